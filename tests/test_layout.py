"""The layout: which modules may import which, which names are public, which commands exist."""

from __future__ import annotations

import argparse
import ast
import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mlx_streamexperts
from mlx_streamexperts._cli import stock_parsers
from mlx_streamexperts._cli.commands import COMMANDS

PACKAGE = Path(mlx_streamexperts.__file__).parent

# A module may import from its own group and from the groups above it in this list. A command may
# import from all of them, but never from another command.
LAYERS = (
    "_errors _lazy _open_files _osinfo _hooks _listeners _closing _progress",
    "_io",
    "_cache",
    "_config",
    "_memory",
    "_distributed",
    "_experts",
    "_loading",
    "_prefixes _structured",
    "_analysis",
    "_cli",
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}
MOVED = {"predict", "trace"}  # modules kept under their old names for imports


def imports(package: Path) -> dict[str, set[str]]:
    """Each module of a package, with those that it imports anywhere in its file."""
    files = {}
    for file in sorted(package.rglob("*.py")):
        *parts, last = file.relative_to(package).with_suffix("").parts
        files[".".join(parts if last == "__init__" else [*parts, last])] = file
    found = {}
    for module, file in files.items():
        folder = module.split(".") if module else []
        if file.name != "__init__.py":
            folder = folder[:-1]
        found[module] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = folder[: len(folder) + 1 - node.level]
                base += node.module.split(".") if node.module else []
                for alias in node.names:
                    name = ".".join([*base, alias.name])
                    found[module].add(name if name in files else ".".join(base))
            elif isinstance(node, ast.Import):  # the package uses relative imports
                assert not any(a.name.startswith("mlx_streamexperts") for a in node.names), file
        found[module] -= {module, ""}
    return found


def faults(graph: dict[str, set[str]]) -> list[str]:
    """Imports that go up the list, from one command to another, or in a circle."""
    top = len(LAYERS)
    bad = []
    for module, used in graph.items():
        if not module:
            continue  # `mlx_streamexperts` itself imports the whole public API
        group = module.partition(".")[0]
        rank = RANKS.get(group, top)
        for other in sorted(used):
            of = other.partition(".")[0]
            if RANKS.get(of, top) > rank:
                bad.append(f"{module} imports {other}, which is later in LAYERS")
            elif RANKS.get(of, top) == rank == top and of != group:
                bad.append(f"{module} imports {other}, another command")
    done: set[str] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            bad.append("a circle: " + " -> ".join((*path[path.index(module) :], module)))
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                follow(other, (*path, module))
            done.add(module)

    for module in sorted(graph):
        follow(module, ())
    return bad


def test_modules_import_only_from_earlier_layers() -> None:
    assert not faults(imports(PACKAGE))


@pytest.mark.parametrize(
    ("module", "line", "complaint"),
    [
        ("_io/reader", "from .._experts.layer import ExpertLayer", "which is later in LAYERS"),
        ("chat", "from .generate import main", "another command"),
        (
            "_cache/policies",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n"
            "    from .expert_map import ExpertCache",
            "a circle: _cache.expert_map -> _cache.policies -> _cache.expert_map",
        ),
        (
            "_io/files",
            "def f():\n    from .._config import StreamConfig",
            "which is later in LAYERS",
        ),
    ],
)
def test_a_planted_fault_is_found(module: str, line: str, complaint: str, tmp_path: Path) -> None:
    for file in PACKAGE.rglob("*.py"):
        copy = tmp_path / file.relative_to(PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(file.read_text())
    planted = tmp_path / f"{module}.py"
    planted.write_text(f"{planted.read_text()}\n{line}\n")
    assert any(complaint in fault for fault in faults(imports(tmp_path)))


def test_dir_shows_only_public_names() -> None:
    importlib.import_module(
        "mlx_streamexperts.generate"
    )  # importing a command must not add it to dir()
    assert sorted(dir(mlx_streamexperts)) == sorted([*mlx_streamexperts.__all__, "__version__"])
    assert all(hasattr(mlx_streamexperts, name) for name in dir(mlx_streamexperts))


def test_only_commands_have_no_underscore() -> None:
    """A path shows whether users may import or run a module: private ones have an underscore."""
    public = {
        path.stem
        for path in PACKAGE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert {p for p in public if not p.startswith("_")} - MOVED == set(COMMANDS)
    for command in COMMANDS:
        folder = PACKAGE / command
        inside = {f.stem for f in folder.glob("*.py")} if folder.is_dir() else set()
        assert all(name.startswith("_") for name in inside)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_main_a_parser_and_a_description(command: str) -> None:
    module = importlib.import_module(f"mlx_streamexperts.{command}")
    assert callable(module.main)
    assert callable(module.setup_arg_parser)
    assert len(COMMANDS[command]) < 75  # fits a line of `streamexperts --help`


def test_command_packages_run_with_python_m() -> None:
    for command in COMMANDS:
        if (PACKAGE / command).is_dir():
            line = [sys.executable, "-W", "error::RuntimeWarning", "-m"]
            line += [f"mlx_streamexperts.{command}", "--help"]
            out = subprocess.run(line, capture_output=True, text=True)
            assert out.returncode == 0, out.stderr
            assert f"usage: python -m mlx_streamexperts.{command} " in out.stdout


_ANSWERS = """
import contextlib, io, sys
from mlx_streamexperts.__main__ import main
sys.argv[0] = "streamexperts"
for command in sys.argv[1:]:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
        main([command, "--help"] if command.isalpha() else [command])
    assert "streamexperts" in said.getvalue(), command
    assert not command.isalpha() or f"usage: streamexperts {command} " in said.getvalue()
    assert "mlx_lm" not in sys.modules and "transformers" not in sys.modules, command
    assert command.isalpha() or "numpy" not in sys.modules, command
"""


def test_help_imports_nothing_that_takes_long() -> None:
    """mlx-lm takes a second, so that no help may import it."""
    line = [sys.executable, "-c", _ANSWERS, "--version", "--help", *COMMANDS]
    out = subprocess.run(line, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr


@pytest.mark.parametrize(
    ("module", "function"),
    [
        ("mlx_lm.generate", "setup_arg_parser"),
        ("mlx_lm.chat", "setup_arg_parser"),
        ("mlx_lm.benchmark", "setup_arg_parser"),
        ("mlx_lm.server", "main"),
    ],
)
def test_parsers_from_the_source_are_mlx_lms_own(
    module: str, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(parser: argparse.ArgumentParser) -> list[tuple[Any, ...]]:
        return [(a.option_strings, a.default, a.choices, a.help) for a in parser._actions]

    ours = stock_parsers.stock_parser(module, function)
    monkeypatch.setattr(stock_parsers, "_namespace", lambda *_: {})  # a source that says nothing
    assert told(ours) == told(stock_parsers.stock_parser(module, function))
    assert importlib.import_module(module).argparse is argparse


def test_imports_of_version_0_1_work() -> None:
    from mlx_streamexperts.predict import NAMED_MACHINES
    from mlx_streamexperts.simulate import simulate
    from mlx_streamexperts.trace import read_trace
    from mlx_streamexperts.tune import Runner, Tuner, Workload, space

    assert NAMED_MACHINES
    assert all(map(callable, (simulate, read_trace, Runner, Tuner, Workload, space)))


@pytest.mark.parametrize("command", ["convert", "doctor", "tune"])
def test_a_command_shows_its_public_names(command: str) -> None:
    module = importlib.import_module(f"mlx_streamexperts.{command}")
    assert dir(module) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing

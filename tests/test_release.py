"""What is released: its types, its bounds, and that its documents keep their word."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

USER = """
import mlx_lm
from mlx_streamexperts import (
    BudgetError, CheckpointError, ExpertReadError, ExpertStream, Plan, StreamConfig, StreamError,
    demo_model, load, patch, plan, stream,
)

def budget(name: str) -> Plan:
    try:
        return plan(name, memory="1GB")
    except BudgetError as e:
        needed: int = e.needed_bytes
        return plan(name, memory=needed)

def run(name: str) -> float:
    model, tokenizer = load(name, cache=10_000_000, config=StreamConfig(progress=False))
    with stream(model) as s:
        streams: ExpertStream = s
        streams.resize("20MB")
        try:
            mlx_lm.generate(model, tokenizer, prompt="x")
        except ExpertReadError as e:
            print(e.layer, e.expert + 1, e.file.name, e.errno)
        except (CheckpointError, StreamError):
            raise
        return streams.stats().cache.hit_rate

with patch(memory="1GB") as patched:
    reveal: list[ExpertStream] = patched.streams
budget(str(demo_model()))
"""


def test_a_users_script_is_typed_strictly(tmp_path: Path) -> None:
    """By the types that the package ships (py.typed)."""
    script = tmp_path / "user.py"
    script.write_text(USER)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n[mypy-mlx_lm.*]\nignore_missing_imports = true\n"
        "[mypy-mlx_streamexperts.*]\nfollow_imports = silent\n"
    )
    pytest.importorskip("mypy", reason="in the dev extra")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from mlx_streamexperts import plan\n\nplan('x', memory=[1]).slots + 'y'\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py", "wrong.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[0] for line in errors] == ["wrong.py", "wrong.py"], done.stdout


def test_what_a_wheel_holds(tmp_path: Path) -> None:
    """Types and the embedded model are in it; nothing of the tests is."""
    builder = pytest.importorskip("hatchling.builders.wheel", reason="in the dev extra")
    wheel = next(iter(builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path))))
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
    sources = {f"mlx_streamexperts/{f.name}" for f in (ROOT / "mlx_streamexperts").glob("*.py")}
    assert sources | {"mlx_streamexperts/py.typed"} <= names
    assert any(n.endswith("data/demo/config.json") for n in names)
    assert all(n.startswith("mlx_streamexperts") for n in names)


def test_bounds_are_those_that_are_tested() -> None:
    """Every dependency has a lower bound; the oldest mlx-lm is run by the workflow."""
    assert all(">=" in d for d in PROJECT["dependencies"])
    lowest = next(d for d in PROJECT["dependencies"] if d.startswith("mlx-lm"))
    oldest = re.search(r">=([\d.]+)", lowest)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert oldest is not None and f'"=={oldest[1]}"' in workflow
    python = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python {python} or newer" in (ROOT / "docs" / "guide.md").read_text()
    assert f'python: "{python}"' in workflow


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    named = re.findall(r"`(test_\w+)\.py::(\w+)`", text)
    assert len(named) > 40
    known: dict[str, set[str]] = {}
    for file, test in named:
        if file not in known:
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
            known[file] = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert test in known[file], f"{file}.py has no {test}"

"""What the documentation says is so: snippets run, links lead somewhere, nothing is left out."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path

import huggingface_hub.constants
import mlx.core
import mlx_lm
import originals
import pytest
from snippets import (
    ROOT,
    Page,
    Snippet,
    anchors,
    commands,
    inline_code,
    links,
    python,
    snippets,
)

import mlx_streamexperts
from mlx_streamexperts import StreamConfig, StreamStats, demo_model
from mlx_streamexperts import _errors as errors
from mlx_streamexperts._cache.expert_map import CacheStats
from mlx_streamexperts._experts.slots import PrefetchStats
from mlx_streamexperts._experts.speculative.runahead import RunAheadStats
from mlx_streamexperts._io.reader import ReadStats
from mlx_streamexperts.doctor import _examination as examination
from mlx_streamexperts.doctor import _selfchecks as selfchecks

RUN = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
"""Pages whose snippets run. Those of other pages are for other machines: only checked."""

CHECKED = [
    *sorted((ROOT / "benchmarks").glob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
]
MEASURED = {
    what: functools.cache(getattr(examination, what))
    for what in ("memory_rate", "sync_seconds", "layer_seconds")
}
"""What `doctor` measures, once for all snippets."""

GUIDE = ROOT / "docs" / "guide.md"


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", [f for f in RUN if snippets(f)], ids=name)
def test_snippets_run(
    file: Path,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = originals.write(
        checkpoint("qwen3_moe", quantize=None), tmp_path / "original", originals.single
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for what, measured in MEASURED.items():
        monkeypatch.setattr(examination, what, measured)
    # A minute of `doctor --selftest`; test_selftest.py and the tests of exactness test more.
    effort = replace(
        selfchecks.EFFORT,
        steps=4, shares=(0.25,), schedules=1, prompt=24, rounds=3, ranges=5,
    )  # fmt: skip
    monkeypatch.setattr(selfchecks, "EFFORT", effort)
    copy = Path(shutil.copytree(demo_model(), tmp_path / "a copy"))
    page = Page({"demo": demo_model(), "copy": copy, "original": original})
    try:
        for snippet in snippets(file):
            page.run(snippet)
    finally:
        page.leave_section()


@pytest.mark.parametrize("file", [f for f in CHECKED if snippets(f)], ids=name)
def test_snippets_of_other_pages_name_what_there_is(file: Path) -> None:
    """Scripts and their options."""
    for snippet in snippets(file):
        for words in commands(snippet.text) if snippet.language in ("bash", "sh") else ():
            if Path(words[0]).name.startswith("python"):
                folder = file.parent if (file.parent / words[1]).is_file() else ROOT
                script = [str(folder / words[1])] if words[1] != "-m" else ["-m"]
                python([*script, *words[2:]], run=False)


@pytest.mark.parametrize("file", [*RUN, *CHECKED], ids=name)
def test_links_lead_somewhere(file: Path) -> None:
    for link in links(file):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (file.parent / path).resolve() if path else file
        assert target.exists(), f"{name(file)}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{name(file)}: {link}"
        assert target.is_relative_to(ROOT), f"{name(file)}: {link}"


def test_commands_and_options_named_in_the_text_are_there() -> None:
    """In the prose and its tables, outside of blocks: nothing runs these."""
    known = set()
    for module in pkgutil.iter_modules(mlx_streamexperts.__path__, "mlx_streamexperts."):
        make = getattr(importlib.import_module(module.name), "setup_arg_parser", None)
        if make is not None:
            known |= {o for action in make()._actions for o in action.option_strings}
    packages = [Path(p.__file__).parent for p in (mlx_lm, mlx.core)]
    for folder in (ROOT / "benchmarks", ROOT / "examples", *packages):
        for file in folder.rglob("*.py"):
            known |= set(re.findall(r'"(--[\w-]+)"', file.read_text()))
    unknown = []
    for file in RUN:
        for text in inline_code(file):
            words = text.split()
            unknown += [(name(file), w) for w in words if w.startswith("--") and w not in known]
            program = words[2] if words[:2] == ["python", "-m"] and words[2:] else "sys"
            placeholder = program.rpartition(".")[2].isupper()
            if not placeholder and importlib.util.find_spec(program) is None:
                unknown.append((name(file), program))
    assert not unknown


def test_modules_and_members_that_the_pages_name_exist() -> None:
    """Paths such as `_io/reader.py`, and members such as `Bank.free`."""
    package = Path(mlx_streamexperts.__file__).parent
    paths = [f"/{f.relative_to(ROOT)}" for f in ROOT.rglob("*.py") if ".venv" not in f.parts]
    classes: dict[str, str] = {}
    for file in package.rglob("*.py"):
        text = file.read_text()
        for start in re.finditer(r"^class (\w+)", text, re.M):
            classes[start[1]] = re.split(r"^(?=\w)", text[start.end() :], maxsplit=1, flags=re.M)[0]
    wrong = []
    for page in [*RUN, *CHECKED]:
        if page.name == "CHANGELOG.md":  # names of its time
            continue
        for text in inline_code(page):
            if re.fullmatch(r"[a-z_][\w/]*/[a-z_]\w*\.py", text):
                if not any(p.endswith("/" + text) for p in paths):
                    wrong.append((name(page), text))
            elif member := re.fullmatch(r"([A-Z]\w*[a-z]\w*)\.(\w+)(\(.*\))?", text):
                body = classes.get(member[1], "")
                if not re.search(rf"\b{member[2]}\b", body):
                    wrong.append((name(page), text))
    assert not wrong


def test_the_readme_opens_with_the_two_commands() -> None:
    """Install and stream; install and test, which is what continuous integration runs."""
    first, second = snippets(ROOT / "README.md")[:2]
    for block, what in ((first, "-m mlx_streamexperts.generate"), (second, "-m pytest")):
        assert block.text.count("\n") == 1
        assert re.search(rf"pip install .* && .* {what}", block.text)


def test_indices_are_complete() -> None:
    for index, members in (
        (ROOT / "docs" / "README.md", (ROOT / "docs").glob("*.md")),
        (ROOT / "examples" / "README.md", (ROOT / "examples").glob("*.py")),
    ):
        listed = {(index.parent / link.partition("#")[0]).resolve() for link in links(index)}
        missing = {m.name for m in members} - {m.name for m in listed} - {"README.md"}
        assert not missing, f"{name(index)} does not list {missing}"


def test_every_statistic_is_explained() -> None:
    """A row of the guide's table for each field, those of the parts with the part's name."""
    parts = {
        "cache": CacheStats,
        "read": ReadStats,
        "prefetch": PrefetchStats,
        "run_ahead": RunAheadStats,
    }
    wanted = [f.name for f in fields(StreamStats) if f.name not in parts]
    wanted += [f"{part}.{f.name}" for part, kind in parts.items() for f in fields(kind)]
    text = GUIDE.read_text()
    missing = [w for w in wanted if not re.search(rf"^\| [^|]*`{re.escape(w)}`", text, re.M)]
    assert not missing


def test_every_option_is_in_the_guide() -> None:
    text = GUIDE.read_text()
    missing = [f.name for f in fields(StreamConfig) if not re.search(rf"`{f.name}\b", text)]
    assert not missing


def test_every_error_has_a_way_out() -> None:
    text = GUIDE.read_text()
    kinds = [n for n, k in vars(errors).items() if inspect.isclass(k) and issubclass(k, Exception)]
    assert len(kinds) > 4
    missing = [k for k in kinds if not re.search(rf"^\| `{k}` \|", text, re.M)]
    assert not missing


def test_the_reference_is_what_the_docstrings_say() -> None:
    file = ROOT / "docs" / "make_api.py"
    spec = importlib.util.spec_from_file_location("make_api", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "stale: run python docs/make_api.py"


@pytest.mark.parametrize(
    ("language", "info", "text"),
    [
        ("bash", "", "python -m mlx_streamexperts.generate --no-such-option"),
        ("bash", "", "python -m mlx_streamexperts.no_such_command"),
        ("bash", "", "python benchmarks/store.py --no-such-option"),
        ("bash", "", "python examples/no_such_script.py"),
        ("bash", "", "true && no-such-program"),
        ("bash", "", "pip install '.[no_such_extra]'"),
        ("bash", "", "curl localhost -d '{not JSON}'"),
        ("bash", "", "mlx.launch --hostfile h.json -m mlx_streamexperts.generate --no-such-option"),
        ("bash", "", "python -m mlx_streamexperts.doctor --model mlx-community/not-in-the-table"),
        ("python", "", "from mlx_streamexperts import no_such_name"),
        ("python", "", "from mlx_streamexperts import load\nload('no/stand-in', cache='1GB')"),
        ("text", "output", "nothing printed this"),
        ("json", "", "{not JSON}"),
        ("no-such-language", "", ""),
    ],
)
def test_what_is_wrong_in_a_snippet_is_found(
    language: str, info: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    snippet = Snippet(ROOT / "README.md", 1, 0, language, info, text)
    with pytest.raises((AssertionError, ImportError, ValueError)):
        Page({}).run(snippet)


def test_stand_ins_take_the_place_of_models_with_budgets_in_proportion() -> None:
    page = Page({"demo": demo_model(), "copy": demo_model()})
    text = 'from mlx_streamexperts import plan\np = plan("mlx-community/Kimi-K2.5", memory="96GB")'
    page.run(Snippet(ROOT / "README.md", 1, 0, "python", "", text))
    assert page.namespace["p"].memory == 96_000_000
    assert 0 < page.namespace["p"].resident_share < 1


def test_a_section_does_not_see_what_the_one_before_had() -> None:
    page = Page({})
    page.run(Snippet(ROOT / "README.md", 1, 1, "python", "", "x = 1"))
    page.run(Snippet(ROOT / "README.md", 3, 1, "python", "", "print(x)"))
    page.run(Snippet(ROOT / "README.md", 5, 1, "text", "output", "1"))
    with pytest.raises(NameError):
        page.run(Snippet(ROOT / "README.md", 7, 2, "python", "", "print(x)"))


def test_shell_blocks_are_taken_apart_as_a_shell_does() -> None:
    text = "# why\nA=1 one 'a b' \\\n  c  # what\ntwo > file | three 2,3 && four &\n"
    assert list(commands(text)) == [["one", "a b", "c"], ["two"], ["three", "2,3"], ["four"]]

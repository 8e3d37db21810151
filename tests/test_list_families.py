"""docs/models.md says what `benchmarks/list_families.py` finds, and an unknown family fails."""

from __future__ import annotations

import importlib.util
import re
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: it is the extra `vlm`")

# Modules that families take their layers from, and that no config.json names.
PARTS = {"mlx-lm": {"bailing_moe_v3"}, "mlx-vlm": {"lfm2", "mistral4"}}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = ROOT / "benchmarks" / "list_families.py"
    spec = importlib.util.spec_from_file_location("list_families", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["list_families"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def page(script: ModuleType) -> str:
    """The generated part of the page; skips if it is of other versions than those installed."""
    text = script.PAGE.read_text().partition(script.BEGIN)[2].partition(script.END)[0]
    for library in script.LIBRARIES:
        if f"{library} {metadata.version(library)}" not in text:
            pytest.skip(f"the page is not of {library} {metadata.version(library)}")
    return text


def _rows(page: str) -> dict[str, list[str]]:
    cells = [
        [c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines() if "| `" in line
    ]
    return {row[0].split("`")[1]: row[2:] for row in cells}


def test_the_page_has_every_family_with_a_tiny_checkpoint(script: ModuleType, page: str) -> None:
    rows = _rows(page)
    for column, library in enumerate(script.LIBRARIES):
        listed = {name for name, cells in rows.items() if cells[column] != "no"}
        assert {n.lower() for n in script.configurations(library).values()} <= listed
        missing = {n.lower() for n in script.with_experts(library)} - listed
        assert missing <= PARTS[library]


@pytest.mark.parametrize(
    ("library", "names"),
    [
        ("mlx-lm", {"dbrx", "gpt_oss", "qwen3_vl_moe"}),
        ("mlx-vlm", {"glm5_next", "mixtral", "moondream3", "qwen3_5_moe"}),
    ],
)
def test_the_page_says_of_a_family_what_loading_it_does(
    library: str, names: set[str], script: ModuleType, page: str
) -> None:
    rows, column = _rows(page), script.LIBRARIES.index(library)
    found = script.survey(library, names)
    assert found.keys() == names
    for name, family in found.items():
        assert rows[name][column].split(" ")[0] == family.status
        if library == "mlx-vlm" and family.status == script.STREAMS:
            assert rows[name][2] == ("yes" if family.pictures else "no")
        if family.status == script.REFUSED:
            number = re.search(r"\[(\d+)\]", rows[name][column])
            assert number is not None
            assert f"\n{number[1]}. {family.why[0].upper()}{family.why[1:]}." in page


def test_an_unknown_family_fails(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {"qwen3_moe": script.lm.FAMILIES["qwen3_moe"]}
    monkeypatch.setattr(script.lm, "FAMILIES", known)
    monkeypatch.setattr(script, "LIBRARIES", ("mlx-lm",))
    families = {"qwen3_moe", "mixtral"}
    monkeypatch.setattr(script, "with_experts", lambda _: families)
    monkeypatch.setattr(script.lm, "NOT_BUILT", {})
    monkeypatch.setattr(script.lm, "METAL_FAMILIES", {})
    assert script.main([]) == 1
    out = capsys.readouterr()
    assert "unknown: mlx-lm mixtral" in out.err
    assert re.search(r"qwen3_moe +streams \(SwitchGLU\)", out.out)
    families.discard("mixtral")
    assert script.main([]) == 0

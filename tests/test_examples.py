"""The examples run as they are, on the embedded model, and do what they say."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import mlx.core as mx
import mlx_lm
import pytest
from conftest import remove_patches
from snippets import ROOT

from mlx_streamexperts import demo_model
from mlx_streamexperts._loading import patching

EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    remove_patches()
    gc.collect()
    mx.clear_cache()


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name))["main"]


def test_script(capsys: pytest.CaptureFixture[str]) -> None:
    main = main_of("script.py")
    assert main(["--prompt", "And God said", "--max-tokens", "8"]) == 0
    out, err = capsys.readouterr()
    model, tokenizer = mlx_lm.load(str(demo_model()))
    assert out.strip() == mlx_lm.generate(model, tokenizer, "And God said", max_tokens=8).strip()
    assert "resident" in err
    assert main(["--model", str(demo_model()), "--memory", "1MB"]) == 1
    assert "too small" in capsys.readouterr().err


def test_existing_pipeline_prints_the_same_without_the_marked_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two lines are marked; what is left is plain mlx-lm."""
    lines = (EXAMPLES / "existing_pipeline.py").read_text().splitlines()
    plain = [line for line in lines if "<-- added" not in line]
    assert len(lines) - len(plain) == 2
    monkeypatch.setattr("sys.argv", ["existing_pipeline.py", str(demo_model())])
    printed = []
    for text in (lines, plain):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n".join(text), "pipeline", "exec"), {"__name__": "__main__"})
        printed.append(out.getvalue())
        streams = [s for installed in patching._installed for s in installed.streams]
        assert [s.stats().cache.misses > 0 for s in streams] == ([True] if text is lines else [])
        remove_patches()
    assert printed[0] == printed[1]
    assert printed[0].count("\n") == 3


def test_batch_job_goes_on_after_an_interruption(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = ["In the beginning", "And God said", "def main(", "fn", "Chapter 1"]
    job = "".join(json.dumps({"id": f"p{i}", "prompt": p}) + "\n" for i, p in enumerate(prompts))
    Path("in.jsonl").write_text(job)
    main = main_of("batch_job.py")
    arguments = ["in.jsonl", "out.jsonl", "--batch", "2", "--max-tokens", "5"]
    assert main(arguments) == 0
    whole = Path("out.jsonl").read_text()
    results = [json.loads(line) for line in whole.splitlines()]
    assert [r["id"] for r in results] == ["p0", "p1", "p2", "p3", "p4"]
    assert all(r["text"] and r["tokens"] == 5 for r in results)
    assert main(arguments) == 1, "an answer is never overwritten"

    # Killed while it wrote the third answer.
    lines = whole.splitlines(keepends=True)
    Path("out.jsonl").unlink()
    Path("out.jsonl.partial").write_text("".join(lines[:2]) + lines[2][:20])
    capsys.readouterr()
    assert main(arguments) == 0
    assert "2 answered before, 3 to do" in capsys.readouterr().err
    again = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [r["id"] for r in again] == [r["id"] for r in results]
    assert again[:2] == results[:2]
    assert not Path("out.jsonl.partial").exists()

    Path("out.jsonl").rename("out.jsonl.partial")
    with pytest.raises(SystemExit, match="begun with"):
        main([*arguments, "--model", "another"])


def test_routing_walkthrough(capsys: pytest.CaptureFixture[str]) -> None:
    backend = matplotlib.get_backend()
    cells = runpy.run_path(str(EXAMPLES / "routing_walkthrough.py"))
    matplotlib.use(backend)
    assert "% replayed" in capsys.readouterr().out
    for picture in ("reuse.svg", "rates.svg"):
        assert Path(picture).read_text().rstrip().endswith("</svg>")
    # Distances of a hand-made case: 1 2 | 1 3 | 2 1
    distances = cells["reuse_distances"]
    assert distances(cells["np"].array([[1, 2], [1, 3], [2, 1]])) == [None, None, 1, None, 2, 1]

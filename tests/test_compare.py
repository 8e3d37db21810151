"""benchmarks/compare.py: equal work, equal slots, and failures that are rows."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import compare
import compare_report as report


def job(folder: Path, **changes: Any) -> dict[str, Any]:
    layers, _, expert_bytes, _ = compare.expert_layout(folder)
    return {
        "checkpoint": str(folder), "layers": layers, "state": "cold", "slots": 2, "options": {},
        "cache_bytes": layers * 2 * expert_bytes, "prompt": [1, 2, 3, 4, 5],
        "continuation": [6, 7, 8], "store": None, **changes,
    }  # fmt: skip


@pytest.fixture(scope="module")
def stock(checkpoint: Callable[..., Path]) -> dict[str, Any]:
    return compare.call(sys.executable, "stock", job(checkpoint("qwen3_moe")), 100)


def test_ours_and_stock_do_the_same_work(
    checkpoint: Callable[..., Path], stock: dict[str, Any]
) -> None:
    folder = checkpoint("qwen3_moe")
    ours = compare.call(sys.executable, "ours", job(folder), 100)
    assert stock["outputs"] == ours["outputs"] and len(ours["outputs"]) == 4
    assert stock["slot_bytes"] is None
    assert ours["slot_bytes"] == job(folder)["cache_bytes"]
    assert len(ours["step_seconds"]) == 3 and ours["counters"]["misses"] > 0


def test_ours_reads_from_all_mirrors(
    checkpoint: Callable[..., Path], stock: dict[str, Any], tmp_path: Path
) -> None:
    folder = checkpoint("qwen3_moe")
    args = argparse.Namespace(
        work=tmp_path, mirrors=[tmp_path / "1", tmp_path / "2"], models=[], timeout=100
    )
    (system,) = [s for s in compare.SYSTEMS if s.mirrored]
    assert compare.prepare(args, [system], folder, 1)[1] == {}
    copies = compare.mirrors_of(args, folder)
    mirrored = job(folder, options={"mirrors": copies})
    ours = compare.call(sys.executable, "ours", mirrored, 100)
    assert ours["outputs"] == stock["outputs"]
    assert list(ours["counters"]["drive_bytes"]) == [str(folder), *copies]


def test_mlx_vlms_offload_does_the_same_work(
    checkpoint: Callable[..., Path], stock: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("mlx_vlm.moe_offload", reason="mlx-vlm is not installed: extra `vlm`")
    folder = checkpoint("qwen3_moe")
    there = job(folder, store=str(tmp_path))
    packed = compare.call(sys.executable, "mlx_vlm", there | {"pack": True}, 100)
    assert packed["pack_seconds"] > 0
    theirs = compare.call(sys.executable, "mlx_vlm", there, 100)
    assert theirs["slot_bytes"] <= there["cache_bytes"]
    assert theirs["counters"]["misses"] > 0
    assert [x[0] for x in theirs["outputs"]] == [x[0] for x in stock["outputs"]]


def test_a_crash_and_a_silence_are_results(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    too_small = compare.call(sys.executable, "ours", job(folder, cache_bytes=2000), 100)
    assert "BudgetError" in too_small["failed"]
    assert "exit status" in compare.call(sys.executable, "no_such_adapter", {}, 100)["failed"]
    assert "no answer" in compare.call(sys.executable, "stock", job(folder), 0.01)["failed"]


def run(system: str, round_number: int, speed: float | None, **more: Any) -> dict[str, Any]:
    where = {
        "model": "m", "prompt_tokens": 8, "state": "cold", "share": 0.25, "system": system,
        "round": round_number,
    }  # fmt: skip
    if speed is None:
        return where | {"failed": "it | broke"}
    return where | {
        "decode_tokens_per_s": speed, "prefill_tokens_per_s": 10 * speed, "load_seconds": 1.0,
        "step_seconds": [1.0], "decode_read_bytes": 5,
        "decode_cpu_seconds": 1.0, "peak_rss_bytes": 1e9,
        "peak_mlx_bytes": 1e9, "slot_bytes": 7, "outputs": [[1, 2], [3, 4]], **more,
    }  # fmt: skip


def test_tables_say_where_we_lose_and_who_failed() -> None:
    runs = [run("stock", i, s) for i, s in enumerate((10, 20))]
    runs += [run("ours", i, s) for i, s in enumerate((4, 8))]
    runs += [run("fast", i, s, outputs=[[1, 9], [5, 4]]) for i, s in enumerate((8, 16))]
    runs += [run("slow", i, s) for i, s in enumerate((1, 2))] + [run("broken", 0, None)]
    data = {
        "machine": "a", "versions": {}, "rivals": [], "date": "b", "decode_tokens": 1,
        "ours": ["ours"], "runs": runs,
        "models": {"m": {"layers": 1, "experts": 4, "expert_bytes": 1, "top_k": 1,
                         "all_expert_bytes": 4}},
    }  # fmt: skip
    text = report.markdown(json.loads(json.dumps(data)))
    (row,) = [x for x in text.splitlines() if "12.0 fast" in x]
    assert "| **0.50** | **0.50** | 0.40 |" in row  # the best rival, and stock, round by round
    assert "it / broke" in text
    (fast,) = [x for x in text.splitlines() if "| fast |" in x]
    assert "2/4, bits 2/4" in fast

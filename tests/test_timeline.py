"""A timeline says where time goes, and changes nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import families
import mlx.core as mx
import pytest
from conftest import QUIET, all_experts, load_streamed, smallest_cache

from mlx_streamexperts import stream
from mlx_streamexperts._experts.timeline import PHASES

TOKENS = families.token_stream(families.VOCAB, 20, seed=2)


def test_a_timeline_has_every_phase_and_every_read(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40, QUIET)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        with expert_stream.timeline(tmp_path / "timeline.json"):
            mx.eval(model(mx.array([[1]])))
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert {e["name"] for e in events if e["ph"] == "X"} == {*PHASES, "read"}


def test_spans_are_the_steps_in_order(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40, QUIET)
    with stream(model) as expert_stream:
        expert_stream.resize(all_experts(expert_stream) // 2)
        file = tmp_path / "timeline.json"
        with expert_stream.timeline(file) as timeline:
            families.run(model, TOKENS, 4)
            summary = timeline.summary()
            assert not file.exists(), "appears only when it is complete"
        stats = expert_stream.stats()
        assert [p.name for p in tmp_path.iterdir()] == ["timeline.json"]
        events = json.loads(file.read_text())["traceEvents"]
        names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
        spans = [e for e in events if e["ph"] == "X"]
        layers = [e for e in spans if names[e["tid"]] == "layers"]
        reads = [e for e in spans if names[e["tid"]] != "layers"]
        assert {e["name"] for e in layers} == set(PHASES)
        assert {e["args"]["layer"] for e in layers} == {x.name for x in expert_stream.layers}
        assert 0 < len(reads) <= stats.read.reads
        assert sum(e["args"]["bytes"] for e in reads) == stats.read.bytes
        ends = [e["ts"] + e["dur"] for e in layers]
        starts = [e["ts"] for e in layers]
        # Phases follow one another: a host thread does one thing at a time.
        assert all(b >= a - 1e-3 for a, b in zip(ends, starts[1:], strict=False))
        for phase in PHASES:
            told = sum(e["dur"] for e in layers if e["name"] == phase) / 1e6
            assert told == pytest.approx(summary[phase], abs=1e-6)
            assert told == pytest.approx(stats.seconds[phase], abs=1e-6)
        assert sum(summary[p] for p in PHASES) <= summary["elapsed"]
        before = file.read_text()
        families.run(model, TOKENS, 4)
        assert file.read_text() == before


def test_a_timeline_that_cannot_be_written_is_known_at_once(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40, QUIET)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        with pytest.raises(OSError, match=r"No such"):
            expert_stream.timeline(tmp_path / "no" / "such" / "folder.json")
        families.run(model, TOKENS, 4)

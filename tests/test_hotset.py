"""Hot sets: what was cached is cached again, results are the same bits, others are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import mlx.nn as nn
import numpy as np
import pytest
from conftest import QUIET, assert_same, load_streamed

from mlx_streamexperts import CheckpointError, ExpertStream, StreamError, plan, stream
from mlx_streamexperts._analysis.replay import replay_routing
from mlx_streamexperts._experts.packed_store import write_store
from mlx_streamexperts._experts.trace import read_trace

TOKENS = families.token_stream(families.VOCAB, 30, seed=4)


def at_share(folder: Path, share: float, **options: Any) -> tuple[nn.Module, ExpertStream]:
    whole = plan(folder, cache="1GB", config=QUIET).experts
    model = load_streamed(folder, int(share * whole), replace(QUIET, **options))
    return model, stream(model)


def residents(expert_stream: ExpertStream) -> list[list[int]]:
    return [x.cache.resident for x in expert_stream.layers]


@pytest.fixture
def saved(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A hot set of a session with half of the experts in cache."""
    model, expert_stream = at_share(checkpoint("qwen3_moe"), 0.5)
    with expert_stream:
        families.run(model, TOKENS, 20)
        expert_stream.save_hot_set(tmp_path / "hot.json")
    return tmp_path / "hot.json"


def test_a_load_with_a_hot_set_starts_with_those_experts(
    saved: Path, checkpoint: Callable[..., Path]
) -> None:
    hot = [x["experts"] for x in json.loads(saved.read_text())["layers"]]
    _, expert_stream = at_share(checkpoint("qwen3_moe"), 0.5, hot_set=str(saved))
    with expert_stream:
        assert residents(expert_stream) == hot
        assert expert_stream.stats().cache.misses == 0  # loading is not a miss


@pytest.mark.parametrize("policy", ["lru", "lrfu", "s3fifo"])
def test_what_was_cached_is_cached_again_and_changes_no_bit(
    policy: str, saved: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model, expert_stream = at_share(checkpoint("qwen3_moe"), 0.5, policy=policy)
    with expert_stream:
        expected = families.run(model, TOKENS, 20)
        cold = expert_stream.stats().cache
    model, expert_stream = at_share(checkpoint("qwen3_moe"), 0.5, policy=policy, hot_set=str(saved))
    with expert_stream:
        hot = [x["experts"] for x in json.loads(saved.read_text())["layers"]]
        assert residents(expert_stream) == hot
        assert max(map(len, hot)) > 0
        before = expert_stream.stats()
        assert (before.cache.misses, before.read.bytes) == (0, 0)  # loading is not a miss
        with expert_stream.trace(tmp_path / "trace.jsonl"):
            assert_same(expected, families.run(model, TOKENS, 20), "with a hot set")
        warm = expert_stream.stats().cache
        live = [x.cache.stats for x in expert_stream.layers]
        slots = [x.cache.slots for x in expert_stream.layers]
    assert warm.misses < cold.misses
    assert warm.compulsory < cold.compulsory
    layers = replay_routing(read_trace(tmp_path / "trace.jsonl"), slots, policy, hot)
    assert [x.stats for x in layers] == live


@pytest.mark.parametrize("share", [0.25, 0.8, 1.0])
def test_a_cache_of_another_size_takes_what_fits(
    share: float, saved: Path, checkpoint: Callable[..., Path]
) -> None:
    hot = [x["experts"] for x in json.loads(saved.read_text())["layers"]]
    _, expert_stream = at_share(checkpoint("qwen3_moe"), share, hot_set=str(saved))
    with expert_stream:
        for layer, experts in zip(expert_stream.layers, hot, strict=True):
            if share == 1:
                assert layer.resident
            else:
                assert layer.cache.resident == experts[: layer.cache.slots]


def test_a_packed_store_is_the_same_checkpoint(
    saved: Path, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("xxhash")
    _, expert_stream = at_share(checkpoint("qwen3_moe"), 0.5)
    with expert_stream:
        for _ in write_store(expert_stream.layers, tmp_path / "store"):
            pass
    _, packed = at_share(
        checkpoint("qwen3_moe"), 0.5, store=str(tmp_path / "store"), hot_set=str(saved)
    )
    with packed:
        assert sum(map(len, residents(packed))) > 0


def test_a_hot_set_of_other_weights_is_refused(
    saved: Path, checkpoint: Callable[..., Path]
) -> None:
    """Of the same shape, like a fine-tune's; of another family too."""
    for other in (checkpoint("qwen3_moe", seed=99), checkpoint("mixtral")):
        with pytest.raises(CheckpointError, match=r"hot\.json.*another checkpoint"):
            at_share(other, 0.5, hot_set=str(saved))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 0}, "not a hot set"),
        ({"layers": {}}, "not a hot set"),
        ({"layers": []}, "another checkpoint"),
        ({"layers": [{"experts": [1, 1]}]}, "is damaged"),
        ({"layers": [{"experts": [-1]}]}, "is damaged"),
        ({"layers": [{"experts": [1 << 40]}]}, "is damaged"),
        ({"layers": [{"experts": [True]}]}, "is damaged"),
        ({"layers": [{"experts": None}]}, "is damaged"),
        ({"layers": [{"name": "other"}]}, "is damaged"),
        ({"layers": [3]}, "is damaged"),
    ],
)
def test_what_is_no_hot_set_is_refused(
    change: dict[str, Any], message: str, saved: Path, checkpoint: Callable[..., Path]
) -> None:
    content = json.loads(saved.read_text())
    for key, value in change.items():
        if isinstance(value, list) and value:
            first = value[0]
            rest = content["layers"][1:]
            value = [content["layers"][0] | first if isinstance(first, dict) else first, *rest]
        content[key] = value
    saved.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        at_share(checkpoint("qwen3_moe"), 0.5, hot_set=str(saved))
    saved.write_text("nonsense")
    with pytest.raises(CheckpointError, match="JSON"):
        at_share(checkpoint("qwen3_moe"), 0.5, hot_set=str(saved))


def test_a_missing_hot_set_is_named_and_a_closed_stream_saves_none(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"missing\.json"):
        at_share(checkpoint("qwen3_moe"), 0.5, hot_set=str(tmp_path / "missing.json"))
    model, expert_stream = at_share(checkpoint("qwen3_moe"), 0.5)
    first = families.run(model, TOKENS, 20)  # the refusal left nothing behind
    assert np.isfinite(first[0]).all()
    expert_stream.close()
    with pytest.raises(StreamError, match="closed"):
        expert_stream.save_hot_set(tmp_path / "hot.json")
    assert not list(tmp_path.iterdir())

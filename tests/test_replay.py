"""Replayed routing counts as the live cache does; the optimum is what exhaustive search finds."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, demo_texts, load_streamed
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import demo_model, stream
from mlx_streamexperts._analysis.replay import (
    BEST,
    best_layer,
    replay,
    replay_layer,
    replay_routing,
    total,
)
from mlx_streamexperts._cache.policies import POLICIES
from mlx_streamexperts._experts.trace import read_trace


def test_a_replay_counts_hits_and_misses() -> None:
    calls = [np.array([[expert]]) for expert in (0, 1, 0, 2, 1)]  # one token each, top-1
    lru = replay_layer(calls, experts=4, slots=2, policy="lru")
    assert lru.stats.hits == 1  # 0, when it comes again
    assert lru.stats.compulsory == 3  # 0, 1 and 2, the first time
    assert lru.stats.capacity == 1  # 1, which 2 evicted
    assert lru.tokens == 5 and lru.decode_hit_rate == pytest.approx(1 / 5)
    assert best_layer(calls, 4, 2).stats.capacity == 0  # the optimum evicts 0 instead
    assert replay_layer(calls, 4, 2, hot=[0, 1]).stats.hits == 3  # both were read beforehand


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("slots", [2, 5, 16, 40])
def test_counts_equal_the_live_cache_on_the_shipped_model(
    policy: str, slots: int, tmp_path: Path
) -> None:
    """With 2 and 5 slots even one token's eight experts pass in waves; with 16 the prompt's do."""
    folder = demo_model()
    tokenizer = mlx_lm.utils.load_tokenizer(folder)
    texts = demo_texts()
    model = load_streamed(folder, 1 << 40, replace(QUIET, policy=policy))
    with stream(model) as expert_stream:
        expert_stream.resize(slots * sum(n.expert_bytes for n in expert_stream.needs()))
        expert_stream.reset()
        with expert_stream.trace(tmp_path / "trace.jsonl"):
            for text in texts[:4:3]:
                tokens, cache = tokenizer.encode(text), make_prompt_cache(model)
                mx.eval(model(mx.array(tokens)[None], cache=cache))
                for t in (tokens * 2)[:10]:
                    mx.eval(model(mx.array([[t]]), cache=cache))
        live = [x.cache.stats for x in expert_stream.layers]
        assert (expert_stream.stats().waves > 0) == (slots < 40)
        assert min(x.misses for x in live) > 0
    assert [x.cache.slots for x in expert_stream.layers] == [slots] * len(live)
    routing = read_trace(tmp_path / "trace.jsonl")
    layers = replay_routing(routing, [slots] * len(live), policy)
    assert [x.stats for x in layers] == live
    assert replay(tmp_path / "trace.jsonl", [slots] * len(live), policy)[1] == live
    for layer in layers:  # decode and prompts apart, together everything
        assert layer.tokens == 20
        assert layer.missed + layer.prompt_missed == layer.stats.misses
    best = replay_routing(routing, [slots] * len(live), BEST)
    for optimum, layer in zip(best, layers, strict=True):
        assert optimum.stats.compulsory == layer.stats.compulsory
        assert optimum.stats.capacity <= layer.stats.capacity
    assert routing.model["top_k"] == 8


def fewest_misses(needs: Sequence[Sequence[int]], experts: int, slots: int) -> int:
    """Every choice of what to keep after every call, tried."""

    @functools.cache
    def from_here(i: int, resident: frozenset[int]) -> int:
        if i == len(needs):
            return 0
        needed = set(needs[i])
        inside = resident | needed
        free = sorted(inside - needed)
        kept = min(len(free), slots - len(needed))
        return len(needed - resident) + min(
            from_here(i + 1, frozenset(needed.union(keep)))
            for keep in itertools.combinations(free, kept)
        )

    return from_here(0, frozenset())


@settings(max_examples=80, deadline=None)
@given(
    slots=st.integers(2, 4),
    needs=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=2, unique=True), max_size=12),
)
def test_the_optimum_is_the_fewest_misses(slots: int, needs: list[list[int]]) -> None:
    calls = [np.array([n]) for n in needs]
    best = best_layer(calls, 7, slots)
    assert best.stats.misses == fewest_misses(needs, 7, slots)
    assert best.stats.compulsory == len({e for n in needs for e in n})
    assert best.stats.hits + best.stats.misses == sum(map(len, needs))


@settings(max_examples=60, deadline=None)
@given(
    slots=st.integers(1, 12),
    prompts=st.lists(
        st.lists(st.lists(st.integers(0, 9), min_size=2, max_size=2), min_size=1, max_size=6),
        max_size=25,
    ),
)
def test_no_policy_beats_the_optimum(slots: int, prompts: list[list[list[int]]]) -> None:
    """Waves included."""
    calls = [np.array(rows) for rows in prompts]
    best = best_layer(calls, 10, slots)
    for policy in POLICIES:
        got = replay_layer(calls, 10, slots, policy)
        assert best.stats.misses <= got.stats.misses
        assert best.stats.compulsory == got.stats.compulsory
        assert best.stats.hits + best.stats.misses == got.stats.hits + got.stats.misses


def test_experts_read_beforehand_are_no_misses() -> None:
    calls = [np.array([[0, 1]]), np.array([[2, 3]]), np.array([[4, 5], [4, 0]])]
    cold = replay_layer(calls, 8, 4)
    assert (cold.stats.hits, cold.stats.compulsory, cold.stats.capacity) == (1, 6, 0)
    assert (cold.tokens, cold.needed, cold.missed, cold.prompt_missed) == (2, 4, 4, 2)
    warm = replay_layer(calls, 8, 4, hot=[1, 2, 5, 0, 3])  # as many as there are slots
    assert (warm.stats.hits, warm.stats.compulsory, warm.stats.capacity) == (4, 2, 1)
    both = total([cold, warm])
    assert (both.tokens, both.stats.hits, both.stats.misses) == (4, 5, 9)
    assert both.decode_hit_rate == 1 - 5 / 8

"""Prefetching changes when bytes come, never the bits that a model gives."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from conftest import (
    QUIET,
    all_experts,
    assert_same,
    demo_tokens,
    load_streamed,
    smallest_cache,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import ExpertStream, demo_model, stream
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._cache.expert_map import POLICIES, ExpertCache
from mlx_streamexperts._experts.prefetch import RouterPrefetcher
from mlx_streamexperts._io.reader import Ticket

ALWAYS = replace(QUIET, prefetch="on")
# Their routers are called outside of the block that holds the experts, or their experts get another
# input than the block: no layer prefetches, and they decode as without it.
CANNOT_PROBE = (
    "gemma4", "gemma4_text", "gemma4_unified", "deepseek_v41", "longcat_flash",
    "longcat_flash_ngram", "nemotron_h_latent",
)  # fmt: skip


def test_a_prefetched_expert_is_in_its_slot_when_it_is_needed(
    streamed: tuple[nn.Module, ExpertStream],
) -> None:
    """Prefetching is asynchronous, and not a miss later."""
    _, expert_stream = streamed
    expert_stream.resize(all_experts(expert_stream) // 2)
    layer = expert_stream.layers[0]
    layer.prefetch([3, 5], distance=1)
    assert layer.slots.prefetch_stats.issued == 2
    layer.slots.await_prefetched()
    assert {3, 5} <= set(layer.cache.resident)
    mx.eval(layer(mx.zeros((1, 1, families.HIDDEN)), mx.array([[[3, 5]]])))
    assert (layer.cache.stats.prefetched, layer.cache.stats.misses) == (2, 0)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_router_style_answers_or_is_left_alone(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family)
    tokens = families.token_stream(families.VOCAB, 16, seed=3)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, 4)
    model = load_streamed(folder, 1 << 40, ALWAYS)
    with stream(model) as expert_stream:
        expert_stream.resize(max(smallest_cache(expert_stream), all_experts(expert_stream) // 2))
        assert_same(expected, families.run(model, tokens, 4), family)
        prefetching = expert_stream.stats().prefetching_layers
        assert (prefetching == 0) == (family in CANNOT_PROBE)
        assert prefetching in (0, len(expert_stream.layers) - 1)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_trained_model_is_bit_identical_and_predicts_well(depth: int) -> None:
    """At sizes at which prefetched experts evict others, and every step misses something."""
    # On a GPU a prompt of 64 rows (8 experts each of 8 tokens) is no longer the same kernel.
    prompt = 24 if mx.default_device() == mx.cpu else 7
    tokens = demo_tokens(prompt + 30)
    stock, _ = mlx_lm.utils.load_model(demo_model())
    expected = families.run(stock, tokens, prompt)
    model = load_streamed(demo_model(), 1 << 40, replace(ALWAYS, prefetch_depth=depth))
    with stream(model) as expert_stream:
        whole, least = all_experts(expert_stream), smallest_cache(expert_stream)
        for size in (least // 2, least, whole // 4, whole // 2):
            expert_stream.resize(size)
            expert_stream.reset()
            assert_same(expected, families.run(model, tokens, prompt), f"{size} bytes")
            stats = expert_stream.stats()
            if size >= least:
                assert stats.cache.prefetched > stats.prefetch.issued // 3 > 0
                assert stats.read.speculative_bytes > 0
                # Every prefetched expert is accounted for, or still there unused.
                used = stats.cache.prefetched + stats.cache.wasted
                unused = sum(len(x.cache._prefetched) for x in expert_stream.layers)
                assert stats.prefetch.issued == used + unused + stats.prefetch.cancelled


def test_predictions_are_the_next_routers_choice_for_the_same_state(
    checkpoint: Callable[..., Path],
) -> None:
    """The two layers' norms differ: their ratio turns one's input into the other's."""
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40, ALWAYS)
    with stream(model) as expert_stream:
        first, second = expert_stream.layers
        norms = [model.layers[i].post_attention_layernorm for i in (1, 2)]
        for seed, norm in enumerate(norms):
            norm.weight = mx.random.uniform(0.2, 3, norm.weight.shape, key=mx.random.key(seed))
        prefetcher = first.prefetcher
        assert isinstance(prefetcher, RouterPrefetcher)
        expert_stream.resize(all_experts(expert_stream) // 2)  # resident layers are not probed
        for seed in range(20):
            state = 5 * mx.random.normal((1, 1, families.HIDDEN), key=mx.random.key(100 + seed))
            prediction = prefetcher.predict(norms[0](state))
            assert prediction is not None
            ((target, distance, _, predicted, scores),) = prediction.answers
            assert target.router.layer is second
            assert distance == 1
            chosen, _ = target.router.choose(norms[1](state))
            assert set(np.array(predicted).ravel()) == set(np.array(chosen).ravel())
            assert scores is not None
            assert scores.shape == predicted.shape


def test_interleaved_sequences_with_reads_under_way(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40, ALWAYS)
    tokens = families.token_stream(families.VOCAB, 60, seed=5).reshape(3, 20)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        results: list[list[mx.array]] = []
        for m in (stock, model):
            caches = [make_prompt_cache(m) for _ in tokens]
            results.append(
                [m(mx.array([[row[i]]]), cache=c) for i in range(20)
                 for row, c in zip(tokens.tolist(), caches, strict=True)]
            )  # fmt: skip
        for a, b in zip(*results, strict=True):
            assert mx.array_equal(a, b)


def test_threads_probe_and_decode_side_by_side() -> None:
    """A layer's experts are skipped only in the thread that probes its router."""
    model = load_streamed(demo_model(), 1 << 40, ALWAYS)
    stock, _ = mlx_lm.utils.load_model(demo_model())
    rows = demo_tokens(80).reshape(4, 20).tolist()
    expected = [np.array(stock(mx.array([row[:4]]))) for row in rows]
    with stream(model) as expert_stream:
        expert_stream.resize(all_experts(expert_stream) // 2)
        wrong: list[str] = []

        def work(row: list[int], logits: np.ndarray) -> None:
            try:
                for _ in range(4):
                    if not np.array_equal(np.array(model(mx.array([row[:4]]))), logits):
                        wrong.append("other logits")
            except Exception as e:
                wrong.append(repr(e))

        threads = [
            threading.Thread(target=work, args=pair) for pair in zip(rows, expected, strict=True)
        ]
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
            assert not t.is_alive()
        assert not wrong


def test_an_interrupted_call_leaves_nothing_for_the_next_one(
    faulty: tuple[Faulty, nn.Module, ExpertStream, nn.Module],
) -> None:
    """Ctrl-C between starting reads and waiting for them."""
    read, _, expert_stream, stock = faulty
    slots = expert_stream.layers[1].slots
    read.gate.clear()
    arrivals = slots.begin([0, 1, 2, 3])
    assert list(arrivals.left) == [0, 1, 2, 3]
    opener = threading.Timer(0.05, read.gate.set)
    opener.start()
    outputs_agree(expert_stream, stock, [0, 1, 5, 6])
    outputs_agree(expert_stream, stock, [2, 3, 5, 6])
    opener.join()


class Faulty:
    """A `read_into` that fails in reader threads, or waits, while a test says so."""

    def __init__(self) -> None:
        self.failing = False
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self._real = platform.read_into

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.entered.set()
        assert self.gate.wait(60)
        if self.failing and threading.current_thread().name.startswith("expert-reader"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._real(fd, buffers, offset)


@pytest.fixture
def faulty(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> tuple[Faulty, nn.Module, ExpertStream, nn.Module]:
    """A stock and a streamed model whose second layer has room for prefetched experts."""
    read = Faulty()
    monkeypatch.setattr(platform, "read_into", read)
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40, replace(QUIET, prefetch="off"))
    expert_stream = stream(model)
    expert_stream.resize(all_experts(expert_stream) // 2)
    return read, model, expert_stream, stock


X = mx.random.normal((1, 1, families.HIDDEN), key=mx.random.key(1))


def outputs_agree(expert_stream: ExpertStream, stock: nn.Module, experts: list[int]) -> None:
    picked = mx.array([[experts]])
    got = expert_stream.layers[1](X, picked)
    assert mx.array_equal(got, stock.layers[2].mlp.switch_mlp(X, picked))


def test_a_failed_prefetch_raises_nothing_and_takes_no_slot(
    faulty: tuple[Faulty, nn.Module, ExpertStream, nn.Module],
) -> None:
    read, _, expert_stream, stock = faulty
    slots = expert_stream.layers[1].slots
    read.failing = True
    slots.prefetch([0, 1, 2])
    until(lambda: expert_stream.stats().read.errors >= 3)
    read.failing = False
    outputs_agree(expert_stream, stock, [3, 4, 5, 6])
    assert slots.prefetch_stats.failed == 3
    assert all(slots.cache.slot_of[e] < 0 for e in (0, 1, 2))
    outputs_agree(expert_stream, stock, [0, 1, 2, 3])


def test_late_prefetches_are_waited_for_and_stale_ones_taken_back(
    faulty: tuple[Faulty, nn.Module, ExpertStream, nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, _, expert_stream, stock = faulty
    slots = expert_stream.layers[1].slots
    whole, claim = slots.cache.slots, slots._claim

    def claim_and_open(needed: Sequence[int]) -> dict[int, Ticket]:
        claimed = claim(needed)  # before any has arrived
        read.gate.set()
        return claimed

    monkeypatch.setattr(slots, "_claim", claim_and_open)
    read.gate.clear()
    slots.prefetch([0, 1, 2, 3])
    outputs_agree(expert_stream, stock, [1, 2, 5, 7])
    assert slots.prefetch_stats.late == 2
    assert slots.cache.stats.prefetched == 2
    assert slots.cache.stats.misses == 2
    slots.drain()
    assert not slots._in_flight
    resident = slots.cache.resident
    assert {1, 2, 5, 7} <= set(resident)
    assert len(resident) + len(slots.cache._free) == whole
    for e in range(8):
        outputs_agree(expert_stream, stock, [e, (e + 1) % 8, (e + 3) % 8, (e + 5) % 8])


def test_closing_and_resizing_with_prefetches_in_flight(
    faulty: tuple[Faulty, nn.Module, ExpertStream, nn.Module],
) -> None:
    """Nothing is written into memory that was given back."""
    read, _, expert_stream, _ = faulty
    for end in (lambda: expert_stream.resize(smallest_cache(expert_stream)), expert_stream.close):
        read.gate.clear()
        read.entered.clear()
        expert_stream.layers[1].slots.prefetch([0, 1, 2, 3])
        assert read.entered.wait(60)
        opener = threading.Timer(0.05, read.gate.set)
        opener.start()
        end()
        assert read.gate.is_set(), "did not wait for the reads under way"
        opener.join()


@settings(max_examples=80, deadline=None)
@given(data=st.data(), policy=st.sampled_from(sorted(POLICIES)))
def test_prefetching_never_evicts_experts_that_must_stay(data: st.DataObject, policy: str) -> None:
    experts = data.draw(st.integers(2, 24))
    slots = data.draw(st.integers(1, experts))
    cache = ExpertCache(experts, slots, policy)
    some = st.lists(st.integers(0, experts - 1), unique=True, max_size=slots)
    in_flight: list[int] = []
    for _ in range(data.draw(st.integers(1, 30))):
        if data.draw(st.booleans()):
            needed = data.draw(some)
            cache.place(needed)
            assert all(cache.slot_of[e] >= 0 for e in needed)
            assert not set(needed) & set(cache._prefetched)
            in_flight = []
        else:
            candidates = data.draw(some)
            before = set(cache.resident)
            placed = cache.place_prefetched(candidates, in_flight)
            assert set(placed) <= set(candidates) - before
            assert before & {*candidates, *in_flight} <= set(cache.resident)
            assert len(cache._prefetched) <= max(2 * len(candidates), experts)
            in_flight += placed
        used = [s for s in cache.slot_of.tolist() if s >= 0]
        assert sorted(used + cache._free) == list(range(slots))
        assert set(cache._prefetched) <= set(cache.resident)

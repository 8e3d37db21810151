"""Run-ahead decoding: passes that trust their layers give the bits of passes that ask them.

On the CPU it never pays, so that "auto" leaves it off; here it is forced.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from conftest import (
    QUIET,
    all_experts,
    assert_same,
    demo_texts,
    demo_tokens,
    load_streamed,
    smallest_cache,
)
from mlx_lm.models import cache as stock_caches
from mlx_lm.models.cache import make_prompt_cache
from test_exactness import HEADLINE, OTHERS, PREFILL, compare

from mlx_streamexperts import ExpertReadError, StreamConfig, demo_model, stream
from mlx_streamexperts._experts.speculative.cache_snapshot import remember
from mlx_streamexperts._experts.speculative.policy import Trust

ON = replace(QUIET, run_ahead="on")


@pytest.mark.parametrize("family", HEADLINE)
def test_headline_families_are_bit_identical(family: str, checkpoint: Callable[..., Path]) -> None:
    compare(checkpoint(family), steps=40, shares=(0.0, 0.5, 0.9, 1.0), config=ON)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_bit_identical(family: str, checkpoint: Callable[..., Path]) -> None:
    compare(checkpoint(family), steps=12, shares=(0.4,), config=ON)


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_with_everything_else_on(share: float) -> None:
    """Reading ahead, overlap, batches of reads: all together, on real text."""
    folder = demo_model()
    tokens = demo_tokens(PREFILL + 60)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, PREFILL)
    config = StreamConfig(progress=False, run_ahead="on", prefetch="on", overlap="on")
    model = load_streamed(folder, 1 << 40, config)
    with stream(model) as s:
        s.resize(int(share * all_experts(s)))
        assert_same(expected, families.run(model, tokens, PREFILL), f"{share:.0%}")
        counted = s.stats().run_ahead
        assert counted.steps == 60
        assert counted.passes > 60
        assert counted.predicted_used > 0.6 * counted.predicted > 0


def test_it_counts_and_records_what_asking_counts(tmp_path: Path) -> None:
    """Whatever passes a step takes, each layer's experts count once."""
    folder = demo_model()
    tokens = demo_tokens(50)
    traces, seen = [], []
    for config in (QUIET, ON):
        model = load_streamed(folder, 1 << 40, config)
        with stream(model) as s:
            s.resize(int(0.4 * all_experts(s)))
            s.reset()
            with s.trace(tmp_path / f"{config.run_ahead}.jsonl"):
                families.run(model, tokens, PREFILL)
            cache = s.stats().cache
            seen.append(cache.hits + cache.prefetched + cache.misses)
            traces.append((tmp_path / f"{config.run_ahead}.jsonl").read_text())
    assert traces[0] == traces[1]
    assert seen[0] == seen[1]


def test_a_step_that_needs_one_pass_reads_nothing_and_asks_nobody() -> None:
    model = load_streamed(demo_model(), 1 << 40, ON)
    with stream(model) as s:
        s.resize(all_experts(s) - sum(n.expert_bytes for n in s.needs()))  # one short in each layer
        tokens = mx.array(demo_tokens(24))[None]
        caches = make_prompt_cache(model)
        mx.eval(model(tokens, cache=caches))
        mx.eval(model(tokens[:, :1], cache=caches))
        for cache in caches:
            cache.trim(1)
        s.reset()
        mx.eval(model(tokens[:, :1], cache=caches))  # the same step again: all is there
        counted = s.stats().run_ahead
        assert (counted.steps, counted.exact_at_once, counted.passes) == (1, 1, 1)
        assert (counted.synced, counted.wrong, counted.speculated) == (0, 0, len(s.layers))
        assert s.stats().read.reads == 0


@pytest.mark.parametrize("options", [{}, {"max_kv_size": 16}, {"kv_bits": 4}])
def test_generation_with_every_kind_of_cache(options: dict[str, Any]) -> None:
    folder = demo_model()
    stock, tokenizer = mlx_lm.load(str(folder))
    prompt = demo_texts()[0]
    kwargs = {"max_tokens": 40, "verbose": False, "quantized_kv_start": 0, **options}
    expected = mlx_lm.generate(stock, tokenizer, prompt, **kwargs)
    model = load_streamed(folder, 1 << 40, ON)
    with stream(model) as s:
        s.resize(int(0.4 * all_experts(s)))
        assert mlx_lm.generate(model, tokenizer, prompt, **kwargs) == expected
        assert s.stats().run_ahead.passes > s.stats().run_ahead.steps > 30


def test_batches() -> None:
    folder = demo_model()
    stock, tokenizer = mlx_lm.load(str(folder))
    prompts = [tokenizer.encode(t)[: 5 + i] for i, t in enumerate(demo_texts()[:3])]
    expected = mlx_lm.batch_generate(stock, tokenizer, prompts, max_tokens=24).texts
    model = load_streamed(folder, 1 << 40, ON)
    with stream(model) as s:
        s.resize(int(0.6 * all_experts(s)))
        assert mlx_lm.batch_generate(model, tokenizer, prompts, max_tokens=24).texts == expected
        assert s.stats().run_ahead.passes > s.stats().run_ahead.steps > 0


@pytest.mark.parametrize("seed", range(6))
def test_random_schedules_of_interleaved_sequences(
    seed: int, checkpoint: Callable[..., Path]
) -> None:
    """Lazy steps of several sequences, evaluated in any order or never, between resizes."""
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40, ON)
    chance = random.Random(seed)
    with stream(model) as s:
        least, whole = smallest_cache(s), all_experts(s)
        s.resize(least)
        sequences = [(make_prompt_cache(stock), make_prompt_cache(model)) for _ in range(3)]
        pending: list[tuple[mx.array, mx.array]] = []
        for step in range(120):
            mine, theirs = sequences[chance.randrange(3)]
            count = chance.choice([1, 1, 1, 2, 5, 24])
            tokens = mx.array(
                families.token_stream(families.VOCAB, count, seed=1000 * seed + step)
            )[None]
            pending.append((stock(tokens, cache=mine), model(tokens, cache=theirs)))
            if chance.random() < 0.05:
                s.resize(chance.randrange(least, whole))
            chance.shuffle(pending)
            while len(pending) > chance.randrange(4):
                expected, got = pending.pop()
                assert mx.array_equal(expected, got), f"schedule {seed}, step {step}"
        assert s.stats().run_ahead.wrong > 20


def test_threads_take_the_ordinary_path(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40, ON)
    wrong: list[str] = []

    def work(seed: int) -> None:
        caches, mine = make_prompt_cache(stock), make_prompt_cache(model)
        for step in range(12):
            tokens = mx.array(families.token_stream(families.VOCAB, 1, seed=97 * seed + step))[None]
            got = np.array(model(tokens, cache=mine).astype(mx.float32))
            with lock:
                expected = np.array(stock(tokens, cache=caches).astype(mx.float32))
            if not np.array_equal(expected, got):
                wrong.append(f"thread {seed}, step {step}")

    lock = threading.Lock()
    with stream(model) as s:
        s.resize(smallest_cache(s))
        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_failed_read_leaves_the_caches_as_they_were(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40, ON)
    tokens = mx.array(families.token_stream(families.VOCAB, 12, seed=5))[None]
    with stream(model) as s:
        s.resize(smallest_cache(s))
        mine, theirs = make_prompt_cache(stock), make_prompt_cache(model)
        read = s._reader._files.read

        def failing(run: Any) -> int:
            raise ExpertReadError("a layer", run[0].expert, "a tensor", Path("a file"), 0, 5)

        for i in range(12):
            expected = stock(tokens[:, i : i + 1], cache=mine)
            monkeypatch.setattr(s._reader._files, "read", failing)
            with pytest.raises(ExpertReadError):
                for step in range(i, 12):  # until one lacks an expert
                    model(tokens[:, step : step + 1], cache=theirs)
            monkeypatch.setattr(s._reader._files, "read", read)
            for cache in theirs:
                cache.trim(cache.offset - i)
            assert mx.array_equal(expected, model(tokens[:, i : i + 1], cache=theirs)), i


def test_the_class_of_the_model_stays_what_it_was(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40, ON)
    with stream(model):
        assert isinstance(model, type(stock))
        assert type(model).__name__ == type(stock).__name__
        other, _ = mlx_lm.utils.load_model(folder)
        assert type(other) is type(stock)  # only the instance was changed


# --- rewind.py


def _filled(kind: str, tokens: int) -> Any:
    make = {
        "kv": stock_caches.KVCache,
        "quantized": lambda: stock_caches.QuantizedKVCache(32, 8),
        "concatenating": stock_caches.ConcatenateKVCache,
        "chunked": lambda: stock_caches.ChunkedKVCache(8),
        "rotating": lambda: stock_caches.RotatingKVCache(8, keep=2),
        "batch": lambda: stock_caches.BatchKVCache([1]),
        "batch rotating": lambda: stock_caches.BatchRotatingKVCache(8, [1]),
    }[kind]
    cache: Any = make()
    for step in range(tokens):
        if kind == "chunked":
            cache.maybe_trim_front()
        _append(cache, step)
    return cache


def _append(cache: Any, seed: int) -> tuple[mx.array, ...]:
    k, v = mx.random.normal((2, 1, 2, 1, 32), key=mx.random.key(seed))
    out = cache.update_and_fetch(k, v)
    arrays = [a for part in out for a in (part if isinstance(part, tuple | list) else (part,))]
    mx.eval(arrays)
    return tuple(arrays)


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 20, 255, 256, 257])
@pytest.mark.parametrize(
    "kind", ["kv", "quantized", "concatenating", "chunked", "rotating", "batch", "batch rotating"]
)
def test_caches_are_taken_back(kind: str, tokens: int) -> None:
    """What is fetched after a step was undone is what a cache without that step gives."""
    cache, plain = _filled(kind, tokens), _filled(kind, tokens)
    undo = remember([cache])
    assert undo is not None
    for wrong in (9991, 9992):
        _append(cache, wrong)
        undo()
    for step in (501, 502, 503):
        for got, expected in zip(_append(cache, step), _append(plain, step), strict=True):
            assert mx.array_equal(got, expected), step
        assert np.array_equal(np.array(cache.offset), np.array(plain.offset))
    if hasattr(cache, "left_padding"):
        assert mx.array_equal(cache.left_padding, plain.left_padding)


def test_recurrent_states_are_kept() -> None:
    cache = stock_caches.ArraysCache(2)
    inner = stock_caches.CacheList(cache, stock_caches.KVCache())
    cache[0], cache[1] = mx.array([1.0]), mx.array([2.0])
    cache.lengths = mx.array([5])
    undo = remember([inner, None])
    assert undo is not None
    for _ in range(2):
        cache[0] = cache[0] + 1
        cache.advance(2)
        undo()
    assert (cache[0].item(), cache[1].item(), cache.lengths.item()) == (1.0, 2.0, 5)


def test_what_cannot_be_taken_back_is_not_tried() -> None:
    class Unknown(stock_caches.KVCache):
        pass

    assert remember([Unknown()]) is None
    full = stock_caches.RotatingKVCache(4096)
    k = mx.zeros((1, 8, 4096, 64))
    full.update_and_fetch(k, k)
    assert remember([full]) is None  # overwriting it means copying it
    assert remember(None) is not None


# --- trust.py


def test_layers_that_seldom_lack_an_expert_are_trusted() -> None:
    trust = Trust(40)
    assert not trust.choose(np.ones(40)).any()
    assert trust.choose(np.zeros(40)).all()
    lacking = np.zeros(40)
    lacking[[3, 17]] = 0.5
    assert set(np.flatnonzero(~trust.choose(lacking))) == {3, 17}


def test_trust_is_never_worse_than_any_other_choice() -> None:
    """Against every subset: the expected time of the layers asked and of passes in vain."""
    chance = np.random.default_rng(0)
    trust = Trust(8)
    for _ in range(50):
        lacking = chance.random(8) ** 4
        best = np.inf
        for bits in range(256):
            chosen = np.array([bits >> i & 1 for i in range(8)], bool)
            best = min(best, _expected(trust, lacking, chosen))
        assert _expected(trust, lacking, trust.choose(lacking)) == pytest.approx(best)


def _expected(trust: Trust, lacking: np.ndarray, trusted: np.ndarray) -> float:
    in_vain = 1 - np.prod(1 - lacking[trusted])
    return float((~trusted).sum() * trust.wait_seconds + in_vain * trust.in_vain_seconds(False))


def test_costs_are_learned_from_steps() -> None:
    trust = Trust(10)
    trust.timed(0.011, waited=0.001, trusted=10, passes=1)
    trust.timed(0.030, waited=0.0, trusted=0, passes=1)
    trust.timed(9.0, waited=0.0, trusted=10, passes=2)  # says nothing about one pass
    assert trust.layer_seconds == pytest.approx(0.001)
    assert trust.wait_seconds == pytest.approx(0.002)
    for _ in range(20):
        trust.timed(0.012, waited=0.002, trusted=9, passes=1)
    assert trust.layer_seconds == pytest.approx(0.001)  # one slow step is forgotten
    for _ in range(200):
        trust.note([4], True, again=False)
        trust.note([5], False, again=False)
    assert trust.lacking[4] == 1
    assert trust.lacking[5] < 1e-3

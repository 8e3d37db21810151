"""Run-ahead decoding: speculative passes give the bits of passes that wait for every layer.

On the CPU it never pays, so "auto" leaves it off; here it is forced.
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
from mlx_lm.models.cache import make_prompt_cache
from test_exactness import HEADLINE, OTHERS, PREFILL, compare

from mlx_streamexperts import ExpertReadError, StreamConfig, demo_model, stream

ON = replace(QUIET, run_ahead="on")


def test_a_step_whose_experts_are_all_resident_takes_one_pass_and_no_wait() -> None:
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


@pytest.mark.parametrize("family", HEADLINE)
def test_headline_families_are_bit_identical(family: str, checkpoint: Callable[..., Path]) -> None:
    shares = (0.0, 0.5, 0.9, 1.0) if family == HEADLINE[0] else (0.0, 0.9)
    compare(checkpoint(family), steps=40, shares=shares, config=ON)


@pytest.mark.parametrize("family", OTHERS)
def test_other_families_are_bit_identical(family: str, checkpoint: Callable[..., Path]) -> None:
    compare(checkpoint(family), steps=12, shares=(0.4,), config=ON)


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_with_everything_else_on(share: float) -> None:
    """Prefetching, overlap, batches of reads: all together, on real text."""
    folder = demo_model()
    tokens = demo_tokens(PREFILL + 30)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, PREFILL)
    config = StreamConfig(progress=False, run_ahead="on", prefetch="on", overlap="on")
    model = load_streamed(folder, 1 << 40, config)
    with stream(model) as s:
        s.resize(int(share * all_experts(s)))
        assert_same(expected, families.run(model, tokens, PREFILL), f"{share:.0%}")
        counted = s.stats().run_ahead
        assert counted.steps == 30
        assert counted.passes > 30
        assert counted.predicted_used > 0.6 * counted.predicted > 0


def test_it_counts_and_records_the_same_as_without(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("options", [{}, {"max_kv_size": 16}, {"kv_bits": 4}])
def test_generation_with_every_kind_of_cache(options: dict[str, Any]) -> None:
    folder = demo_model()
    stock, tokenizer = mlx_lm.load(str(folder))
    prompt = demo_texts()[0]
    kwargs = {"max_tokens": 24, "verbose": False, "quantized_kv_start": 0, **options}
    expected = mlx_lm.generate(stock, tokenizer, prompt, **kwargs)
    model = load_streamed(folder, 1 << 40, ON)
    with stream(model) as s:
        s.resize(int(0.4 * all_experts(s)))
        assert mlx_lm.generate(model, tokenizer, prompt, **kwargs) == expected
        assert s.stats().run_ahead.passes > s.stats().run_ahead.steps > 16


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


@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(n, marks=pytest.mark.full) for n in range(2, 6))]
)
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

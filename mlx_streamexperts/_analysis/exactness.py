"""Streamed against stock, bit by bit, on MLX's default device.

Shared by `doctor --selftest` and the benchmarks for GPUs: decoding at several cache sizes in every
way there is, and random schedules of sequences whose steps are built lazily. It judges nothing: it
counts, and returns the counts.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from .._config import StreamConfig
from .._experts.bank import numbers
from .._experts.lossy import refuse_lossy
from .._experts.stream import ExpertStream, stream
from .._loading.lazy_load import original_load_model
from .._loading.load import patch
from .._loading.patching import for_this_thread

PLAIN = StreamConfig(cache=1 << 60, progress=False, prefetch="off", run_ahead="off")
"""Unlimited cache, adaptive features off; callers enable what they test."""

SHARES = (1.0, 0.9, 0.5, 0.25)
"""Parts of all experts that are resident."""

PREFILL_BOUND = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}
"""Largest difference of prefill logits, relative to the largest logit, on devices but the CPU.

It holds while no router's choice changes: if two experts are as good as equal, another order of
sums may choose the other expert, and the difference that follows has no bound.
"""

_TOKENS = 400  # token ids to draw from: few, so that experts are used again

Models = tuple[nn.Module, ExpertStream]


def ways(base: StreamConfig = PLAIN) -> dict[str, StreamConfig]:
    """Ways to decode, by name; other options are those of `base`."""
    plain = replace(base, prefetch="off", run_ahead="off")
    return {
        "asked": plain,
        "asked, prefetching": replace(plain, prefetch="on"),
        "asked, in lots": replace(plain, overlap="on"),
        "run ahead": replace(plain, run_ahead="on"),
        "run ahead, as it pays": replace(plain, run_ahead="auto", prefetch="auto"),
    }


def load_stock(folder: Path) -> nn.Module:
    """mlx-lm's own model, without tokenizer."""
    model: nn.Module = original_load_model(folder)[0]
    return model


def load_streamed(folder: Path, config: StreamConfig) -> Models:
    """A streamed model without tokenizer, and its stream. A lossy one is refused."""
    refuse_lossy(config.lossy, "a comparison with the stock model")
    with for_this_thread(patch(config=config)):
        model, _ = mlx_lm.utils.load_model(folder)
    return model, stream(model)


def resize(s: ExpertStream, share: float) -> None:
    """Resize the cache to a share of the experts, at least those of one token."""
    slots = [max(n.top_k, int(share * n.experts)) for n in s.needs()]
    s.resize(sum(n * x.expert_bytes for n, x in zip(slots, s.layers, strict=True)))


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Random token ids, from a few hundred."""
    return np.random.default_rng(seed).integers(0, _TOKENS, count).tolist()


def decode(model: nn.Module, tokens: Sequence[int]) -> tuple[list[np.ndarray], float]:
    """Logits [V] of one-token steps, each evaluated, and the median seconds of a step."""
    cache, logits, seconds = make_prompt_cache(model), [], []
    for t in tokens:
        start = time.perf_counter()
        step = model(mx.array([[t]]), cache=cache)
        mx.eval(step)
        seconds.append(time.perf_counter() - start)
        logits.append(numbers(step.astype(mx.float32))[0, -1])
    return logits, statistics.median(seconds[len(seconds) // 3 :])


def same(expected: Sequence[np.ndarray], got: Sequence[np.ndarray]) -> bool:
    """True if all logits are the same bits, and finite."""
    return all(
        np.array_equal(a, b) and np.isfinite(a).all() for a, b in zip(expected, got, strict=True)
    )


def reference(folder: Path, tokens: Sequence[int]) -> list[np.ndarray] | None:
    """Stock logits [V] of each step; None if they are not finite, or differ when run again."""
    stock = load_stock(folder)
    expected, _ = decode(stock, tokens)
    again, _ = decode(stock, tokens)
    return expected if same(expected, again) else None


@dataclass(frozen=True)
class Decoded:
    """Result of decoding with some share of the experts resident.

    Attributes:
        identical: all logits equalled stock's.
        misses: experts that had to be read.
        passes, steps: see `RunAheadStats`.
    """

    identical: bool
    misses: int
    passes: int
    steps: int


def decoding(
    folder: Path,
    tokens: Sequence[int],
    expected: Sequence[np.ndarray],
    config: StreamConfig,
    shares: Sequence[float] = SHARES,
) -> dict[float, Decoded]:
    """Decode at several cache sizes; results by share."""
    rows = {}
    model, s = load_streamed(folder, config)
    with s:
        for share in shares:
            resize(s, share)
            s.reset()
            got, _ = decode(model, tokens)
            stats = s.stats()
            rows[share] = Decoded(
                same(expected, got),
                stats.cache.misses + stats.cache.prefetched,
                stats.run_ahead.passes,
                stats.run_ahead.steps,
            )
    return rows


@dataclass(frozen=True)
class Prefilled:
    """Result of a whole prompt with some share of the experts resident.

    Attributes:
        difference: see `prefill_difference`.
        bound: see `prefill_bound`.
        waves: groups of experts that went through the slots, summed over layers.
    """

    difference: float
    bound: float
    waves: int


def prompts(
    folder: Path, lengths: Sequence[int], config: StreamConfig = PLAIN,
    shares: Sequence[float] = SHARES,
) -> dict[tuple[int, float], Prefilled]:  # fmt: skip
    """Whole prompts of several lengths at several cache sizes; results by length and share."""
    stock = load_stock(folder)
    model, s = load_streamed(folder, config)
    rows = {}
    with s:
        for length in lengths:
            prompt = mx.array(random_tokens(length, seed=1))[None]
            expected = stock(prompt)
            for share in shares:
                resize(s, share)
                s.reset()
                apart = prefill_difference(expected, model(prompt))
                waves = s.stats().waves + len(s.layers)
                rows[length, share] = Prefilled(apart, prefill_bound(expected.dtype), waves)
    return rows


def prefill_bound(dtype: mx.Dtype) -> float:
    """The most that `prefill_difference` may be on MLX's default device.

    MLX multiplies float32 matrices at reduced precision by default, where the hardware can: TF32
    has the ten bits of float16 (https://ml-explore.github.io/mlx/build/html/usage/precision.html).
    """
    if mx.default_device() == mx.cpu:
        return 0.0
    if dtype == mx.float32 and os.environ.get("MLX_ENABLE_TF32", "1") != "0":
        dtype = mx.float16
    return PREFILL_BOUND[dtype]


def prefill_difference(expected: mx.array, got: mx.array) -> float:
    """Largest difference of logits, relative to the largest; infinite if any is not finite."""
    return relative_difference(*(numbers(x.astype(mx.float32)) for x in (expected, got)))


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """`prefill_difference` of NumPy arrays of equal shape."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max() / np.abs(a).max())


@dataclass
class Schedules:
    """Result of random schedules.

    Attributes:
        schedules: number that were run.
        steps: passes that both models built.
        compared: passes whose logits were compared.
        taken_back: passes that were trimmed from the KV cache, as a rejected draft is.
        passes: run-ahead passes.
        different: schedules that differed.
    """

    schedules: int = 0
    steps: int = 0
    compared: int = 0
    taken_back: int = 0
    passes: int = 0
    different: list[str] = field(default_factory=list)


def schedules(
    folder: Path,
    configs: Mapping[str, StreamConfig],
    count: int,
    seconds: float,
    seed: int = 0,
) -> Schedules:
    """Run random schedules until one differs, `count` were run, or `seconds` are over.

    A schedule is several sequences whose steps are built lazily, evaluated in any order or never,
    and taken back, with caches resized in between.

    Args:
        configs: ways to decode, by name; each schedule draws one.
    """
    stock = load_stock(folder)
    loaded = {name: load_streamed(folder, config) for name, config in configs.items()}
    chance, result = random.Random(seed), Schedules()
    start = time.perf_counter()
    try:
        while result.schedules < count and not result.different:
            if time.perf_counter() - start > seconds:
                break
            name = chance.choice(list(loaded))
            if not _one_schedule(stock, loaded[name], chance, result):
                result.different.append(f"schedule {result.schedules} of seed {seed}: {name}")
            result.schedules += 1
    finally:
        for _, s in loaded.values():
            s.close()
    return result


def _one_schedule(
    stock: nn.Module, streamed: Models, chance: random.Random, result: Schedules
) -> bool:
    """Run one schedule; False as soon as it differs from stock."""
    model, s = streamed
    s.reset()
    if chance.random() < 0.3:
        resize(s, chance.choice(SHARES[1:]) * chance.random())
    sequences = [(make_prompt_cache(stock), make_prompt_cache(model)) for _ in range(3)]
    pending: list[tuple[mx.array, mx.array]] = []
    for _ in range(chance.randrange(4, 16)):
        mine, theirs = sequences[chance.randrange(3)]
        tokens = mx.array([[chance.randrange(_TOKENS)]])
        pending.append((stock(tokens, cache=mine), model(tokens, cache=theirs)))
        result.steps += 1
        if chance.random() < 0.1:  # as speculative decoding rejects a draft
            for cache in (*mine, *theirs):
                cache.trim(1)
            result.taken_back += 1
        if chance.random() < 0.1:
            pending.clear()  # an abandoned pass
        chance.shuffle(pending)
        while len(pending) > chance.randrange(4):
            expected, got = pending.pop()
            result.compared += 1
            if not mx.array_equal(expected, got).item():
                return False
    result.passes += s.stats().run_ahead.passes
    return True

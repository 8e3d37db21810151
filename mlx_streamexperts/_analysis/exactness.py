"""Streamed against stock, bit by bit, on this machine's default device.

What `doctor --selftest` and the benchmarks for GPUs share: decoding at several cache sizes in every
way there is, and random schedules of sequences whose steps are built lazily. Nothing is judged
here: results are counted and handed back.
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
from .._experts.stream import ExpertStream, stream
from .._loading.discover import original_load_model
from .._loading.load import patch
from .._loading.patching import for_this_thread

PLAIN = StreamConfig(cache=1 << 60, progress=False, prefetch="off", run_ahead="off")
"""Room for everything, and nothing on that chooses by trial: whoever uses it says what he wants."""

SHARES = (1.0, 0.9, 0.5, 0.25)
"""Parts of all experts that are resident."""

PREFILL_BOUND = {mx.float32: 1e-4, mx.float16: 1e-2, mx.bfloat16: 5e-2}
"""Largest difference of prefill logits, relative to the largest logit, on devices but the CPU.

While no router's choice changes: where two experts are as good as equal, another order of sums may
choose the other, and what that makes of a token has no bound.
"""

_TOKENS = 400  # numbers of tokens that are drawn from: few, so that experts come again

Models = tuple[nn.Module, ExpertStream]


def ways(base: StreamConfig = PLAIN) -> dict[str, StreamConfig]:
    """The ways to decode, by name; other options are those of `base`."""
    plain = replace(base, prefetch="off", run_ahead="off")
    return {
        "asked": plain,
        "asked, reading ahead": replace(plain, prefetch="on"),
        "asked, in lots": replace(plain, overlap="on"),
        "run ahead": replace(plain, run_ahead="on"),
        "run ahead, as it pays": replace(plain, run_ahead="auto", prefetch="auto"),
    }


def load_stock(folder: Path) -> nn.Module:
    """mlx-lm's own model, without tokenizer."""
    model: nn.Module = original_load_model(folder)[0]
    return model


def load_streamed(folder: Path, config: StreamConfig) -> Models:
    """A streamed model without tokenizer, and its stream."""
    with for_this_thread(patch(config=config)):
        model, _ = mlx_lm.utils.load_model(folder)
    return model, stream(model)


def resize(s: ExpertStream, share: float) -> None:
    """Leave room for a share of the experts, at least one token's."""
    slots = [max(n.top_k, int(share * n.experts)) for n in s.needs()]
    s.resize(sum(n * x.expert_bytes for n, x in zip(slots, s.layers, strict=True)))


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Numbers of tokens, from a few hundred."""
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
    """Are all logits the same bits, and numbers?"""
    return all(
        np.array_equal(a, b) and np.isfinite(a).all() for a, b in zip(expected, got, strict=True)
    )


def reference(folder: Path, tokens: Sequence[int]) -> list[np.ndarray] | None:
    """Stock logits [V] of each step; None where they are no numbers, or others the next time."""
    stock = load_stock(folder)
    expected, _ = decode(stock, tokens)
    again, _ = decode(stock, tokens)
    return expected if same(expected, again) else None


@dataclass(frozen=True)
class Decoded:
    """What came of decoding with some share of the experts resident.

    Attributes:
        identical: all logits were stock's.
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
    """What came of a whole prompt with some share of the experts resident.

    Attributes:
        difference: see `prefill_difference`.
        bound: see `prefill_bound`.
        waves: in which the experts passed through, of all layers together.
    """

    difference: float
    bound: float
    waves: int


def prompts(
    folder: Path, lengths: Sequence[int], config: StreamConfig = PLAIN,
    shares: Sequence[float] = SHARES,
) -> dict[tuple[int, float], Prefilled]:  # fmt: skip
    """Whole prompts of so many tokens at several cache sizes; results by length and share."""
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
    """The largest difference of some logits, relative to the largest; infinite if no numbers."""
    return relative_difference(*(numbers(x.astype(mx.float32)) for x in (expected, got)))


def relative_difference(a: np.ndarray, b: np.ndarray) -> float:
    """The same of NumPy's arrays, of the shape of each other."""
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max() / np.abs(a).max())


@dataclass
class Schedules:
    """What came of random schedules.

    Attributes:
        schedules: how many were run.
        steps: passes that were built, of both models.
        compared: those of them whose logits were compared.
        taken_back: of those the ones that were then taken back, as a rejected draft is.
        passes: of run-ahead.
        different: which schedules differed.
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
    """Several sequences whose steps are built lazily, evaluated in any order or never, taken back,
    with caches resized in between; until one differs, `count` were run, or the time is up.

    Args:
        configs: ways to decode, by name; chance chooses.
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

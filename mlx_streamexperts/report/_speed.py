"""Timed generation with mlx-lm's own steps: first token, steady, in batches, and sustained.

Greedy, and always the same number of tokens (an end of text does not end it), so that every machine
is timed on the same tokens. Figures come with every repeat.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import batch_generate, generate_step

from .._experts.stream import stream
from . import _report as report
from ._method import Prompt
from ._power import Sensors
from ._report import Repeats

SUSTAINED_TOKENS = 256  # generated after each prompt of the sustained run
T = TypeVar("T")


@dataclass(frozen=True)
class Run:
    """One generation. All but `first_token` is of the tokens after the first; times in seconds."""

    first_token: float
    steps: list[float]  # of each token
    hits: int
    needed: int  # experts, resident or not
    read_bytes: int
    reads: int  # system calls
    wait: float  # for reads

    @property
    def tokens_per_s(self) -> float:
        return len(self.steps) / sum(self.steps)


def generate(model: nn.Module, prompt: list[int], tokens: int) -> Run:
    """Generate `tokens` tokens, at least two, after a prompt.

    `generate_step` builds a token's successor before it yields the token: the time to the first
    token is the one that users of mlx-lm see.
    """
    start = time.perf_counter()
    steps = _steps(model, prompt, max(2, tokens))
    next(steps)
    first, before = time.perf_counter() - start, _counters(model)
    times = [time.perf_counter()]
    times += (time.perf_counter() for _ in steps)
    counted = (b - a for a, b in zip(before, _counters(model), strict=True))
    return Run(first, [b - a for a, b in itertools.pairwise(times)], *counted)


def _counters(model: nn.Module) -> tuple[Any, ...]:
    """The last five fields of a `Run`, so far."""
    cache, read = (found := stream(model).stats()).cache, found.read
    needed = cache.hits + cache.prefetched + cache.misses
    return cache.hits, needed, read.bytes, read.reads, read.wait_seconds


def _steps(model: nn.Module, prompt: list[int], tokens: int) -> Iterator[Any]:
    chunk = stream(model).plan.prefill_tokens
    return generate_step(mx.array(prompt), model, max_tokens=tokens, prefill_step_size=chunk)


def combined(runs: Sequence[Run]) -> report.Decoding:
    """A token's mean seconds, hits and reads over several runs."""
    tokens = sum(len(r.steps) for r in runs)
    token = sum(sum(r.steps) for r in runs) / tokens
    wait = min(token, sum(r.wait for r in runs) / tokens)
    needed = sum(r.needed for r in runs)
    return report.Decoding(
        token_s=token,
        wait_s=wait,
        other_s=token - wait,
        hit_rate=sum(r.hits for r in runs) / needed if needed else 1.0,
        read_bytes=sum(r.read_bytes for r in runs) / tokens,
        reads=sum(r.reads for r in runs) / tokens,
        tokens_per_s=Repeats.of([r.tokens_per_s for r in runs]),
    )


def by_prompt(
    model: nn.Module, prompts: Sequence[Prompt], tokens: int, repeats: int, traces: Path
) -> list[report.PromptSpeed]:
    """Steady decoding of every prompt, in turns, with a warm cache.

    One more turn, which is not timed, writes each prompt's trace into the folder `traces`.
    """
    turns = [[generate(model, p.tokens, tokens) for p in prompts] for _ in range(repeats)]
    for i, prompt in enumerate(prompts):
        with stream(model).trace(traces / f"{i}.jsonl"):
            generate(model, prompt.tokens, tokens)
    return [
        report.PromptSpeed(
            task=p.task,
            language=p.language,
            **vars(combined(runs)),
            prompt_tokens=len(p.tokens),
            first_token_s=Repeats.of([r.first_token for r in runs]),
        )
        for p, runs in zip(prompts, zip(*turns, strict=True), strict=True)
    ]


def _in_turns(
    run: Callable[[int], T], sizes: Sequence[int], repeats: int
) -> Iterator[tuple[int, tuple[T, ...]]]:
    """Each size with the results of its repeats; sizes take turns.

    The first turn is dropped: a device may compile kernels for a size that it has not seen.
    """
    turns = [[run(n) for n in sizes] for _ in range(repeats + 1)][1:]
    return zip(sizes, zip(*turns, strict=True), strict=True)


def first_tokens(
    model: nn.Module, text: list[int], lengths: Sequence[int], repeats: int
) -> list[report.LengthSpeed]:
    """Time to the first token, and decoding after it, by length of the prompt."""
    rows = []
    for length, runs in _in_turns(lambda n: generate(model, text[:n], 8), lengths, repeats):
        first = Repeats.of([r.first_token for r in runs])
        rows.append(report.LengthSpeed(length, first, Repeats.of([r.tokens_per_s for r in runs])))
    return rows


def batches(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], sizes: Sequence[int],
    tokens: int, repeats: int,
) -> list[report.BatchSpeed]:  # fmt: skip
    """Tokens/s of all sequences together, by the number of sequences at once.

    mlx-lm's `batch_generate`; a sequence ends when the model ends its text.
    """

    def rate(size: int) -> float:
        texts = [p.tokens for p in itertools.islice(itertools.cycle(prompts), size)]
        chunk = max(1, stream(model).plan.prefill_tokens // size)
        answer = batch_generate(model, tokenizer, texts, max_tokens=tokens, prefill_step_size=chunk)
        return float(answer.stats.generation_tps)

    return [report.BatchSpeed(n, Repeats.of(rates)) for n, rates in _in_turns(rate, sizes, repeats)]


def sustained(
    model: nn.Module, prompts: Sequence[Prompt], seconds: float, window: float, sensors: Sensors
) -> tuple[report.Sustained, dict[str, float]]:
    """Decode without a pause for `seconds`, prompt after prompt; also returns joules by source.

    Prompts count for heat and energy; rates are of decoding alone, or every prompt would look like
    a dip. Sensors are read after each `window` seconds of decoding. Ctrl-C ends it with the windows
    measured so far.

    Raises:
        KeyboardInterrupt: before the first window had ended.
    """
    windows: list[report.Window] = []
    tokens = _endless(model, prompts)
    next(tokens)
    sensors.begin()
    start = time.perf_counter()
    count = total = 0
    inside = decoding = 0.0
    interrupted = False
    try:
        for took in tokens:
            total += 1
            if took is not None:
                count, inside, decoding = count + 1, inside + took, decoding + took
            now = time.perf_counter() - start
            over = now >= seconds
            # The rest at the end is no window: one slow token would make it a dip.
            if inside >= window or (over and not windows and count):
                heat, throttled = sensors.heat(), sensors.throttled()
                windows.append(report.Window(now, count / inside, heat, throttled))
                sensors.look()
                count, inside = 0, 0.0
            if over and windows:
                break
    except KeyboardInterrupt:
        if not windows:
            raise
        interrupted = True
    joules = sensors.end()
    rates = [w.tokens_per_s for w in windows]
    middle = statistics.median(rates)
    run = report.Sustained(
        seconds=time.perf_counter() - start,
        decode_s=decoding,
        window_s=window,
        tokens=total,
        windows=windows,
        tokens_per_s=report.Spread(middle, min(rates), max(rates)),
        drift=drift(rates),
        dips=sum(r < 0.8 * middle for r in rates),
        interrupted=interrupted,
    )
    return run, joules


def drift(rates: Sequence[float]) -> float | None:
    """Change from the first third of the windows to the last; None for fewer than six windows."""
    third = len(rates) // 3
    if third < 2:
        return None
    return statistics.median(rates[-third:]) / statistics.median(rates[:third]) - 1


def _endless(model: nn.Module, prompts: Sequence[Prompt]) -> Iterator[float | None]:
    """Seconds of each token, for ever; None for the first token after a prompt."""
    for prompt in itertools.cycle(prompts):
        last = None
        for _ in _steps(model, prompt.tokens, SUSTAINED_TOKENS):
            now = time.perf_counter()
            yield None if last is None else now - last
            last = time.perf_counter()

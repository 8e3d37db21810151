"""Timed generation with mlx-lm's own steps: first token, steady, in batches, and sustained.

Greedy, a fixed number of tokens whatever the model says (an end of text does not end it), so that
the same tokens are timed on every machine. Figures come with every repeat, not with a mean alone.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import batch_generate, generate_step

from .._experts.stream import stream
from ._power import Sensors
from ._prompts import Prompt

SUSTAINED_TOKENS = 256
"""Generated after each prompt of the sustained run."""


@dataclass(frozen=True)
class Run:
    """One generation.

    Attributes:
        first_token: seconds from the start to the first token.
        steps: seconds of each token after the first; the counts below are of these.
        hits, needed: experts that were resident, and that were wanted.
        read_bytes, reads: bytes read, in so many system calls.
        wait: seconds that the model stood still for reads.
    """

    first_token: float
    steps: list[float]
    hits: int
    needed: int
    read_bytes: int
    reads: int
    wait: float

    @property
    def tokens_per_s(self) -> float:
        """Of the tokens after the first."""
        return len(self.steps) / sum(self.steps)


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread of repeats, and the repeats themselves."""
    return {
        "median": statistics.median(values),
        "low": min(values),
        "high": max(values),
        "values": list(values),
    }


def generate(model: nn.Module, prompt: list[int], tokens: int) -> Run:
    """Generate `tokens` tokens, at least two, after a prompt.

    `generate_step` builds a token's successor before it yields it: the time to the first token is
    the one that users of mlx-lm see.
    """
    expert_stream = stream(model)
    chunk = expert_stream.plan.prefill_tokens
    start = time.perf_counter()
    times = []
    for _ in generate_step(
        mx.array(prompt), model, max_tokens=max(2, tokens), prefill_step_size=chunk
    ):
        times.append(time.perf_counter())
        if len(times) == 1:
            first, before = times[0] - start, expert_stream.stats()
            times = [time.perf_counter()]
    after = expert_stream.stats()
    counts = [
        (c.hits, c.hits + c.prefetched + c.misses, s.read.bytes, s.read.reads)
        for s in (before, after)
        for c in (s.cache,)
    ]
    hits, needed, read_bytes, reads = (b - a for a, b in zip(*counts, strict=True))
    return Run(
        first,
        [b - a for a, b in itertools.pairwise(times)],
        hits,
        needed,
        read_bytes,
        reads,
        after.read.wait_seconds - before.read.wait_seconds,
    )


def combined(runs: Sequence[Run]) -> dict[str, float]:
    """Of several runs' tokens after the first: seconds, hit rate and reads of one of them.

    Returns:
        `token_s`, of that `wait_s` for reads and `other_s`; `hit_rate`; `read_bytes`; `reads`.
    """
    tokens = sum(len(r.steps) for r in runs)
    token = sum(sum(r.steps) for r in runs) / tokens
    wait = min(token, sum(r.wait for r in runs) / tokens)
    needed = sum(r.needed for r in runs)
    return {
        "token_s": token,
        "wait_s": wait,
        "other_s": token - wait,
        "hit_rate": sum(r.hits for r in runs) / needed if needed else 1.0,
        "read_bytes": sum(r.read_bytes for r in runs) / tokens,
        "reads": sum(r.reads for r in runs) / tokens,
    }


def by_prompt(
    model: nn.Module, prompts: Sequence[Prompt], tokens: int, repeats: int, folder: Path | None
) -> list[dict[str, Any]]:
    """Steady decoding: every prompt `repeats` times, in turns, with a warm cache.

    Args:
        folder: where each prompt's routing goes, in a further, untimed turn; None for none.
    """
    expert_stream = stream(model)
    runs: list[list[Run]] = [[] for _ in prompts]
    for _ in range(repeats):
        for mine, prompt in zip(runs, prompts, strict=True):
            mine.append(generate(model, prompt.tokens, tokens))
    if folder is not None:
        for i, prompt in enumerate(prompts):
            with expert_stream.trace(folder / f"{i}.jsonl"):
                generate(model, prompt.tokens, tokens)
    return [
        {
            "task": p.task,
            "language": p.language,
            "prompt_tokens": len(p.tokens),
            "first_token_s": summary([r.first_token for r in mine]),
            "tokens_per_s": summary([r.tokens_per_s for r in mine]),
            **combined(mine),
        }
        for p, mine in zip(prompts, runs, strict=True)
    ]


def _in_turns(
    run: Callable[[int], Any], sizes: Sequence[int], repeats: int
) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Each size, and what came of its repeats; sizes take turns.

    After an untimed turn: a device may compile kernels for a size that it had not seen.
    """
    turns = [[run(n) for n in sizes] for _ in range(repeats + 1)][1:]
    return zip(sizes, zip(*turns, strict=True), strict=True)


def first_tokens(
    model: nn.Module, text: list[int], lengths: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Time to the first token, and decoding after it, by length of the prompt, in turns."""
    return [
        {
            "prompt_tokens": length,
            "seconds": summary([r.first_token for r in runs]),
            "tokens_per_s": summary([r.tokens_per_s for r in runs]),
        }
        for length, runs in _in_turns(lambda n: generate(model, text[:n], 8), lengths, repeats)
    ]


def batches(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Prompt], sizes: Sequence[int],
    tokens: int, repeats: int,
) -> list[dict[str, Any]]:  # fmt: skip
    """Tokens/s of all sequences together, by how many there are at once, in turns.

    mlx-lm's `batch_generate`; a sequence ends where the model ends its text.
    """

    def rate(size: int) -> float:
        texts = [p.tokens for p in itertools.islice(itertools.cycle(prompts), size)]
        chunk = max(1, stream(model).plan.prefill_tokens // size)
        answer = batch_generate(model, tokenizer, texts, max_tokens=tokens, prefill_step_size=chunk)
        return float(answer.stats.generation_tps)

    return [
        {"batch": size, "tokens_per_s": summary(rates)}
        for size, rates in _in_turns(rate, sizes, repeats)
    ]


def sustained(
    model: nn.Module, prompts: Sequence[Prompt], seconds: float, window: float, sensors: Sensors
) -> dict[str, Any]:
    """Decode without a pause for `seconds`, prompt after prompt; what each window came to.

    Prompts take their time, which counts for heat and energy; rates are of decoding alone, or every
    prompt would look like a dip. Ctrl-C ends it with the windows that there are.

    Args:
        window: seconds of decoding in one window.
        sensors: read once a window.

    Raises:
        KeyboardInterrupt: before the first window had ended.
    """
    windows: list[dict[str, Any]] = []
    steps = _endless(model, prompts)
    next(steps)
    sensors.begin()
    start = time.perf_counter()
    count = total = 0
    inside = decoding = 0.0
    interrupted = False
    try:
        for took in steps:
            total += 1
            if took is not None:
                count, inside, decoding = count + 1, inside + took, decoding + took
            now = time.perf_counter()
            over = now - start >= seconds
            # What is left at the end is no window: one slow token would make it a dip.
            if inside >= window or (over and not windows and count):
                windows.append(
                    {
                        "at_s": now - start,
                        "tokens_per_s": count / inside,
                        "celsius": sensors.heat(),
                        "throttled": sensors.throttled(),
                    }
                )
                sensors.look()
                count, inside = 0, 0.0
            if over and windows:
                break
    except KeyboardInterrupt:
        if not windows:
            raise
        interrupted = True
    joules = sensors.end()
    return {
        "seconds": time.perf_counter() - start,
        "decode_s": decoding,
        "window_s": window,
        "tokens": total,
        "windows": windows,
        **drift([w["tokens_per_s"] for w in windows]),
        "joules": joules,
        "interrupted": interrupted,
    }


def drift(rates: Sequence[float]) -> dict[str, Any]:
    """How the last third of some windows compares with the first, and how many were slow.

    A dip is a window below 80 % of the median. Fewer than six windows tell nothing of a drift.
    """
    third, middle = len(rates) // 3, statistics.median(rates)
    change = None
    if third >= 2:
        change = statistics.median(rates[-third:]) / statistics.median(rates[:third]) - 1
    return {
        "tokens_per_s": {k: v for k, v in summary(rates).items() if k != "values"},
        "drift": change,
        "dips": sum(r < 0.8 * middle for r in rates),
    }


def _endless(model: nn.Module, prompts: Sequence[Prompt]) -> Iterator[float | None]:
    """Seconds of a token at each step, for ever: 256 after each prompt, whose first has none."""
    chunk = stream(model).plan.prefill_tokens
    for prompt in itertools.cycle(prompts):
        last = None
        for _ in generate_step(
            mx.array(prompt.tokens), model, max_tokens=SUSTAINED_TOKENS, prefill_step_size=chunk
        ):
            now = time.perf_counter()
            yield None if last is None else now - last
            last = time.perf_counter()

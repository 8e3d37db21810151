"""Faults and changes, again and again: no byte more of MLX's memory, nor of Python's, than before.

test_injected.py counts slots, threads and descriptors after single ones.
"""

from __future__ import annotations

import gc
import itertools
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import current_thread, main_thread

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import all_experts, leftovers, load_streamed, smallest_cache
from mlx_lm.generate import generate_step

from mlx_streamexperts import BudgetError, ExpertReadError, StreamConfig, StreamError, stream
from mlx_streamexperts import _osinfo as platform

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
TIMES = 36
SLACK_BYTES = 64 << 10  # for all of them: the interpreter keeps freed objects for reuse


@pytest.fixture(params=["off", "on"])
def model(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Iterator[nn.Module]:
    """With the fewest slots; waiting for each layer, and running ahead."""
    config = StreamConfig(progress=False, prefetch="off", run_ahead=request.param)
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40, config)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        yield model


def held() -> tuple[int, int, int]:
    """Bytes of MLX's arrays, objects that the collector knows, and bytes of Python's memory."""
    gc.collect()
    gc.collect()  # what the finalizers of the first round let go
    mx.synchronize()
    mx.clear_cache()
    return mx.get_active_memory(), len(gc.get_objects()), tracemalloc.get_traced_memory()[0]


def assert_flat(again: Callable[[], object], times: int = TIMES, seconds: float = 60) -> None:
    """Do it until whatever is made once is made; then `times` more.

    What the last one left running holds a little for as long as it runs: hence `seconds` to wait.
    """
    tracemalloc.start()
    try:
        for _ in range(6):
            again()
        held()  # collects what has been left so far
        left, before = leftovers(), held()  # the first of them makes objects that stay
        for _ in range(times):
            again()
        end = time.monotonic() + seconds
        while (grown := growth(before, held(), times, left)) and time.monotonic() < end:
            time.sleep(0.05)
    finally:
        tracemalloc.stop()
    assert not grown


def growth(
    before: tuple[int, int, int], after: tuple[int, int, int], times: int, left: Counter[str]
) -> list[str]:
    """What there is more of than before, in words."""
    arrays, objects, python = (b - a for a, b in zip(before, after, strict=True))
    found = [f"{arrays} bytes of MLX's arrays"] if arrays > 0 else []
    found += [f"{objects} objects"] if objects >= times // 3 else []
    found += [f"{python} bytes of Python's memory"] if python >= SLACK_BYTES else []
    return found + [f"{n} x {name}" for name, n in (leftovers() - left).items()]


@pytest.mark.parametrize("leak", [lambda: mx.zeros(64) + 1, lambda: [[]], lambda: bytes(3000)])
def test_a_leak_would_be_seen(leak: Callable[[], object]) -> None:
    kept: list[object] = []

    def again() -> None:
        kept.append(leak())
        mx.eval(kept[-1])

    with pytest.raises(AssertionError):
        assert_flat(again, seconds=0)


@contextmanager
def failing(error: type[BaseException], after: int) -> Iterator[None]:
    """Reads fail, but for the first ones; by Ctrl-C only where it can come, in the main thread."""
    real, left = platform.read_into, [after]

    def read(*args: object) -> int:
        left[0] -= 1
        if left[0] < 0 and (error is OSError or current_thread() is main_thread()):
            raise error(5, "Input/output error")
        return real(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as m:
        m.setattr(platform, "read_into", read)
        yield


def test_reads_that_fail(model: nn.Module) -> None:
    """By an error and by Ctrl-C, the first one and a later one; and an exact pass after each."""
    stream(model)._reader._job_seconds = 0.0  # the caller reads
    expected = np.array(model(TOKENS))
    turns = itertools.cycle(itertools.product((OSError, KeyboardInterrupt), (0, 7)))
    raised: Counter[type] = Counter()

    def again() -> None:
        for layer in stream(model).layers:
            layer.slots.cache.clear()
        try:
            with failing(*next(turns)):
                mx.eval(model(TOKENS))
        except (ExpertReadError, KeyboardInterrupt) as e:
            raised[type(e)] += 1
        assert np.array_equal(np.array(model(TOKENS)), expected)

    assert_flat(again)
    assert raised[ExpertReadError] > TIMES // 2 - 3 and raised[KeyboardInterrupt] > 3


@pytest.mark.parametrize("model", ["on"], indirect=True)
def test_generations_that_are_left(model: nn.Module) -> None:
    def again() -> None:
        steps = generate_step(TOKENS[0], model, max_tokens=20)
        for _ in range(3):
            next(steps)
        steps.close()

    assert_flat(again)


@pytest.mark.parametrize("model", ["on"], indirect=True)
def test_resizes(model: nn.Module) -> None:
    expert_stream = stream(model)
    sizes = (all_experts(expert_stream) // 2, smallest_cache(expert_stream))

    def again() -> None:
        for size in sizes:
            expert_stream.resize(size)
            mx.eval(model(TOKENS))
        with pytest.raises(StreamError):
            expert_stream.resize(1)

    assert_flat(again, TIMES // 2)  # each resizes twice


def test_loads(checkpoint: Callable[..., Path]) -> None:
    """One that is closed, one that is let go of, one that does not fit, in turns."""
    folder = checkpoint("qwen3_moe")
    turns = itertools.cycle(("closed", "let go of", "does not fit"))

    def again() -> None:
        if (turn := next(turns)) == "does not fit":
            with pytest.raises(BudgetError):
                load_streamed(folder, 1024)
            return
        model = load_streamed(folder, 1 << 40)
        mx.eval(model(TOKENS))
        if turn == "closed":
            stream(model).close()

    assert_flat(again)

"""A device that fails once: the error comes out of the call, and nothing wrong ever does.

Metal reports a command buffer that failed to whoever waits for it first, and then forgets it: what
it should have computed is garbage from then on, without a word. The stand-in here does the same.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, all_experts, load_streamed, smallest_cache
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import stream
from mlx_streamexperts._errors import OtherThreadError, StreamError
from mlx_streamexperts._experts import bank, cpu_streams, layer, prefetch, split
from mlx_streamexperts._experts.bank import Bank, SlotTensor, numbers
from mlx_streamexperts._experts.speculative import cache_snapshot, runahead, slot_tables

EVALUATING = (bank, cache_snapshot, cpu_streams, layer, prefetch, runahead, slot_tables, split)
"""Every module on the path of a token that uses MLX."""

FAILURE = "[METAL] Command buffer execution failed: Internal Error"
TOKENS = families.token_stream(families.VOCAB, 40, seed=6).reshape(2, 20).tolist()


class Device:
    """Stands in for `mlx.core` and `numpy` in our modules; one evaluation fails.

    Args:
        at: which one, counted from 1.
        prompt: `mx.async_eval` says so itself, and not only the next evaluation.
    """

    def __init__(self, at: int, prompt: bool) -> None:
        self._at, self._prompt = at, prompt
        self.seen, self.fired, self._pending = 0, False, False
        self._evaluated: mx.array | None = None

    def evaluate(self, *arrays: Any, at_once: bool = True) -> None:
        if self._pending:
            self._pending = False
            raise RuntimeError(FAILURE)
        self.seen += 1
        mx.eval(*arrays)
        if self.seen == self._at:
            self.fired = True
            for _, array in tree_flatten(arrays):
                garble(array)
            if at_once:
                raise RuntimeError(FAILURE)
            self._pending = True
        self._evaluated = arrays[0] if at_once else None

    @property
    def mx(self) -> Any:
        later = functools.partial(self.evaluate, at_once=self._prompt)
        return _Instead(mx, eval=self.evaluate, async_eval=later)

    @property
    def numpy(self) -> Any:
        return _Instead(np, array=self._array)

    def _array(self, content: Any, *rest: Any) -> np.ndarray:
        """NumPy drops the error that an array's evaluation raises, and asks again."""
        if isinstance(content, mx.array) and content is not self._evaluated:
            with suppress(RuntimeError):
                self.evaluate(content)
        return np.array(content, *rest)


def garble(array: mx.array) -> None:
    """Zeros in place of what was computed: numbers that could be right, for all one sees."""
    bits = array.view({1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size])
    mx.eval(bits)
    np.asarray(memoryview(bits))[...] = 0  # type: ignore[arg-type]


class _Instead:
    def __init__(self, module: ModuleType, **others: Any) -> None:
        self._module = module
        vars(self).update(others)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def passes(model: nn.Module, evaluate: Callable[..., None]) -> list[np.ndarray]:
    """Logits of two sequences, whose steps are built before any of them is evaluated."""
    caches = [make_prompt_cache(model) for _ in TOKENS]
    logits = []
    for first, last in ((0, 8), (8, 9), (9, 10)):
        built = [
            model(mx.array([row[first:last]]), cache=cache)
            for row, cache in zip(TOKENS, caches, strict=True)
        ]
        evaluate(built)
        logits += [np.array(y) for y in built]
    return logits


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        (True, {}),
        (True, {"overlap": "on"}),
        (True, {"in_place": "off", "prefetch": "on"}),
        pytest.param(True, {"prefetch": "on"}, marks=pytest.mark.full),
        pytest.param(False, {"prefetch": "on"}, marks=pytest.mark.full),
        (True, {"run_ahead": "on", "prefetch": "on"}),
        (False, {"run_ahead": "on", "prefetch": "on"}),
    ],
    ids=str,
)
def test_a_device_that_fails_once(
    prompt: bool,
    options: dict[str, Any],
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At each evaluation that there is: an error or the right logits, and right ones afterwards."""
    folder = checkpoint("qwen3_moe")
    expected = passes(mlx_lm.utils.load_model(folder)[0], mx.eval)
    model = load_streamed(folder, 1 << 40, replace(QUIET, **options))
    raised = 0

    def exact(logits: list[np.ndarray]) -> bool:
        return all(np.array_equal(a, b) for a, b in zip(expected, logits, strict=True))

    with stream(model) as s:
        s.resize(max(smallest_cache(s), all_experts(s) // 3))
        for at in range(1, 1000):
            device = Device(at, prompt)
            with monkeypatch.context() as patched:
                for module in EVALUATING:
                    patched.setattr(module, "mx", device.mx)
                    if hasattr(module, "np"):
                        patched.setattr(module, "np", device.numpy)
                try:
                    logits = passes(model, device.evaluate)
                except RuntimeError as e:
                    assert str(e) == FAILURE
                    raised += 1
                else:
                    assert not device.fired, f"evaluation {at}: {exact(logits)}"
            if not device.fired:
                break
            assert exact(passes(model, mx.eval)), f"after evaluation {at}"
        assert not device.fired
        assert raised == at - 1 > 20


def built_elsewhere() -> tuple[Bank, mx.array, Callable[[], None]]:
    """A bank with an unevaluated reader of another thread, and what ends that thread."""
    module = nn.Module()
    its_bank = Bank({"weight": SlotTensor(module, "weight", (8, 4), mx.float32)}, 2, True)
    readers: list[mx.array] = []
    ready, over = threading.Event(), threading.Event()

    def build() -> None:
        readers.append(its_bank.track_reader(module.weight[mx.array([1])] * 2))
        ready.set()
        over.wait()

    thread = threading.Thread(target=build)
    thread.start()
    ready.wait()

    def end() -> None:
        over.set()
        thread.join()

    return its_bank, readers[0], end


def test_mlx_refuses_what_another_thread_has_built() -> None:
    """By a message that we know from all others."""
    its_bank, output, end = built_elsewhere()
    try:
        with pytest.raises(RuntimeError) as said:
            mx.eval(output)
        assert bank._of_another_thread(said.value)
        with pytest.raises(OtherThreadError, match="another thread"):
            its_bank.flush_readers()
    finally:
        end()
    assert not bank._of_another_thread(RuntimeError(FAILURE))


def test_a_device_error_is_not_taken_for_another_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the thread that built it lives or not."""
    its_bank, _, end = built_elsewhere()
    try:
        for _ in range(2):
            with monkeypatch.context() as patched:
                patched.setattr(bank, "mx", _Instead(mx, eval=_fails))
                with pytest.raises(RuntimeError, match="Command buffer"):
                    its_bank.flush_readers()
            end()
    finally:
        end()
    its_bank.flush_readers()


def _fails(*_: Any) -> None:
    raise RuntimeError(FAILURE)


def test_numpy_swallows_an_arrays_error_and_numbers_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second look is what a device's garbage would come from; here it is all sevens."""
    _, output, end = built_elsewhere()
    monkeypatch.setattr(mx.array, "__array__", lambda *a, **k: np.full(3, 7), raising=False)
    try:
        assert np.array(output).tolist() == [7, 7, 7]
        with pytest.raises(RuntimeError, match="There is no Stream"):
            numbers(output)
    finally:
        end()


def test_no_memory_is_told_from_a_device_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def new_bank(error: str) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError(error)

        monkeypatch.setattr(bank, "mx", _Instead(mx, eval=fail))
        Bank({"weight": SlotTensor(nn.Module(), "weight", (8, 4), mx.float32)}, 2, True)

    with pytest.raises(StreamError, match="no memory for 256 bytes"):
        new_bank("[malloc] Unable to allocate 256 bytes.")
    with pytest.raises(RuntimeError, match="Command buffer"):
        new_bank(FAILURE)


@pytest.mark.parametrize("end", ["close", "resize"])
def test_an_error_that_comes_up_at_the_end_is_raised_once_all_is_done(
    end: str, streamed: tuple[nn.Module, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was built and never evaluated may hold garbage: its owner has to know."""
    model, s = streamed
    small = all_experts(s) // 2
    before = s.plan.trunk
    model(mx.array([TOKENS[0][:3]]))
    with monkeypatch.context() as patched:
        patched.setattr(bank, "mx", _Instead(mx, eval=_fails))
        with pytest.raises(RuntimeError, match="Command buffer"):
            s.close() if end == "close" else s.resize(small)
    if end == "close":
        tables = [t.slot for x in s.layers for t in x.tensors.values()]
        assert all(getattr(t.module, t.attribute).nbytes == 0 for t in tables)
        assert not any(t.is_alive() for t in s.reader._threads)
        s.close()
        assert s.held_bytes() == before
    else:
        s.resize(small)
        expected = model(mx.array([TOKENS[0][:3]]))
        assert mx.array_equal(expected, model(mx.array([TOKENS[0][:3]])))


def test_one_failure_does_not_end_prefetching_and_a_block_that_cannot_be_probed_does(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_moe")
    model = load_streamed(folder, 1 << 40, replace(QUIET, prefetch="on"))
    with stream(model) as s:
        s.resize(all_experts(s) // 2)
        fails: list[bool] = []
        real = prefetch.Router.choose

        def choose(self: prefetch.Router, x: mx.array) -> Any:
            if fails and fails.pop(0):
                raise ValueError("not now")
            return real(self, x)

        monkeypatch.setattr(prefetch.Router, "choose", choose)
        cache = make_prompt_cache(model)

        def step() -> int:
            mx.eval(model(mx.array([[3]]), cache=cache))
            return s.stats().prefetching_layers

        count = step()
        assert count == len(s.layers) - 1
        for failures in ([True], [True, True], [False, True, True]):
            fails[:] = failures
            assert [step() for _ in range(4)] == [count] * 4
        fails[:] = [True] * 3
        assert [step() for _ in range(3)] == [count, count, count - 1]
        mx.eval(model(mx.array([[3]]), cache=cache))

"""Several threads and one model: the moments at which one could disturb another.

benchmarks/races.py tries moments at random; a few of its schedules run here. Those that it found to
go wrong, or that reading did, are staged below.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, all_experts, load_streamed, smallest_cache, until

from mlx_streamexperts import ExpertStream, StreamConfig, StreamError, stream
from mlx_streamexperts._experts import prefetch, thread_guard
from mlx_streamexperts._experts.autotune import AutoTuner

RACES = Path(__file__).parent.parent / "benchmarks" / "races.py"


def test_random_schedules(tmp_path: Path) -> None:
    """In development mode, with threads, files and memory counted."""
    out = tmp_path / "found.json"
    command = [sys.executable, "-X", "dev", str(RACES), "--schedules", "12"]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    found = json.loads(out.read_text())
    assert found["failures"] == [] and "wrong" not in found
    assert found["dev_mode"]
    assert min(found[n] for n in ("schedules", "compared", "yields", "resizes", "loads")) > 0


class Pair:
    """A streamed model, and what stock says."""

    def __init__(self, folder: Path, config: StreamConfig = QUIET) -> None:
        stock, _ = mlx_lm.utils.load_model(folder)
        self.tokens = [mx.array(families.token_stream(families.VOCAB, 1, s))[None] for s in (1, 2)]
        self.expected = [np.array(stock(t)) for t in self.tokens]
        self.model: nn.Module = load_streamed(folder, 1 << 40, config)
        self.stream: ExpertStream = stream(self.model)
        self.stream.resize(smallest_cache(self.stream))

    def exact(self, which: int = 0) -> bool:
        return np.array_equal(np.array(self.model(self.tokens[which])), self.expected[which])


@pytest.fixture
def pair(checkpoint: Callable[..., Path]) -> Iterator[Pair]:
    made = Pair(checkpoint("qwen3_moe"))
    yield made
    made.stream.close()


class Elsewhere(threading.Thread):
    """Calls something in a thread of its own; `result` waits for what it returns or raises."""

    def __init__(self, call: Callable[[], Any]) -> None:
        super().__init__()
        self._call, self._outcome = call, None
        self.start()

    def run(self) -> None:
        try:
            self._outcome = self._call()
        except Exception as e:
            self._outcome = e

    def result(self) -> Any:
        self.join(60)
        assert not self.is_alive()
        return self._outcome


def test_closed_between_a_calls_indices_and_its_slots(pair: Pair) -> None:
    """Its experts were all there: it would have computed with slots that are no more."""
    assert Elsewhere(pair.exact).result() is True
    with pair.stream.layers[-1].lock:
        call = Elsewhere(pair.exact)
        call.join(0.2)  # it waits for the lock by then, most likely
        pair.stream.close()
    outcome = call.result()
    assert isinstance(outcome, StreamError) and "closed" in str(outcome)


def test_a_call_while_the_cache_is_exchanged_waits(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots, calls = pair.stream.layers[0].slots, []
    opened = slots.open

    def slowly(*args: Any) -> None:
        calls.append(Elsewhere(pair.exact))
        calls[0].join(0.2)
        opened(*args)

    monkeypatch.setattr(slots, "open", slowly)  # undone: it knows the model, and would keep it
    pair.stream.resize(all_experts(pair.stream) // 2)
    assert calls[0].result() is True


def test_a_call_of_a_resident_layer_has_one_banks_tables(pair: Pair) -> None:
    """Its projections must not be exchanged between one and the next."""
    pair.stream.resize(all_experts(pair.stream))
    layer = pair.stream.layers[0]
    up, resizing = layer.switch.up_proj, []

    class Resizing(nn.Module):
        def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
            if not resizing:
                small = smallest_cache(pair.stream)
                resizing.append(Elsewhere(lambda: pair.stream.resize(small)))
                resizing[0].join(0.3)
            return up(*args, **kwargs)

    layer.switch.up_proj = Resizing()
    assert pair.exact()
    assert resizing[0].result() is None
    layer.switch.up_proj = up
    assert pair.exact(1)


def test_calls_while_a_layer_is_read_in_whole(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """They neither take its slots nor see it half-filled."""
    layer, calls = pair.stream.layers[0], []
    fill = layer.fill

    def slowly(experts: Any) -> Iterator[int]:
        calls.append(Elsewhere(pair.exact))
        calls[0].join(0.2)
        yield from fill(experts)

    monkeypatch.setattr(layer, "fill", slowly)
    pair.stream.resize(all_experts(pair.stream))
    assert calls[0].result() is True
    assert layer.resident and pair.exact()


def test_reading_in_whole_is_done_again_after_ctrl_c(pair: Pair) -> None:
    """What a call has placed since is no obstacle."""
    layer = pair.stream.layers[0]
    fill = layer.fill

    def interrupted(experts: Any) -> Iterator[int]:
        layer.fill = fill  # type: ignore[method-assign]
        raise KeyboardInterrupt
        yield

    layer.fill = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        pair.stream.resize(all_experts(pair.stream))
    assert pair.exact(1) and pair.exact(0)
    pair.stream.resize(all_experts(pair.stream))
    assert layer.resident and pair.exact()


def test_two_threads_resize(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other: never some layers of one size and some of the other."""
    small, large = smallest_cache(pair.stream), all_experts(pair.stream) // 2
    layer, resizing = pair.stream.layers[0], []
    opened = layer.open

    def slowly(*args: Any) -> None:
        opened(*args)
        if not resizing:
            resizing.append(Elsewhere(lambda: pair.stream.resize(small)))
            resizing[0].join(0.3)

    monkeypatch.setattr(layer, "open", slowly)
    pair.stream.resize(large)
    assert resizing[0].result() is None
    assert sum(x.cache.slots * x.expert_bytes for x in pair.stream.layers) == small
    assert pair.exact()


def test_the_first_thread_evaluates_what_it_left_when_it_calls_next(pair: Pair) -> None:
    """Of all its sequences: the second thread could not, and waits for it."""
    left = [pair.model(t) for t in pair.tokens]
    second = Elsewhere(pair.exact)
    until(lambda: pair.stream._guard.shared)
    assert pair.exact(1)
    assert second.result() is True
    assert all(map(np.array_equal, map(np.array, left), pair.expected))


def test_wrong_passes_leave_nothing_to_another_thread(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that has evaluated all it got, and waits for work: others need not wait for it."""
    monkeypatch.setattr(thread_guard, "_PATIENCE_SECONDS", 0.0)
    pair = Pair(checkpoint("qwen3_moe"), replace(QUIET, run_ahead="on"))
    with pair.stream:
        pair.stream.resize(all_experts(pair.stream) * 7 // 8)
        ready, over = threading.Event(), threading.Event()

        def first() -> bool:
            right = pair.exact(0) and pair.exact(1) and pair.exact(0)
            pair.stream.layers[0].slots.cache.clear()
            right = right and pair.exact(0)  # the first layer lacks its experts, the next one none
            ready.set()
            over.wait()
            return right

        idle = Elsewhere(first)
        ready.wait()
        stats = pair.stream.stats().run_ahead
        pair.stream.layers[1].slots.cache.clear()  # so that slots are written
        assert Elsewhere(lambda: pair.exact(1)).result() is True
        over.set()
        assert idle.result() is True
        assert stats.passes > stats.steps > 0


def test_a_router_that_is_asked_hears_its_own_gate_only(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread's arrays could not be evaluated here."""
    pair = Pair(checkpoint("qwen3_moe"), replace(QUIET, prefetch="on"))
    with pair.stream:
        prefetcher = pair.stream.layers[1].prefetcher
        assert isinstance(prefetcher, prefetch.RouterPrefetcher)
        router, x = prefetcher.router, mx.random.normal((1, 1, families.HIDDEN))
        expected = [np.array(a) for a in router.choose(x) if a is not None]
        softmax = mx.softmax

        def meanwhile(*args: Any, **kwargs: Any) -> mx.array:
            monkeypatch.setattr(mx, "softmax", softmax)
            Elsewhere(lambda: router._block["gate"](-x)).result()
            return softmax(*args, **kwargs)

        monkeypatch.setattr(mx, "softmax", meanwhile)
        got = [np.array(a) for a in router.choose(x) if a is not None]
        assert len(got) == 2 and all(map(np.array_equal, got, expected))


def test_a_trial_timed_by_several_threads() -> None:
    """None decides on times that another has just thrown away."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        tuner = AutoTuner(("a", "b"), "a", turn=1, turns=1)
        tuner._BEFORE = tuner._HOLD = tuner._LONGEST_HOLD = 1  # type: ignore[misc]
        tuner._hold = tuner._left = 1
        recording = [Elsewhere(lambda: [tuner.record(1.0) for _ in range(20000)]) for _ in range(4)]
        assert all(isinstance(t.result(), list) for t in recording)
    finally:
        sys.setswitchinterval(before)

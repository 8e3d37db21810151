"""Keeping a GPU awake while a token waits for reads, and between requests."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue

import families
import mlx_lm.utils
import pytest
from conftest import assert_same, load_streamed, until

from mlx_streamexperts import StreamConfig, stream
from mlx_streamexperts._experts import keep_awake
from mlx_streamexperts._experts.keep_awake import KeepAwake


def test_beats_come_while_a_caller_waits() -> None:
    awake = KeepAwake(layers=2, always=True, scarce=lambda: False, make_beat=lambda: lambda: None)
    with awake.during_wait():
        until(lambda: awake.beats > 3)
    awake.close()
    beats = awake.beats
    with awake.during_wait():  # closed: nothing beats any more
        time.sleep(0.01)
    assert awake.beats == beats


class Noted(SimpleQueue[None]):
    """Notes how long its reader waits: None for ever."""

    timeout: float | None = None

    def get(self, block: bool = True, timeout: float | None = None) -> None:
        self.timeout = timeout
        return super().get(block, timeout)


@pytest.mark.parametrize("scarce", [False, True])
def test_beats_go_on_between_requests_for_a_while(
    scarce: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep_awake, "_IDLE_BEAT", 0.002)
    monkeypatch.setattr(keep_awake, "SimpleQueue", Noted)
    asked = threading.Event()

    def is_scarce() -> bool:
        asked.set()
        return scarce

    awake = KeepAwake(2, always=False, scarce=is_scarce, make_beat=lambda: lambda: None)
    with awake.during_wait():  # the trial has not switched beats during waits on yet
        pass
    assert asked.wait(60)
    if scarce:
        time.sleep(0.02)
        assert awake.beats == 0
    else:
        until(lambda: awake.beats > 2)
        monkeypatch.setattr(keep_awake, "_IDLE_SECONDS", 0.05)
        until(lambda: awake._wake.timeout is None)  # type: ignore[attr-defined]
        beats = awake.beats  # the machine may sleep now
        time.sleep(0.01)
        assert awake.beats == beats
    awake.close()


@pytest.mark.parametrize(("gain", "kept"), [(0.9, True), (0.99, False), (1.1, False)])
def test_beats_stay_only_if_they_clearly_pay(gain: float, kept: bool) -> None:
    awake = KeepAwake(1, always=False, scarce=lambda: False, make_beat=lambda: lambda: None)
    awake.close()
    tuner = awake.tuner
    assert tuner.choice is False
    for _ in range(60):
        tuner.record(gain if tuner.choice else 1.0)
    assert not tuner.trying
    assert tuner.choice is kept


def test_an_error_of_the_device_ends_the_beats_and_no_call() -> None:
    def broken() -> Callable[[], None]:
        raise RuntimeError("no such device")

    awake = KeepAwake(2, always=True, scarce=lambda: False, make_beat=broken)
    until(lambda: awake.failed is not None)
    with awake.during_wait():
        pass
    assert awake.failed == "RuntimeError: no such device"
    awake.close()


def test_it_changes_no_bit(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keep_awake, "_AFTER_SECONDS", 0.0)
    folder = checkpoint("qwen3_moe")
    tokens = families.token_stream(families.VOCAB, 40, seed=3)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, 20)
    model = load_streamed(folder, 61_440, StreamConfig(progress=False, keep_awake="on"))
    with stream(model) as expert_stream:
        assert_same(expected, families.run(model, tokens, 20), "kept awake")
        assert expert_stream.stats().cache.misses > 20
        with expert_stream._keep_awake.during_wait():  # type: ignore[union-attr]
            until(lambda: expert_stream.stats().beats > 2)
        expert_stream.reset()
    names = {t.name for t in threading.enumerate()}
    assert "keep-awake" not in names


def test_only_metal_is_kept_awake_unless_asked(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with stream(load_streamed(checkpoint("qwen3_moe"), 1 << 40)) as here:
        assert here._keep_awake is None
    monkeypatch.setattr("mlx_streamexperts._experts.stream.on_metal", lambda: True)
    with stream(load_streamed(checkpoint("qwen3_moe"), 1 << 40)) as mac:
        assert mac._keep_awake is not None
        timers = mac._timers.values()
        assert all(t._other is mac._keep_awake.tuner for t in timers)
    off = StreamConfig(progress=False, keep_awake="off")
    with stream(load_streamed(checkpoint("qwen3_moe"), 1 << 40, off)) as mac:
        assert mac._keep_awake is None

"""Expert slots go to other programs while the system is short of memory, and come back."""

from __future__ import annotations

import ctypes
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import all_experts, assert_same, load_streamed, smallest_cache
from serving import serving

from mlx_streamexperts import ExpertStream, StreamConfig, StreamError, _osinfo, stream
from mlx_streamexperts._analysis.exactness import decode, load_stock, random_tokens
from mlx_streamexperts._cache.expert_map import ExpertCache
from mlx_streamexperts._experts.pressure import PressureWatch
from mlx_streamexperts.server import _command as command

PLANNED, MOST = 800, 500


class Holder:
    """An expert cache of 800 bytes that can do without 500."""

    planned_cache, most_given_back = PLANNED, MOST

    def __init__(self) -> None:
        self.given_back = 0
        self.refuses = False

    def give_back(self, nbytes: int) -> None:
        if self.refuses:
            raise StreamError("no memory for 100 bytes of expert slots")
        self.given_back = nbytes


def watch(holder: Holder, system: SimpleNamespace) -> PressureWatch:
    return PressureWatch(
        holder, lambda: system.level, lambda: system.available, reserve=50, start=False
    )


def test_slots_go_part_by_part_down_to_a_minimum(caplog: pytest.LogCaptureFixture) -> None:
    holder, system = Holder(), SimpleNamespace(level=1, available=0)
    watched, given = watch(holder, system), []
    for second in range(25):
        watched.look(second)
        given.append(holder.given_back)
    assert given[:7] == [100, 100, 100, 200, 200, 200, 300]  # a change first has time to show
    assert given[-1] == MOST
    assert "gives 100 B, and has 700 B of 800 B (never less than 300 B)" in caplog.text
    assert caplog.text.count("can give no more") == 1


def test_twice_as_much_goes_when_it_is_critical() -> None:
    holder = Holder()
    watch(holder, SimpleNamespace(level=2, available=0)).look(0)
    assert holder.given_back == 200


def test_slots_come_back_after_a_minute_of_calm_if_there_is_room() -> None:
    holder, system = Holder(), SimpleNamespace(level=1, available=1000)
    watched = watch(holder, system)
    watched.look(0)
    watched.look(3)
    assert holder.given_back == 200
    system.level = 0
    watched.look(62)
    assert holder.given_back == 200
    system.available = 149  # a part would leave less than the reserve
    watched.look(64)
    assert holder.given_back == 200
    system.available = 150
    watched.look(65)
    assert holder.given_back == 100
    watched.look(100)
    assert holder.given_back == 100
    system.level = 1
    watched.look(130)  # short again
    assert holder.given_back == 200


def test_a_cache_that_cannot_grow_again_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    holder, system = Holder(), SimpleNamespace(level=0, available=1000)
    holder.given_back, holder.refuses = 100, True
    watch(holder, system).look(0)
    assert "keeps its size: no memory for 100 bytes" in caplog.text


@pytest.mark.parametrize(
    ("available", "psi", "expected"),
    [
        (1001, "some avg10=9.99 avg60=50.00 avg300=0.00 total=1\nfull avg10=0.00 ...\n", 0),
        (1001, "some avg10=10.00 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 ...\n", 1),
        (1001, None, 0),
        (999, None, 1),
        (499, None, 2),
    ],
)
def test_pressure_on_linux(
    available: int, psi: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(_osinfo, "available_memory_bytes", lambda: available)
    monkeypatch.setattr(_osinfo, "memory_reserve", lambda: 1000)
    if psi is not None:
        (tmp_path / "proc/pressure").mkdir(parents=True)
        (tmp_path / "proc/pressure/memory").write_text(psi)
    assert _osinfo.memory_pressure(tmp_path) == expected


@pytest.mark.parametrize(("level", "expected"), [(1, 0), (2, 1), (4, 2), (None, 0)])
def test_pressure_on_macos(
    level: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XNU's levels (bsd/sys/event.h): 1 normal, 2 warning, 4 critical."""

    def sysctlbyname(name: bytes, value: object, size: object, new: None, length: int) -> int:
        assert name == b"kern.memorystatus_vm_pressure_level"
        if level is None:
            return -1
        ctypes.memmove(value, ctypes.byref(ctypes.c_int(level)), 4)
        return 0

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(sysctlbyname=sysctlbyname))
    assert _osinfo.memory_pressure() == expected


def test_results_stay_the_same_while_slots_go_and_come(
    checkpoint: Callable[..., Path], not_compiled: None
) -> None:
    folder, tokens = checkpoint("qwen3_moe"), [t % 128 for t in random_tokens(16)]
    expected, _ = decode(load_stock(folder), tokens)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as s:
        s.resize(all_experts(s) * 3 // 4)
        planned, bound = s.planned_cache, s.plan.bound
        most = s.most_given_back
        assert most == planned - smallest_cache(s)
        over, went = threading.Event(), []

        def change() -> None:
            while not over.is_set():
                for given in (most, 0, most // 2, 3 * most // 4):
                    s.give_back(given)
                    went.append(s.stats().given_back)

        thread = threading.Thread(target=change)
        thread.start()
        try:
            for _ in range(3):
                assert_same(expected, decode(model, tokens)[0], "while the cache changes")
        finally:
            over.set()
            thread.join()
        assert max(went) == most
        s.give_back(1 << 60)
        assert s.plan.cache == smallest_cache(s)
        assert s.plan.bound == bound - most  # a longer context may not take it
        assert_same(expected, decode(model, tokens)[0], "with the fewest slots")
        for nothing in (0, -(1 << 20)):
            s.give_back(nothing)
            assert (s.plan.cache, s.plan.bound, s.given_back) == (planned, bound, 0)


def test_the_most_useful_experts_move_to_the_new_slots(
    streamed: tuple[nn.Module, ExpertStream],
) -> None:
    model, s = streamed
    s.resize(all_experts(s) // 2)
    model(mx.array([[1, 2, 3, 4, 5, 6]]))
    mx.eval(model(mx.array([[7]])))
    layer = s.layers[-1]
    cache, before = layer.cache, s.stats().cache
    experts = {e: contents(layer, e) for e in cache.resident}
    s.give_back(s.planned_cache // 2)
    kept = layer.cache.resident
    assert 0 < len(kept) == layer.cache.slots < len(experts)
    for e in kept:
        assert contents(layer, e) == experts[e]
    assert s.stats().cache == before  # counters go on, and moving is no miss
    s._open_layer(layer, 2 * len(kept), keep=True)  # as growing does where memory allows it
    assert kept == layer.cache.resident
    for e in kept:
        assert contents(layer, e) == experts[e]


def contents(layer: object, expert: int) -> list[bytes]:
    slot = int(layer.cache.slot_of[expert])  # type: ignore[attr-defined]
    return [bytes(m) for m in layer.slots.bank.destinations(slot)]  # type: ignore[attr-defined]


def test_a_change_that_fails_leaves_a_cache_that_works(
    streamed: tuple[nn.Module, ExpertStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, s = streamed
    s.resize(all_experts(s) // 2)
    s.give_back(s.planned_cache // 2)
    expected, given = np.array(model(mx.array([[1, 2, 3]]))), s.given_back

    def zeros(shape: tuple[int, ...], *more: object) -> mx.array:
        if shape[0] > s.plan.slots[-1]:
            raise MemoryError("[malloc] unable to allocate")
        return original(shape, *more)

    original = mx.zeros
    monkeypatch.setattr(mx, "zeros", zeros)
    with pytest.raises(StreamError, match="no memory"):
        s.give_back(0)
    assert s.given_back == given
    assert np.array_equal(np.array(model(mx.array([[1, 2, 3]]))), expected)


def test_memory_never_exceeds_the_planned_cache(checkpoint: Callable[..., Path]) -> None:
    model = load_streamed(checkpoint("qwen3_moe"), 1 << 40)
    with stream(model) as s:
        s.resize(all_experts(s) * 3 // 4)
        mx.eval(model(mx.array([[1, 2, 3, 4, 5, 6]])))
        mx.clear_cache()
        mx.reset_peak_memory()
        held = mx.get_active_memory()
        for given in (s.planned_cache // 8, s.planned_cache // 2, s.planned_cache // 4, 0):
            s.give_back(given)
            assert mx.get_active_memory() <= held - s.given_back + (64 << 10)
        assert mx.get_peak_memory() <= held + (64 << 10)


def test_a_stream_watches_only_if_it_is_asked_to(checkpoint: Callable[..., Path]) -> None:
    def watching(config: StreamConfig) -> bool:
        with stream(load_streamed(checkpoint("qwen3_moe"), 1 << 40, config)) as s:
            found = s._pressure is not None
        return found

    assert watching(StreamConfig(progress=False, pressure="auto"))
    assert not watching(StreamConfig(progress=False))
    with pytest.raises(StreamError, match="pressure"):
        StreamConfig(pressure="on")


def test_a_server_watches_and_says_what_it_gave() -> None:
    with serving("--pressure", "auto") as running:
        s = running.generator.model_provider.expert_stream
        assert s is not None and s._pressure is not None
        s._pressure.close()  # or it might take a part back before it is compared
        before = running.text("One day", 4)
        s.give_back(s.most_given_back)
        assert running.text("One day", 4) == before
        metrics = running.request("GET", "/metrics")[2].decode()
        found = re.search(r"^streamexperts_expert_cache_given_back_bytes (\S+)$", metrics, re.M)
        assert found is not None and float(found[1]) == s.given_back > 0


def test_a_server_watches_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def patched(config: StreamConfig) -> None:
        asked.append(config.pressure)
        raise StreamError("that is all")

    monkeypatch.setattr(command, "patch", patched)
    assert command.main(["--port", "0"]) == 1
    assert asked == ["auto"]


def test_pinned_experts_keep_their_slots() -> None:
    before = ExpertCache(8, 6, pinned=(0, 1))
    before.place([0, 1])
    for expert in (2, 3, 4, 5):
        before.place([expert])
    after = ExpertCache(8, 4, pinned=(0, 1))
    moved = after.succeed(before)
    assert moved == {0: 0, 1: 1, 4: 4, 5: 5}
    assert np.flatnonzero(after.slot_of >= 0).tolist() == [0, 1, 4, 5]
    assert after.place([6], keep=[0, 1, 5]) == [6]  # the least recently used makes room
    assert after.slot_of[4] < 0

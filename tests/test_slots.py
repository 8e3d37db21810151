"""A layer's slots: experts arrive in them, and no slot ever claims bytes that it does not hold."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_streamexperts import ExpertReadError
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._errors import OtherThreadError
from mlx_streamexperts._experts.bank import SlotTensor
from mlx_streamexperts._experts.slots import ExpertSlots, ExpertTensor
from mlx_streamexperts._io.checkpoint import ExpertTable
from mlx_streamexperts._io.reader import ExpertReader

EXPERTS, ROW = 8, 4  # a row is one expert's bytes, each of which is its number


def test_slots_by_example(slots: ExpertSlots) -> None:
    arrivals = slots.begin([5, 2])  # both are missing: their reads begin
    assert list(arrivals.left) == [5, 2]
    arrivals.all()
    assert (held(slots, 5), held(slots, 2)) == ([5] * ROW, [2] * ROW)
    assert not slots.begin([2]).left  # a hit
    slots.begin([6, 7]).all()  # there are three slots, and 5 was not used for the longest time
    assert slots.cache.resident == [2, 6, 7]
    slots.prefetch([1])  # read it while nobody waits; it takes a slot as well
    slots.begin([1]).all()
    assert held(slots, 1) == [1] * ROW


@pytest.fixture
def reader() -> Iterator[ExpertReader]:
    reader = ExpertReader(threads=1)
    yield reader
    reader.close()


@pytest.fixture
def build(reader: ExpertReader, tmp_path: Path) -> Callable[[bool], ExpertSlots]:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"".join(bytes([e]) * ROW for e in range(EXPERTS)))

    def build(in_place: bool) -> ExpertSlots:
        stored = ExpertTable(
            "U8", ROW, (str(file),) * EXPERTS, tuple(range(0, EXPERTS * ROW, ROW)), ("w",) * EXPERTS
        )
        slot = SlotTensor(nn.Module(), "weight", (ROW,), mx.uint8)
        slots = ExpertSlots("a layer", {"weight": ExpertTensor(slot, stored)}, EXPERTS)
        slots.open(3, reader, "lru", in_place)
        return slots

    return build


@pytest.fixture
def slots(build: Callable[[bool], ExpertSlots]) -> ExpertSlots:
    return build(True)


def held(slots: ExpertSlots, expert: int) -> list[int]:
    """What kernels see in an expert's slot."""
    table = slots.tensors["weight"].slot.module.weight
    return table[int(slots.cache.slot_of[expert])].tolist()


def fails_at(expert: int) -> Callable[[int, Sequence[memoryview], int], int]:
    """A `read_into` that cannot read one expert."""
    real = platform.read_into

    def read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset == expert * ROW:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    return read


@pytest.mark.parametrize("in_place", [True, False])
def test_a_failed_read_empties_its_slot_alone(
    in_place: bool, build: Callable[[bool], ExpertSlots], monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = build(in_place)
    slots.begin([0]).all()
    with monkeypatch.context() as patched:
        patched.setattr(platform, "read_into", fails_at(5))
        with pytest.raises(ExpertReadError) as e:
            slots.begin([0, 5, 3]).all()
    assert (e.value.layer, e.value.expert) == ("a layer", 5)
    assert 0 in slots.cache.resident and 5 not in slots.cache.resident
    slots.begin([0, 5, 3]).all()
    assert [held(slots, x) for x in (0, 5, 3)] == [[x] * ROW for x in (0, 5, 3)]


def test_a_change_that_an_exception_ends_empties_all_slots(
    slots: ExpertSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The map may be anything then."""
    slots.begin([0, 1]).all()

    def no_memory(expert: int) -> None:
        raise MemoryError

    with monkeypatch.context() as patched, pytest.raises(MemoryError):
        patched.setattr(slots.cache._policy, "insert", no_memory)
        slots.begin([4, 5])
    assert slots.cache.slot_of[4] >= 0  # it was given a slot, and nothing was read
    assert not slots.arrived().any()
    arrivals = slots.begin([4, 0])
    assert list(arrivals.left) == [4, 0]
    arrivals.all()
    assert (held(slots, 4), held(slots, 0)) == ([4] * ROW, [0] * ROW)


def test_prefetched_experts_are_claimed_or_taken_back(
    slots: ExpertSlots, reader: ExpertReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate, real = threading.Event(), threading.Event(), platform.read_into

    def read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        entered.set()
        assert gate.wait(60)
        return real(fd, buffers, offset)

    monkeypatch.setattr(platform, "read_into", read)
    slots.prefetch([6, 1, 3])
    assert entered.wait(60)  # the reader's only thread reads 6
    assert not slots.arrived().any()
    arrivals = slots.begin([6, 1])
    assert list(arrivals.left) == [6, 1]  # in flight already: no further reads
    assert 3 not in slots.cache.resident  # taken back before it was read
    gate.set()
    arrivals.all()
    assert (held(slots, 6), held(slots, 1)) == ([6] * ROW, [1] * ROW)
    assert reader.stats.bytes == 2 * ROW
    stats = slots.prefetch_stats
    assert (stats.issued, stats.late, stats.cancelled) == (3, 2, 1)


def test_a_prefetch_does_not_evaluate_another_threads_graph(
    slots: ExpertSlots, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise OtherThreadError("another thread")

    slots.begin([0]).all()
    with monkeypatch.context() as patched:
        patched.setattr(slots.bank, "flush_readers", refuse)
        slots.prefetch([4])  # no error: nobody asked for it
        assert slots.cache.resident == [0]
        with pytest.raises(OtherThreadError):
            slots.begin([4])
    slots.begin([4, 0]).all()
    assert (held(slots, 4), held(slots, 0)) == ([4] * ROW, [0] * ROW)

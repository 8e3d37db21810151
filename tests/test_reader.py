"""Bytes arrive exactly and in the right order; a failure names its expert and affects no other.

All files are real. The tests make faults and orders by replacing `_osinfo.read_into`, the only call
that reads.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import leftovers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._errors import ExpertReadError, StreamError
from mlx_streamexperts._io import reader as reader_module
from mlx_streamexperts._io.files import direct_works
from mlx_streamexperts._io.ranges import ByteRange
from mlx_streamexperts._io.reader import DEMAND, PREFETCH, ExpertReader, Ticket


def test_a_reader_by_example(tmp_path: Path) -> None:
    file, memory = tmp_path / "model.safetensors", bytearray(6)
    file.write_bytes(b"abcdefghij")
    parts = [memoryview(memory)[:3], memoryview(memory)[3:]]
    ranges = [
        ByteRange(str(file), offset, into, "layers.3", expert, "weight")
        for offset, into, expert in ((7, parts[0], 12), (0, parts[1], 40))
    ]
    reader = ExpertReader(threads=2)
    ticket = reader.submit(ranges)  # returns at once
    ticket.wait()  # the caller helps to read while it waits
    assert memory == b"hijabc"
    assert not ticket.left  # experts whose reads have not ended
    reader.close()


FILE_BYTES = 300_007  # no multiple of any block size
CONTENT = random.Random(0).randbytes(FILE_BYTES)
PATIENCE = 60.0  # seconds until a test gives up instead of hanging

Read = Callable[[int, Sequence[memoryview], int], int]
fuzz = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of known bytes."""
    file = tmp_path_factory.mktemp("reader") / "model.safetensors"
    file.write_bytes(CONTENT)
    return file


@pytest.fixture(scope="module", params=["through page cache", "direct"])
def direct(request: pytest.FixtureRequest, shard: Path) -> bool:
    """Both ways to read; the second only if the file system supports it."""
    if request.param == "direct" and not direct_works(shard):
        pytest.skip(f"the file system of {shard} cannot read past the page cache")
    return request.param == "direct"


def wanted(
    file: Path, offset: int, into: bytearray | memoryview, expert: int = 0, tensor: str = "w"
) -> ByteRange:
    return ByteRange(str(file), offset, memoryview(into), "model.layers.3", expert, tensor)


def finished(ticket: Ticket) -> None:
    """Wait without helping, unlike `Ticket.wait`."""
    give_up = time.monotonic() + PATIENCE
    while ticket.left:
        assert time.monotonic() < give_up, "reads did not end"
        time.sleep(0.001)


class Gate:
    """A `read_into` that holds all reads until it is opened, and notes their offsets."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.offsets: list[int] = []
        self._real = platform.read_into

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.offsets.append(offset)
        self.entered.set()
        assert self.open.wait(PATIENCE), "the test never opened the gate"
        return self._real(fd, buffers, offset)


@contextmanager
def gated_reader(
    monkeypatch: pytest.MonkeyPatch, shard: Path
) -> Iterator[tuple[ExpertReader, Gate]]:
    """A reader whose single thread is busy with a read at offset 0 until the gate opens."""
    gate = Gate()
    monkeypatch.setattr(platform, "read_into", gate)
    reader = ExpertReader(threads=1)
    try:
        reader.submit([wanted(shard, 0, bytearray(1))])
        assert gate.entered.wait(PATIENCE)
        yield reader, gate
    finally:
        gate.open.set()
        reader.close()


def in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Run in a thread; the list holds the exceptions after `join`."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, raised


def join(thread: threading.Thread) -> None:
    thread.join(PATIENCE)
    assert not thread.is_alive(), "hangs"


# Bytes arrive.


@fuzz
@given(
    spans=st.lists(
        st.tuples(st.integers(0, FILE_BYTES), st.integers(0, 9000) | st.integers(0, 40)),
        max_size=12,
    ),
    threads=st.integers(1, 8),
    read_bytes=st.sampled_from([100, 1000, 4096, 8192, 12_345, 1 << 20]),
    priority=st.sampled_from([DEMAND, PREFETCH]),
)
def test_arbitrary_ranges_arrive_exactly(
    spans: list[tuple[int, int]],
    threads: int,
    read_bytes: int,
    priority: int,
    direct: bool,
    shard: Path,
) -> None:
    """Ranges may overlap, be empty, or end at the file's end; nothing is written beside them."""
    spans = [(a, min(n, FILE_BYTES - a)) for a, n in spans]
    memory = bytearray(b"\xa5" * (sum(n + 3 for _, n in spans) + 1))
    expected = bytearray(memory)
    ranges, at = [], 1
    for expert, (offset, n) in enumerate(spans):
        ranges.append(wanted(shard, offset, memoryview(memory)[at : at + n], expert))
        expected[at : at + n] = CONTENT[offset : offset + n]
        at += n + 3
    reader = ExpertReader(threads, read_bytes, direct)
    try:
        ticket = reader.submit(ranges, priority)
        ticket.wait()
        assert not ticket.left and not ticket.errors
        assert memory == expected
        assert reader.stats.bytes == sum(n for _, n in spans)
        assert reader.stats.errors == 0
    finally:
        reader.close()


def test_aligned_direct_reads_go_straight_into_the_memory(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No bounce buffer and no copy, if offset, length and address allow it."""
    if not direct_works(shard):
        pytest.skip(f"the file system of {shard} cannot read past the page cache")
    memory, owners, real = mmap.mmap(-1, 3 * 4096), [], platform.read_into

    def spy(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        owners.extend(b.obj for b in buffers)
        return real(fd, buffers, offset)

    monkeypatch.setattr(platform, "read_into", spy)
    reader = ExpertReader(2, direct=True)
    try:
        view = memoryview(memory)
        pages = [wanted(shard, 8192 + i * 4096, view[i * 4096 : (i + 1) * 4096]) for i in range(3)]
        reader.submit(pages).wait()
        assert view == CONTENT[8192 : 8192 + 3 * 4096]
        assert len(owners) == 3 and all(o is memory for o in owners)
    finally:
        reader.close()


@pytest.mark.parametrize("n", [1, 100, 4095, 4096, 5000, 70_000])
def test_the_files_last_bytes(n: int, direct: bool, shard: Path) -> None:
    """The widened range of a direct read runs over the file's end."""
    memory = bytearray(n)
    reader = ExpertReader(1, direct=direct)
    try:
        reader.submit([wanted(shard, FILE_BYTES - n, memory)]).wait()
        assert memory == CONTENT[-n:]
    finally:
        reader.close()


def test_several_files_at_once(direct: bool, tmp_path: Path) -> None:
    """Ranges of different files are never merged."""
    files = []
    for i in range(5):
        files.append(tmp_path / f"model-{i}.safetensors")
        files[i].write_bytes(bytes([i]) * 5000)
    memory = bytearray(5000)
    ranges = [
        wanted(files[i // 1000], i, memoryview(memory)[i : i + 1000]) for i in range(0, 5000, 1000)
    ]
    reader = ExpertReader(3, direct=direct)
    try:
        reader.submit(ranges).wait()
        assert memory == b"".join(bytes([i]) * 1000 for i in range(5))
        assert reader.stats.reads == 5
    finally:
        reader.close()


def test_neighbours_become_one_scatter_read(direct: bool, shard: Path) -> None:
    """In whatever order they are submitted, and wherever their memory is."""
    sizes = [10, 5000, 1, 4096, 333]
    begins = [1234, *itertools.accumulate(sizes, initial=1234)][1:-1]
    parts = [bytearray(n) for n in sizes]
    ranges = [wanted(shard, b, p, i) for i, (b, p) in enumerate(zip(begins, parts, strict=True))]
    random.Random(3).shuffle(ranges)
    reader = ExpertReader(4, direct=direct)
    try:
        reader.submit(ranges).wait()
        assert b"".join(parts) == CONTENT[1234 : 1234 + sum(sizes)]
        assert reader.stats.reads == 1
    finally:
        reader.close()


def test_ranges_with_a_gap_are_read_apart(shard: Path) -> None:
    a, b = bytearray(100), bytearray(100)
    reader = ExpertReader(2)
    try:
        reader.submit([wanted(shard, 0, a), wanted(shard, 101, b)]).wait()
        assert (a, b) == (CONTENT[:100], CONTENT[101:201])
        assert reader.stats.reads == 2
    finally:
        reader.close()


def test_more_neighbours_than_one_system_call_takes(shard: Path) -> None:
    parts = [bytearray(2) for _ in range(1500)]
    reader = ExpertReader(1)
    try:
        reader.submit([wanted(shard, 7 + 2 * i, p) for i, p in enumerate(parts)]).wait()
        assert b"".join(parts) == CONTENT[7:3007]
        assert 2 <= reader.stats.reads < 20
    finally:
        reader.close()


@pytest.mark.parametrize("read_bytes", [4096, 10_000, 65_536])
def test_long_ranges_are_split(
    read_bytes: int, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that threads share them; no read is longer than asked for."""
    lengths: list[int] = []
    real = platform.read_into

    def spy(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        lengths.append(sum(len(b) for b in buffers))
        return real(fd, buffers, offset)

    monkeypatch.setattr(platform, "read_into", spy)
    memory, rest = bytearray(200_000), bytearray(50)
    reader = ExpertReader(4, read_bytes)
    try:
        reader.submit([wanted(shard, 11, memory), wanted(shard, 200_011, rest)]).wait()
        assert memory + rest == CONTENT[11:200_061]
        assert max(lengths) <= read_bytes
        assert sum(lengths) == 200_050
        assert reader.stats.reads == len(lengths) == -(-200_050 // read_bytes)
    finally:
        reader.close()


@pytest.mark.parametrize("most", [1, 7, 1000])
def test_short_reads_go_on_where_they_stopped(
    most: int, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A system call may return less than asked for, in the middle of any buffer."""
    real = platform.read_into

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        take, room = [], most
        for b in buffers:
            take.append(b[:room])
            room -= len(take[-1])
            if not room:
                break
        return real(fd, take, offset)

    monkeypatch.setattr(platform, "read_into", short)
    parts = [bytearray(n) for n in (5, 3, 500, 1, 1, 90)]
    begins = [0, *itertools.accumulate(len(p) for p in parts)]
    reader = ExpertReader(2)
    try:
        reader.submit([wanted(shard, b, p) for b, p in zip(begins, parts, strict=False)]).wait()
        assert b"".join(parts) == CONTENT[:600]
        assert reader.stats.reads == -(-600 // most)
        assert reader.stats.bytes == 600
    finally:
        reader.close()


def test_short_direct_reads_go_on_too(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block at a time, straight and through the bounce buffer."""
    if not direct_works(shard):
        pytest.skip(f"the file system of {shard} cannot read past the page cache")
    real = platform.read_into
    monkeypatch.setattr(
        platform, "read_into", lambda fd, buffers, offset: real(fd, [buffers[0][:4096]], offset)
    )
    aligned, odd = memoryview(mmap.mmap(-1, 5 * 4096)), bytearray(20_000)
    reader = ExpertReader(1, direct=True)
    try:
        reader.submit([wanted(shard, 4096, aligned), wanted(shard, 100_001, odd)]).wait()
        assert aligned == CONTENT[4096 : 6 * 4096]
        assert odd == CONTENT[100_001:120_001]
    finally:
        reader.close()


def test_many_threads_submit_at_once(direct: bool, shard: Path) -> None:
    reader = ExpertReader(4, 3000, direct)
    total = [0] * 8

    def work(which: int) -> None:
        rng = random.Random(which)
        for _ in range(25):
            spans = [(rng.randrange(FILE_BYTES - 9000), rng.randrange(9000)) for _ in range(4)]
            parts = [bytearray(n) for _, n in spans]
            ranges = [wanted(shard, a, p) for (a, _), p in zip(spans, parts, strict=True)]
            reader.submit(ranges, rng.choice([DEMAND, PREFETCH])).wait()
            assert parts == [CONTENT[a : a + n] for a, n in spans]
            total[which] += sum(n for _, n in spans)

    try:
        started = [in_thread(lambda i=i: work(i)) for i in range(8)]
        for thread, raised in started:
            join(thread)
            assert not raised, raised
        assert reader.stats.bytes == sum(total)
    finally:
        reader.close()


# In the right order.


def test_demand_overtakes_speculative(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gated_reader(monkeypatch, shard) as (reader, gate):
        early = reader.submit([wanted(shard, 10 * i, bytearray(5)) for i in (1, 2)], PREFETCH)
        demand = reader.submit([wanted(shard, 10 * i, bytearray(5)) for i in (3, 4)], DEMAND)
        late = reader.submit([wanted(shard, 50, bytearray(5))], PREFETCH)
        gate.open.set()
        for ticket in (early, demand, late):
            finished(ticket)
        assert gate.offsets == [0, 30, 40, 10, 20, 50]  # first come, first served within each


def test_the_waiting_thread_helps_with_demand_reads_only(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While every worker is busy, the caller reads what it needs itself."""
    real, memory = platform.read_into, bytearray(100)
    with gated_reader(monkeypatch, shard) as (reader, gate):
        me, mine = threading.get_ident(), []

        def read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if threading.get_ident() != me:
                return gate(fd, buffers, offset)
            mine.append(offset)
            return real(fd, buffers, offset)

        monkeypatch.setattr(platform, "read_into", read)
        later = reader.submit([wanted(shard, 500, bytearray(5))], PREFETCH)
        reader.submit([wanted(shard, 1000, memory)], DEMAND).wait()
        assert memory == CONTENT[1000:1100]
        assert mine == [1000]
        assert later.left
        gate.open.set()
        later.wait()


# What fails.


def fail_at(bad: set[int], number: int) -> Read:
    """A `read_into` that raises for reads that begin at these offsets."""
    real = platform.read_into

    def read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset in bad:
            raise OSError(number, os.strerror(number))
        return real(fd, buffers, offset)

    return read


@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL, errno.ESTALE])
def test_an_io_error_says_what_could_not_be_read(
    number: int, shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others arrive all the same, `errors` names no other expert, and the reader goes on."""
    offsets = range(0, 8000, 1000)
    parts = [bytearray(200) for _ in offsets]
    ranges = [
        wanted(shard, o, p, e, f"t{e}") for e, (o, p) in enumerate(zip(offsets, parts, strict=True))
    ]
    reader = ExpertReader(3)
    try:
        with monkeypatch.context() as m:
            m.setattr(platform, "read_into", fail_at({2000, 5000}, number))
            ticket = reader.submit(ranges)
            with pytest.raises(ExpertReadError) as e:
                ticket.wait()
        error = e.value
        assert error.errno == number
        assert (error.layer, error.file) == ("model.layers.3", shard)
        assert (error.expert, error.tensor, error.offset) in [(2, "t2", 2000), (5, "t5", 5000)]
        for said in (error.layer, error.tensor, error.file, error.offset, os.strerror(number)):
            assert str(said) in str(error)
        assert set(ticket.errors) == {2, 5}
        assert reader.stats.errors == 2
        for expert, (offset, part) in enumerate(zip(offsets, parts, strict=True)):
            if expert not in (2, 5):
                assert part == CONTENT[offset : offset + 200]
        assert reader.stats.bytes == 6 * 200
        reader.submit(ranges).wait()  # usable again
        assert parts == [CONTENT[o : o + 200] for o in offsets]
    finally:
        reader.close()


def test_waiting_again_raises_again(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "read_into", fail_at({0}, errno.EIO))
    reader = ExpertReader(1)
    try:
        ticket = reader.submit([wanted(shard, 0, bytearray(9))])
        for _ in range(2):
            with pytest.raises(ExpertReadError):
                ticket.wait()
    finally:
        reader.close()


def test_every_expert_of_a_failed_scatter_read_is_named(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a split and a merged range, each expert that did not arrive whole is in `errors`."""
    monkeypatch.setattr(platform, "read_into", fail_at({3000}, errno.EIO))
    reader = ExpertReader(2, read_bytes=1000)
    try:
        split = wanted(shard, 2000, bytearray(2300), expert=1)  # 2000, 3000, and 4000 with ...
        merged = wanted(shard, 4300, bytearray(100), expert=2)
        ticket = reader.submit([split, merged])
        with pytest.raises(ExpertReadError) as e:
            ticket.wait()
        assert (e.value.expert, e.value.offset) == (1, 3000)
        assert set(ticket.errors) == {1}
        assert merged.into == CONTENT[4300:4400]
    finally:
        reader.close()


def test_an_unforeseen_error_reaches_the_waiting_thread(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise ZeroDivisionError("surprise")

    monkeypatch.setattr(platform, "read_into", broken)
    reader = ExpertReader(1)
    try:
        with pytest.raises(ExpertReadError) as e:
            reader.submit([wanted(shard, 0, bytearray(9), expert=4)]).wait()
        assert isinstance(e.value.__cause__, ZeroDivisionError)
        assert e.value.expert == 4
    finally:
        reader.close()


def test_ctrl_c_while_helping_is_a_keyboard_interrupt(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that the waiting thread does itself is interrupted like its other code."""
    with gated_reader(monkeypatch, shard) as (reader, gate):
        me = threading.get_ident()

        def read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if threading.get_ident() == me:
                raise KeyboardInterrupt
            return gate(fd, buffers, offset)

        monkeypatch.setattr(platform, "read_into", read)
        ticket = reader.submit([wanted(shard, 100, bytearray(9))])
        with pytest.raises(KeyboardInterrupt):
            ticket.wait()
        reader.cancel(ticket)  # as the layer then does: returns, the gate still shut


@pytest.mark.parametrize("n", [5, 200, 100_000])
def test_end_of_file(n: int, direct: bool, shard: Path) -> None:
    """A range over the end names the first byte that is not there; `errno` is None."""
    reader = ExpertReader(2, direct=direct)
    try:
        ticket = reader.submit([wanted(shard, FILE_BYTES - 2, bytearray(n), 6, "t.scales")])
        with pytest.raises(ExpertReadError, match="end of file") as e:
            ticket.wait()
        error = e.value
        assert (error.layer, error.expert, error.tensor) == ("model.layers.3", 6, "t.scales")
        assert (error.file, error.offset, error.errno) == (shard, FILE_BYTES, None)
        assert set(ticket.errors) == {6}
        good = bytearray(50)
        reader.submit([wanted(shard, 33, good)]).wait()
        assert good == CONTENT[33:83]
    finally:
        reader.close()


@pytest.mark.parametrize("size", [0, 5000, 8192])
def test_a_range_wholly_beyond_the_file(size: int, direct: bool, tmp_path: Path) -> None:
    """Its own first byte is the first that could not be read, not some earlier block's."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(bytes(size))
    reader = ExpertReader(1, direct=direct)
    try:
        with pytest.raises(ExpertReadError) as e:
            reader.submit([wanted(file, 8300, bytearray(10), 1)]).wait()
        assert (e.value.expert, e.value.offset, e.value.errno) == (1, 8300, None)
    finally:
        reader.close()


def test_end_of_file_inside_a_scatter_read_names_the_expert_it_hit(
    direct: bool, shard: Path
) -> None:
    begin = FILE_BYTES - 250
    ranges = [wanted(shard, begin + 100 * i, bytearray(100), i, f"t{i}") for i in range(5)]
    reader = ExpertReader(1, direct=direct)
    try:
        ticket = reader.submit(ranges)
        with pytest.raises(ExpertReadError) as e:
            ticket.wait()
        assert (e.value.expert, e.value.tensor, e.value.offset) == (2, "t2", FILE_BYTES)
        assert set(ticket.errors) >= {2, 3, 4}
    finally:
        reader.close()


GARBAGE = """
import gc, threading
from mlx_streamexperts._io.reader import _running_threads
class Cycle: pass
gc.set_threshold(700)
for room in range(12):  # so that a collection falls into the call
    gc.collect()
    cycle = Cycle()
    cycle.itself, cycle.own = cycle, threading.local()
    cycle.own.x = 1
    del cycle
    kept = []
    while gc.get_count()[0] < 700 - room: kept.append([])
    assert threading.get_ident() in _running_threads()
"""


def test_looking_for_threads_that_died_never_collects_garbage() -> None:
    """CPython 3.11 stands still if what is collected meanwhile has a `threading.local`."""
    subprocess.run([sys.executable, "-c", GARBAGE], check=True, timeout=120)


def test_a_missing_file(direct: bool, tmp_path: Path) -> None:
    """Once the file is there, the same reader reads it."""
    file = tmp_path / "model.safetensors"
    memory = bytearray(10)
    reader = ExpertReader(1, direct=direct)
    try:
        with pytest.raises(ExpertReadError) as e:
            reader.submit([wanted(file, 3, memory, 9)]).wait()
        assert (e.value.errno, e.value.file, e.value.expert) == (errno.ENOENT, file, 9)
        file.write_bytes(CONTENT[:100])
        reader.submit([wanted(file, 3, memory, 9)]).wait()
        assert memory == CONTENT[3:13]
    finally:
        reader.close()


def test_no_direct_reads_is_an_error_not_a_fallback(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> tuple[int, int]:
        raise OSError(errno.EINVAL, "no O_DIRECT here")

    monkeypatch.setattr(platform, "open_direct", refuse)
    assert not direct_works(shard)
    reader = ExpertReader(1, direct=True)
    try:
        with pytest.raises(ExpertReadError) as e:
            reader.submit([wanted(shard, 0, bytearray(10))]).wait()
        assert e.value.errno == errno.EINVAL
    finally:
        reader.close()


# Cancelling and closing.


def test_cancelled_reads_touch_nothing(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, other = bytearray(3000), bytearray(10)
    with gated_reader(monkeypatch, shard) as (reader, gate):
        ranges = [wanted(shard, o, memoryview(memory)[o : o + 100]) for o in range(0, 3000, 200)]
        ticket = reader.submit(ranges, PREFETCH)
        beside = reader.submit([wanted(shard, 70, other)], PREFETCH)
        reader.cancel(ticket)
        assert not ticket.left
        gate.open.set()
        finished(beside)
        assert memory == bytes(3000)
        assert other == CONTENT[70:80]  # others' reads stay queued
        assert gate.offsets == [0, 70]


def test_cancel_waits_for_reads_under_way(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Afterwards no thread writes to the memory."""
    gate, memory = Gate(), bytearray(10)
    monkeypatch.setattr(platform, "read_into", gate)
    reader = ExpertReader(1)
    try:
        ticket = reader.submit([wanted(shard, 0, memory), wanted(shard, 50, bytearray(10))])
        assert gate.entered.wait(PATIENCE)
        thread, raised = in_thread(lambda: reader.cancel(ticket))
        thread.join(0.05)
        assert thread.is_alive(), "cancel returned while a read was under way"
        gate.open.set()
        join(thread)
        assert not raised
        assert memory == CONTENT[:10]
        assert gate.offsets == [0]  # the second one was still queued, and never read
    finally:
        gate.open.set()
        reader.close()


def test_cancelling_what_is_done_does_nothing(shard: Path) -> None:
    reader = ExpertReader(1)
    try:
        for ranges in ([], [wanted(shard, 0, bytearray(10))]):
            ticket = reader.submit(ranges)
            ticket.wait()
            reader.cancel(ticket)
            ticket.wait()
            assert not ticket.left
    finally:
        reader.close()


def test_close_fails_what_is_queued_and_finishes_what_is_under_way(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No waiting thread hangs."""
    gate = Gate()
    monkeypatch.setattr(platform, "read_into", gate)
    reader = ExpertReader(1)
    first = bytearray(10)
    under_way = reader.submit([wanted(shard, 0, first)], PREFETCH)
    assert gate.entered.wait(PATIENCE)
    ranges = [wanted(shard, o, bytearray(10), o // 100) for o in (100, 200)]
    queued = reader.submit(ranges, PREFETCH)
    waiters = [in_thread(queued.wait) for _ in range(3)]
    closer, close_raised = in_thread(reader.close)
    for thread, raised in waiters:
        join(thread)  # before the gate opens: the queue is failed at once
        assert [type(e) for e in raised] == [ExpertReadError]
    assert set(queued.errors) == {1, 2}
    gate.open.set()
    join(closer)
    assert not close_raised
    under_way.wait()
    assert first == CONTENT[:10]


def test_close_does_not_pull_the_file_from_under_a_helping_caller(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor closed too early may be another file by the time it is read."""
    stranger = tmp_path / "stranger"
    stranger.write_bytes(b"?" * 10_000)
    gate, memory = Gate(), bytearray(100)
    helping, go_on, real = threading.Event(), threading.Event(), platform.read_into

    def read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if threading.current_thread().name.startswith("expert-reader"):
            return gate(fd, buffers, offset)
        helping.set()
        assert go_on.wait(PATIENCE)
        return real(fd, buffers, offset)

    monkeypatch.setattr(platform, "read_into", read)
    reader = ExpertReader(1)
    reader.submit([wanted(shard, 0, bytearray(10))])
    assert gate.entered.wait(PATIENCE)
    ticket = reader.submit([wanted(shard, 1000, memory)])
    caller, raised = in_thread(ticket.wait)
    assert helping.wait(PATIENCE)
    gate.open.set()
    closer, _ = in_thread(reader.close)
    closer.join(0.3)  # ends now only if it does not wait for the caller
    fds = [os.open(stranger, os.O_RDONLY) for _ in range(4)]
    try:
        go_on.set()
        join(caller)
        join(closer)
        assert raised or memory == CONTENT[1000:1100], "another file's bytes, and no error"
    finally:
        for fd in fds:
            os.close(fd)


def test_a_closed_reader_says_so(shard: Path) -> None:
    reader = ExpertReader(2)
    reader.close()
    reader.close()  # twice does no harm
    with pytest.raises(StreamError, match="closed"):
        reader.submit([wanted(shard, 0, bytearray(1))])


def test_nothing_is_left_behind(direct: bool, shard: Path, tmp_path: Path) -> None:
    """No threads and descriptors remain after success, errors, cancelling, and unread queues."""
    files = [tmp_path / f"{i}" for i in range(4)]
    for file in files:
        file.write_bytes(CONTENT[:20_000])

    def use() -> None:
        reader = ExpertReader(4, 1000, direct)
        for file in files:
            reader.submit([wanted(file, 5, bytearray(9000))]).wait()
        for bad in (
            wanted(files[0], 19_990, bytearray(50)),
            wanted(tmp_path / "x", 0, bytearray(1)),
        ):
            with pytest.raises(ExpertReadError):
                reader.submit([bad]).wait()
        reader.cancel(reader.submit([wanted(shard, 0, bytearray(100_000))], PREFETCH))
        reader.submit([wanted(shard, 0, bytearray(100_000))], PREFETCH)
        reader.close()

    use()
    before = leftovers()
    for _ in range(5):
        use()
    assert not leftovers() - before


# What the counters say.


def test_quick_reads_are_one_job_of_the_waiting_thread(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until they become slow: then others help again."""
    clock = itertools.count()
    step = 1e-6
    stub = SimpleNamespace(perf_counter=lambda: next(clock) * step, sleep=time.sleep)
    monkeypatch.setattr(reader_module, "time", stub)
    jobs: list[tuple[int, str]] = []
    reader = ExpertReader(4)
    try:
        reader.on_read.add(
            lambda ranges, *_: jobs.append((len(ranges), threading.current_thread().name))
        )
        offsets = range(0, 12_000, 1000)  # 12 reads
        parts = [bytearray(100) for _ in offsets]
        ranges = [wanted(shard, o, p, o) for o, p in zip(offsets, parts, strict=True)]
        for _ in range(20):
            jobs.clear()
            reader.submit(ranges).wait()
        assert jobs == [(12, threading.current_thread().name)]
        assert parts == [CONTENT[o : o + 100] for o in offsets]
        step = 1.0
        for _ in range(3):
            jobs.clear()
            reader.submit(ranges).wait()
        assert [n for n, _ in jobs] == [2] * 6
    finally:
        reader.close()


def test_small_reads_that_wait_for_the_drive_are_announced(
    shard: Path, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the page cache, all of a call before the first is read, until they wait no more."""
    clock = itertools.count()
    step = 1.0
    stub = SimpleNamespace(perf_counter=lambda: next(clock) * step, sleep=time.sleep)
    monkeypatch.setattr(reader_module, "time", stub)
    announced: list[tuple[int, int]] = []
    monkeypatch.setattr(
        platform, "announce_read", lambda fd, offset, nbytes: announced.append((offset, nbytes))
    )
    places = range(0, 12_000, 1000)
    reader = ExpertReader(4, direct=direct)

    def read(size: int, priority: int = DEMAND) -> list[tuple[int, int]]:
        announced.clear()
        parts = [bytearray(size) for _ in places]
        ranges = [wanted(shard, o, p, o) for o, p in zip(places, parts, strict=True)]
        reader.submit(ranges, priority).wait()
        assert parts == [CONTENT[o : o + size] for o in places]
        return announced.copy()

    try:
        assert read(100) == []  # nothing is known yet
        assert read(100) == ([] if direct else [(o, 100) for o in places])
        assert read(100, PREFETCH) == []
        step = 1e-6
        until = [read(100) for _ in range(30)]
        assert until[-1] == []
    finally:
        reader.close()


def test_counters(shard: Path) -> None:
    reader = ExpertReader(1)
    try:
        assert reader.stats.bytes == reader.stats.reads == reader.stats.errors == 0
        ticket = reader.submit([wanted(shard, o, bytearray(100)) for o in (0, 1000, 2000)])
        finished(ticket)
        ticket.wait()  # it was done: nobody stood still
        assert (reader.stats.bytes, reader.stats.reads, reader.stats.errors) == (300, 3, 0)
        assert reader.stats.wait_seconds == 0
        assert reader.stats.read_seconds > 0
    finally:
        reader.close()


def test_standing_still_is_counted(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gated_reader(monkeypatch, shard) as (reader, gate):
        ticket = reader.submit([wanted(shard, 100, bytearray(9))], PREFETCH)
        thread, raised = in_thread(ticket.wait)
        thread.join(0.05)
        assert thread.is_alive() and reader.stats.wait_seconds == 0
        gate.open.set()
        join(thread)
        assert not raised
        assert reader.stats.wait_seconds > 0


def test_nothing_to_read_is_done_at_once(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the only thread is busy."""
    with gated_reader(monkeypatch, shard) as (reader, _):
        for ranges in ([], [wanted(shard, 10, bytearray(0))]):
            ticket = reader.submit(ranges)
            assert not ticket.left
            ticket.wait()


# Prefetches: withdrawn, promoted, and waited for one by one.


def test_withdraw_takes_back_only_what_is_not_under_way(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with gated_reader(monkeypatch, shard) as (reader, gate):
        memory = bytearray(600)
        views = [memoryview(memory)[i : i + 100] for i in range(0, 600, 100)]
        ranges = [wanted(shard, 1000 * i + 7, views[i], expert=i // 2) for i in range(6)]
        ticket = reader.submit(ranges, PREFETCH)
        assert reader.withdraw(ticket, 1)
        assert 1 not in ticket.left
        assert 0 in ticket.left
        assert reader.withdraw(ticket, 1), "nothing of it is under way any more"
        gate.open.set()
        finished(ticket)
        assert memory[200:400] == bytes(200)
        assert memory[:100] == CONTENT[7:107]
        assert memory[500:] == CONTENT[5007:5107]


def test_withdraw_leaves_what_is_under_way(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, memory = Gate(), bytearray(10)
    monkeypatch.setattr(platform, "read_into", gate)
    reader = ExpertReader(1)
    try:
        ticket = reader.submit([wanted(shard, 0, memory, 4)], PREFETCH)
        assert gate.entered.wait(PATIENCE)
        assert not reader.withdraw(ticket, 4)
        assert 4 in ticket.left
        gate.open.set()
        assert ticket.wait_for_any([4]) == [4]
        assert memory == CONTENT[:10]
    finally:
        gate.open.set()
        reader.close()


def test_promoted_reads_go_among_demand_reads(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with gated_reader(monkeypatch, shard) as (reader, gate):
        far = reader.submit([wanted(shard, 10, bytearray(5))], PREFETCH + 1)
        near = reader.submit(
            [wanted(shard, 10 * i, bytearray(5), expert=i) for i in (2, 3)], PREFETCH
        )
        demand = reader.submit([wanted(shard, 40, bytearray(5))])
        reader.promote(near, 3)
        gate.open.set()
        for ticket in (far, near, demand):
            finished(ticket)
        assert gate.offsets == [0, 30, 40, 20, 10]


def test_experts_arrive_one_by_one_in_the_order_asked_for(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first can be used while the others are read, wherever they are in the file."""
    with gated_reader(monkeypatch, shard) as (reader, gate):
        ranges = [
            wanted(shard, 1000 * (10 - e) + 100 * part, bytearray(9), expert=e)
            for e in (2, 0, 1)
            for part in (0, 3)
        ]
        ticket = reader.submit(ranges)
        gate.open.set()
        left, order = [0, 1, 2], []
        while left:
            got = ticket.wait_for_any(left)
            order += got
            left = [e for e in left if e not in got]
        assert set(order) == {0, 1, 2}
        assert gate.offsets[1:] == [8000, 8300, 10000, 10300, 9000, 9300]


def test_only_the_expert_that_failed_raises(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "read_into", fail_at({2000}, errno.EIO))
    reader = ExpertReader(2)
    try:
        ticket = reader.submit(
            [wanted(shard, 1000 * e, bytearray(9), expert=e) for e in (1, 2, 3)], PREFETCH
        )
        finished(ticket)
        assert ticket.wait_for_any([1]) == [1]
        with pytest.raises(ExpertReadError) as e:
            ticket.wait_for_any([2])
        assert e.value.expert == 2
        assert ticket.wait_for_any([3]) == [3]
    finally:
        reader.close()


def test_demand_behind_speculation_is_accounted_for(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    monkeypatch.setattr(platform, "read_into", gate)
    reader = ExpertReader(1)
    try:
        ahead = reader.submit([wanted(shard, 0, bytearray(10))], PREFETCH)
        assert gate.entered.wait(PATIENCE)
        demand = reader.submit([wanted(shard, 50, bytearray(10))])
        time.sleep(0.02)
        gate.open.set()
        finished(demand)
        finished(ahead)
        assert reader.stats.delay_seconds >= 0.02
        assert reader.stats.speculative_bytes == 10
        assert reader.stats.bytes == 20
    finally:
        gate.open.set()
        reader.close()

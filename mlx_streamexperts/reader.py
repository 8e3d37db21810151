"""Asynchronous reads of byte ranges into given memory, by a pool of threads.

The only module that touches weight files. It knows nothing of MLX: threads handle bytes, and MLX
arrays are bound to the thread that makes them. Demand reads overtake speculative ones; ranges that
lie side by side in a file become one scatter read; long ones are split over the threads.
"""

from __future__ import annotations

import heapq
import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from . import platform
from .errors import ExpertReadError, StreamError

DEMAND, SPECULATIVE = 0, 1
"""Priorities: a layer waits for a demand read; a speculative one may be of use later."""


class ByteRange(NamedTuple):
    """Bytes of one expert's tensor in a file, and where they must go.

    Attributes:
        file: path of the shard (a string: comparing and hashing `Path` costs a microsecond each).
        offset: first byte in it.
        into: writable memory; its length is the number of bytes to read.
        layer, expert, tensor: whose bytes they are, for error messages.
    """

    file: str
    offset: int
    into: memoryview
    layer: str
    expert: int
    tensor: str


@dataclass(slots=True)
class ReadStats:
    """What a reader has done.

    Attributes:
        bytes: bytes delivered into expert memory.
        reads: system calls that read.
        read_seconds: time the threads spent reading, summed over threads.
        wait_seconds: time callers stood still in `Ticket.wait`.
        errors: ranges that failed.
    """

    bytes: int = 0
    reads: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    errors: int = 0


class Ticket:
    """A submitted group of reads."""

    def __init__(self, reader: ExpertReader, jobs: int) -> None:
        self._reader = reader
        self._submitted = time.perf_counter()
        self.seconds = 0.0  # from submission to the last byte
        self._left = jobs
        self._done = threading.Event()
        self.error: ExpertReadError | None = None
        self.failed: set[tuple[str, int]] = set()  # (layer, expert)
        if jobs == 0:
            self._done.set()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def wait(self) -> None:
        """Stand still until every read has ended, well or badly; helps with the queue meanwhile.

        Raises:
            ExpertReadError: the first failure; `failed` names every expert that did not arrive.
        """
        if not self._done.is_set():
            start = time.perf_counter()
            # A warm read takes 10 us, waking a thread about 50: run queued reads right here.
            while not self._done.is_set() and self._reader.run_one(DEMAND):
                pass
            self._done.wait()
            self._reader.stats.wait_seconds += time.perf_counter() - start
        if self.error is not None:
            raise self.error


@dataclass(slots=True)
class _Job:
    """Ranges side by side in one file: one scatter read."""

    ticket: Ticket
    ranges: list[ByteRange]
    nbytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.nbytes = sum(len(r.into) for r in self.ranges)


class ExpertReader:
    """Thread pool for reads.

    Args:
        threads: reads in flight at once.
        read_bytes: longest single read; longer ranges are split so that threads share them.
        direct: bypass the page cache. True needs the file system's support and raises where it
            has none.
    """

    def __init__(self, threads: int = 8, read_bytes: int = 8 << 20, direct: bool = False) -> None:
        self.stats = ReadStats()
        self.direct = direct
        self._read_bytes = read_bytes
        self._files: dict[str, tuple[int, int]] = {}  # path -> (descriptor, alignment)
        self._queue: list[tuple[int, int, _Job]] = []  # heap of (priority, order, job)
        self._order = 0
        self._helping = 0  # reads that callers do themselves
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._closed = False
        self._local = threading.local()
        self._threads = [
            threading.Thread(target=self._run, name=f"expert-reader-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, ranges: Sequence[ByteRange], priority: int = DEMAND) -> Ticket:
        """Queue reads; returns at once.

        Args:
            ranges: what to read; all memory must stay valid until the ticket is done.
            priority: `DEMAND` or `SPECULATIVE`.
        """
        runs = list(_merge(ranges, self._read_bytes))
        ticket = Ticket(self, len(runs))
        with self._work:
            if self._closed:
                raise StreamError("the expert reader is closed")
            for run in runs:
                self._order += 1
                heapq.heappush(self._queue, (priority, self._order, _Job(ticket, run)))
            self._work.notify(len(runs))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Take the ticket's queued reads back and wait for those under way.

        Its memory may be reused afterwards; which ranges arrived is not known.
        """
        with self._lock:
            mine = sum(1 for entry in self._queue if entry[2].ticket is ticket)
            self._queue = [entry for entry in self._queue if entry[2].ticket is not ticket]
            heapq.heapify(self._queue)
            ticket._left -= mine
            if ticket._left == 0:
                ticket._done.set()
        ticket._done.wait()

    def run_one(self, priority: int) -> bool:
        """Run the first queued read of at most this priority value; False if there is none."""
        with self._lock:
            if not self._queue or self._queue[0][0] > priority:
                return False
            job = heapq.heappop(self._queue)[2]
            self._helping += 1
        try:
            interrupt = self._execute(job)
        finally:
            with self._lock:
                self._helping -= 1
                self._idle.notify_all()
        if interrupt is not None:
            raise interrupt  # Ctrl-C, in the caller's thread: his, as anywhere else
        return True

    def close(self) -> None:
        """End the threads and close the files. Queued reads are dropped and count as failed."""
        with self._work:
            if self._closed:
                return
            self._closed = True
            dropped, self._queue = self._queue, []
            self._work.notify_all()
        for _, _, job in dropped:
            self._finish(job, ExpertReadError(*_label(job.ranges[0]), job.ranges[0].offset, 9))
        for thread in self._threads:
            thread.join()
        with self._idle:  # a descriptor closed under a read may be another file by then
            self._idle.wait_for(lambda: self._helping == 0)
        for fd, _ in self._files.values():
            os.close(fd)
        self._files.clear()

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._queue and not self._closed:
                    self._work.wait()
                if self._closed:
                    return
                job = heapq.heappop(self._queue)[2]
            self._execute(job)
            del job  # its views would keep a bank's memory alive while this thread waits

    def _execute(self, job: _Job) -> BaseException | None:
        """Do a read; returns what is not an `Exception` and interrupted it."""
        interrupt = None
        start = time.perf_counter()
        try:
            reads = self._read(job)
            error = None
        except ExpertReadError as e:
            reads, error = 0, e
        except BaseException as e:  # a waiting caller must never hang, whatever happened here
            first = job.ranges[0]
            reads, error = 0, ExpertReadError(*_label(first), first.offset, 5)
            error.__cause__ = e
            interrupt = None if isinstance(e, Exception) else e
        with self._lock:
            self.stats.read_seconds += time.perf_counter() - start
            self.stats.reads += reads
            self.stats.bytes += 0 if error else job.nbytes
        self._finish(job, error)
        return interrupt

    def _finish(self, job: _Job, error: ExpertReadError | None) -> None:
        ticket = job.ticket
        with self._lock:
            if error is not None:
                self.stats.errors += len(job.ranges)
                ticket.error = ticket.error or error
                ticket.failed.update((r.layer, r.expert) for r in job.ranges)
            ticket._left -= 1
            if ticket._left == 0:
                ticket.seconds = time.perf_counter() - ticket._submitted
                ticket._done.set()

    def _read(self, job: _Job) -> int:
        """Read all of a job's ranges; returns the number of system calls."""
        fd, alignment = self._open(job.ranges[0])
        if alignment > 1 and not _aligned(job, alignment):
            return self._read_bounced(job, fd, alignment)
        buffers = [r.into for r in job.ranges]
        offset, calls = job.ranges[0].offset, 0
        while buffers:
            try:
                count = platform.read_into(fd, buffers, offset)
            except OSError as e:
                raise _failure(job, offset, e.errno) from e
            calls += 1
            if count == 0:
                raise _failure(job, offset, None)
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                if alignment > 1 and count % alignment:
                    raise _failure(job, offset, None)  # a direct read stops short only at the end
                buffers[0] = buffers[0][count:]
        return calls

    def _read_bounced(self, job: _Job, fd: int, alignment: int) -> int:
        """Read the widened, aligned range into aligned memory of this thread, then copy out."""
        begin = job.ranges[0].offset
        end = begin + job.nbytes
        start = begin - begin % alignment
        length = -(-(end - start) // alignment) * alignment
        bounce = self._bounce(length)
        got = calls = 0
        while start + got < end:
            try:
                count = platform.read_into(fd, [bounce[got:length]], start + got)
            except OSError as e:
                raise _failure(job, start + got, e.errno) from e
            calls += 1
            if count == 0 or (count % alignment and start + got + count < end):
                raise _failure(job, start + got + count, None)
            got += count
        position = begin - start
        for r in job.ranges:
            # NumPy lets other threads run during the copy; a memoryview assignment does not.
            np.copyto(
                np.frombuffer(r.into, np.uint8),
                np.frombuffer(bounce[position : position + len(r.into)], np.uint8),
            )
            position += len(r.into)
        return calls

    def _bounce(self, nbytes: int) -> memoryview:
        """This thread's page-aligned buffer of at least `nbytes`."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._local.buffer = memoryview(mmap.mmap(-1, nbytes))
        return buffer

    def _open(self, first: ByteRange) -> tuple[int, int]:
        """The shard's descriptor, opened at first use, and the alignment it asks for."""
        known = self._files.get(first.file)
        if known is None:
            with self._lock:
                known = self._files.get(first.file)
                if known is None:
                    try:
                        if self.direct:
                            known = platform.open_direct(Path(first.file))
                        else:
                            known = os.open(first.file, os.O_RDONLY), 1
                    except OSError as e:
                        raise ExpertReadError(*_label(first), first.offset, e.errno) from e
                    self._files[first.file] = known
        return known


def direct_works(file: Path) -> bool:
    """Can `file` be read past the page cache? Reads its first block to find out."""
    try:
        fd, alignment = platform.open_direct(file)
    except OSError:
        return False
    try:
        os.preadv(fd, [mmap.mmap(-1, max(alignment, platform.PAGE_BYTES))], 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _merge(ranges: Sequence[ByteRange], read_bytes: int) -> list[list[ByteRange]]:
    """Group ranges that lie side by side in a file, none longer than `read_bytes`."""
    runs: list[list[ByteRange]] = []
    length = 0
    for whole in sorted(ranges, key=lambda r: (r.file, r.offset)):
        for r in _split(whole, read_bytes):
            last = runs[-1][-1] if runs else None
            if (
                last is not None
                and last.file == r.file
                and last.offset + len(last.into) == r.offset
                and length + len(r.into) <= read_bytes
            ):
                runs[-1].append(r)
                length += len(r.into)
            else:
                runs.append([r])
                length = len(r.into)
    return runs


def _split(r: ByteRange, read_bytes: int) -> list[ByteRange]:
    if len(r.into) <= read_bytes:
        return [r] if len(r.into) else []
    return [
        r._replace(offset=r.offset + i, into=r.into[i : i + read_bytes])
        for i in range(0, len(r.into), read_bytes)
    ]


def _aligned(job: _Job, alignment: int) -> bool:
    return job.ranges[0].offset % alignment == 0 and all(
        len(r.into) % alignment == 0
        and np.frombuffer(r.into, np.uint8).ctypes.data % alignment == 0
        for r in job.ranges
    )


def _label(r: ByteRange) -> tuple[str, int, str, Path]:
    return r.layer, r.expert, r.tensor, Path(r.file)


def _failure(job: _Job, offset: int, errno: int | None) -> ExpertReadError:
    """The error of the range in which `offset` lies."""
    at = job.ranges[0]
    offset = max(offset, at.offset)  # a widened read may fail before the first wanted byte
    for r in job.ranges:
        if r.offset <= offset:
            at = r
    return ExpertReadError(*_label(at), offset, errno)

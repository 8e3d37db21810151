"""Asynchronous reads of byte ranges into given memory, by a pool of threads.

It knows nothing of MLX: threads handle bytes, and MLX
arrays are bound to the thread that makes them. Demand reads overtake speculative ones; ranges that
lie side by side in a file become one scatter read; long ones are split over the threads.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from .errors import ExpertReadError, StreamError
from .files import ShardFiles, label
from .ranges import ByteRange, merge

DEMAND, SPECULATIVE = 0, 1
"""Priorities: a layer waits for a demand read; a speculative one may be of use later."""

_SMALL_READ_BYTES = 128 << 10

# The waiting thread reads too while reads are shorter than this.
_HELP_SECONDS = 300e-6

OnRead = Callable[[Sequence[ByteRange], int, float, float, float], None]
"""Told of each read: ranges, priority, when it was queued, begun and ended (perf_counter)."""


@dataclass(slots=True)
class ReadStats:
    """What a reader has done.

    Attributes:
        bytes: bytes delivered into expert memory.
        speculative_bytes: those of them that nobody waited for when they were read.
        reads: system calls that read.
        read_seconds: time the threads spent reading, summed over threads.
        wait_seconds: time callers stood still waiting for reads.
        delay_seconds: time that reads which a layer waits for stood behind speculative ones.
        errors: ranges that failed.
    """

    bytes: int = 0
    speculative_bytes: int = 0
    reads: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    delay_seconds: float = 0.0
    errors: int = 0


class Ticket:
    """A submitted group of reads of one layer's experts."""

    def __init__(self, reader: ExpertReader, jobs: list[_Job]) -> None:
        self._reader = reader
        self._submitted = time.perf_counter()
        self.seconds = 0.0  # from submission to the last byte
        self._left = len(jobs)
        self._reads_left: dict[int, int] = {}  # expert -> reads that have not ended
        for job in jobs:
            for expert in job.experts:
                self._reads_left[expert] = self._reads_left.get(expert, 0) + 1
        self._done = threading.Event()
        self._ended = threading.Event()  # set when an expert's last read ends
        self.error: ExpertReadError | None = None  # the first
        self.errors: dict[int, ExpertReadError] = {}  # by expert
        self.failed: set[tuple[str, int]] = set()  # (layer, expert)
        if not jobs:
            self._done.set()

    @property
    def done(self) -> bool:
        return self._done.is_set()

    def ended(self, expert: int) -> bool:
        """Have all reads of this expert ended, well or badly?"""
        return expert not in self._reads_left

    def wait(self) -> None:
        """Stand still until every read has ended, well or badly; helps with the queue meanwhile.

        Raises:
            ExpertReadError: the first failure; `failed` names every expert that did not arrive.
        """
        if not self._done.is_set():
            start = time.perf_counter()
            while not self._done.is_set() and self._reader.help():
                pass
            self._done.wait()
            self._reader.stats.wait_seconds += time.perf_counter() - start
        if self.error is not None:
            raise self.error

    def wait_for_any(self, experts: Collection[int]) -> list[int]:
        """Stand still until the reads of at least one of `experts` have ended; returns those.

        To be called by one thread. Helps with the queue like `wait`.

        Raises:
            ExpertReadError: one of those failed.
        """
        start = time.perf_counter()
        while not (got := [e for e in experts if e not in self._reads_left]):
            if not self._reader.help():
                self._ended.wait()
                self._ended.clear()  # before looking again: what ends from here on sets it again
        self._reader.stats.wait_seconds += time.perf_counter() - start
        for expert in got:
            if expert in self.errors:
                raise self.errors[expert]
        return got


@dataclass(slots=True)
class _Job:
    """What a thread does in one go: scatter reads, each of ranges side by side in one file."""

    runs: list[list[ByteRange]]
    priority: int
    experts: set[int] = field(init=False)
    ticket: Ticket = field(init=False)
    behind: bool = False  # speculative reads held every thread when it was queued

    def __post_init__(self) -> None:
        self.experts = {r.expert for run in self.runs for r in run}


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
        self._files = ShardFiles(direct)
        self._queue: list[tuple[int, int, _Job]] = []  # heap of (priority, order, job)
        self._order = 0
        self._helping = 0  # reads that callers do themselves
        self._speculating = 0  # speculative reads under way
        self._job_seconds = 0.0  # moving average of one read
        self.on_read: OnRead | None = None  # called after each read while a timeline is taken
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._idle = threading.Condition(self._lock)
        self._closed = False
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
        runs = merge(ranges, self._read_bytes)
        # Handing out a small read costs as much as the read: then no more portions than threads.
        each = 1
        if sum(len(r.into) for r in ranges) < _SMALL_READ_BYTES * len(runs):
            each = -(-len(runs) // max(8, len(self._threads)))
        jobs = [_Job(runs[i : i + each], priority) for i in range(0, len(runs), each)]
        ticket = Ticket(self, jobs)
        with self._work:
            if self._closed:
                raise StreamError("the expert reader is closed")
            behind = priority == DEMAND and self._speculating >= len(self._threads)
            for job in jobs:
                job.ticket, job.behind = ticket, behind
                self._order += 1
                heapq.heappush(self._queue, (priority, self._order, job))
            self._work.notify(len(jobs))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Take the ticket's queued reads back and wait for those under way.

        Its memory may be reused afterwards; which ranges arrived is not known.
        """
        with self._lock:
            self._take_back(ticket, lambda job: True)
        ticket._done.wait()

    def withdraw(self, ticket: Ticket, expert: int) -> bool:
        """Take an expert's reads back if none is under way; returns whether that was so.

        Its memory may then be reused at once. Otherwise nothing changes.
        """
        with self._lock:
            queued = [e[2] for e in self._queue if e[2].ticket is ticket]
            mine = [job for job in queued if expert in job.experts]
            under_way = ticket._reads_left.get(expert, 0) - len(mine)
            if under_way or any(len(job.experts) > 1 for job in mine):
                return False
            self._take_back(ticket, lambda job: expert in job.experts)
        return True

    def promote(self, ticket: Ticket, expert: int) -> None:
        """A speculative read is waited for now: put what is queued of it among demand reads."""
        with self._lock:
            for i, (priority, order, job) in enumerate(self._queue):
                if job.ticket is ticket and expert in job.experts and priority > DEMAND:
                    self._queue[i] = (DEMAND, order, job)
            heapq.heapify(self._queue)

    def _take_back(self, ticket: Ticket, chosen: Callable[[_Job], bool]) -> None:
        mine = [e[2] for e in self._queue if e[2].ticket is ticket and chosen(e[2])]
        self._queue = [e for e in self._queue if e[2].ticket is not ticket or not chosen(e[2])]
        heapq.heapify(self._queue)
        for job in mine:
            self._count_down(job)

    def help(self) -> bool:
        """Run the first queued demand read in the caller's thread; False if none is to be run.

        A warm read takes 10 us and waking a thread about 50. A long read is left to the threads:
        whoever waits should rather go on when something else has arrived.
        """
        return self._job_seconds < _HELP_SECONDS and self.run_one(DEMAND)

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
                self._finish(
                    job, [(r, ExpertReadError(*label(r[0]), r[0].offset, 9)) for r in job.runs]
                )
        for thread in self._threads:
            thread.join()
        with self._idle:  # a descriptor closed under a read may be another file by then
            self._idle.wait_for(lambda: self._helping == 0)
        self._files.close()

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
        speculative = job.priority != DEMAND
        with self._lock:
            self._speculating += speculative
            if job.behind:
                self.stats.delay_seconds += start - job.ticket._submitted
        reads = nbytes = 0
        failures: list[tuple[list[ByteRange], ExpertReadError]] = []
        for run in job.runs:
            try:
                reads += self._files.read(run)
                nbytes += sum(len(r.into) for r in run)
            except ExpertReadError as e:
                failures.append((run, e))
            except BaseException as e:  # a waiting caller must never hang, whatever happened here
                error = ExpertReadError(*label(run[0]), run[0].offset, 5)
                error.__cause__ = e
                failures.append((run, error))
                interrupt = None if isinstance(e, Exception) else e
        seconds = time.perf_counter() - start
        if (on_read := self.on_read) is not None:
            ranges = [r for run in job.runs for r in run]
            on_read(ranges, job.priority, job.ticket._submitted, start, start + seconds)
        with self._lock:
            self._speculating -= speculative
            self._job_seconds += 0.05 * (seconds - self._job_seconds)
            self.stats.read_seconds += seconds
            self.stats.reads += reads
            self.stats.bytes += nbytes
            self.stats.speculative_bytes += nbytes if speculative else 0
            self._finish(job, failures)
        return interrupt

    def _finish(
        self, job: _Job, failures: Sequence[tuple[list[ByteRange], ExpertReadError]]
    ) -> None:
        """A job has ended; with the lock held."""
        ticket = job.ticket
        for run, error in failures:
            self.stats.errors += len(run)
            ticket.error = ticket.error or error
            for r in run:
                ticket.errors.setdefault(r.expert, error)
                ticket.failed.add((r.layer, r.expert))
        self._count_down(job)

    def _count_down(self, job: _Job) -> None:
        """A read has ended or will never begin; with the lock held."""
        ticket = job.ticket
        for expert in job.experts:
            left = ticket._reads_left[expert] = ticket._reads_left[expert] - 1
            if not left:
                del ticket._reads_left[expert]
                ticket._ended.set()
        ticket._left -= 1
        if ticket._left == 0:
            ticket.seconds = time.perf_counter() - ticket._submitted
            ticket._done.set()

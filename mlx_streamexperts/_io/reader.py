"""Asynchronous reads of byte ranges into given memory, by a pool of threads.

It knows nothing of MLX: threads handle bytes, and MLX
arrays are bound to the thread that makes them. Demand reads overtake speculative ones; ranges that
lie side by side in a file become one scatter read; long ones are split over the threads.

Ctrl-C may end a caller's call here between any two steps. Therefore callers use no lock that is
written in Python (`Condition`, `Event`: an interrupt within leaves them locked), what ends a read
can be done twice, and `stop` trusts no ticket.
"""

from __future__ import annotations

import errno
import heapq
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import SimpleQueue

from .._errors import ExpertReadError, StreamError
from .._listeners import Listeners
from .files import ShardFiles, label
from .ranges import ByteRange, merge

DEMAND, PREFETCH = 0, 1
"""Priorities: a layer waits for a demand read; a speculative one may be of use later."""

_SMALL_READ_BYTES = 128 << 10

# The waiting thread reads too while reads are shorter than this.
_HELP_SECONDS = 300e-6

# It reads all of them where one takes less than this: threads that are woken for 5 us of copying
# stand in each other's way. Embedded model, 25 % resident, warm: 47.0 -> 50.2 tokens/s.
_QUICK_SECONDS = 40e-6
_QUICK_BYTES = 1 << 20

# Who waits looks this often whether a thread has died, or a signal got lost.
_LOOK_SECONDS = 0.05

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


class Wake:
    """Wakes one waiter. Callers look again at what they wait for: it may wake without cause."""

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._gate.acquire()

    def set(self) -> None:
        with suppress(RuntimeError):  # nobody has woken since the last time
            self._gate.release()

    def wait(self) -> None:
        self._gate.acquire(timeout=_LOOK_SECONDS)


class Ticket:
    """A submitted group of reads of one layer's experts."""

    def __init__(self, reader: ExpertReader, jobs: list[Job]) -> None:
        self._reader = reader
        self._submitted = time.perf_counter()
        self.seconds = 0.0  # from submission to the last byte
        self._left = set(jobs)  # that have not ended
        self._reads_left: dict[int, set[Job]] = {}  # by expert
        for job in jobs:
            for expert in job.experts:
                self._reads_left.setdefault(expert, set()).add(job)
        self._wake = Wake()  # set when an expert's last read ends
        self.unheard = 0  # queued reads that no thread was woken for: who waits does them
        self.error: ExpertReadError | None = None  # the first
        self.errors: dict[int, ExpertReadError] = {}  # by expert
        self.failed: set[tuple[str, int]] = set()  # (layer, expert)

    @property
    def done(self) -> bool:
        return not self._left

    def ended(self, expert: int) -> bool:
        """Have all reads of this expert ended, well or badly?"""
        return expert not in self._reads_left

    def wait(self) -> None:
        """Stand still until every read has ended, well or badly; helps with the queue meanwhile.

        Raises:
            ExpertReadError: the first failure; `failed` names every expert that did not arrive.
        """
        if self._left:
            start = time.perf_counter()
            while self._left:
                self._help()
            self._wake.set()  # somebody else may wait too
            self._reader.stats.wait_seconds += time.perf_counter() - start
        if self.error is not None:
            self._reader.revive()
            raise self.error

    def wait_for_any(self, experts: Collection[int]) -> list[int]:
        """Stand still until the reads of at least one of `experts` have ended; returns those.

        To be called by one thread. Helps with the queue like `wait`.

        Raises:
            ExpertReadError: one of those failed.
        """
        start = time.perf_counter()
        while not (got := [e for e in experts if e not in self._reads_left]):
            self._help()
        self._reader.stats.wait_seconds += time.perf_counter() - start
        for expert in got:
            if expert in self.errors:
                self._reader.revive()
                raise self.errors[expert]
        return got

    def _help(self) -> None:
        """Run a queued read, or stand still until one has ended."""
        if self.unheard and not self._reader.quick:
            self._rouse()
        if not self._reader.help():
            self._stand_still()

    def _rouse(self) -> None:
        jobs, self.unheard = self.unheard, 0
        self._reader.rouse(jobs)

    def _stand_still(self) -> None:
        if self.unheard:
            self._rouse()
        start = time.perf_counter()
        self._wake.wait()
        if time.perf_counter() - start >= _LOOK_SECONDS:
            self._reader.revive()


@dataclass(slots=True, eq=False)
class Job:
    """What a thread does in one go: scatter reads, each of ranges side by side in one file."""

    runs: list[list[ByteRange]]
    priority: int
    layer: str = field(init=False)
    experts: set[int] = field(init=False)
    ticket: Ticket = field(init=False)
    behind: bool = False  # speculative reads held every thread when it was queued

    def __post_init__(self) -> None:
        self.layer = self.runs[0][0].layer
        self.experts = {r.expert for run in self.runs for r in run}


class ExpertReader:
    """Thread pool for reads.

    Args:
        threads: reads in flight at once.
        read_bytes: longest single read; longer ranges are split so that threads share them.
        direct: bypass the page cache. True needs the file system's support and raises where it
            has none.
        expected: marks of the files (`platform.file_mark`): others are not read in their place.
    """

    def __init__(
        self,
        threads: int = 8,
        read_bytes: int = 8 << 20,
        direct: bool = False,
        expected: dict[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.stats = ReadStats()
        self.direct = direct
        self._read_bytes = read_bytes
        self._files = ShardFiles(direct, expected or {})
        self._queue: list[tuple[int, int, Job]] = []  # heap of (priority, order, job)
        self._order = 0
        self._taken: dict[int, Job] = {}  # reads under way, by thread
        self._speculating = 0  # speculative reads under way
        self._job_seconds, self._read_seconds = 0.0, _QUICK_SECONDS  # moving averages: job, read
        self.on_read = Listeners[OnRead]()  # called after each read while timelines are taken
        self._lock = threading.Lock()
        self._work: SimpleQueue[None] = SimpleQueue()  # one for each job, taken by whom it wakes
        self._idle = Wake()  # set when a read ends
        self._closed = False
        self._threads: list[threading.Thread] = []
        try:
            for i in range(threads):
                self._threads.append(self._start(i))
        except RuntimeError as e:  # the system's limit of threads: fewer do as well
            if not self._threads:
                raise StreamError(f"no thread can be started to read experts: {e}") from e
        except BaseException:
            self.close()
            raise

    def submit(self, ranges: Sequence[ByteRange], priority: int = DEMAND) -> Ticket:
        """Queue reads; returns at once.

        Args:
            ranges: what to read; all memory must stay valid until the ticket is done.
            priority: `DEMAND` or `PREFETCH`.
        """
        runs = merge(ranges, self._read_bytes)
        # Handing out a small read costs as much as the read: then no more portions than threads.
        each, total = 1, sum([len(r.into) for r in ranges])
        if total < _SMALL_READ_BYTES * len(runs):
            each = -(-len(runs) // max(8, len(self._threads)))
        jobs = [Job(runs[i : i + each], priority) for i in range(0, len(runs), each)]
        ticket = Ticket(self, jobs)
        with self._lock:
            if self._closed:
                raise StreamError("the expert reader is closed")
            behind = priority == DEMAND and self._speculating >= len(self._threads)
            for job in jobs:
                job.ticket, job.behind = ticket, behind
                self._order += 1
                heapq.heappush(self._queue, (priority, self._order, job))
        if priority == DEMAND and total < _QUICK_BYTES and self.quick:
            ticket.unheard = len(jobs)
        else:
            self.rouse(len(jobs))
        return ticket

    @property
    def quick(self) -> bool:
        """Are reads so short that waking a thread for one takes longer?"""
        return self._read_seconds < _QUICK_SECONDS

    def rouse(self, jobs: int) -> None:
        """Wake threads for so many queued reads."""
        for _ in range(jobs):
            self._work.put(None)

    def cancel(self, ticket: Ticket) -> None:
        """Take the ticket's queued reads back and wait for those under way.

        Its memory may be reused afterwards; which ranges arrived is not known.
        """
        self._give_back()
        with self._lock:
            self._take_back(lambda job: job.ticket is ticket)
        while ticket._left:
            ticket._stand_still()

    def stop(self, layer: str) -> None:
        """Take all queued reads of a layer back and wait for those under way.

        For when a call was interrupted anywhere, in this class too: no ticket is asked.
        """
        self._give_back()
        with self._lock:
            self._take_back(lambda job: job.layer == layer)
        while any(job.layer == layer for job in list(self._taken.values())):
            self._idle.wait()
            self.revive()

    def withdraw(self, ticket: Ticket, expert: int) -> bool:
        """Take an expert's reads back if none is under way; returns whether that was so.

        Its memory may then be reused at once. Otherwise nothing changes.
        """
        with self._lock:
            queued = [e[2] for e in self._queue if e[2].ticket is ticket]
            mine = [job for job in queued if expert in job.experts]
            under_way = len(ticket._reads_left.get(expert, ())) - len(mine)
            if under_way or any(len(job.experts) > 1 for job in mine):
                return False
            self._take_back(lambda job: job.ticket is ticket and expert in job.experts)
        return True

    def promote(self, ticket: Ticket, expert: int) -> None:
        """A speculative read is waited for now: put what is queued of it among demand reads."""
        with self._lock:
            for i, (priority, order, job) in enumerate(self._queue):
                if job.ticket is ticket and expert in job.experts and priority > DEMAND:
                    self._queue[i] = (DEMAND, order, job)
            heapq.heapify(self._queue)

    def _take_back(self, chosen: Callable[[Job], bool]) -> None:
        mine = [e[2] for e in self._queue if chosen(e[2])]
        self._queue = [e for e in self._queue if not chosen(e[2])]
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
        job = self._take(priority)
        if job is None:
            return False
        try:
            interrupt = self._execute(job)
        finally:
            self._give_back()
        if interrupt is not None:
            raise interrupt  # Ctrl-C, in the caller's thread: his, as anywhere else
        return True

    def close(self) -> None:
        """End the threads and close the files. Queued reads are dropped and count as failed."""
        self._give_back()
        with self._lock:
            self._closed = True
            dropped, self._queue = self._queue, []
            for _, _, job in dropped:
                self._finish(job, self._failures(job, errno.EBADF))
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        while self._taken:  # a descriptor closed under a read may be another file by then
            self._idle.wait()
            self._bury()
        self._files.close()

    def is_mine(self) -> bool:
        """Is this one of the reader's threads?"""
        return threading.current_thread() in self._threads

    def revive(self) -> None:
        """Threads that died (none should) are replaced; what they were reading has failed."""
        self._bury()
        for i, thread in enumerate(self._threads):
            if not (thread.is_alive() or self._closed):
                self._threads[i] = self._start(i)
                self._work.put(None)  # which it had taken

    def _start(self, number: int) -> threading.Thread:
        name = f"expert-reader-{number}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        while True:
            self._work.get()
            try:
                while (job := self._take(sys.maxsize)) is not None:
                    self._execute(job)
                    del job  # its views would keep a bank's memory alive while this thread waits
            finally:
                self._give_back()
            if self._closed:
                return

    def _take(self, priority: int) -> Job | None:
        """The first queued read of at most this priority value, now this thread's."""
        self._give_back()
        with self._lock:
            if not self._queue or self._queue[0][0] > priority:
                return None
            # Noted before it leaves the queue: it is never in neither.
            job = self._taken[threading.get_ident()] = self._queue[0][2]
            heapq.heappop(self._queue)
        return job

    def _give_back(self) -> None:
        """If this thread was interrupted in a read, that has failed."""
        if threading.get_ident() in self._taken:
            self._fail([threading.get_ident()])

    def _bury(self) -> None:
        """What threads that are no more were reading has failed."""
        alive = sys._current_frames()
        self._fail([t for t in list(self._taken) if t not in alive])

    def _fail(self, threads: Iterable[int]) -> None:
        with self._lock:
            for thread in threads:
                job = self._taken[thread]
                if not any(e[2] is job for e in self._queue):
                    self._finish(job, self._failures(job, errno.EINTR))
                del self._taken[thread]
        self._idle.set()

    def _failures(self, job: Job, number: int) -> list[tuple[list[ByteRange], ExpertReadError]]:
        return [(r, ExpertReadError(*label(r[0]), r[0].offset, number)) for r in job.runs]

    def _execute(self, job: Job) -> BaseException | None:
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
        for on_read in self.on_read.now:
            ranges = [r for run in job.runs for r in run]
            on_read(ranges, job.priority, job.ticket._submitted, start, start + seconds)
        with self._lock:
            self._speculating -= speculative
            self._job_seconds += 0.05 * (seconds - self._job_seconds)
            self._read_seconds += 0.05 * (seconds / max(1, reads) - self._read_seconds)
            self.stats.read_seconds += seconds
            self.stats.reads += reads
            self.stats.bytes += nbytes
            self.stats.speculative_bytes += nbytes if speculative else 0
            self._finish(job, failures)
            del self._taken[threading.get_ident()]
        self._idle.set()
        return interrupt

    def _finish(
        self, job: Job, failures: Sequence[tuple[list[ByteRange], ExpertReadError]]
    ) -> None:
        """A job has ended; with the lock held. Done twice it does no more than once."""
        ticket = job.ticket
        if job not in ticket._left:
            return
        for run, error in failures:
            self.stats.errors += len(run)
            ticket.error = ticket.error or error
            for r in run:
                ticket.errors.setdefault(r.expert, error)
                ticket.failed.add((r.layer, r.expert))
        self._count_down(job)

    def _count_down(self, job: Job) -> None:
        """A read has ended or will never begin; with the lock held."""
        ticket = job.ticket
        for expert in job.experts:
            left = ticket._reads_left.get(expert, set())
            left.discard(job)
            if not left:
                ticket._reads_left.pop(expert, None)
        if ticket._left == {job}:
            ticket.seconds = time.perf_counter() - ticket._submitted
        ticket._left.discard(job)
        ticket._wake.set()

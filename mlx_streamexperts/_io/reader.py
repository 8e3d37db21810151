"""Asynchronous reads of byte ranges into given memory, by a pool of threads.

`ExpertReader` owns the queue, the threads and the files. A `Ticket` is a caller's view of the reads
that it submitted; a `Job` is the part of them that one thread does in one go. Threads handle bytes
and must never touch MLX, whose arrays are bound to the thread that makes them.

Any line that runs in a caller's thread may be the last of its call (Ctrl-C, `MemoryError`).
Therefore callers use no lock that is written in Python (an exception within `Condition` or `Event`
leaves it locked), a job is always in the queue, in `_taken` or ended, and can be ended twice.
"""

from __future__ import annotations

import errno
import gc
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
from .._osinfo import raise_thread_priority
from .files import ShardFiles, label
from .mirrors import Drive, GivenUpError, Mirrors
from .ranges import ByteRange, merge, span_bytes

DEMAND, PREFETCH = 0, 1
"""Priorities: a layer waits for a demand read; a prefetch may be of use later."""

_SMALL_READ_BYTES = 128 << 10

# The waiting thread reads too while reads are shorter than this.
_HELP_SECONDS = 300e-6

# It does all reads itself if one takes less than this: workers that are woken for 5 us of copying
# get in each other's way. Embedded model, 25 % resident, warm: 47.0 -> 50.2 tokens/s.
_QUICK_SECONDS = 40e-6
_QUICK_BYTES = 1 << 20

# It takes them in jobs of about this length, short enough for others to help if reads become slow.
# A layer of the embedded model with two misses from a checkpoint: one job instead of six.
_ALONE_SECONDS = 150e-6

TINY_READ_BYTES = 16 << 10
"""Reads that are shorter on average go through the page cache, even if it is short of memory.

If they wait for the drive, they are announced together: the drive gets all at once without a thread
each, and the waiting thread soon finds most of them there. Nothing in the page cache, 12.5 %
resident, tokens/s against eight threads past the page cache, by the average of nine reads an
expert: 1.15 with 8.5 kB, 0.95 with 27 kB, 0.89 with 61 kB. Past it, a Mac reads pages of 16 kB.
"""
_FORGET = 0.9  # a job whose first read does not wait says this much less that others do
_MOST_WAIT = 5 * _QUICK_SECONDS  # then a single pause is forgotten after 16 jobs

# A waiting thread checks this often for workers that died and for wake-ups that got lost.
_CHECK_SECONDS = 0.05

_POLL_SECONDS = 0.001  # between looks at reads that are under way, after errors and when closing

OnRead = Callable[[Sequence[ByteRange], int, float, float, float], None]
"""Called after each job: its ranges, with the files that were read, its priority, and when it was
queued, begun and ended (`time.perf_counter`)."""


@dataclass(slots=True)
class ReadStats:
    """What a reader has done.

    Attributes:
        bytes: bytes delivered into expert memory.
        speculative_bytes: those of them that were prefetched.
        reads: system calls that read.
        read_seconds: time spent reading, summed over threads.
        wait_seconds: time that callers waited for reads.
        delay_seconds: time that demand reads waited because every thread did a prefetch.
        errors: ranges that failed.
        drive_bytes: bytes by drive, if there are mirrors: the model's own folder first.
        moved: reads that failed or hung at one drive and were done by another.
    """

    bytes: int = 0
    speculative_bytes: int = 0
    reads: int = 0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    delay_seconds: float = 0.0
    errors: int = 0
    drive_bytes: dict[str, int] = field(default_factory=dict)
    moved: int = 0


class Ticket:
    """The reads of one `ExpertReader.submit`, as their caller sees them. All are of one layer.

    Attributes:
        submitted: when (`time.perf_counter`).
        left: jobs that have not ended, by expert. An expert that is not in it has arrived, failed,
            or was taken back.
        errors: why an expert did not arrive, by expert; the first failure first.
        unassigned: jobs left for the waiting thread; no worker was woken for them.
    """

    def __init__(self, reader: ExpertReader) -> None:
        self._reader = reader
        self._gate = threading.Lock()  # open when something has ended
        self._gate.acquire()
        self.submitted = time.perf_counter()
        self.left: dict[int, set[Job]] = {}
        self.errors: dict[int, ExpertReadError] = {}
        self.unassigned = 0

    def wait(self) -> None:
        """Wait until every read has ended, and help with demand reads meanwhile.

        Raises:
            ExpertReadError: the first failure; `errors` has all experts that did not arrive.
        """
        if self.left:
            start = time.perf_counter()
            while self.left:
                self._help()
            self.wake()  # another thread may wait too
            self._reader.stats.wait_seconds += time.perf_counter() - start
        if self.errors:
            self._reader.revive()
            raise next(iter(self.errors.values()))

    def wait_for_any(self, experts: Collection[int]) -> list[int]:
        """Wait until the reads of at least one of `experts` have ended; returns those experts.

        Only one thread may call this. It helps with demand reads like `wait`.

        Raises:
            ExpertReadError: one of those experts failed.
        """
        start, wanted = time.perf_counter(), set(experts)
        while wanted <= self.left.keys():
            self._help()
        self._reader.stats.wait_seconds += time.perf_counter() - start
        ended = [e for e in experts if e not in self.left]
        if self.errors:
            for expert in ended:
                if expert in self.errors:
                    self._reader.revive()
                    raise self.errors[expert]
        return ended

    def end(self, job: Job, failures: Sequence[tuple[list[ByteRange], ExpertReadError]]) -> None:
        """Note that a job has ended. The caller holds the reader's lock.

        Args:
            job: one of this ticket's; nothing changes if it has ended before.
            failures: its ranges that could not be read.
        """
        if job.ended:
            return
        for run, error in failures:
            for r in run:
                self.errors.setdefault(r.expert, error)
        for expert in job.experts:
            jobs = self.left.get(expert, set())
            jobs.discard(job)
            if not jobs:
                self.left.pop(expert, None)
        job.ended = True

    def wake(self) -> None:
        """Let a waiting thread look again at what it waits for."""
        if self._gate.locked():
            with suppress(RuntimeError):  # another thread was faster
                self._gate.release()

    def _help(self) -> None:
        """Run a queued demand read, or wait until a read of this ticket has ended."""
        reader = self._reader
        if self.unassigned and not reader.quick:
            self._assign()
        if reader.help():
            return
        if self.unassigned:
            self._assign()
        if not self._gate.acquire(timeout=_CHECK_SECONDS):
            reader.revive()

    def _assign(self) -> None:
        self._reader.wake(self.unassigned)
        self.unassigned = 0


@dataclass(slots=True, eq=False)
class Job:
    """What one thread does in one go.

    Attributes:
        runs: scatter reads, each of ranges that lie side by side in one file.
        priority: `DEMAND`, `PREFETCH`, or more for a prefetch that can wait.
        ticket: what it is part of.
        experts: whose bytes it reads.
        behind: every thread did a prefetch when this demand read was queued.
        ended: read, failed or taken back.
    """

    runs: list[list[ByteRange]]
    priority: int
    ticket: Ticket
    experts: set[int] = field(default_factory=set)
    behind: bool = False
    ended: bool = False


class ExpertReader:
    """Thread pool for reads.

    Args:
        threads: reads in flight at once.
        read_bytes: longest single read; longer ranges are split so that threads share them.
        direct: bypass the page cache. Reads fail if the file system does not support that.
        expected: marks of the files (`_osinfo.file_mark`); a file with another mark is not read.
        mirrors: the drives that hold the files, if there are several. Then `threads` is the number
            for each of them, and callers leave all reads to the threads, which may hang.

    Attributes:
        stats: counters.
        on_read: called after each job.
        quick: reads take less time than waking a worker for one.
    """

    def __init__(
        self,
        threads: int = 8,
        read_bytes: int = 8 << 20,
        direct: bool = False,
        expected: dict[str, tuple[int, ...]] | None = None,
        mirrors: Mirrors | None = None,
    ) -> None:
        self.stats = ReadStats()
        self.on_read = Listeners[OnRead]()
        self.direct = direct
        self.quick = False
        self._read_bytes = read_bytes
        self._files = ShardFiles(direct, expected or {})
        self.mirrors = mirrors
        self._late: list[threading.Thread] = []  # workers that hung, and were replaced
        threads *= len(mirrors.drives) if mirrors is not None else 1
        self._queue: list[tuple[int, int, Job]] = []  # heap of (priority, order, job)
        self._order = 0
        self._taken: dict[int, Job] = {}  # under way, by thread
        self._job_seconds, self._read_seconds = 0.0, _QUICK_SECONDS  # moving averages: job, read
        self._wait_seconds = 0.0  # of a job's first read, the longest of late
        self._lock = threading.Lock()
        self._work: SimpleQueue[None] = SimpleQueue()  # one item wakes one worker
        self._closed = False
        self._threads: list[threading.Thread] = []
        try:
            for i in range(threads):
                self._threads.append(self._start(i))
        except RuntimeError as e:  # the system's limit of threads; fewer do as well
            if not self._threads:
                raise StreamError(f"no thread can be started to read experts: {e}") from e
        except BaseException:
            self.close()
            raise

    def submit(self, ranges: Sequence[ByteRange], priority: int = DEMAND) -> Ticket:
        """Queue reads; returns at once.

        Args:
            ranges: what to read. All memory must stay valid until the reads have ended.
            priority: `DEMAND`, `PREFETCH`, or more for a prefetch that can wait.
        """
        longest, nbytes = self._read_bytes, sum([len(r.into) for r in ranges])
        if self.mirrors is not None:
            longest = self.mirrors.piece_bytes(nbytes, longest)
        runs = merge(ranges, longest)
        # Handing out a small read costs as much as the read: then no more jobs than threads, and
        # few if the waiting thread does them all.
        each = 1
        small = priority == DEMAND and nbytes < _QUICK_BYTES and self.mirrors is None
        tiny = small and not self.direct and nbytes < TINY_READ_BYTES * len(runs)
        if tiny and self._wait_seconds > _QUICK_SECONDS:
            self._files.announce(runs)
        alone = small and self.quick
        if alone:
            each = max(1, int(_ALONE_SECONDS / max(self._read_seconds, 1e-6)))
        elif nbytes < _SMALL_READ_BYTES * len(runs):
            each = -(-len(runs) // max(8, len(self._threads)))
        ticket, jobs = Ticket(self), []
        for i in range(0, len(runs), each):
            job = Job(runs[i : i + each], priority, ticket)
            jobs.append(job)
            job.experts = {r.expert for run in job.runs for r in run}
            for expert in job.experts:
                ticket.left.setdefault(expert, set()).add(job)
        with self._lock:
            if self._closed:
                raise StreamError("the expert reader is closed")
            threads = len(self._threads)
            behind = priority == DEMAND and len(self._taken) >= threads
            if behind:
                behind = sum(job.priority > DEMAND for job in self._taken.values()) >= threads
            for job in jobs:
                job.behind = behind
                self._order += 1
                heapq.heappush(self._queue, (priority, self._order, job))
        if alone:
            ticket.unassigned = len(jobs)
        else:
            self.wake(len(jobs))
        return ticket

    def wake(self, workers: int) -> None:
        """Wake so many workers, each of which works until the queue is empty."""
        for _ in range(workers):
            self._work.put(None)

    def help(self) -> bool:
        """Run the first queued demand read in the caller's thread; False if it runs none.

        A warm read takes 10 us and waking a worker about 50. Long reads are left to the workers, so
        that the caller can go on as soon as something else has arrived.
        """
        if self._job_seconds >= _HELP_SECONDS or self.mirrors is not None:
            return False
        try:
            job = self._take(DEMAND)
            if job is None:
                return False
            self._execute(job)
        except BaseException:
            self._fail_own()
            raise
        return True

    def cancel(self, ticket: Ticket) -> None:
        """Take back the ticket's queued reads and wait for those under way.

        Its memory may be reused afterwards. Which ranges arrived is not known.
        """
        self._stop(lambda job: job.ticket is ticket)

    def stop(self, layer: str) -> None:
        """Take back all queued reads of a layer and wait for those under way.

        This is for a caller that lost its tickets because an exception ended its call.
        """
        self._stop(lambda job: job.runs[0][0].layer == layer)

    def _stop(self, chosen: Callable[[Job], bool]) -> None:
        self._fail_own()
        while True:
            with self._lock:
                self._take_back(chosen)  # in every round: a read that hangs is queued again
                if not any(chosen(job) for job in self._taken.values()):
                    return
            time.sleep(_POLL_SECONDS)
            self.revive()

    def withdraw(self, ticket: Ticket, expert: int) -> bool:
        """Take back an expert's reads if none is under way; returns whether it did.

        Its memory may then be reused at once. Otherwise nothing changes.
        """
        with self._lock:
            queued = [job for _, _, job in self._queue if job.ticket is ticket]
            mine = [job for job in queued if expert in job.experts]
            under_way = len(ticket.left.get(expert, ())) - len(mine)
            if under_way or any(len(job.experts) > 1 for job in mine):
                return False
            self._take_back(lambda job: job.ticket is ticket and expert in job.experts)
        return True

    def promote(self, ticket: Ticket, expert: int) -> None:
        """Turn an expert's queued prefetch into a demand read, because a layer waits for it now."""
        with self._lock:
            for i, (priority, order, job) in enumerate(self._queue):
                if job.ticket is ticket and expert in job.experts and priority > DEMAND:
                    self._queue[i] = (DEMAND, order, job)
            heapq.heapify(self._queue)

    def _take_back(self, chosen: Callable[[Job], bool]) -> None:
        """Remove jobs from the queue; the caller holds the lock."""
        mine = [job for _, _, job in self._queue if chosen(job)]
        self._queue = [entry for entry in self._queue if not chosen(entry[2])]
        heapq.heapify(self._queue)
        for job in mine:
            job.ticket.end(job, ())

    def close(self) -> None:
        """End the threads and close the files. Queued reads fail."""
        self._fail_own()
        with self._lock:
            self._closed = True
            dropped, self._queue = self._queue, []
            for _, _, job in dropped:
                self._fail(job, errno.EBADF)
        self.wake(len(self._threads))
        for i in range(len(self._threads)):
            while (thread := self._threads[i]).is_alive():
                thread.join(None if self.mirrors is None else _CHECK_SECONDS)
                self._replace_hung()
        # A descriptor that is closed while a caller reads may be another file by then.
        self._stop(lambda job: True)
        self._files.close()
        if self.mirrors is not None:
            self.mirrors.close()

    def is_mine(self) -> bool:
        """Is the calling thread one of this reader's workers, or its mirrors'?"""
        me = threading.current_thread()
        if self.mirrors is not None and self.mirrors.is_mine():
            return True
        return me in self._threads or me in self._late

    def revive(self) -> None:
        """Replace workers that have died, or hang; what the dead were reading has failed."""
        self._reap()
        self._replace_hung()
        for i, thread in enumerate(self._threads):
            if not (thread.is_alive() or self._closed):
                self._threads[i] = self._start(i)
                self._work.put(None)  # the dead worker had taken one

    def _replace_hung(self) -> None:
        """Let other workers do what hangs at one drive and can be read from another."""
        if self.mirrors is None or not (hung := self.mirrors.give_up()):
            return
        for thread in hung:
            self._requeue(thread)
        for i, worker in enumerate(self._threads):
            if worker.ident in hung:
                self._late = [*filter(threading.Thread.is_alive, self._late), worker]
                with suppress(RuntimeError):  # the system's limit of threads
                    self._threads[i] = self._start(i)
                self._work.put(None)

    def _requeue(self, thread: int) -> None:
        """Let another worker do what a thread has taken and was given up at a drive."""
        with self._lock:
            job = self._taken.get(thread)
            if job is None:
                return
            if self._closed:
                self._fail(job, errno.EBADF)
            elif not job.ended:
                self._order += 1
                heapq.heappush(self._queue, (job.priority, -self._order, job))
                self.stats.moved += 1
            del self._taken[thread]
        self._work.put(None)

    def _start(self, number: int) -> threading.Thread:
        name = f"expert-reader-{number}"
        thread = threading.Thread(target=self._run, name=name, daemon=True)
        thread.start()
        return thread

    def _run(self) -> None:
        raise_thread_priority()
        while True:
            self._work.get()
            try:
                while (job := self._take(sys.maxsize)) is not None:
                    if not self._execute(job):
                        return  # another worker has this one's place
                    del job  # its views would keep a bank's memory alive while this thread waits
            finally:
                self._fail_own()
            if self._closed:
                return

    def _take(self, priority: int) -> Job | None:
        """The first queued job of at most this priority value, now this thread's."""
        me = threading.get_ident()
        if me in self._taken:
            self._fail_taken([me])
        with self._lock:
            if not self._queue or self._queue[0][0] > priority:
                return None
            entry = self._queue[0]
            if self.mirrors is not None and not self.mirrors.has_room(entry[2].runs[0]):
                ready = (e for e in sorted(self._queue) if self.mirrors.has_room(e[2].runs[0]))
                entry = next(ready, entry)
                if entry is self._queue[0] or entry[0] > priority:
                    return None
            job = self._taken[me] = entry[2]  # before it leaves the queue
            if entry is self._queue[0]:
                heapq.heappop(self._queue)
            else:
                self._queue.remove(entry)
                heapq.heapify(self._queue)
            if self.mirrors is not None and self._queue:
                self._work.put(None)  # another worker may have found no drive with room
        return job

    def _execute(self, job: Job) -> bool:
        """Do this thread's job. An error of any read ends the job and goes to its ticket.

        Returns:
            False if the job hung and another thread has it now.
        """
        start = first = time.perf_counter()
        reads = nbytes = moves = 0
        places: list[tuple[Drive, list[ByteRange]]] = []
        failures: list[tuple[list[ByteRange], ExpertReadError]] = []
        for run in job.runs:
            try:
                if self.mirrors is None:
                    reads += self._files.read(run)
                else:
                    calls, drive, moved = self.mirrors.read(run)
                    reads += calls
                    moves += moved
                    places.append((drive, run))
                nbytes += span_bytes(run)
                if run is job.runs[0]:
                    first = time.perf_counter()
            except GivenUpError:
                self._requeue(threading.get_ident())
                return False
            except ExpertReadError as e:
                failures.append((run, e))
            except Exception as e:  # nobody expects it, and a waiting caller must never hang
                error = ExpertReadError(*label(run[0]), run[0].offset, errno.EIO)
                error.__cause__ = e
                failures.append((run, error))
        end = time.perf_counter()
        for on_read in self.on_read.now:
            ranges = [r for run in job.runs for r in run]
            if places:
                ranges = [r._replace(file=d.path(r.file)) for d, run in places for r in run]
            on_read(ranges, job.priority, job.ticket.submitted, start, end)
        with self._lock:
            stats, seconds = self.stats, end - start
            self._job_seconds += 0.05 * (seconds - self._job_seconds)
            self._wait_seconds = max(min(first - start, _MOST_WAIT), _FORGET * self._wait_seconds)
            # The first of announced reads waits for the others, too: it says nothing about them.
            each = (end - first) / (reads - 1) if reads > 1 else seconds
            self._read_seconds += min(0.3, 0.05 * reads) * (each - self._read_seconds)
            self.quick = self._read_seconds < _QUICK_SECONDS
            stats.read_seconds += seconds
            stats.reads += reads
            stats.bytes += nbytes
            if job.priority > DEMAND:
                stats.speculative_bytes += nbytes
            elif job.behind:
                stats.delay_seconds += start - job.ticket.submitted
            if places and self.mirrors is not None and not stats.drive_bytes:
                stats.drive_bytes = dict.fromkeys((d.folder for d in self.mirrors.drives), 0)
            for drive, run in places:
                stats.drive_bytes[drive.folder] += span_bytes(run)
            stats.moved += moves
            for run, _ in failures:
                stats.errors += len(run)
            job.ticket.end(job, failures)
            del self._taken[threading.get_ident()]
        job.ticket.wake()
        return True

    def _fail_own(self) -> None:
        """If an exception ended this thread's job, that has failed."""
        if threading.get_ident() in self._taken:
            self._fail_taken([threading.get_ident()])

    def _reap(self) -> None:
        """What threads that are no more were reading has failed."""
        alive = _running_threads()
        self._fail_taken([t for t in list(self._taken) if t not in alive])

    def _fail_taken(self, threads: Iterable[int]) -> None:
        with self._lock:
            for thread in threads:
                job = self._taken.get(thread)
                if job is None:  # another caller was faster
                    continue
                if not any(queued is job for _, _, queued in self._queue):
                    self._fail(job, errno.EINTR)
                del self._taken[thread]

    def _fail(self, job: Job, number: int) -> None:
        """End a job that was not done; the caller holds the lock."""
        if not job.ended:
            self.stats.errors += sum(len(run) for run in job.runs)
            errors = [ExpertReadError(*label(r[0]), r[0].offset, number) for r in job.runs]
            job.ticket.end(job, list(zip(job.runs, errors, strict=True)))
            job.ticket.wake()


_asking = threading.RLock()  # a collection before may end a stream, which asks too


def _running_threads() -> set[int]:
    """Idents of all threads that run Python now.

    CPython 3.11 holds the lock of its list of threads in `sys._current_frames`, and may collect
    garbage there. If that frees a `threading.local`, whose end wants the same lock, the process
    stands still for ever (seen in gdb). So nothing is collected meanwhile.
    """
    with _asking:
        collects = gc.isenabled()
        gc.disable()
        try:
            return set(sys._current_frames())
        finally:
            if collects:
                gc.enable()

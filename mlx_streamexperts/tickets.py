"""What a caller holds while reads are under way, and how it waits for them.

A ticket stands for reads that were submitted together. Threads of the reader (reader.py) change it,
with the reader's lock held.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import ExpertReadError
from .ranges import ByteRange

if TYPE_CHECKING:
    from .reader import ExpertReader

# Who waits looks this often whether a thread has died, or a signal got lost.
_LOOK_SECONDS = 0.05


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

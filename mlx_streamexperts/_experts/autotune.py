"""Deciding between ways to do the same thing by measured times, while working."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from typing import Generic, TypeVar

Way = TypeVar("Way")


class Trial(Generic[Way]):
    """Tries each way in turns, then keeps the fastest and tries again now and then.

    Steps are timed in turns of `turn` with each way; after `turns` turns of each the lowest median
    wins for `_HOLD` steps, which doubles each time that the same one wins.

    Args:
        ways: what there is to choose from.
        first: what is likely to be best, kept for the first `_BEFORE` steps: a short run is not
            to be spent on trying.

    Attributes:
        way: the present choice.
        trying: it is still being compared.
    """

    _BEFORE, _HOLD, _LONGEST_HOLD = 32, 256, 8192

    def __init__(self, ways: Sequence[Way], first: Way, turn: int = 8, turns: int = 3) -> None:
        self.way, self.trying = first, False
        self._ways, self._turn, self._turns = tuple(ways), turn, turns
        self._times: dict[Way, list[float]] = {way: [] for way in ways}
        self._hold, self._left = self._HOLD, self._BEFORE
        self._winner: Way | None = None
        self._lock = threading.Lock()  # several threads' steps are timed in one trial

    def note(self, seconds: float) -> None:
        """A step took this long with the present choice."""
        with self._lock:
            self._note(seconds)

    def _note(self, seconds: float) -> None:
        if self.trying:
            self._times[self.way].append(seconds)
        self._left -= 1
        if self._left > 0:
            return
        self._left = self._turn
        if not self.trying:  # time to ask again
            self.trying = True
        elif min(map(len, self._times.values())) >= self._turn * self._turns:
            self._decide()
        else:
            self.way = self._ways[(self._ways.index(self.way) + 1) % len(self._ways)]

    def _decide(self) -> None:
        self.way = min(self._ways, key=lambda way: statistics.median(self._times[way]))
        won_again = self.way == self._winner
        self._hold = min(2 * self._hold, self._LONGEST_HOLD) if won_again else self._HOLD
        self._winner, self._left, self.trying = self.way, self._hold, False
        self._times = {way: [] for way in self._ways}


class Pace:
    """Times an expert layer's step with the present way, over layers that are alike.

    A step is from one layer's indices to the next layer's: what is built in between runs in it.

    Args:
        trial: learns the times of those steps that were marked.
    """

    def __init__(self, trial: Trial[str]) -> None:
        self.trial = trial
        self._marked: float | None = None

    def tick(self, now: float) -> None:
        """A layer has its indices."""
        marked, self._marked = self._marked, None
        if marked is not None:
            self.trial.note(now - marked)

    def mark(self, now: float) -> None:
        """This step shows what the present way is worth."""
        self._marked = now

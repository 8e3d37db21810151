"""Choosing between ways to do the same thing by measured times, while working."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Sequence
from typing import Generic, TypeVar

Choice = TypeVar("Choice")


class AutoTuner(Generic[Choice]):
    """Tries each choice in turns, keeps the fastest, and tries again from time to time.

    Steps are timed in turns of `turn` with each choice. After `turns` turns of each, the lowest
    median wins for `_HOLD` steps, which doubles each time that the same choice wins.

    Args:
        choices: what to choose from.
        first: the likeliest to be best, kept for the first `_BEFORE` steps, because a short run
            should not be spent on trying.
        turn: steps of a turn.
        turns: turns of each choice before one wins.
        least_gain: share of the time of `first` that another choice must save to win.

    Attributes:
        choice: the present one.
        trying: choices are being compared.
    """

    _BEFORE, _HOLD, _LONGEST_HOLD = 32, 256, 8192

    def __init__(
        self,
        choices: Sequence[Choice],
        first: Choice,
        turn: int = 8,
        turns: int = 3,
        least_gain: float = 0.0,
    ) -> None:
        self.choice, self.trying = first, False
        self._choices, self._turn, self._turns = tuple(choices), turn, turns
        self._first, self._least_gain = first, least_gain
        self._times: dict[Choice, list[float]] = {choice: [] for choice in choices}
        self._hold, self._left = self._HOLD, self._BEFORE
        self._winner: Choice | None = None
        self._lock = threading.Lock()  # steps of several threads are timed together

    def record(self, seconds: float) -> None:
        """Record the time of a step with the present choice."""
        with self._lock:
            if self.trying:
                self._times[self.choice].append(seconds)
            self._left -= 1
            if self._left > 0:
                return
            self._left = self._turn
            if not self.trying:  # time to try again
                self.trying = True
            elif min(map(len, self._times.values())) >= self._turn * self._turns:
                self._decide()
            else:
                after = self._choices.index(self.choice) + 1
                self.choice = self._choices[after % len(self._choices)]

    def _decide(self) -> None:
        medians = {c: statistics.median(times) for c, times in self._times.items()}
        medians[self._first] *= 1 - self._least_gain
        self.choice = min(self._choices, key=medians.__getitem__)
        won_again = self.choice == self._winner
        self._hold = min(2 * self._hold, self._LONGEST_HOLD) if won_again else self._HOLD
        self._winner, self._left, self.trying = self.choice, self._hold, False
        self._times = {choice: [] for choice in self._choices}


class StepTimer:
    """Times steps for a tuner, over layers that are alike.

    A step is from one layer's indices to the next layer's: everything built in between runs in it.

    Args:
        tuner: learns the times of the steps that `time_step` selects.
        other: a tuner of something else that learns them too.
    """

    def __init__(self, tuner: AutoTuner[str], other: AutoTuner[bool] | None = None) -> None:
        self.tuner, self._other = tuner, other
        self._began: float | None = None

    def lap(self, now: float) -> None:
        """A layer has its indices: end the step before, if it is timed."""
        began, self._began = self._began, None
        if began is not None:
            self.tuner.record(now - began)
            if self._other is not None:
                self._other.record(now - began)

    def time_step(self, began: float) -> None:
        """Time the present step: it shows what the present choice is worth."""
        self._began = began

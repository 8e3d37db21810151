"""Gives expert slots to other programs while the system is short of memory, and takes them again.

It decides when and how many; the stream moves the slots. Results never change: an expert without a
slot is read again when it is needed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

import mlx.core as mx

from .._closing import Closing
from .._config import format_size
from .._osinfo import available_memory_bytes, memory_pressure, memory_reserve
from .._progress import Clock

_PERIOD = 1.0  # seconds between looks at the system
_SETTLE = 3.0  # seconds for a change to show in what the system says
_CALM = 60.0  # seconds without pressure before slots are taken again
_PARTS = 8  # of the planned cache; one part is given or taken at once, two under critical pressure

_log = logging.getLogger(__name__)


class SlotHolder(Protocol):
    """Holds the expert cache: an `ExpertStream`."""

    @property
    def given_back(self) -> int:
        """Bytes of the planned cache that other programs have now."""

    @property
    def most_given_back(self) -> int:
        """Bytes of the planned cache that it can do without."""

    @property
    def planned_cache(self) -> int:
        """Bytes of the whole cache."""

    def give_back(self, nbytes: int) -> None:
        """Leave about `nbytes` of the planned cache to other programs from now on."""


class PressureWatch(Closing):
    """Watches the system's memory in a thread of its own, and resizes the cache by it.

    Args:
        holder: holds the expert cache.
        level: tells how short memory is: 0 not at all, 1 short, 2 critically.
        available: tells how many bytes can be taken without swapping.
        reserve: bytes that stay available when slots are taken again.
        start: watch at once; else only `look` does.
    """

    def __init__(
        self,
        holder: SlotHolder,
        level: Callable[[], int] = memory_pressure,
        available: Callable[[], int] = available_memory_bytes,
        reserve: int | None = None,
        start: bool = True,
    ) -> None:
        self._holder, self._level, self._available = holder, level, available
        self._reserve = memory_reserve() if reserve is None else reserve
        self._changed = self._short = -_CALM  # when the cache changed, and when memory was short
        self._told = False  # that no more can be given
        self._clock: Clock | None = None
        if start:
            # MLX aborts at exit if a stream of an ended thread is left.
            self._clock = Clock(lambda: self.look(time.monotonic()), _PERIOD, mx.clear_streams)

    def look(self, now: float) -> None:
        """Look at the system once, and give or take slots.

        Args:
            now: seconds of a clock that never goes back.
        """
        level = self._level()
        if level:
            self._short = now
        if now - self._changed < _SETTLE:
            return
        part = -(-self._holder.planned_cache // _PARTS)
        if level:
            self._give(level * part, now)
            return
        self._told = False
        calm = now - max(self._short, self._changed) >= _CALM
        if calm and self._holder.given_back and self._available() >= part + self._reserve:
            self._move(max(0, self._holder.given_back - part), now)

    def close(self) -> None:
        if self._clock is not None:
            self._clock.close()

    def _give(self, nbytes: int, now: float) -> None:
        before, most = self._holder.given_back, self._holder.most_given_back
        if before < most:
            self._move(min(most, before + nbytes), now)
        if self._holder.given_back == before and not self._told:
            self._told = True
            _log.warning("the system is short of memory, and the expert cache can give no more")

    def _move(self, wanted: int, now: float) -> None:
        before = self._holder.given_back
        self._changed = now
        try:
            self._holder.give_back(wanted)
        except Exception as e:  # it must not end the watch
            _log.warning(f"the expert cache keeps its size: {e}")
            return
        after, planned = self._holder.given_back, self._holder.planned_cache
        moved = format_size(abs(after - before))
        if after > before:
            why = f"the system is short of memory: the expert cache gives {moved}"
        elif after < before:
            why = f"memory is free again: the expert cache takes {moved}"
        else:
            return
        has, least = format_size(planned - after), planned - self._holder.most_given_back
        _log.warning(
            f"{why}, and has {has} of {format_size(planned)} (never less than {format_size(least)})"
        )

"""Random pauses at the package's own lines: what two threads can do to each other, they do soon.

On Python 3.12 and later by `sys.monitoring`, before that by `threading.settrace`; only threads that
start while `Yields` is on are disturbed, by either. Each thread draws from a generator of its own,
so that a seed repeats what is drawn, though not what the system makes of it.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Self

import mlx_streamexperts

PACKAGE = str(Path(mlx_streamexperts.__file__).parent)


class Yields(threading.local):
    """What one thread knows; `on` and `off` are for all.

    Args:
        seed: of all threads' generators.
        share: of the lines at which a thread gives way; a quarter of these times it sleeps.
        longest: sleep, in seconds.
    """

    counts: dict[int, int]
    """How often each thread gave way."""

    def __init__(self, seed: int, share: float, longest: float, counts: dict[int, int]) -> None:
        name = threading.current_thread().name
        self._chance = random.Random(f"{seed} {name}")
        self._share, self._longest, self.counts = share, longest, counts
        self._left = self._next()

    def __enter__(self) -> Self:
        sys.setswitchinterval(1e-5)
        if sys.version_info >= (3, 12):
            tool, events = sys.monitoring.PROFILER_ID, sys.monitoring.events
            sys.monitoring.use_tool_id(tool, "yields")
            sys.monitoring.register_callback(tool, events.LINE, self._monitored)
            sys.monitoring.set_events(tool, events.LINE)
        else:
            threading.settrace(self._traced)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setswitchinterval(5e-3)
        if sys.version_info >= (3, 12):
            sys.monitoring.set_events(sys.monitoring.PROFILER_ID, 0)
            sys.monitoring.free_tool_id(sys.monitoring.PROFILER_ID)
        else:
            threading.settrace(None)  # type: ignore[arg-type]

    def _next(self) -> int:
        """Lines until this thread gives way again."""
        return 1 + int(self._chance.expovariate(self._share))

    def _line(self) -> None:
        self._left -= 1
        if self._left > 0:
            return
        self._left = self._next()
        me = threading.get_ident()
        self.counts[me] = self.counts.get(me, 0) + 1
        sleep = self._chance.random() * self._longest if self._chance.random() < 0.25 else 0.0
        time.sleep(sleep)

    def _traced(self, frame: FrameType, event: str, arg: object) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None

        def line(frame: FrameType, event: str, arg: object) -> Any:
            if event == "line":
                self._line()
            return line

        return line

    def _monitored(self, code: CodeType, number: int) -> Any:
        if not code.co_filename.startswith(PACKAGE):
            return sys.monitoring.DISABLE
        if threading.current_thread() is not threading.main_thread():
            self._line()
        return None

"""Signs of life of long work: progress bars, how far a prompt is, and a clock that shows it.

Knows neither models nor files: it gets numbers and functions.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TextIO

from tqdm import tqdm

from ._closing import Closing

_TERMINAL_SECONDS, _PIPE_SECONDS = 1.0, 10.0
_ERASE = "\r\x1b[2K"


def progress_bar(what: str, shown: bool, total: int | None = None, unit: str = "B") -> tqdm:
    """A progress bar that counts bytes, or steps of another unit. Nothing unless `shown`."""
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=not shown)


@dataclass(frozen=True)
class Progress:
    """How far a prompt is.

    Attributes:
        tokens: tokens done. Those of the pass under way count by the layers that it has finished.
        total: tokens of the prompt; None if they are not known.
        layer: expert layers that the pass under way has entered; 0 between passes.
        layers: expert layers of the model.
        read_bytes: bytes read for experts since the prompt began.
        seconds: since the prompt began.
    """

    tokens: int
    total: int | None
    layer: int
    layers: int
    read_bytes: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Tokens done per second; 0.0 before the first."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end of the prompt at the rate so far; None if that cannot be told."""
        if self.total is None or self.tokens <= 0:
            return None
        return self.seconds * max(0, self.total - self.tokens) / self.tokens

    def __str__(self) -> str:
        """One line: tokens, layer, bytes read, rate, time left."""
        of = "" if self.total is None else f" of {self.total:,}"
        parts = [f"{self.tokens:,}{of} tokens"]
        if self.layer:
            parts.append(f"layer {self.layer} of {self.layers}")
        parts.append(f"{self.read_bytes / 1e9:.2f} GB read")
        parts.append(f"{self.tokens_per_second:.1f} tokens/s")
        left = self.seconds_left
        parts.append(f"{self.seconds:.0f} s" + ("" if left is None else f", {left:.0f} s left"))
        return ", ".join(parts)


class Clock(Closing):
    """Calls a function again and again in a thread of its own, until it is closed.

    Args:
        tick: the function. It must not touch MLX arrays of other threads.
        seconds: between two calls.
        end: called in the thread when it ends.
    """

    def __init__(
        self, tick: Callable[[], None], seconds: float, end: Callable[[], None] | None = None
    ) -> None:
        self._tick, self._seconds, self._end = tick, seconds, end
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(self._seconds):
            self._tick()
        if self._end is not None:
            self._end()

    def close(self) -> None:
        """Stop, and wait for a call that is under way."""
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join()


class StatusLine(Closing):
    """Tells again and again how far long work is.

    A terminal gets one line, no wider than it is, written anew each second and removed at the end.
    A file or a pipe gets a line now and then.

    Args:
        text: returns the line.
        file: where to write it; standard error if None.
        seconds: between two lines. None: one second in a terminal, ten elsewhere.
        shown: write anything at all.
    """

    def __init__(
        self,
        text: Callable[[], str],
        file: TextIO | None = None,
        seconds: float | None = None,
        shown: bool = True,
    ) -> None:
        self._text, self._file = text, sys.stderr if file is None else file
        self._terminal, self._shown = self._file.isatty(), shown
        self._is_there = False  # in a terminal
        self._lock = threading.Lock()
        wait = _TERMINAL_SECONDS if self._terminal else _PIPE_SECONDS
        wait = wait if seconds is None else seconds
        self._clock = Clock(self.show, wait) if shown else None

    def show(self) -> None:
        """Write the line now."""
        text = self._text()
        with self._lock:
            self._write(self._cut(text) if self._terminal else text + "\n")
            self._is_there = self._terminal

    def say(self, text: str) -> None:
        """Write a line that stays."""
        with self._lock:
            self._write(text + "\n")
            self._is_there = False

    def close(self) -> None:
        """Remove the line."""
        if self._clock is not None:
            self._clock.close()
        with self._lock:
            if self._is_there:
                self._write("")
            self._is_there = False

    def _cut(self, text: str) -> str:
        """The line as far as the terminal is wide: one that wraps could not be written anew."""
        with suppress(OSError, ValueError):  # a terminal without a descriptor
            columns = os.get_terminal_size(self._file.fileno()).columns
            if 0 < columns <= len(text):
                return text[: max(0, columns - 2)] + "…"
        return text

    def _write(self, text: str) -> None:
        if self._shown:
            self._file.write((_ERASE if self._terminal else "") + text)
            self._file.flush()

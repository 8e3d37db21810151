"""Shows on standard error how far a prompt is, so that a command is never silent for long.

A terminal gets one line, written anew each second and removed at the end. A file or a pipe gets a
line now and then. Whoever reads standard output sees none of it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from .._closing import Closing
from .._experts.follower import Follower
from .._experts.stream import ExpertStream
from .._progress import Clock

_TERMINAL_SECONDS, _PIPE_SECONDS = 1.0, 10.0
_ERASE = "\r\x1b[2K"


class PromptLine(Closing):
    """The line of one generation.

    Args:
        follower: tells how far the prompt is.
        file: where to write it; standard error if None.
        seconds: between two lines. None: one second in a terminal, ten elsewhere.
    """

    def __init__(
        self, follower: Follower, file: TextIO | None = None, seconds: float | None = None
    ) -> None:
        self._follower, self._file = follower, sys.stderr if file is None else file
        self._terminal = self._file.isatty()
        self._generated: int | None = None  # tokens; None before the first
        self._shown = False
        self._lock = threading.Lock()
        wait = _TERMINAL_SECONDS if self._terminal else _PIPE_SECONDS
        self._clock = Clock(self._show, wait if seconds is None else seconds)

    def generated(self, tokens: int) -> None:
        """Tell that this many tokens have been generated, of which the user has seen none."""
        self._generated = tokens

    def close(self) -> None:
        """Remove the line."""
        self._clock.close()
        with self._lock:
            if self._shown and self._terminal:
                self._write(_ERASE)
            self._shown = False

    def _show(self) -> None:
        now = self._follower.now()
        if self._generated is None:
            text = f"Prompt: {now}"
        else:
            text = f"Generating: {self._generated:,} tokens, {now.read_bytes / 1e9:.2f} GB read, "
            text += f"{now.seconds:.0f} s"
        with self._lock:
            self._write(f"{_ERASE}{text}" if self._terminal else text + "\n")
            self._shown = True

    def _write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()


@contextmanager
def prompt_line(
    expert_stream: ExpertStream, tokens: int | None, shown: bool
) -> Iterator[PromptLine | None]:
    """Show how far a prompt of `tokens` tokens is within the block; nothing unless `shown`."""
    if not shown:
        yield None
        return
    with expert_stream.follow(prompt_tokens=tokens) as follower, PromptLine(follower) as line:
        yield line

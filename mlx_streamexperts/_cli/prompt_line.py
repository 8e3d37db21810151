"""Shows on standard error how far a prompt is, so that a command is never silent for long.

Whoever reads standard output sees none of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from .._experts.follower import Follower
from .._experts.stream import ExpertStream
from .._progress import StatusLine


class PromptLine(StatusLine):
    """The line of one generation.

    Args:
        follower: tells how far the prompt is.
        file, seconds: see `StatusLine`.
    """

    def __init__(
        self, follower: Follower, file: TextIO | None = None, seconds: float | None = None
    ) -> None:
        self._follower = follower
        self._generated: int | None = None  # tokens; None before the first
        super().__init__(self._now, file, seconds)

    def generated(self, tokens: int) -> None:
        """Tell that this many tokens have been generated, of which the user has seen none."""
        self._generated = tokens

    def _now(self) -> str:
        now = self._follower.now()
        if self._generated is None:
            return f"Prompt: {now}"
        read = f"{now.read_bytes / 1e9:.2f} GB read"
        return f"Generating: {self._generated:,} tokens, {read}, {now.seconds:.0f} s"


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

"""Whose requests the pass under way serves, and whether anybody still waits for it.

A pass of a prompt takes seconds to minutes. It ends early only if every client that it serves has
left: the others' prompts are in the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Waiting(Protocol):
    """Somebody who waits for a reply: a `Client`.

    Attributes:
        context: mlx-lm's `GenerationContext` of the reply; None before there is one.
    """

    context: Any

    def gone(self) -> bool:
        """Has it left?"""


class Audience:
    """Those who wait for the pass under way.

    Attributes:
        latest: whose request was given to mlx-lm's loop last.
    """

    def __init__(self) -> None:
        self.latest: Waiting | None = None
        self._now: Sequence[Waiting | None] = ()

    @contextmanager
    def waiting(self, clients: Sequence[Waiting | None]) -> Iterator[None]:
        """These wait for what runs within the block; None is somebody who never leaves."""
        self._now = clients
        try:
            yield
        finally:
            self._now = ()

    def has_left(self) -> bool:
        """Has everybody left? False between the blocks of `waiting`."""
        now = self._now
        return bool(now) and all(c is not None and c.gone() for c in now)

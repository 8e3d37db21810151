"""Whose requests the pass under way serves, and whether anybody still waits for it.

A pass of a prompt takes seconds to minutes. It ends early only if every client that it serves has
left: the others' prompts are in the same pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol


class Waiting(Protocol):
    """Somebody who waits for a reply: a `Client`.

    Attributes:
        context: mlx-lm's `GenerationContext` of the reply; None before there is one.
        lossy: the level that was asked for; None for the server's.
    """

    context: Any
    lossy: int | None

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


def lowest(clients: Iterable[Waiting | None]) -> int | None:
    """The lowest level of lossy passes that several clients agree to; None for the server's."""
    asked = [c.lossy for c in clients if c is not None and c.lossy is not None]
    return min(asked, default=None)

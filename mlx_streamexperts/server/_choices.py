"""Takes several replies of one request at once, in the order in which their parts come.

Knows nothing of what the parts are.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class _End:
    """Ends a stream in the queue."""


def interleaved(
    streams: Sequence[Generator[T, None, None]],
) -> Generator[tuple[int, T], None, None]:
    """The items of all streams, each with the number of its stream.

    Several run in a thread each; one alone runs in this one. What a stream raises is raised here.
    Streams are closed after the item that they give next once this one is closed.
    """
    if len(streams) == 1:
        with closing(streams[0]) as only:
            for item in only:
                yield 0, item
        return
    items: SimpleQueue[tuple[int, Any]] = SimpleQueue()
    abandoned = threading.Event()

    def run(number: int, stream: Generator[T, None, None]) -> None:
        last: Any = _End()
        try:
            with closing(stream):
                for item in stream:
                    items.put((number, item))
                    if abandoned.is_set():
                        break
        except BaseException as e:  # `Refused` among them
            last = e
        items.put((number, last))

    for number, stream in enumerate(streams):
        threading.Thread(target=run, args=(number, stream), daemon=True).start()
    try:
        left = len(streams)
        while left:
            number, item = items.get()
            if isinstance(item, BaseException):
                raise item
            if isinstance(item, _End):
                left -= 1
            else:
                yield number, item
    finally:
        abandoned.set()

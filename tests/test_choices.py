"""Several replies are taken as their parts come, and end together."""

from __future__ import annotations

import threading
from collections.abc import Generator

import pytest
from conftest import until

from mlx_streamexperts.server._choices import interleaved
from mlx_streamexperts.server._refusals import Refused


def counting(
    count: int, closed: list[int] | None = None, gate: threading.Event | None = None
) -> Generator[int, None, None]:
    try:
        for i in range(count):
            if gate is not None:
                assert gate.wait(60)
            yield i
    finally:
        if closed is not None:
            closed.append(count)


def test_items_come_in_each_streams_order() -> None:
    assert list(interleaved([counting(3)])) == [(0, 0), (0, 1), (0, 2)]
    items = list(interleaved([counting(3), counting(0), counting(5)]))
    assert [i for n, i in items if n == 0] == [0, 1, 2]
    assert [i for n, i in items if n == 2] == [0, 1, 2, 3, 4]
    assert len(items) == 8


def test_a_stream_that_waits_holds_no_other_back() -> None:
    gate = threading.Event()
    items = interleaved([counting(1, gate=gate), counting(3)])
    assert [next(items) for _ in range(3)] == [(1, 0), (1, 1), (1, 2)]
    gate.set()
    assert list(items) == [(0, 0)]


def test_what_a_stream_raises_ends_all() -> None:
    def failing() -> Generator[int, None, None]:
        yield 1
        raise Refused(400, "no")

    closed: list[int] = []
    gate = threading.Event()
    for streams in ([failing()], [counting(9, closed, gate), failing()]):
        with pytest.raises(Refused, match="no"):
            list(interleaved(streams))
    gate.set()
    until(lambda: closed == [9])


def test_streams_are_closed_with_the_whole() -> None:
    closed: list[int] = []
    for streams in ([counting(5, closed)], [counting(10**9, closed), counting(10**8, closed)]):
        items = interleaved(streams)
        next(items)
        items.close()
    until(lambda: sorted(closed) == [5, 10**8, 10**9])

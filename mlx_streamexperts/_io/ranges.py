"""Byte ranges of experts, and how they become reads.

Pure functions: neighbouring ranges of a file become one read, and long ranges are split so that
threads can share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple


class ByteRange(NamedTuple):
    """Bytes of one expert's tensor in a file, and where they must go.

    Attributes:
        file: path of the shard (a string: comparing and hashing `Path` costs a microsecond each).
        offset: first byte in it.
        into: writable memory; its length is the number of bytes to read.
        layer, expert, tensor: whose bytes they are, for error messages.
    """

    file: str
    offset: int
    into: memoryview
    layer: str
    expert: int
    tensor: str


def span_bytes(run: Sequence[ByteRange]) -> int:
    """Bytes that one read of ranges side by side takes."""
    return run[-1].offset + len(run[-1].into) - run[0].offset


def merge(ranges: Sequence[ByteRange], read_bytes: int) -> list[list[ByteRange]]:
    """Group ranges that lie side by side in a file, no group longer than `read_bytes`.

    Groups are in the order in which their experts were given, so that the first expert is complete
    long before the last.
    """
    order: dict[int, int] = {}
    for r in ranges:
        order.setdefault(r.expert, len(order))
    runs: list[list[ByteRange]] = []
    places: list[int] = []  # of each run's first expert in that order
    length = end = 0
    file = ""
    for whole in sorted(ranges, key=_file_and_offset):
        place, size = order[whole.expert], len(whole.into)
        for r in (whole,) if 0 < size <= read_bytes else _split(whole, read_bytes):
            size = len(r.into)
            if r.offset == end and r.file == file and length + size <= read_bytes:
                runs[-1].append(r)
                length += size
                places[-1] = min(places[-1], place)
            else:
                runs.append([r])
                places.append(place)
                length, file = size, r.file
            end = r.offset + size
    return [runs[i] for i in sorted(range(len(runs)), key=places.__getitem__)]


_file_and_offset = itemgetter(0, 1)


def _split(r: ByteRange, read_bytes: int) -> list[ByteRange]:
    return [
        r._replace(offset=r.offset + i, into=r.into[i : i + read_bytes])
        for i in range(0, len(r.into), read_bytes)
    ]

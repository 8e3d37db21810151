"""Byte ranges of experts, and how they become reads.

Pure functions: what lies side by side in a file is read at once, what is long is shared out.
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


def merge(ranges: Sequence[ByteRange], read_bytes: int) -> list[list[ByteRange]]:
    """Group ranges that lie side by side in a file, none longer than `read_bytes`.

    Experts come in the order given, so that the first is complete long before the last.
    """
    runs: list[list[ByteRange]] = []
    length = end = 0
    file = ""
    for whole in sorted(ranges, key=_place_on_disk):
        size = len(whole.into)
        for r in (whole,) if 0 < size <= read_bytes else _split(whole, read_bytes):
            size = len(r.into)
            if r.offset == end and r.file == file and length + size <= read_bytes:
                runs[-1].append(r)
                length += size
            else:
                runs.append([r])
                length, file = size, r.file
            end = r.offset + size
    place: dict[int, int] = {}
    for r in ranges:
        place.setdefault(r.expert, len(place))
    return sorted(runs, key=lambda run: min([place[r.expert] for r in run]))


_place_on_disk = itemgetter(0, 1)  # file and offset


def _split(r: ByteRange, read_bytes: int) -> list[ByteRange]:
    return [
        r._replace(offset=r.offset + i, into=r.into[i : i + read_bytes])
        for i in range(0, len(r.into), read_bytes)
    ]

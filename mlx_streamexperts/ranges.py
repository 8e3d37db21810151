"""Byte ranges of experts, and how they become reads.

Pure functions: what lies side by side in a file is read at once, what is long is shared out.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    length = 0
    for whole in sorted(ranges, key=lambda r: (r.file, r.offset)):
        for r in _split(whole, read_bytes):
            last = runs[-1][-1] if runs else None
            if (
                last is not None
                and last.file == r.file
                and last.offset + len(last.into) == r.offset
                and length + len(r.into) <= read_bytes
            ):
                runs[-1].append(r)
                length += len(r.into)
            else:
                runs.append([r])
                length = len(r.into)
    place: dict[int, int] = {}
    for r in ranges:
        place.setdefault(r.expert, len(place))
    return sorted(runs, key=lambda run: min(place[r.expert] for r in run))


def _split(r: ByteRange, read_bytes: int) -> list[ByteRange]:
    if len(r.into) <= read_bytes:
        return [r] if len(r.into) else []
    return [
        r._replace(offset=r.offset + i, into=r.into[i : i + read_bytes])
        for i in range(0, len(r.into), read_bytes)
    ]

"""Write a safetensors checkpoint in place: every byte's position is known before any is computed.

A shard is written under a temporary name that mlx-lm does not look for, and takes its own name only
when all of it is on the disk, so that a shard under its name is whole. Nothing here knows models.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._experts.bank import byte_view
from .._io.output import sync_folder

_NAMES = {
    mx.bool_: "BOOL", mx.uint8: "U8", mx.uint16: "U16", mx.uint32: "U32", mx.uint64: "U64",
    mx.int8: "I8", mx.int16: "I16", mx.int32: "I32", mx.int64: "I64",
    mx.float16: "F16", mx.bfloat16: "BF16", mx.float32: "F32", mx.float64: "F64",
    mx.complex64: "C64",
}  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """Tensors that are written together, in one shard: they come of one computation.

    Attributes:
        name: module path or tensor name.
        group: pieces that follow each other with the same group stay in one shard if they fit.
        tensors: element type and shape by name.
    """

    name: str
    group: str
    tensors: dict[str, tuple[mx.Dtype, tuple[int, ...]]]

    @property
    def nbytes(self) -> int:
        return sum(dtype.size * math.prod(shape) for dtype, shape in self.tensors.values())


@dataclass(frozen=True)
class Shard:
    """A file to be written.

    Attributes:
        file: its name.
        pieces: what it holds.
        header: everything before the data.
        offsets: absolute position of each tensor's first byte.
        nbytes: length of the file.
    """

    file: str
    pieces: tuple[Piece, ...]
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def lay_out(pieces: Sequence[Piece], shard_bytes: int) -> list[Shard]:
    """Share the pieces out over shards of at most `shard_bytes`, where a piece is not longer."""
    shards: list[list[Piece]] = []
    room = 0
    for i, piece in enumerate(pieces):
        begins = i == 0 or pieces[i - 1].group != piece.group
        rest = piece.nbytes
        if begins:
            for follower in pieces[i + 1 :]:
                if follower.group != piece.group:
                    break
                rest += follower.nbytes
        # A group that fits a shard of its own is not divided; a longer one fills what is left.
        if not shards or piece.nbytes > room or (begins and room < rest <= shard_bytes):
            shards.append([])
            room = shard_bytes
        shards[-1].append(piece)
        room -= piece.nbytes
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]  # as mlx-lm names them
    return [_describe(name, tuple(shard)) for name, shard in zip(names, shards, strict=True)]


def _describe(file: str, pieces: tuple[Piece, ...]) -> Shard:
    header: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    position, starts = 0, {}
    for piece in pieces:
        for name, (dtype, shape) in piece.tensors.items():
            end = position + dtype.size * math.prod(shape)
            span = [position, end]
            header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": span}
            starts[name], position = position, end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + begin for name, begin in starts.items()}
    return Shard(file, pieces, len(text).to_bytes(8, "little") + text, offsets, start + position)


class ShardWriter:
    """Writes one shard; `finish` gives it its name.

    Raises:
        OSError: from every method, the file system's.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self._path, self._shard = folder / shard.file, shard
        self._partial = self._path.with_name(shard.file + ".partial")
        self._fd = os.open(self._partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.ftruncate(self._fd, shard.nbytes)
            write_at(self._fd, memoryview(shard.header), 0)
        except BaseException:
            os.close(self._fd)
            raise

    def write(self, name: str, values: mx.array, row: int = 0) -> int:
        """Put an evaluated, contiguous array at a row of tensor `name`; returns its bytes."""
        if not values.size:
            return 0
        if not values.ndim:
            values = values.reshape(1)
        row_bytes = values.nbytes // values.shape[0]
        write_at(self._fd, byte_view(values), self._shard.offsets[name] + row * row_bytes)
        return values.nbytes

    def finish(self) -> None:
        """Everything is written: put it on the disk, then under its name."""
        os.fsync(self._fd)
        self._partial.replace(self._path)
        sync_folder(self._path.parent)

    def close(self) -> None:
        os.close(self._fd)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """All of `data`; one system call writes at most 2 GiB."""
    while data:
        written = os.pwrite(fd, data[: 1 << 30], offset)
        data, offset = data[written:], offset + written

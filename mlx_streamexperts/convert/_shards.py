"""Writes a safetensors checkpoint whose layout is fixed before any tensor is computed.

A shard is written under a temporary name that mlx-lm ignores, and renamed once all of it is on the
disk. So a shard under its final name is whole. Nothing here knows models.
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
    """Tensors that are computed together and written to the same shard.

    Attributes:
        name: module path or tensor name.
        group: consecutive pieces of the same group share a shard if they fit.
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
        file: file name.
        pieces: its tensors.
        header: all bytes before the data.
        offsets: position of each tensor's first byte in the file.
        nbytes: length of the file.
    """

    file: str
    pieces: tuple[Piece, ...]
    header: bytes
    offsets: dict[str, int]
    nbytes: int


def lay_out(pieces: Sequence[Piece], shard_bytes: int) -> list[Shard]:
    """Distribute pieces over shards of at most `shard_bytes`; a larger piece gets its own shard."""
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
        # A group that fits into one shard is not divided; a larger one fills up the current shard.
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
        OSError: every method raises the file system's errors.
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
        """Write an evaluated, contiguous array at a row of tensor `name`; returns its bytes."""
        if not values.size:
            return 0
        if not values.ndim:
            values = values.reshape(1)
        row_bytes = values.nbytes // values.shape[0]
        write_at(self._fd, byte_view(values), self._shard.offsets[name] + row * row_bytes)
        return values.nbytes

    def finish(self) -> None:
        """Flush the file to the disk, then give it its name."""
        os.fsync(self._fd)
        self._partial.replace(self._path)
        sync_folder(self._path.parent)

    def close(self) -> None:
        os.close(self._fd)


def write_at(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data`; one system call writes at most 2 GiB."""
    while data:
        written = os.pwrite(fd, data[: 1 << 30], offset)
        data, offset = data[written:], offset + written

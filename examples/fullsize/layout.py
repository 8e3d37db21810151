"""Where each tensor of a stand-in lies: its published place, or where a converter would put it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils

from mlx_streamexperts import StreamError

HERE = Path(__file__).parent
# With 7, mlx-lm's make_shards gives Kimi K2.5's 91 shards; with its default it would give 180.
_SHARD_GIB = {"kimi-k2.5": 7}
_DEFAULT_SHARD_GIB = 5
_FREE_HEADER = 65_536  # header length of shards whose first expert tensor leaves more room
_LARGEST_SHARD = 6 << 30
_DTYPES = {
    mx.uint32: "U32", mx.bfloat16: "BF16", mx.float32: "F32", mx.uint8: "U8", mx.int32: "I32",
    mx.int64: "I64",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes are."""

    file: str
    offset: int


def require(condition: bool, otherwise: str) -> None:
    """What must hold of a stand-in that is true to its model, also under `python -O`."""
    if not condition:
        raise StreamError(otherwise)


def shard_layout(
    name: str, tensors: dict[str, mx.array]
) -> tuple[dict[str, Place], dict[str, int]]:
    """The place of every tensor, and the length of every file's header (with its first 8 bytes)."""
    if name == "qwen3.5-397b":
        return _published(tensors)
    return _sequential(tensors, _SHARD_GIB.get(name, _DEFAULT_SHARD_GIB))


def describe(name: str, array: mx.array, begin: int) -> str:
    """A tensor's entry in a header, as MLX writes it."""
    span = [begin, begin + array.nbytes]
    entry = {"dtype": _DTYPES[array.dtype], "shape": list(array.shape), "data_offsets": span}
    return f"{json.dumps(name)}:{json.dumps(entry, separators=(',', ':'))}"


def header_text(entries: list[str]) -> str:
    return '{"__metadata__":{"format":"mlx"},' + ",".join(entries) + "}"


def _sequential(
    tensors: dict[str, mx.array], shard_gib: int
) -> tuple[dict[str, Place], dict[str, int]]:
    """Tensor after tensor, in shards filled in model order as mlx-lm's converter fills them."""
    shards = mlx_lm.utils.make_shards(tensors, shard_gib)
    places, headers = {}, {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        # Offsets do not depend on the header, so its length can be found first.
        begin, entries = 0, []
        for name, array in shard.items():
            entries.append(describe(name, array, begin))
            begin += array.nbytes
        start = headers[file] = 8 + -(-len(header_text(entries)) // 8) * 8
        for name, array in shard.items():
            places[name] = Place(file, start)
            start += array.nbytes
    return places, headers


def _published(tensors: dict[str, mx.array]) -> tuple[dict[str, Place], dict[str, int]]:
    """Expert tensors where the published checkpoint has them, the trunk in the gaps between.

    The published headers leave room for a shard's own tensors and no more; what of the trunk does
    not fit into a layer's own shards goes to others.
    """
    published = json.loads((HERE / "qwen3.5-397b.experts.json").read_text())
    places: dict[str, Place] = {}
    for layer, parts in published["layers"].items():
        for part, (file, offset, shape) in parts.items():
            name = published["tensor_name"].format(layer=layer, part=part)
            if name not in tensors:
                continue  # cut down
            require(list(tensors[name].shape) == shape, f"{name} is not {shape}")
            places[name] = Place(file, offset)
    shards = {f: _Shard(f) for f in sorted({p.file for p in places.values()})}
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        shards[place.file].take(name, tensors[name], place.offset)
    for shard in shards.values():
        shard.close_header()
    for name, array in tensors.items():
        if name in places:
            continue
        own = [s for s in shards.values() if layer_of(name) in s.layers]
        for shard in (*own, *shards.values()):
            if (offset := shard.room_for(name, array)) is not None:
                places[name] = Place(shard.file, offset)
                break
        else:
            raise StreamError(f"no gap between the published experts has room for {name}")
    return places, {s.file: s.start for s in shards.values()}


def layer_of(name: str) -> str | None:
    """The layer's number in a tensor's name."""
    parts = name.split(".")
    return parts[parts.index("layers") + 1] if "layers" in parts else None


class _Shard:
    """Gaps of one shard, and the room left in its header."""

    def __init__(self, file: str) -> None:
        self.file, self.start = file, 0
        self.layers: set[str | None] = set()
        self._end = 0
        self._gaps: list[tuple[int, int]] = []
        self._entries_bytes = len(header_text([]))

    def take(self, name: str, array: mx.array, offset: int) -> None:
        """A tensor whose place is given; called in order of offset."""
        require(offset >= self._end, f"{name} overlaps in {self.file}")
        self._gaps.append((self._end, offset))
        self._end = offset + array.nbytes
        self.layers.add(layer_of(name))
        self._entries_bytes += len(describe(name, array, offset)) + 1

    def close_header(self) -> None:
        """Decide where data starts: at the first tensor, if a header would just fit before it."""
        first = self._gaps[0][1]
        self.start = first if first < 2 * _FREE_HEADER else _FREE_HEADER
        self._gaps[0] = (self.start, first)
        self._gaps.append((self._end, max(self._end, _LARGEST_SHARD)))

    def room_for(self, name: str, array: mx.array) -> int | None:
        """Take the first gap that holds the tensor, if the header can name it too."""
        entry = len(describe(name, array, _LARGEST_SHARD)) + 1
        if 8 + self._entries_bytes + entry > self.start:
            return None
        for i, (begin, end) in enumerate(self._gaps):
            if end - begin >= array.nbytes:
                self._gaps[i] = (begin + array.nbytes, end)
                self._entries_bytes += entry
                return begin
        return None


def shard_sizes(folder: Path) -> str:
    """What a written stand-in comes to, in a line."""
    files = list(folder.glob("*.safetensors"))
    apparent = sum(f.stat().st_size for f in files)
    on_disk = sum(f.stat().st_blocks * 512 for f in files)
    return f"{len(files)} shards, {apparent / 1e9:.1f} GB apparent, {on_disk / 1e9:.2f} GB on disk"

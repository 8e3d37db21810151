"""Where every tensor's bytes lie in a safetensors checkpoint, from the headers alone.

No weight is read here. Everything that can be wrong with the files is found here, before anything
loads, and raised as `CheckpointError` naming the file and the tensor. The format is
https://github.com/huggingface/safetensors (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeGuard

from .._errors import CheckpointError
from .._osinfo import content_sample

# Bytes of one element. Sub-byte types have no byte range of their own and are not streamed.
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
_MAX_SIZE = 2**63 - 1  # no file is longer; larger numbers are refused unprinted
_MOST_LAYERS = 1000  # Kimi K2.5 has 61
# Not every "layer" in a key counts them: Gemma has vocab_size_per_layer_input of 262144.
_LAYER_COUNT = re.compile(r"(n|num)_(\w+_)?layers?$")
_SHARDS = "model*.safetensors"
INDEX = "model.safetensors.index.json"
CONVERSION = "convert.json"  # there from a conversion's start on, while config.json comes last


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a checkpoint and the bytes that hold it.

    Attributes:
        name: the tensor's name in the file.
        file: the shard that holds it.
        dtype: safetensors name of the element type, for example `U32` or `BF16`.
        shape: dimensions.
        offset: absolute position of its first byte in the file.
        nbytes: its length in bytes.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ExpertTable:
    """Where one tensor of each of a layer's experts lies.

    Attributes:
        dtype: safetensors name of the element type.
        row_bytes: bytes of one expert's part.
        files: the file with each expert's part (strings: the reader compares them at every miss).
        offsets: absolute position of each expert's first byte in its file.
        names: the stored tensor that holds each expert's part.
    """

    dtype: str
    row_bytes: int
    files: tuple[str, ...]
    offsets: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def experts(self) -> int:
        return len(self.offsets)

    @classmethod
    def stacked(cls, entry: TensorEntry) -> ExpertTable:
        """A tensor `[experts, ...]`: expert after expert in one range."""
        experts = entry.shape[0]
        row = entry.nbytes // max(1, experts)
        offsets = tuple(range(entry.offset, entry.offset + experts * row, row)) if row else ()
        return cls(entry.dtype, row, (str(entry.file),) * experts, offsets, (entry.name,) * experts)

    @classmethod
    def nowhere(cls, nbytes: int, experts: int) -> ExpertTable:
        """A table that is yet to be written, for planning: it has a size and no place."""
        return cls("", nbytes // max(1, experts), (), (0,) * experts, ())

    @classmethod
    def separate(cls, entries: Sequence[TensorEntry]) -> ExpertTable:
        """One tensor an expert, as original checkpoints have them.

        Raises:
            CheckpointError: they differ in shape or element type.
        """
        first = entries[0]
        for entry in entries:
            if (entry.dtype, entry.shape) != (first.dtype, first.shape):
                raise CheckpointError(
                    f"{entry.file}: tensor {entry.name} is {entry.dtype} {list(entry.shape)}, but "
                    f"{first.name} in {first.file} is {first.dtype} {list(first.shape)}"
                )
        return cls(
            first.dtype,
            first.nbytes,
            tuple(str(e.file) for e in entries),
            tuple(e.offset for e in entries),
            tuple(e.name for e in entries),
        )


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a model folder, by name.

    Attributes:
        folder: the model folder.
        tensors: every tensor of every `model*.safetensors` file in it.
        absent: tensors that no file has, with the file that the index names for them. A hint: an
            index may be of another conversion, and name more than the model needs.
    """

    folder: Path
    tensors: dict[str, TensorEntry]
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())


def read_checkpoint(folder: Path) -> Checkpoint:
    """The tensors of the `model*.safetensors` files of `folder`, which is what mlx-lm loads.

    mlx-lm never reads the index file, and a checkpoint is whole if its model finds all that it
    needs: whatever the index says, nothing is refused for it here.

    Args:
        folder: the model folder.

    Raises:
        CheckpointError: there is no shard, one is truncated or malformed, tensors overlap or appear
            twice.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is not a folder: a model folder with config.json is needed"
        )
    files = shard_files(folder)
    promised = read_index(folder)
    if not files:
        raise CheckpointError(_no_files(folder, promised))
    tensors: dict[str, TensorEntry] = {}
    for file in files:
        for entry in read_header(file):
            if entry.name in tensors:
                raise CheckpointError(
                    f"tensor {entry.name} is in both {tensors[entry.name].file} and {file}: "
                    "remove the shard that does not belong to this checkpoint"
                    + _pattern_in_name(folder)
                )
            tensors[entry.name] = entry
    return Checkpoint(folder, tensors, {t: f for t, f in promised.items() if t not in tensors})


def shard_files(folder: Path) -> list[Path]:
    """The files that mlx-lm reads weights from; to it a folder's own name is part of a pattern."""
    return sorted(Path(f) for f in glob.glob(str(folder / _SHARDS)))


def is_shard(name: str) -> bool:
    """Does mlx-lm read a file of this name for weights?"""
    return fnmatch(name, _SHARDS)


def _no_files(folder: Path, promised: dict[str, str]) -> str:
    shards = {f for f in promised.values() if is_shard(f)}
    found = f"no {_SHARDS} file in {folder}"
    if any(folder.glob(_SHARDS)):
        return f"mlx-lm finds {found}{_pattern_in_name(folder)}"
    if shards:
        found += f" ({len(shards)} of {len(shards)} shards named in {INDEX} are missing)"
    return found


def _pattern_in_name(folder: Path) -> str:
    """A way out where mlx-lm takes a folder's name for a pattern of names; else empty."""
    if glob.escape(str(folder)) == str(folder):
        return ""
    return "; mlx-lm takes *, ? and [ in a folder's name for a pattern: rename the folder"


def whereabouts(checkpoint: Checkpoint) -> str:
    """What the index says of tensors that a model lacks; empty where it says nothing."""
    folder, absent = checkpoint.folder, checkpoint.absent
    if not absent:
        return ""
    gone = sorted(
        {f for f in absent.values() if not os.path.exists(folder / f)},
        key=lambda f: (not is_shard(f), f),  # those that mlx-lm would read come first
    )
    if gone:
        named = {*absent.values(), *(t.file.name for t in checkpoint.tensors.values())}
        return (
            f"{folder / gone[0]} is missing ({len(gone)} of {len(named)} shards named in {INDEX} "
            "are): download the checkpoint again or complete it"
        )
    tensor = min(absent)
    where = f"tensor {tensor} should be in {folder / absent[tensor]} according to {INDEX}, but "
    if is_shard(absent[tensor]):
        return where + "that file does not have it: download it again"
    return where + f"mlx-lm reads {_SHARDS} only: give that file such a name"


def check_model_folder(folder: Path) -> None:
    """Is there a config.json?

    Raises:
        CheckpointError: there is none; says so where a conversion into the folder is unfinished.
            Or it is no JSON object, or of more layers than any model has.
    """
    if (folder / "config.json").is_file():
        _check_numbers(folder / "config.json", read_model_config(folder))
        return
    reason = "not a model folder"
    if (folder / CONVERSION).is_file():
        reason = "a conversion into this folder is unfinished; run the same command again to go on"
    raise CheckpointError(f"{folder / 'config.json'} is missing: {reason}")


def _check_numbers(file: Path, config: dict[str, Any], depth: int = 0) -> None:
    """Refuse what takes mlx-lm or MLX down, or up all memory, before they raise an error."""
    for key, value in config.items():
        if isinstance(value, dict) and depth < 4:
            _check_numbers(file, value, depth + 1)
        # mlx-lm builds as many layers as are asked for before it looks for their weights.
        elif _LAYER_COUNT.match(key) and isinstance(value, int) and value > _MOST_LAYERS:
            raise CheckpointError(f"{file}: {key} is {value}, more than any model has")
        # MLX 0.32 divides by it: the process ends with SIGFPE.
        elif key in ("bits", "group_size") and isinstance(value, int | float) and value < 1:
            raise CheckpointError(f"{file}: {key} is {value}")


def read_header(file: Path) -> list[TensorEntry]:
    """Parse and validate one shard's header; no tensor data is read.

    Raises:
        CheckpointError: see `read_checkpoint`.
    """
    try:
        file_bytes = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if file_bytes < 8 or length > file_bytes - 8:
                raise CheckpointError(
                    f"{file}: the header claims {length} bytes but the file has {file_bytes}: "
                    "it is truncated or not a safetensors file"
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file}: header of {length} bytes, more than the format's limit of "
                    f"{MAX_HEADER_BYTES}"
                )
            raw = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot read the header: {e.strerror}") from e
    try:
        header = json.loads(raw, object_pairs_hook=named_once)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: the header is not valid JSON: {e}") from e
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object")
    header.pop("__metadata__", None)
    data_start = 8 + length
    entries = [_entry(file, name, spec, data_start) for name, spec in header.items()]
    end, previous = data_start, ""
    for entry in sorted(entries, key=lambda t: (t.offset, t.nbytes)):
        if entry.offset < end:
            raise CheckpointError(f"{file}: tensors {previous} and {entry.name} overlap")
        end, previous = entry.offset + entry.nbytes, entry.name
    if end > file_bytes:
        raise CheckpointError(
            f"{file}: tensor {previous} ends at byte {end} but the file has {file_bytes}: "
            "the shard is truncated, download it again"
        )
    return entries


def header_identity(file: Path) -> dict[str, Any]:
    """What tells one shard from another without reading its data: size, and digest of the header.

    Two fine-tunes of one model may have the same; `file_identity` tells them apart.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with file.open("rb") as f:
            start = f.read(8)
            header = f.read(min(int.from_bytes(start, "little"), MAX_HEADER_BYTES))
        size = file.stat().st_size
    except OSError as e:
        raise CheckpointError(f"{file}: cannot read the header: {e.strerror}") from e
    return {"bytes": size, "header_sha256": hashlib.sha256(start + header).hexdigest()}


def file_identity(file: Path) -> dict[str, Any]:
    """`header_identity`, and a digest of samples of the data.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return {**header_identity(file), "sample": content_sample(file)}
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e


def _entry(file: Path, name: str, spec: Any, data_start: int) -> TensorEntry:
    """Validate one header entry on its own."""
    where = f"{file}: tensor {name}"
    if not isinstance(spec, dict):
        raise CheckpointError(f"{where}: its description is not a JSON object")
    dtype, shape, span = spec.get("dtype"), spec.get("shape"), spec.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        raise CheckpointError(f"{where}: unknown dtype {dtype!r}")
    if not _are_sizes(shape):
        raise CheckpointError(f"{where}: its shape is not a list of sizes below 2^63")
    if not _are_sizes(span) or len(span) != 2:
        raise CheckpointError(f"{where}: data_offsets is not [begin, end], two positions in a file")
    begin, end = span
    if begin > end:
        raise CheckpointError(f"{where}: data_offsets {span} run backwards")
    expected = math.prod(shape) * _ITEM_BYTES[dtype]
    if expected > _MAX_SIZE:
        raise CheckpointError(f"{where}: its shape has more elements than any file")
    if end - begin != expected:
        raise CheckpointError(
            f"{where}: {end - begin} bytes stored, but {dtype} of shape {shape} takes {expected}"
        )
    return TensorEntry(name, file, dtype, tuple(shape), data_start + begin, end - begin)


def named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; one that names a thing twice means one thing to us and another to others."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:200]!r} is there twice")
    return found


def read_model_config(folder: Path) -> dict[str, Any]:
    """A model's config.json; of what it says twice the last counts, as for mlx-lm.

    Raises:
        CheckpointError: it cannot be read, or holds no object.
    """
    return read_json_object(folder / "config.json", "a model's configuration", dict)


def read_json_object(
    file: Path,
    holding: str,
    made_of: Callable[[list[tuple[str, Any]]], dict[str, Any]] = named_once,
) -> dict[str, Any]:
    """The JSON object in a file, which is expected to hold `holding`.

    Args:
        file: the file.
        holding: for error messages.
        made_of: makes an object of its pairs; by default one that names a thing twice is refused.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        if (size := file.stat().st_size) > MAX_HEADER_BYTES:
            raise ValueError(f"{size:,} bytes, more than {MAX_HEADER_BYTES:,}")
        content = json.loads(file.read_text("utf-8"), object_pairs_hook=made_of)
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: not readable as JSON: {e}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object with {holding}")
    return content


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Is this a list of numbers that sizes and positions in a file can have?"""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_SIZE for n in value)


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name from the index file, as far as it can be understood."""
    try:
        weight_map = read_json_object(folder / INDEX, "weight_map", dict).get("weight_map")
    except CheckpointError:
        return {}
    if not isinstance(weight_map, dict):
        return {}
    plain: dict[str, bool] = {}  # Kimi K2.5's original has 208,000 tensors in 56 shards

    def is_plain(name: Any) -> bool:
        """A file in the folder: a hostile index must not make us look elsewhere."""
        if not isinstance(name, str):
            return False
        if name not in plain:
            short = 0 < len(name) < 256 and name.isprintable()
            plain[name] = short and Path(name).name == name != ".."
        return plain[name]

    return {tensor: file for tensor, file in weight_map.items() if is_plain(file)}

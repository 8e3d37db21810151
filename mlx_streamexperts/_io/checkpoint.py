"""Where each tensor's bytes are in a safetensors checkpoint, from the headers alone.

This module never reads a weight. It finds everything that can be wrong with the files before
anything loads, and raises a `CheckpointError` that names the file and the tensor. The format is
https://github.com/huggingface/safetensors (8 bytes of header length, a JSON header, the data).
"""

from __future__ import annotations

import glob
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeGuard

from .._errors import CheckpointError, UnsupportedModelError
from .._osinfo import content_sample

# Bytes of one element. Sub-byte types have no byte range of their own and are not streamed.
_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4,
    "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the reference implementation's limit
_MAX_SIZE = 2**63 - 1  # no file is longer; messages do not print larger numbers
_MOST_LAYERS = 1000  # Kimi K2.5 has 61
# Not every key with "layer" is a count of layers: Gemma's vocab_size_per_layer_input is 262144.
_LAYER_COUNT = re.compile(r"(n|num)_(\w+_)?layers?$")
_SHARDS = "model*.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
"""Files that transformers makes a tokenizer of without a model's code."""
INDEX = "model.safetensors.index.json"
MOVED = "model-experts-moved-to-a-packed-store.safetensors"
"""A note, see moved.py: no shard. Every library that reads shards stops at it."""
INDEX_ASIDE = f"{INDEX}.aside"  # the index as it was, while it leads to that note
CONVERSION = "convert.json"  # a conversion writes this file first and config.json last
PACKING = "packing.json"  # so does packing a repository of the Hub


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
    """Where one tensor of a layer's experts is stored, for each expert.

    Attributes:
        dtype: safetensors name of the element type.
        row_bytes: bytes of one expert's part.
        files: the file with each expert's part (strings: the reader compares them in every miss).
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
        """The table of a tensor `[experts, ...]`, which holds expert after expert."""
        experts = entry.shape[0]
        row = entry.nbytes // max(1, experts)
        offsets = tuple(range(entry.offset, entry.offset + experts * row, row)) if row else ()
        return cls(entry.dtype, row, (str(entry.file),) * experts, offsets, (entry.name,) * experts)

    @classmethod
    def nowhere(cls, nbytes: int, experts: int) -> ExpertTable:
        """A table for planning, of a tensor that is not written yet: with sizes, without places."""
        return cls("", nbytes // max(1, experts), (), (0,) * experts, ())

    @classmethod
    def separate(cls, entries: Sequence[TensorEntry]) -> ExpertTable:
        """The table of one tensor per expert, as original checkpoints have them.

        Raises:
            CheckpointError: the tensors differ in shape or element type.
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


def extents(tables: Iterable[ExpertTable], experts: Iterable[int]) -> list[tuple[str, int, int]]:
    """The parts of files that hold experts: file, begin, end; neighbours joined."""
    chosen = list(experts)
    parts = sorted(
        (t.files[n], t.offsets[n], t.offsets[n] + t.row_bytes) for t in tables for n in chosen
    )
    joined: list[tuple[str, int, int]] = []
    for file, begin, end in parts:
        if joined and joined[-1][0] == file and begin <= joined[-1][2]:
            joined[-1] = file, joined[-1][1], max(end, joined[-1][2])
        else:
            joined.append((file, begin, end))
    return joined


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a model folder, by name.

    Attributes:
        folder: the model folder.
        tensors: every tensor of every file that its library reads: `model*.safetensors`, or what
            mlx-vlm chooses.
        absent: tensors that the index names and no file has, with the file that should have them.
            This is only a hint: the index may belong to another conversion, or name tensors that
            the model does not need.
    """

    folder: Path
    tensors: dict[str, TensorEntry]
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.nbytes for t in self.tensors.values())


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the headers of the `model*.safetensors` files of `folder`, which mlx-lm loads.

    mlx-lm never reads the index file, and a checkpoint is complete if its model finds all tensors
    that it needs. Therefore nothing is refused here because of the index.

    Args:
        folder: the model folder.

    Raises:
        CheckpointError: there is no shard, a shard is truncated or malformed, or tensors overlap or
            appear twice.
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
        add_shard(tensors, folder, file)
    return Checkpoint(folder, tensors, {t: f for t, f in promised.items() if t not in tensors})


def add_shard(tensors: dict[str, TensorEntry], folder: Path, file: Path) -> None:
    """Add the tensors of a model folder's shard to those of others.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    for entry in read_header(file):
        if entry.name in tensors:
            raise CheckpointError(
                f"tensor {entry.name} is in both {tensors[entry.name].file} and {file}: "
                "remove the shard that does not belong to this checkpoint"
                + _pattern_in_name(folder)
            )
        tensors[entry.name] = entry


def shard_files(folder: Path) -> list[Path]:
    """The files that mlx-lm reads weights from. Like mlx-lm, this treats `folder` as a pattern."""
    found = sorted(Path(f) for f in glob.glob(str(folder / _SHARDS)))
    return [f for f in found if f.name != MOVED]


def is_shard(name: str) -> bool:
    """Does mlx-lm read weights from a file of this name?"""
    return fnmatch(name, _SHARDS) and name != MOVED


def is_weights(name: str) -> bool:
    """Does mlx-vlm, or mlx-lm too, read weights from a file of this name?"""
    return name.endswith(".safetensors") and name != MOVED


def _no_files(folder: Path, promised: dict[str, str]) -> str:
    shards = {f for f in promised.values() if is_shard(f)}
    found = f"no {_SHARDS} file in {folder}"
    if any(folder.glob(_SHARDS)):
        return f"mlx-lm finds {found}{_pattern_in_name(folder)}"
    if shards:
        found += f" ({len(shards)} of {len(shards)} shards named in {INDEX} are missing)"
    if any(folder.glob("*.gguf")):
        return f"{found}: GGUF files cannot be streamed, take an MLX conversion of the model"
    return f"{found}: download the model again or complete it"


def _pattern_in_name(folder: Path) -> str:
    """Advice if mlx-lm takes the folder's name for a pattern; otherwise empty."""
    if glob.escape(str(folder)) == str(folder):
        return ""
    return "; mlx-lm takes *, ? and [ in a folder's name for a pattern: rename the folder"


def whereabouts(checkpoint: Checkpoint) -> str:
    """Where the index says that missing tensors should be; empty if it does not name them."""
    folder, absent = checkpoint.folder, checkpoint.absent
    if not absent:
        return ""
    gone = sorted(
        {f for f in absent.values() if not os.path.exists(folder / f)},
        key=lambda f: (not is_shard(f), f),  # files that mlx-lm would read come first
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
    """Check that a folder has a usable config.json.

    Raises:
        CheckpointError: it has none (the message tells if a conversion is unfinished), or the file
            is not a JSON object or asks for more layers than any model has.
    """
    if os.path.isfile(folder / "config.json"):  # False, too, where the folder cannot be entered
        _check_numbers(folder / "config.json", read_model_config(folder))
        return
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: state a model's folder")
    if folder.is_dir() and not os.access(folder, os.R_OK | os.X_OK):
        raise CheckpointError(f"{folder}: cannot be read: Permission denied")
    reason = "not a model folder"
    if (folder / CONVERSION).is_file():
        reason = "a conversion into this folder is unfinished; run the same command again to go on"
    elif (folder / PACKING).is_file():
        reason = "packing into this folder is unfinished; run the same command again to go on"
    raise CheckpointError(f"{folder / 'config.json'} is missing: {reason}")


def _check_numbers(file: Path, config: dict[str, Any], depth: int = 0) -> None:
    """Refuse numbers with which mlx-lm or MLX would crash or take all memory."""
    for key, value in config.items():
        if isinstance(value, dict) and depth < 4:
            _check_numbers(file, value, depth + 1)
        # mlx-lm builds all layers before it looks for their weights.
        elif _LAYER_COUNT.match(key) and isinstance(value, int) and value > _MOST_LAYERS:
            raise CheckpointError(f"{file}: {key} is {value}, more than any model has")
        # MLX 0.32 divides by it: the process ends with SIGFPE.
        elif key in ("bits", "group_size") and isinstance(value, int | float) and value < 1:
            raise CheckpointError(f"{file}: {key} is {value}")


def read_header(file: Path) -> list[TensorEntry]:
    """Parse and validate one shard's header, without reading tensor data.

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
    """A shard's size and the digest of its header, to tell it from others without reading its data.

    Two fine-tunes of one model may have the same; `file_identity` tells them apart.

    Raises:
        CheckpointError: the file cannot be read.
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
    """`header_identity` and a digest of samples of the data.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        return {**header_identity(file), "sample": content_sample(file)}
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e


def _entry(file: Path, name: str, spec: Any, data_start: int) -> TensorEntry:
    """Validate one entry of a header."""
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
    """Make a JSON object; refuse repeated names, because other readers may take the other value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:200]!r} is there twice")
    return found


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read a model's config.json. The last of repeated names counts, as in mlx-lm.

    Raises:
        CheckpointError: it cannot be read, or is not a JSON object.
    """
    return read_json_object(folder / "config.json", "a model's configuration", dict)


def tokenizer_code(folder: Path) -> str | None:
    """The Python file of a model without which its tokenizer cannot be built; None without one.

    Raises:
        CheckpointError: tokenizer_config.json is not a JSON object.
    """
    file = folder / "tokenizer_config.json"
    if not file.is_file() or any((folder / name).is_file() for name in _TOKENIZERS):
        return None
    named = read_json_object(file, "a tokenizer's configuration", dict).get("auto_map")
    found = named.get("AutoTokenizer") if isinstance(named, dict) else None
    classes = found if isinstance(found, list) else [found]
    return next((f"{c.split('.')[0]}.py" for c in classes if isinstance(c, str)), None)


def check_tokenizer(folder: Path, trusted: bool) -> None:
    """Refuse a tokenizer that is code, unless that may run.

    Without this, transformers says that sentencepiece is missing, after the weights are loaded.

    Raises:
        UnsupportedModelError: it is code, and not trusted.
        CheckpointError: tokenizer_config.json is not a JSON object.
    """
    if not trusted and (code := tokenizer_code(folder)) is not None:
        raise UnsupportedModelError(
            f"{folder}: this model's tokenizer is Python code that comes with it, {code}. If you "
            "trust that, pass --trust-remote-code (tokenizer_config={'trust_remote_code': True})"
        )


def read_json_object(
    file: Path,
    holding: str,
    made_of: Callable[[list[tuple[str, Any]]], dict[str, Any]] = named_once,
) -> dict[str, Any]:
    """Read the JSON object in a file.

    Args:
        file: the file.
        holding: what the object should hold, for error messages.
        made_of: makes an object from its pairs; by default repeated names are refused.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        if (size := file.stat().st_size) > MAX_HEADER_BYTES:
            raise ValueError(f"{size:,} bytes, more than {MAX_HEADER_BYTES:,}")
        content = json.loads(file.read_text("utf-8"), object_pairs_hook=made_of)
    except FileNotFoundError as e:
        raise CheckpointError(f"{file}: there is no such file") from e
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: not readable as JSON: {e}") from e
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object with {holding}")
    return content


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    """Is this a list of numbers that can be sizes or positions in a file?"""
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_SIZE for n in value)


def read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name, from the parts of the index file that are valid."""
    aside = folder / INDEX_ASIDE
    file = aside if aside.exists() else folder / INDEX
    try:
        weight_map = read_json_object(file, "weight_map", dict).get("weight_map")
    except CheckpointError:
        return {}
    if not isinstance(weight_map, dict):
        return {}
    plain: dict[str, bool] = {}  # a cache: Kimi K2.5's original has 208,000 tensors in 56 shards

    def is_plain(name: Any) -> bool:
        """Is this a file in the folder? A hostile index must not make us look elsewhere."""
        if not isinstance(name, str):
            return False
        if name not in plain:
            short = 0 < len(name) < 256 and name.isprintable()
            plain[name] = short and Path(name).name == name != ".."
        return plain[name]

    return {tensor: file for tensor, file in weight_map.items() if is_plain(file)}

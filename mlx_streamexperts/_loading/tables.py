"""Finds a model's tables that are looked up by token, ties them to bytes, and replaces them.

Known kinds: the n-gram tables of qwen4_exp (a list of parts that is one table) and of
longcat_flash_ngram, the per-layer embeddings of Gemma 3n and 4, and the engrams of DeepSeek V4.1.
Their families only look up rows in them. A table is tied to its bytes like an expert table
(discover.py), never by its name. One that is computed while loading stays in memory. Nothing is
evaluated here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .._config import StreamConfig, parse_size
from .._errors import UnsupportedModelError
from .._experts.rows import (
    DEFAULT_CACHE,
    LEAST_BYTES,
    RowPlace,
    Rows,
    RowTable,
    RowTensor,
    StreamedRows,
)
from .._experts.stream import flatten
from .._io.checkpoint import Checkpoint, TensorEntry
from .lazy_load import MLX_VLM, LoadRecord

_EMBEDDINGS = (nn.Embedding, nn.QuantizedEmbedding)
_QUANTIZATION = ("group_size", "bits", "mode")


@dataclass(frozen=True)
class _Found:
    """A table in the model: one embedding, or several that hold consecutive rows.

    Attributes:
        path: of the module that is replaced.
        parts: the embeddings, each with its path.
        offloaded: the module in its place that reads rows itself, as mlx-vlm does for engrams.
    """

    path: str
    parts: list[tuple[str, nn.Module]]
    offloaded: nn.Module | None = None


def stream_tables(
    model: nn.Module,
    checkpoint: Checkpoint,
    record: LoadRecord,
    config: StreamConfig,
    as_converted: bool = False,
) -> Rows:
    """Put `StreamedRows` in place of a model's known tables, if the options say so.

    Args:
        model: a lazily loaded model.
        checkpoint: its files.
        record: where its arrays come from.
        config: the options `rows` and `row_cache`.
        as_converted: accept tables that have no place on disk yet.

    Raises:
        UnsupportedModelError: a table that mlx-vlm reads row by row is not in the checkpoint.
    """
    entries = {id(array): checkpoint.tensors[name] for name, array in record.stored.items()}
    tables = []
    for found in list(_known_tables(model)):
        placed = _placed(found, entries, record, checkpoint, as_converted)
        if placed is not None:
            tables.append((found, placed))
        elif found.offloaded is not None:
            # Left in place it would be a parameter, and loading would read all of it.
            raise UnsupportedModelError(
                f"{checkpoint.folder}: the files do not hold {found.path} as {MLX_VLM} uses it, so "
                "its rows cannot be read one by one: download the model again"
            )
    nbytes = sum(_nbytes(tensors, rows) for _, (tensors, rows) in tables)
    if config.rows == "off" or (config.rows == "auto" and nbytes < LEAST_BYTES):
        # Those that mlx-vlm reads row by row itself leave the whole table among the parameters.
        tables = [(found, placed) for found, placed in tables if found.offloaded is not None]
    streamed = []
    for found, (tensors, rows) in tables:
        embedding = found.parts[0][1]
        table = RowTable(found.path, embedding, tensors, rows, joined=len(found.parts) > 1)
        set_module(model, found.path, StreamedRows(table))
        streamed.append(table)
    cache = DEFAULT_CACHE if config.row_cache is None else parse_size(config.row_cache)
    return Rows(streamed, cache)


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a path such as `model.layers.3.mlp.switch_mlp`."""
    *parents, last = path.split(".")
    node: Any = model
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node[part]
    node[int(last) if isinstance(node, list) else last] = module


def _nbytes(tensors: Sequence[RowTensor], rows: int) -> int:
    return rows * sum(t.row_bytes for t in tensors)


def _known_tables(model: nn.Module) -> Iterator[_Found]:
    """Tables of the known kinds, in no particular order."""
    for path, module in model.named_modules():
        *parents, last = path.split(".")
        owner = parents[-1] if parents else ""
        if last == "embed_tokens_per_layer" or owner == "embedders":
            if type(module) in _EMBEDDINGS:
                yield _Found(path, [(path, module)])
        elif type(module).__name__ == "ShardedEmbedding":
            parts = [(f"{path}.shards.{i}", part) for i, part in enumerate(module.shards)]
            if _alike([part for _, part in parts]):
                yield _Found(path, parts)
        elif type(module).__name__ == "OffloadedEngramEmbedding":
            yield _Found(path, [(path, module._source_embedding)], module)


def _alike(parts: list[nn.Module]) -> bool:
    """Are these embeddings parts of one table?"""
    first = parts[0]
    return type(first) in _EMBEDDINGS and all(
        type(p) is type(first)
        and all(getattr(p, name, None) == getattr(first, name, None) for name in _QUANTIZATION)
        and [(n, a.dtype, a.shape[1:]) for n, a in flatten(p)]
        == [(n, a.dtype, a.shape[1:]) for n, a in flatten(first)]
        for p in parts
    )


def _placed(
    found: _Found,
    entries: dict[int, TensorEntry],
    record: LoadRecord,
    checkpoint: Checkpoint,
    as_converted: bool,
) -> tuple[list[RowTensor], int] | None:
    """A table's tensors and its number of rows; None if it is not on disk as it is used."""
    tensors = []
    for attribute, array in flatten(found.parts[0][1]):
        row_bytes = array.nbytes // max(1, array.shape[0])
        places, first = [], 0
        for path, part in found.parts:
            own: mx.array = getattr(part, attribute)
            if found.offloaded is not None:
                at = _mapped(found.offloaded, attribute, checkpoint)
            else:
                at = _stored(f"{path}.{attribute}", own, entries, record, checkpoint)
            if at is not None:
                entry, skip = at
                if entry.nbytes - skip < own.nbytes:
                    at = None
                places.append(RowPlace(str(entry.file), entry.offset + skip, first, entry.name))
            if at is None and not as_converted:
                return None
            first += own.shape[0]
        if not row_bytes or own.ndim != 2:
            return None
        if len(places) < len(found.parts):
            places = []
        tensors.append(RowTensor(attribute, array.dtype, row_bytes, tuple(places)))
    return tensors, first


def _stored(
    where: str,
    table: mx.array,
    entries: dict[int, TensorEntry],
    record: LoadRecord,
    checkpoint: Checkpoint,
) -> tuple[TensorEntry, int] | None:
    """The stored tensor that holds a table, and the bytes in it before the table begins.

    None if the table is computed while loading. The arguments are those of
    `discover._stored_parts`.
    """
    rows = record.traced.get(where)
    if record.traced and rows is None:
        return None
    if entry := entries.get(id(table)):
        return entry, 0
    if rows is None or len(rows.ranges) != 1 or rows.nbytes != table.nbytes:
        return None
    name, skip, _ = rows.ranges[0]
    return checkpoint.tensors[name], skip


def _mapped(
    offloaded: Any, attribute: str, checkpoint: Checkpoint
) -> tuple[TensorEntry, int] | None:
    """The same for a table that mlx-vlm has mapped from its file, whose links NumPy resolves."""
    mapped = offloaded._arrays[attribute]
    for entry in checkpoint.tensors.values():
        alike = (entry.offset, entry.nbytes) == (mapped.offset, mapped.nbytes)
        if alike and entry.file.samefile(mapped.filename):
            return entry, 0
    return None

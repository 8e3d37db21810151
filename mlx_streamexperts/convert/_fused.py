"""Computes rows of expert tables that mlx-lm rewrites from other tables while loading.

For example, a checkpoint may store `gate_up_proj` for the model's `gate_proj` and `up_proj`. This
module finds the stored tables that a table needs by experiments with mlx-lm's own `sanitize`, never
by name, and reads only the rows that it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .._errors import CheckpointError, UnsupportedModelError
from .._io.checkpoint import Checkpoint, TensorEntry

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class FusedTables:
    """Rows of tables that mlx-lm rewrites from other tables, such as `gate_up_proj`.

    mlx-lm's `sanitize` runs on the checkpoint with these tables cut down to the wanted experts; its
    results are those experts' rows.

    Args:
        checkpoint: the original checkpoint.
        build_empty: builds its model without weights.
    """

    def __init__(self, checkpoint: Checkpoint, build_empty: Callable[[], nn.Module]) -> None:
        self._checkpoint, self._build_empty = checkpoint, build_empty
        self._model: nn.Module | None = None
        self._base: dict[str, mx.array] = {}
        self._sources: dict[str, set[str]] = {}

    def rows(self, tables: list[str], experts: int, first: int, end: int) -> dict[str, mx.array]:
        """Rows of experts `first` to `end - 1` of a layer's tables, not evaluated, by table."""
        if any(table not in self._sources for table in tables):
            self._find_sources(tables, experts)
        needed = set().union(*(self._sources[table] for table in tables))
        view = {}
        for name in self._candidates(tables[0], experts):
            dtype, entry = self._base[name].dtype, self._checkpoint.tensors[name]
            view[name] = (
                read_rows(entry, dtype, first, end)
                if name in needed
                else mx.zeros((end - first, *entry.shape[1:]), dtype)  # never evaluated
            )
        made = self._sanitize(view)
        return {table: made[table] for table in tables}

    def _find_sources(self, tables: list[str], experts: int) -> None:
        """Find the stored tables that each of `tables` is made of: its length follows theirs."""
        candidates = self._candidates(tables[0], experts)
        shapes = {
            n: (self._checkpoint.tensors[n].shape[1:], self._base[n].dtype) for n in candidates
        }

        def made_of(lengths: dict[str, int]) -> dict[str, mx.array]:
            cut = {n: mx.zeros((lengths[n], *shape), d) for n, (shape, d) in shapes.items()}
            return self._sanitize(cut)  # shapes only: nothing is evaluated

        try:
            made = made_of(dict.fromkeys(candidates, 2))
        except (ValueError, KeyError, TypeError, RuntimeError) as e:
            raise _unknown(self._checkpoint, tables[0], candidates) from e
        if any(table not in made or made[table].shape[:1] != (2,) for table in tables):
            raise _unknown(self._checkpoint, tables[0], candidates)
        found: dict[str, set[str]] = {table: set() for table in tables}
        for name in candidates:
            try:
                made = made_of({**dict.fromkeys(candidates, 2), name: 3})
            except (ValueError, RuntimeError):  # combined with another one: any table may need it
                for sources in found.values():
                    sources.add(name)
                continue
            for table, sources in found.items():
                if made[table].shape[0] != 2:
                    sources.add(name)
        if not all(found.values()):
            raise _unknown(self._checkpoint, tables[0], candidates)
        self._sources.update(found)

    def _candidates(self, table: str, experts: int) -> list[str]:
        """Names of stored tensors of the same layer with a row for each expert."""
        if not self._base:
            for file in sorted({str(t.file) for t in self._checkpoint.tensors.values()}):
                self._base.update(cast(dict[str, mx.array], mx.load(file)))
        layer = layer_of(table)
        return [
            name
            for name, entry in self._checkpoint.tensors.items()
            if entry.shape[:1] == (experts,) and layer_of(name) == layer
        ]

    def _sanitize(self, replaced: dict[str, mx.array]) -> dict[str, mx.array]:
        if self._model is None:
            self._model = self._build_empty()
        return self._model.sanitize({**self._base, **replaced})


def layer_of(name: str) -> str:
    """Number of a tensor's layer, the first number in its name; empty if there is none."""
    return next((part for part in name.split(".") if part.isdigit()), "")


def read_rows(entry: TensorEntry, dtype: mx.Dtype, first: int, end: int) -> mx.array:
    """Read rows [end - first, ...] of a stored table [experts, ...], from expert `first` on.

    Raises:
        CheckpointError: the file cannot be read.
    """
    row = entry.nbytes // entry.shape[0]
    data = np.empty((end - first) * row, np.uint8)
    where = f"{entry.file}: tensor {entry.name}, experts {first} to {end - 1}"
    try:
        with entry.file.open("rb", buffering=0) as f:
            f.seek(entry.offset + first * row)
            view, done = data.data, 0
            while done < len(data):
                count = f.readinto(view[done:])
                if not count:
                    raise CheckpointError(f"{where}: the file ends early; download it again")
                done += count
    except OSError as e:
        raise CheckpointError(f"{where}: cannot be read: {e.strerror}") from e
    values = mx.array(data.view(_UNSIGNED[dtype.size]))
    return values.view(dtype).reshape(end - first, *entry.shape[1:])


def _unknown(checkpoint: Checkpoint, table: str, candidates: list[str]) -> UnsupportedModelError:
    """The error for tables whose rows cannot be computed separately."""
    return UnsupportedModelError(
        f"{checkpoint.folder}: mlx-lm computes {table} in a way that cannot be done a few experts "
        f"at a time. Tensors of that layer with a row an expert: {', '.join(candidates) or '-'}. "
        "Convert with mlx_lm.convert on a machine that holds the experts, or use an MLX conversion."
    )

"""Rows of expert tables that mlx-lm rewrites from other tables while loading.

An original checkpoint may hold `gate_up_proj` where the model has `gate_proj` and `up_proj`. Which
rows of which stored tables are needed is found by experiment with mlx-lm's own `sanitize`, never
from names; only those rows are read.
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

    mlx-lm's `sanitize` is run on the checkpoint with the tables concerned cut down to the experts
    that are wanted; what it makes of them are those experts' rows.
    """

    def __init__(self, checkpoint: Checkpoint, skeleton: Callable[[], nn.Module]) -> None:
        self._checkpoint, self._skeleton = checkpoint, skeleton
        self._model: nn.Module | None = None
        self._base: dict[str, mx.array] = {}
        self._sources: dict[str, set[str]] = {}

    def rows(self, tables: list[str], experts: int, first: int, end: int) -> dict[str, mx.array]:
        """Experts `first` to `end` of tables of one layer, not yet evaluated."""
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
        """Which stored tables each of `tables` is made of: those whose length it follows."""
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
            except (ValueError, RuntimeError):  # it is combined with another: no table is ruled out
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
        """Stored tensors of the same layer with a row for each expert."""
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
            self._model = self._skeleton()
        return self._model.sanitize({**self._base, **replaced})


def layer_of(name: str) -> str:
    """A tensor's layer: its first component that is a number, or none."""
    return next((part for part in name.split(".") if part.isdigit()), "")


def read_rows(entry: TensorEntry, dtype: mx.Dtype, first: int, end: int) -> mx.array:
    """Experts `first` to `end` of a stored table `[experts, ...]`.

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
    """A form whose rows cannot be had singly."""
    return UnsupportedModelError(
        f"{checkpoint.folder}: mlx-lm computes {table} in a way that cannot be done a few experts "
        f"at a time. Tensors of that layer with a row an expert: {', '.join(candidates) or '-'}. "
        "Convert with mlx_lm.convert on a machine that holds the experts, or use an MLX conversion."
    )

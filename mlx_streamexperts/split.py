"""A call of an expert layer taken apart into (token, expert) rows, and put together again.

Rows whose experts are in memory can run while others' are read. The parts must give the bits that
the whole call would have given.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# mlx-lm sorts a call's rows by expert from this many on.
SORTED_ROWS = 64


class SplitCall:
    """One call `switch(x, indices)`, run part by part.

    Args:
        switch: mlx-lm's module over slots.
        x: [..., D] tokens.
        experts: int [..., K], the chosen experts.
        slot_of: int32 [experts], where each expert is; looked at when a part runs.
        keep_row_count: every kernel call must have as many rows as the whole call has. A GPU
            backend may choose its kernel by their number, and another one sums in another order.
    """

    def __init__(
        self,
        switch: nn.Module,
        x: mx.array,
        experts: np.ndarray,
        slot_of: np.ndarray,
        keep_row_count: bool,
    ) -> None:
        self._switch, self._x, self._slot_of = switch, x, slot_of
        self._shape = experts.shape
        self._chosen = experts.ravel()  # [T*K]
        self._keeps = keep_row_count and experts.size < SORTED_ROWS
        # A prompt's parts go into one output as they come: kept and joined at the end they would
        # take three times its memory. Of a token's, joining costs least.
        self._in_one = experts.size >= SORTED_ROWS
        self._y: mx.array | None = None  # [T*K, D]
        self._parts: list[tuple[np.ndarray, mx.array]] = []  # rows, their result

    @property
    def begun(self) -> bool:
        """Has a part been run?"""
        return bool(self._parts) or self._y is not None

    def rows_of(self, experts: Sequence[int]) -> np.ndarray:
        """Indices of the rows of some experts, int [R]."""
        wanted = np.zeros(len(self._slot_of), bool)
        wanted[experts] = True
        return np.flatnonzero(wanted[self._chosen])

    def run(self, rows: np.ndarray) -> mx.array:
        """Build the part of the call that these rows are; their experts must be in their slots.

        Returns:
            Something to evaluate: [R, D]; where the number of rows is kept [..., K, D], of which
            only these rows count.
        """
        y = self._run_padded(rows) if self._keeps else self._run_alone(rows)
        if not self._in_one:
            self._parts.append((rows, y))
            return y
        if self._y is None:
            self._y = mx.zeros((len(self._chosen), y.shape[-1]), y.dtype)
        self._y[mx.array(rows.astype(np.uint32))] = y
        mx.async_eval(self._y)  # nothing else holds the one before: written where it is
        return y

    def joined(self) -> mx.array:
        """All parts in the call's order, [..., K, D]; together they must be all rows."""
        if self._y is not None:
            return self._y.reshape(*self._shape, -1)
        size = len(self._chosen)
        if self._keeps:
            y = self._parts[0][1]
            for rows, more in self._parts[1:]:
                mine = np.zeros(size, bool)
                mine[rows] = True
                y = mx.where(mx.array(mine.reshape(*self._shape, 1)), more, y)
            return y
        inverse = np.empty(size, np.uint32)
        inverse[np.concatenate([rows for rows, _ in self._parts])] = np.arange(size)
        y = mx.concatenate([y for _, y in self._parts])[mx.array(inverse)]  # [T*K, D]
        return y.reshape(*self._shape, -1)

    def _run_padded(self, rows: np.ndarray) -> mx.array:
        stand_in = self._slot_of[self._chosen[rows[0]]]
        slots = np.full(len(self._chosen), stand_in, np.uint32)
        slots[rows] = self._slot_of[self._chosen[rows]]
        return self._switch(self._x, mx.array(slots.reshape(self._shape)))  # [..., K, D]

    def _run_alone(self, rows: np.ndarray) -> mx.array:
        x, top_k = self._x, self._shape[-1]
        tokens = len(self._chosen) // top_k
        slots = mx.array(self._slot_of[self._chosen[rows]].astype(np.uint32))  # [R]
        if tokens == 1:  # decode: like stock, one token broadcast over its experts
            return self._switch(x.reshape(1, -1), slots[None])[0]  # [R, D]
        if x.size // x.shape[-1] != tokens:
            x = mx.broadcast_to(x, (*self._shape[:-1], x.shape[-1]))
        x = x.reshape(tokens, -1)[mx.array((rows // top_k).astype(np.uint32))]  # [R, D]
        return self._switch(x, slots[:, None])[:, 0]  # [R, D]

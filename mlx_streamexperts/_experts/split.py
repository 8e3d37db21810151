"""Runs a call of an expert layer in parts, by (token, expert) rows, and joins their results.

Rows whose experts are resident can run while other experts are read. The parts must give the same
bits as the whole call.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

# mlx-lm sorts a call's rows by expert from this many on.
SORTED_ROWS = 64

# Metal's `gather_qmm` runs sorted rows as matrices from this many on for each expert of its table,
# and one by one below (MLX 0.32).
_RATIO = 4


@dataclass(frozen=True)
class RowRule:
    """How a backend chooses its kernels; another kernel would sum in another order.

    Attributes:
        count: it looks at whether rows are sorted, which they are from `SORTED_ROWS` on.
        ratio: it looks at the number of rows for each expert of a table.
        padded: it looks at the number of unsorted rows too. So a part of a token's call gets
            stand-in rows, as many as the whole has.
    """

    count: bool = False
    ratio: bool = False
    padded: bool = False

    @classmethod
    def of(cls, switch: nn.Module) -> RowRule:
        """The rule for a module on MLX's default device. The CPU backend computes row by row.

        Metal computes unsorted rows one by one, each in the same way however many there are
        (`gather_qmv` in backend/metal/quantized.cpp and `gather_mv` in matmul.cpp, MLX 0.32).
        mlx-vlm's modules have Metal kernels of their own for them, of which that is not known.
        """
        if mx.default_device() == mx.cpu:
            return cls()
        linears = [m for m in switch.values() if isinstance(m, nn.Module) and "weight" in m]
        own = all(isinstance(m, SwitchLinear | QuantizedSwitchLinear) for m in linears)
        metal = mx.metal.is_available()
        quantized = any("scales" in m for m in linears)
        return cls(count=True, ratio=metal and quantized, padded=not (metal and own))

    def limits(self, rows: int, experts: int, slots: int) -> tuple[int, int]:
        """The least and the most rows of a part of a prompt that uses the kernels of the whole.

        Args:
            rows: of the whole.
            experts: rows of the table of the stock model.
            slots: rows of the table here.
        """
        if not self.ratio:
            return (SORTED_ROWS if self.count else 1), sys.maxsize
        if rows // experts >= _RATIO:
            return max(SORTED_ROWS, _RATIO * slots), sys.maxsize
        return 1, max(SORTED_ROWS, _RATIO * slots) - 1

    def divides(self, rows: int, experts: int, slots: int) -> bool:
        """Must a prompt run in parts although all of its experts are resident?"""
        return self.ratio and rows >= SORTED_ROWS and rows > self.limits(rows, experts, slots)[1]


class SplitCall:
    """One call `switch(x, indices, weights)`, run part by part.

    Args:
        switch: runs mlx-lm's module over slots.
        x: [..., D] tokens.
        experts: int [..., K], the chosen experts.
        weights: [..., K], each row's own factor; None if the module takes none.
        slot_of: int32 [experts], each expert's slot; read when a part runs.
        slots: how many there are.
        rule: how the device chooses its kernels. A token's parts have as many rows as the whole if
            that matters; a prompt's parts are large enough, or small enough.
        whole: the module computes these tokens one by one, so a part keeps the rows of the whole.

    Attributes:
        begun: a part has run.
    """

    def __init__(
        self,
        switch: Callable[[mx.array, mx.array, mx.array | None], mx.array],
        x: mx.array,
        experts: np.ndarray,
        weights: mx.array | None,
        slot_of: np.ndarray,
        slots: int,
        rule: RowRule,
        whole: bool = False,
    ) -> None:
        self._switch, self._x, self._weights, self._slot_of = switch, x, weights, slot_of
        self._shape = experts.shape
        self._chosen = experts.ravel()  # [T*K]
        self._keeps = whole or (rule.padded and experts.size < SORTED_ROWS)
        # A prompt's parts go into one output at once: joined at the end, they would take three
        # times its memory. For a token, joining is cheapest.
        self._in_one = experts.size >= SORTED_ROWS and not self._keeps
        self._least, self._most = 1, sys.maxsize
        if self._in_one:
            self._least, self._most = rule.limits(experts.size, len(slot_of), slots)
        self._y: mx.array | None = None  # [T*K, D]
        self._parts: list[tuple[np.ndarray, mx.array]] = []  # rows, their result
        self.begun = False

    def rows_of(self, experts: Sequence[int]) -> np.ndarray:
        """Indices of the rows of some experts, int [R]."""
        wanted = np.zeros(len(self._slot_of), bool)
        wanted[experts] = True
        return np.flatnonzero(wanted[self._chosen])

    def run(self, rows: np.ndarray) -> list[mx.array]:
        """Build the part of the call with these rows, whose experts must be in their slots.

        Returns:
            The arrays to evaluate for it, [R, D] each; or [..., K, D] if parts keep the number of
            rows, of which only these rows count.
        """
        self.begun = True
        if not self._in_one:
            y = self._run_padded(rows) if self._keeps else self._run_alone(rows)
            self._parts.append((rows, y))
            return [y]
        most = self._most
        return [self._add(rows[at : at + most]) for at in range(0, len(rows), most)]

    def _add(self, rows: np.ndarray) -> mx.array:
        """Run these rows of a prompt and write their results to the output."""
        more = np.repeat(rows[-1:], max(0, self._least - len(rows)))
        y = self._run_alone(np.concatenate([rows, more]))[: len(rows)]
        if self._y is None:
            self._y = mx.zeros((len(self._chosen), y.shape[-1]), y.dtype)
        self._y[mx.array(rows.astype(np.uint32))] = y
        mx.async_eval(self._y)  # nothing else holds the array before: it is updated in place
        return y

    def joined(self) -> mx.array:
        """Join the parts in the call's order, [..., K, D]; they must cover all rows."""
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
        shaped = mx.array(slots.reshape(self._shape))
        return self._switch(self._x, shaped, self._weights)  # [..., K, D]

    def _run_alone(self, rows: np.ndarray) -> mx.array:
        x, top_k = self._x, self._shape[-1]
        tokens = len(self._chosen) // top_k
        slots = mx.array(self._slot_of[self._chosen[rows]].astype(np.uint32))  # [R]
        weights = None
        if self._weights is not None:
            weights = self._weights.reshape(-1)[mx.array(rows.astype(np.uint32))]  # [R]
        if tokens == 1:  # decode: like stock, one token broadcast over its experts
            weights = None if weights is None else weights[None]
            return self._switch(x.reshape(1, -1), slots[None], weights)[0]  # [R, D]
        if x.size // x.shape[-1] != tokens:
            x = mx.broadcast_to(x, (*self._shape[:-1], x.shape[-1]))
        x = x.reshape(tokens, -1)[mx.array((rows // top_k).astype(np.uint32))]  # [R, D]
        weights = None if weights is None else weights[:, None]
        return self._switch(x, slots[:, None], weights)[:, 0]  # [R, D]

"""Which stored bytes a table consists of that a model's `sanitize` cut out of others.

An original checkpoint may hold `gate_up_proj` [experts, 2 * hidden, width]; the model's `sanitize`
splits its rows into two tables. Each expert's half is still one range of bytes in the file, so it
can be streamed from where it lies. The other way round, a table may join what is stored apart: then
an expert is several ranges. The graph of `sanitize` tells which: every operation that only selects
or joins whole rows is followed, and any other (a sum, a transpose, a change of type) makes the
result unknown. Nothing is evaluated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from .._hooks import random_state_kept, swapped_in_thread

Weights = dict[str, mx.array]
_RESHAPES = {"Flatten", "Unflatten", "Reshape", "Squeeze", "ExpandDims", "View"}


Range = tuple[str, int, int]
"""A stored tensor, an offset in it, and a number of bytes."""


@dataclass(frozen=True)
class Stored:
    """An array as ranges of bytes of stored tensors.

    Attributes:
        shape: of the array.
        item_bytes: bytes of an element.
        ranges: together they are the array, row after row. Neighbours in a tensor are one range.
    """

    shape: tuple[int, ...]
    item_bytes: int
    ranges: tuple[Range, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self._bytes(self.shape)

    def rows(self) -> list[tuple[Range, ...]]:
        """The ranges of each index of the first axis."""
        return self._divided(self._bytes(self.shape[1:]))

    def slice(self, axis: int, start: int, stop: int) -> Stored | None:
        """Indices [start, stop) of an axis; None along the third and later ones."""
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        if shape == self.shape:
            return self
        if axis > 1:
            return None
        step = self._bytes(self.shape[axis + 1 :])
        blocks = [self.ranges] if axis == 0 else self.rows()
        ranges = [r for block in blocks for r in _cut(block, start * step, stop * step)]
        return replace(self, shape=shape, ranges=_merged(ranges))

    def _divided(self, step: int) -> list[tuple[Range, ...]]:
        """The ranges of every `step` bytes."""
        blocks: list[tuple[Range, ...]] = []
        block: list[Range] = []
        room = step
        for name, offset, nbytes in self.ranges if step else ():
            while nbytes:
                taken = min(nbytes, room)
                block.append((name, offset, taken))
                offset, nbytes, room = offset + taken, nbytes - taken, room - taken
                if not room:
                    blocks.append(tuple(block))
                    block, room = [], step
        return blocks

    def _bytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) * self.item_bytes


def _cut(ranges: Sequence[Range], begin: int, end: int) -> list[Range]:
    """Bytes [begin, end) of what some ranges hold together."""
    found, at = [], 0
    for name, offset, nbytes in ranges:
        first, last = max(begin, at), min(end, at + nbytes)
        if first < last:
            found.append((name, offset + first - at, last - first))
        at += nbytes
    return found


def _merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same bytes, with neighbours in a tensor as one range."""
    merged: list[Range] = []
    for name, offset, nbytes in ranges:
        if merged and merged[-1][0] == name and sum(merged[-1][1:]) == offset:
            merged[-1] = (name, merged[-1][1], merged[-1][2] + nbytes)
        else:
            merged.append((name, offset, nbytes))
    return tuple(merged)


def trace(sanitize: Callable[[Weights], Weights], weights: Weights) -> dict[str, Stored]:
    """Find which results of `sanitize` are ranges of stored bytes.

    Args:
        sanitize: takes the arrays of a checkpoint by name and returns those of a model.
        weights: those arrays, not necessarily evaluated.

    Returns:
        By the name of the result. Computed results are left out; everything is if MLX cannot trace
        the function, because it looks at values.
    """
    names = list(weights)
    results: list[str] = []

    def run(*arrays: mx.array) -> list[mx.array]:
        made = sanitize(dict(zip(names, arrays, strict=True)))
        results[:] = made
        return list(made.values())

    events: list[dict[str, Any]] = []
    try:
        # `sanitize` may build a model. `contiguous` changes no value, and MLX cannot export it.
        with random_state_kept(), swapped_in_thread(mx, contiguous=lambda a, *_, **__: a):
            mx.export_function(events.append, run, *weights.values())
    except Exception:  # model code may raise anything when it looks at a placeholder
        return {}
    known: dict[str, Stored | None] = {}
    outputs: list[tuple[str, Any, Any]] = []
    for event in events:
        if event["type"] == "inputs":
            for name, (key, shape, dtype) in zip(names, event["inputs"], strict=True):
                nbytes = math.prod(shape) * dtype.size
                known[key] = Stored(tuple(shape), dtype.size, ((name, 0, nbytes),))
        elif event["type"] == "outputs":
            outputs = event["outputs"]
        elif event["type"] == "primitive":
            inputs = [known.get(key) for key, _, _ in event["inputs"]]
            made = _results(event, inputs)
            for (key, _, _), stored in zip(event["outputs"], made, strict=True):
                known[key] = stored
    found = zip(results, (known.get(key) for key, _, _ in outputs), strict=True)
    return {name: stored for name, stored in found if stored is not None}


def _results(node: dict[str, Any], inputs: list[Stored | None]) -> list[Stored | None]:
    """What an operation makes of stored arrays; None for each result that it computes."""
    outputs, arguments = node["outputs"], node["arguments"]
    unknown: list[Stored | None] = [None] * len(outputs)
    first = inputs[0] if inputs else None
    if first is None:
        return unknown
    if node["name"] == "AsType" and outputs[0][2] == node["inputs"][0][2]:
        return [first]  # `mx.array(a)`: a copy
    if node["name"] == "Concatenate":
        parts = [x for x in inputs if x is not None]
        if len(parts) < len(inputs) or len({p.item_bytes for p in parts}) > 1:
            return unknown
        if arguments[0] == 0:
            ranges = _merged(r for p in parts for r in p.ranges)
        elif arguments[0] == 1 and len(first.shape) > 2:  # each expert's parts, one after another
            rows = zip(*(p.rows() for p in parts), strict=True)
            ranges = _merged(r for row in rows for part in row for r in part)
        else:
            return unknown
        return [replace(first, shape=tuple(outputs[0][1]), ranges=ranges)]
    if node["name"] == "Slice":
        return [_sliced(first, *arguments)]
    if node["name"] == "Split":
        at, axis = arguments
        edges = [0, *at, first.shape[axis]]
        return [first.slice(axis, a, b) for a, b in itertools.pairwise(edges)]
    if node["name"] in _RESHAPES:
        return [replace(first, shape=tuple(outputs[0][1]), item_bytes=outputs[0][2].size)]
    return unknown


def _sliced(
    stored: Stored, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int]
) -> Stored | None:
    if any(step != 1 for step in steps):
        return None
    result: Stored | None = stored
    for axis, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        result = result.slice(axis, start, stop) if result is not None else None
    return result

"""Which stored bytes a table consists of that a model's `sanitize` cut out of others.

An original checkpoint may hold `gate_up_proj` [experts, 2 * hidden, width]; the model's `sanitize`
splits its rows into two tables. Each expert's half is still one range of bytes in the file, so it
can be streamed from where it lies. The graph of `sanitize` tells which range: every operation that
only selects or joins whole rows is followed, and any other (a sum, a transpose, a change of type)
makes the result unknown. Nothing is evaluated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .._hooks import swapped_in_thread

Weights = dict[str, mx.array]
_RESHAPES = {"Flatten", "Unflatten", "Reshape", "Squeeze", "ExpandDims", "View"}


@dataclass(frozen=True)
class Stored:
    """An array as ranges of bytes of stored tensors.

    Attributes:
        shape: of the array.
        item_bytes: bytes of an element.
        ranges: (stored tensor, offset in bytes). One range holds the whole array, or there is one
            for each index of the first axis. Every range is contiguous.
    """

    shape: tuple[int, ...]
    item_bytes: int
    ranges: tuple[tuple[str, int], ...]

    @property
    def whole(self) -> bool:
        """Does one range hold the whole array?"""
        return len(self.ranges) == 1

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return self._bytes(self.shape)

    def rows(self) -> Stored:
        """The same array, a range for each index of the first axis."""
        if not self.whole or not self.shape:
            return self
        (name, offset), step = self.ranges[0], self._bytes(self.shape[1:])
        ranges = tuple((name, offset + i * step) for i in range(self.shape[0]))
        return replace(self, ranges=ranges)

    def slice(self, axis: int, start: int, stop: int) -> Stored | None:
        """Indices [start, stop) of an axis; None if an expert's part is not contiguous then."""
        shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
        if shape == self.shape:
            return self
        skip = start * self._bytes(self.shape[axis + 1 :])
        if axis == 0 and self.whole:
            return replace(
                self, shape=shape, ranges=((self.ranges[0][0], self.ranges[0][1] + skip),)
            )
        if axis == 0:
            return replace(self, shape=shape, ranges=self.ranges[start:stop])
        if axis == 1:
            ranges = tuple((name, offset + skip) for name, offset in self.rows().ranges)
            return replace(self, shape=shape, ranges=ranges)
        return None

    def reshaped(self, shape: tuple[int, ...], item_bytes: int) -> Stored | None:
        """The same bytes with other axes; None if an expert's bytes were several ranges then."""
        if self.whole or (shape and shape[0] == self.shape[0]):
            return replace(self, shape=shape, item_bytes=item_bytes)
        return None

    def _bytes(self, shape: Sequence[int]) -> int:
        return math.prod(shape) * self.item_bytes


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
    # `sanitize` may build a model, whose initial weights are random. They must take no numbers from
    # the caller, who may have set the seed before loading, as mlx_lm.generate does.
    state: Any = mx.random.state
    high, low = np.array(state[0]).tolist()
    try:
        # It changes no value, and MLX cannot export it.
        with swapped_in_thread(mx, contiguous=lambda a, *_, **__: a):
            mx.export_function(events.append, run, *weights.values())
    except Exception:  # model code may raise anything when it looks at a placeholder
        return {}
    finally:
        mx.random.seed(high << 32 | low)  # the inverse of mx.random.key
    known: dict[str, Stored | None] = {}
    outputs: list[tuple[str, Any, Any]] = []
    for event in events:
        if event["type"] == "inputs":
            for name, (key, shape, dtype) in zip(names, event["inputs"], strict=True):
                known[key] = Stored(tuple(shape), dtype.size, ((name, 0),))
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
    if node["name"] == "Concatenate" and arguments[0] == 0:
        parts = [x.rows() for x in inputs if x is not None]
        if len(parts) < len(inputs) or len({p.item_bytes for p in parts}) > 1:
            return unknown
        ranges = tuple(r for p in parts for r in p.ranges)
        return [replace(parts[0], shape=tuple(outputs[0][1]), ranges=ranges)]
    if node["name"] == "Slice":
        return [_sliced(first, *arguments)]
    if node["name"] == "Split":
        at, axis = arguments
        edges = [0, *at, first.shape[axis]]
        return [first.slice(axis, a, b) for a, b in itertools.pairwise(edges)]
    if node["name"] in _RESHAPES:
        return [first.reshaped(tuple(outputs[0][1]), outputs[0][2].size)]
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

"""KV caches of prompts in memory: what several prompts begin with is there once.

The rows of caches that grow are kept in segments, one for each stretch of tokens that prompts have
in common; other caches are kept whole. A segment is shared only with rows of the same bits, so that
what comes out is what went in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from mlx_lm.models.cache import KVCache

from .._memory.footprint import leaves
from .states import ROWS, grows, kinds, row_arrays, set_row_arrays

_SHORTEST = 64  # tokens for which a segment is divided
_BITS = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}

Tokens = npt.NDArray[np.int64]


@dataclass(eq=False)
class Segment:
    """Rows of consecutive tokens.

    Attributes:
        tokens: these, [T].
        rows: by cache and name, [1, heads, T, width].
    """

    tokens: Tokens
    rows: dict[str, mx.array]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.rows.values())


class SharedCaches:
    """The caches of one prompt. A deep copy of it is a list of whole ones, as mlx-lm expects.

    Args:
        model: whose they are.
        shells: the caches without their rows.
        segments: their rows.
    """

    def __init__(self, model: Any, shells: list[Any], segments: list[Segment]) -> None:
        self.model, self.shells, self.segments = model, shells, segments
        self.kinds = kinds(shells)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.shells)

    def __len__(self) -> int:
        return len(self.shells)

    def __deepcopy__(self, memo: dict[int, Any]) -> list[Any]:
        caches: list[Any] = copy.deepcopy(self.shells)
        for cache in caches:
            vars(cache).pop("is_trimmable", None)
        for number, cache in enumerate(leaves(caches)):
            if not grows(cache):
                continue
            for name in ROWS:
                count = 1 if type(cache) is KVCache else 3
                arrays = []
                for i in range(count):
                    parts = [s.rows[f"{number}.{name}.{i}"] for s in self.segments]
                    # Never a segment's own array: a cache that was trimmed is written in place.
                    arrays.append(
                        copy.copy(parts[0]) if len(parts) == 1 else mx.concatenate(parts, axis=-2)
                    )
                # Not evaluated: each layer is copied when it is first used, not all at once.
                set_row_arrays(cache, name, arrays)
        return caches

    def never_trim(self) -> None:
        """Trimmed, they would not continue like fresh ones: mlx-lm may use them whole only."""
        for cache in self.shells:
            cache.is_trimmable = _never

    def common(self, tokens: Tokens) -> int:
        """With how many of these tokens it begins."""
        done = 0
        for segment in self.segments:
            here = tokens[done : done + len(segment.tokens)]
            differ = np.flatnonzero(here != segment.tokens[: len(here)])
            count = int(differ[0]) if differ.size else len(here)
            done += count
            if count < len(segment.tokens):
                break
        return done


class SharedPrompts:
    """All prompts in memory. One that nobody refers to is gone."""

    def __init__(self) -> None:
        self._all: WeakSet[SharedCaches] = WeakSet()

    @property
    def nbytes(self) -> int:
        """Bytes of all segments, each counted once."""
        return sum(s.nbytes for s in {s for prompt in self._all for s in prompt.segments})

    def share(
        self, model: Any, tokens: list[int], caches: list[Any], room: Callable[[int], bool]
    ) -> SharedCaches | None:
        """The caches of a prompt, with the rows that other prompts have too.

        Args:
            model: whose they are.
            tokens: all that the caches hold.
            caches: of one sequence. The list is emptied, so that nothing is there twice for longer
                than a layer is copied.
            room: hears how many bytes will be added to `nbytes`; False if there is no room.

        Returns:
            None if there is no room.
        """
        rows = {
            f"{number}.{name}.{i}": array[..., : len(tokens), :]
            for number, cache in enumerate(leaves(caches))
            if grows(cache)
            for name in ROWS
            for i, array in enumerate(row_arrays(cache, name))
        }
        shells = copy.deepcopy(caches)  # arrays are not copied
        for cache in leaves(shells):
            if grows(cache):
                for name in ROWS:
                    setattr(cache, name, None if type(cache) is KVCache else ())
        caches.clear()
        ids = np.asarray(tokens, np.int64)
        made = SharedCaches(model, shells, [])
        done = self._take_shared(made, ids, rows) if rows else len(ids)
        self._all.add(made)
        if not room(sum(a.nbytes for a in rows.values()) * (len(ids) - done) // len(ids)):
            return None
        if done < len(ids):
            made.segments.append(Segment(ids[done:], _cut(rows, done, len(ids))))
        for cache in leaves(shells):
            mx.eval(vars(cache))
        return made

    def _take_shared(self, made: SharedCaches, ids: Tokens, rows: dict[str, mx.array]) -> int:
        """Give it the segments that are there; returns of how many tokens."""
        others = [p for p in self._all if p.model == made.model and p.kinds == made.kinds]
        best = max(others, key=lambda p: p.common(ids), default=None)
        left, done = (0, 0) if best is None else (best.common(ids), 0)
        for segment in [] if best is None else list(best.segments):
            count = min(left, len(segment.tokens))
            whole = count == len(segment.tokens)
            if (not whole and count < _SHORTEST) or not _same(segment, rows, done, count):
                break
            made.segments.append(segment if whole else self._divide(segment, count))
            done, left = done + count, left - count
        return done

    def _divide(self, segment: Segment, count: int) -> Segment:
        """Divide a segment in all prompts that have it; returns the first part."""
        first, second = (Segment(t, {}) for t in np.split(segment.tokens, [count]))
        for name in list(segment.rows):
            array = segment.rows.pop(name)  # no more than one is there twice
            first.rows[name] = mx.contiguous(array[..., :count, :])
            second.rows[name] = mx.contiguous(array[..., count:, :])
            mx.eval(first.rows[name], second.rows[name])
        for prompt in self._all:
            prompt.segments = [
                part
                for s in prompt.segments
                for part in ((first, second) if s is segment else (s,))
            ]
        return first


def _never() -> bool:
    return False


def _cut(rows: dict[str, mx.array], begin: int, end: int) -> dict[str, mx.array]:
    """Take the rows of some of the tokens, in memory of their own; `rows` is empty afterwards."""
    found = {}
    for name in list(rows):
        found[name] = mx.contiguous(rows.pop(name)[..., begin:end, :])
        mx.eval(found[name])
    return found


def _same(segment: Segment, rows: dict[str, mx.array], begin: int, count: int) -> bool:
    """Are the first rows of a segment those of a prompt, bit by bit?"""
    for name, array in segment.rows.items():
        bits = _BITS[array.itemsize]
        one, two = array[..., :count, :], rows[name][..., begin : begin + count, :]
        if one.dtype != two.dtype or not mx.array_equal(one.view(bits), two.view(bits)).item():
            return False
    return True

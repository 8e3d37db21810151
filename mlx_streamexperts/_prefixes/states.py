"""A model's KV caches as named arrays and numbers, and back, for every family of mlx-lm.

Plain and quantized keys and values only grow: of a prefix that begins where another one ended,
their new rows are enough, and fewer tokens are the first of their rows. Any other cache is taken as
it is, attribute by attribute. A cache comes back through the model's own new one, and only if both
have the same classes and attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from .._memory.footprint import leaves

ROWS = ("keys", "values")  # [1, heads, tokens, width] of a cache that only grows
_GROWING = (stock.KVCache, stock.QuantizedKVCache)
GROWING = tuple(kind.__name__ for kind in _GROWING)
_FIXED = ("max_size", "keep", "chunk_size", "group_size", "bits")


class NotKeptError(Exception):
    """These caches hold something that cannot be written or put back."""


@dataclass
class Parts:
    """What a prefix consists of.

    Attributes:
        rows: arrays of the prefix's new tokens.
        states: arrays as they are after its last token.
        plain: for each cache its class, its attributes that are no arrays, and where arrays go.
    """

    rows: dict[str, mx.array]
    states: dict[str, mx.array]
    plain: list[dict[str, Any]]


def grows(cache: Any) -> bool:
    """Does a cache consist of rows alone, one for each token?"""
    return type(cache) in _GROWING


def kinds(caches: Sequence[Any]) -> list[str]:
    """Classes of the caches, with the numbers that never change: caches of one kind fit."""
    return [
        " ".join([type(c).__name__, *(f"{n}={vars(c)[n]}" for n in _FIXED if n in vars(c))])
        for c in leaves(caches)
    ]


def row_arrays(cache: Any, name: str) -> list[mx.array]:
    """The arrays of `keys` or `values` of a cache that grows: one, or three if quantized."""
    held = getattr(cache, name)
    return [held] if isinstance(held, mx.array) else list(held)


def set_row_arrays(cache: Any, name: str, arrays: list[mx.array]) -> None:
    """The inverse of `row_arrays`."""
    setattr(cache, name, arrays[0] if len(arrays) == 1 else tuple(arrays))


def take(caches: Sequence[Any], begin: int, end: int) -> Parts:
    """The parts of the tokens `begin` to `end - 1`, of caches that hold `end` tokens.

    Raises:
        NotKeptError: there is something in a cache that cannot be written, or several sequences.
    """
    parts = Parts({}, {}, [])
    for number, cache in enumerate(leaves(caches)):
        kind, values = type(cache), dict(vars(cache))
        if isinstance(held := values.get("offset", end), int) and held != end:
            raise NotKeptError(f"a cache holds {held} tokens, not {end}")
        if grows(cache):
            for name in ROWS:
                if values.pop(name) is None or row_arrays(cache, name)[0].shape[0] != 1:
                    raise NotKeptError("a cache is empty, or of several sequences")
                for i, array in enumerate(row_arrays(cache, name)):
                    parts.rows[f"{number}.{name}.{i}"] = array[..., begin:end, :]
        found: dict[str, Any] = {}
        for name, value in values.items():
            found[name] = _plain(value, f"{number}.{name}", parts.states)
        parts.plain.append({"class": kind.__name__, "attributes": found})
    return parts


def _plain(value: Any, name: str, arrays: dict[str, mx.array]) -> Any:
    """A value as JSON; arrays in it go to `arrays`."""
    if isinstance(value, mx.array):
        arrays[name] = value
        return {"array": name}
    if isinstance(value, (list, tuple)):
        items = [_plain(v, f"{name}.{i}", arrays) for i, v in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise NotKeptError(f"a cache holds a {type(value).__name__}")


def put(
    caches: list[Any],
    plain: Sequence[dict[str, Any]],
    tokens: int,
    rows: Callable[[str], mx.array],
    state: Callable[[str], mx.array],
) -> None:
    """Fill new caches from parts. They are changed only if all of them can be filled.

    Args:
        caches: from the model's `make_cache`, empty. A plain one is replaced if a quantized one is
            to come back.
        plain: of `Parts`.
        tokens: what they hold then.
        rows: returns the rows of those tokens by name.
        state: returns a state by name.

    Raises:
        NotKeptError: the caches have other classes or attributes.
    """
    found = list(leaves(caches))
    flat = len(found) == len(caches) and all(a is b for a, b in zip(found, caches, strict=True))
    if flat:  # mlx-lm quantizes no cache within another one
        for number, (cache, entry) in enumerate(zip(caches, plain, strict=False)):
            if type(cache) is stock.KVCache and entry["class"] == "QuantizedKVCache":
                found[number] = stock.QuantizedKVCache()
    if [c["class"] for c in plain] != [type(c).__name__ for c in found]:
        raise NotKeptError("the model makes other caches")
    new: list[dict[str, Any]] = []
    for number, (cache, entry) in enumerate(zip(found, plain, strict=True)):
        values = {name: _value(v, state) for name, v in entry["attributes"].items()}
        if grows(cache):
            count = 1 if type(cache) is stock.KVCache else 3
            for name in ROWS:
                arrays = [rows(f"{number}.{name}.{i}") for i in range(count)]
                values[name] = arrays[0] if count == 1 else tuple(arrays)
            values["offset"] = tokens
        if values.keys() != vars(cache).keys():
            raise NotKeptError(f"a {type(cache).__name__} has other attributes now")
        new.append(values)
    for cache, values in zip(found, new, strict=True):
        for name, value in values.items():
            setattr(cache, name, value)
    if flat:
        caches[:] = found


def _value(value: Any, state: Callable[[str], mx.array]) -> Any:
    """The inverse of `_plain`."""
    if not isinstance(value, dict):
        return value
    if "array" in value:
        return state(value["array"])
    (kind, items), *_ = value.items()
    made = [_value(v, state) for v in items]
    return tuple(made) if kind == "tuple" else made


def in_batches(arrays: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """The arrays one after the other, evaluated: no more than one is in memory twice."""
    for name, array in arrays.items():
        whole = mx.contiguous(array)
        mx.eval(whole)
        yield name, whole

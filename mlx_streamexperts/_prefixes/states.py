"""A model's KV caches as named arrays and numbers, and back, for every family of mlx-lm.

Plain keys and values only grow: of a prefix that begins where another one ended, their new rows are
enough. Any other cache is taken as it is, attribute by attribute. A cache comes back through the
model's own new one, and only if both have the same classes and attributes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

from .._memory.footprint import leaves

_ROWS = ("keys", "values")  # [1, heads, tokens, width] of a plain cache


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
        if kind is stock.KVCache:
            if cache.keys is None or cache.keys.shape[0] != 1:
                raise NotKeptError("a cache is empty, or of several sequences")
            for name in _ROWS:
                parts.rows[f"{number}.{name}"] = values.pop(name)[..., begin:end, :]
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
    caches: Sequence[Any],
    plain: Sequence[dict[str, Any]],
    rows: Callable[[str], mx.array],
    state: Callable[[str], mx.array],
) -> None:
    """Fill new caches from parts. They are changed only if all of them can be filled.

    Args:
        caches: from the model's `make_cache`, empty.
        plain: of `Parts`.
        rows: returns the rows of all tokens by name.
        state: returns a state by name.

    Raises:
        NotKeptError: the caches have other classes or attributes.
    """
    found = list(leaves(caches))
    if [c["class"] for c in plain] != [type(c).__name__ for c in found]:
        raise NotKeptError("the model makes other caches")
    new: list[dict[str, Any]] = []
    for number, (cache, entry) in enumerate(zip(found, plain, strict=True)):
        values = {name: _value(v, state) for name, v in entry["attributes"].items()}
        if type(cache) is stock.KVCache:
            values.update({name: rows(f"{number}.{name}") for name in _ROWS})
        if values.keys() != vars(cache).keys():
            raise NotKeptError(f"a {type(cache).__name__} has other attributes now")
        new.append(values)
    for cache, values in zip(found, new, strict=True):
        for name, value in values.items():
            setattr(cache, name, value)


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

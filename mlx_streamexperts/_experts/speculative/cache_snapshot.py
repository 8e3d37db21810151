"""Taking a model's caches back to before a forward pass.

A pass that used an expert which was not there gave wrong results: what it left in the caches must
be undone, without copying them. mlx-lm's caches write keys and values behind `offset`, where the
next pass writes again, so that their other attributes are all there is to restore; recurrent
states are new arrays each step, so that the old ones need only be kept. A cache that overwrites
what a second pass would read cannot be taken back, unless it is small enough to keep a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

_COPY_BYTES = 1 << 20
"""A rotating cache up to this size is copied each step: 128 tokens of gpt-oss are 256 KiB."""

# Caches that write behind their present end only, or into new arrays.
_APPENDING = (
    stock.KVCache, stock.QuantizedKVCache, stock.ConcatenateKVCache, stock.ChunkedKVCache,
    stock.BatchKVCache,
)  # fmt: skip
_ROTATING = (stock.RotatingKVCache, stock.BatchRotatingKVCache)

Undo = Callable[[], None]


def remember(caches: Iterable[Any] | None) -> Undo | None:
    """Note the state of a model's caches before a pass.

    Args:
        caches: mlx-lm's caches, one a layer, None among them; or None where the pass uses none.

    Returns:
        What takes them back to it, any number of times; or None where one of them cannot be.
    """
    undos: list[Undo] = []
    for cache in caches or ():
        undo = _remember(cache)
        if undo is None:
            return None
        undos.append(undo)

    def undo_all() -> None:
        for undo in undos:
            undo()

    return undo_all


def _remember(cache: Any) -> Undo | None:
    kind = type(cache)
    if cache is None:
        return _nothing
    if kind is stock.CacheList:
        return remember(cache.caches)
    if kind is stock.ArraysCache:
        return _attributes(cache, {**vars(cache), "cache": list(cache.cache)})
    if kind in _APPENDING:
        return _attributes(cache, dict(vars(cache)))
    if kind in _ROTATING:
        if cache.keys is None or not _full(cache):
            return _attributes(cache, dict(vars(cache)))
        if cache.keys.nbytes + cache.values.nbytes <= _COPY_BYTES:
            # Another array over the same memory: writing then has to leave that alone.
            kept = {"keys": mx.array(cache.keys), "values": mx.array(cache.values)}
            return _attributes(cache, {**vars(cache), **kept})
    return None


def _full(cache: Any) -> bool:
    """Will a rotating cache overwrite what it holds?"""
    tokens = cache._offset if isinstance(cache.offset, mx.array) else cache.offset
    return bool(tokens >= cache.max_size)


def _attributes(cache: Any, before: dict[str, Any]) -> Undo:
    # Counters of batches are arrays that some caches change where they are.
    counters = {
        name: mx.array(value)
        for name, value in before.items()
        if isinstance(value, mx.array) and value.ndim <= 1
    }

    def undo() -> None:
        for name, value in before.items():
            if name in counters:
                value = mx.array(counters[name])
            elif isinstance(value, list):
                value = list(value)
            setattr(cache, name, value)

    return undo


def _nothing() -> None:
    pass

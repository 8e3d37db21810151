"""Snapshots of a model's KV caches, to take them back to before a forward pass.

A pass that used an expert that was not resident gave wrong results: its changes to the caches must
be undone, without copying them. mlx-lm's caches write keys and values behind `offset`, where the
next pass writes again, so only their other attributes need restoring. Recurrent states are new
arrays in each step, so the old ones only need to be kept. A cache that overwrites entries that a
second pass would read cannot be taken back, unless it is small enough to copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as stock

_COPY_BYTES = 1 << 20
"""A rotating cache up to this size is copied each step: 128 tokens of gpt-oss are 256 KiB."""

# Caches that only write behind their present end, or into new arrays.
_APPENDING = (
    stock.KVCache, stock.QuantizedKVCache, stock.ConcatenateKVCache, stock.ChunkedKVCache,
    stock.BatchKVCache,
)  # fmt: skip
_ROTATING = (stock.RotatingKVCache, stock.BatchRotatingKVCache)

Restore = Callable[[], None]
"""Takes caches back to a snapshot, any number of times."""


def snapshot(caches: Iterable[Any] | None) -> Restore | None:
    """Take a snapshot of a model's caches before a pass.

    Args:
        caches: mlx-lm's caches, one per layer, some of them None; or None if the pass uses none.

    Returns:
        A function that restores them; None if one of them cannot be restored.
    """
    restores: list[Restore] = []
    for cache in caches or ():
        restore = _snapshot(cache)
        if restore is None:
            return None
        restores.append(restore)

    def restore_all() -> None:
        for restore in restores:
            restore()

    return restore_all


def _snapshot(cache: Any) -> Restore | None:
    kind = type(cache)
    if cache is None:
        return _nothing
    if kind is stock.CacheList:
        return snapshot(cache.caches)
    if kind is stock.ArraysCache:
        return _attributes(cache, {**vars(cache), "cache": list(cache.cache)})
    if kind in _APPENDING:
        return _attributes(cache, dict(vars(cache)))
    if kind in _ROTATING:
        if cache.keys is None or not _full(cache):
            return _attributes(cache, dict(vars(cache)))
        if cache.keys.nbytes + cache.values.nbytes <= _COPY_BYTES:
            # A second array over the same memory keeps MLX from writing there in place.
            kept = {"keys": mx.array(cache.keys), "values": mx.array(cache.values)}
            return _attributes(cache, {**vars(cache), **kept})
    return None


def _full(cache: Any) -> bool:
    """Will a rotating cache overwrite entries that it holds?"""
    tokens = cache._offset if isinstance(cache.offset, mx.array) else cache.offset
    return bool(tokens >= cache.max_size)


def _attributes(cache: Any, before: dict[str, Any]) -> Restore:
    # Counters of batches are arrays that some caches change in place.
    counters = {
        name: mx.array(value)
        for name, value in before.items()
        if isinstance(value, mx.array) and value.ndim <= 1
    }

    def restore() -> None:
        for name, value in before.items():
            if name in counters:
                value = mx.array(counters[name])
            elif isinstance(value, list):
                value = list(value)
            setattr(cache, name, value)

    return restore


def _nothing() -> None:
    pass

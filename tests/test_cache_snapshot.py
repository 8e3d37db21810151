"""Snapshots of KV caches: a wrong pass leaves no trace in them."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models import cache as stock_caches

from mlx_streamexperts._experts.speculative.cache_snapshot import snapshot


def test_a_restored_cache_has_forgotten_the_pass() -> None:
    cache = stock_caches.KVCache()
    right, wrong = mx.ones((1, 2, 1, 32)), mx.zeros((1, 2, 1, 32))
    cache.update_and_fetch(right, right)
    restore = snapshot([cache])
    assert restore is not None
    cache.update_and_fetch(wrong, wrong)
    restore()
    keys, _ = cache.update_and_fetch(right, right)
    assert cache.offset == 2
    assert mx.array_equal(keys, mx.ones((1, 2, 2, 32)))


def _filled(kind: str, tokens: int) -> Any:
    make = {
        "kv": stock_caches.KVCache,
        "quantized": lambda: stock_caches.QuantizedKVCache(32, 8),
        "concatenating": stock_caches.ConcatenateKVCache,
        "chunked": lambda: stock_caches.ChunkedKVCache(8),
        "rotating": lambda: stock_caches.RotatingKVCache(8, keep=2),
        "batch": lambda: stock_caches.BatchKVCache([1]),
        "batch rotating": lambda: stock_caches.BatchRotatingKVCache(8, [1]),
    }[kind]
    cache: Any = make()
    for step in range(tokens):
        if kind == "chunked":
            cache.maybe_trim_front()
        _append(cache, step)
    return cache


def _append(cache: Any, seed: int) -> tuple[mx.array, ...]:
    k, v = mx.random.normal((2, 1, 2, 1, 32), key=mx.random.key(seed))
    out = cache.update_and_fetch(k, v)
    arrays = [a for part in out for a in (part if isinstance(part, tuple | list) else (part,))]
    mx.eval(arrays)
    return tuple(arrays)


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 20, 255, 256, 257])
@pytest.mark.parametrize(
    "kind", ["kv", "quantized", "concatenating", "chunked", "rotating", "batch", "batch rotating"]
)
def test_caches_are_restored(kind: str, tokens: int) -> None:
    """After a restore, a cache gives the same as one that never had the step."""
    cache, plain = _filled(kind, tokens), _filled(kind, tokens)
    restore = snapshot([cache])
    assert restore is not None
    for wrong in (9991, 9992):
        _append(cache, wrong)
        restore()
    for step in (501, 502, 503):
        for got, expected in zip(_append(cache, step), _append(plain, step), strict=True):
            assert mx.array_equal(got, expected), step
        assert np.array_equal(np.array(cache.offset), np.array(plain.offset))
    if hasattr(cache, "left_padding"):
        assert mx.array_equal(cache.left_padding, plain.left_padding)


def test_recurrent_states_are_kept() -> None:
    cache = stock_caches.ArraysCache(2)
    inner = stock_caches.CacheList(cache, stock_caches.KVCache())
    cache[0], cache[1] = mx.array([1.0]), mx.array([2.0])
    cache.lengths = mx.array([5])
    restore = snapshot([inner, None])
    assert restore is not None
    for _ in range(2):
        cache[0] = cache[0] + 1
        cache.advance(2)
        restore()
    assert (cache[0].item(), cache[1].item(), cache.lengths.item()) == (1.0, 2.0, 5)


def test_caches_that_cannot_be_restored_have_no_snapshot() -> None:
    class Unknown(stock_caches.KVCache):
        pass

    assert snapshot([Unknown()]) is None
    full = stock_caches.RotatingKVCache(4096)
    k = mx.zeros((1, 8, 4096, 64))
    full.update_and_fetch(k, k)
    assert snapshot([full]) is None  # overwriting it means copying it
    assert snapshot(None) is not None

"""Takes a model's KV caches back to before a pass that was ended half-way.

Plain caches of keys and values only write behind their end: what they held needs no copy, and a
grown array may stay. Other caches are kept as they were, which takes memory while the pass runs. So
the caller says how much there is, and without it the pass cannot be taken back.

Run-ahead has its own snapshots (`_experts/speculative/cache_snapshot.py`): it takes the same pass
back several times and must be sure to keep no graph of a wrong one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models import cache as stock

from .footprint import leaves

_APPENDING = (stock.KVCache, stock.QuantizedKVCache, stock.BatchKVCache)
_HELD = ("keys", "values")


class Rewind:
    """A model's caches as they were.

    Args:
        caches: the caches, one for each layer; None if a pass uses none.
        tokens: of each sequence in the pass that follows.

    Attributes:
        possible: the caches can be taken back.
        kept_bytes: memory that this keeps from being freed, until `drop`.
    """

    def __init__(self, caches: Sequence[Any] | None, tokens: int) -> None:
        self.possible, self.kept_bytes = True, 0
        self._steps: list[Callable[[], None]] = []
        self._caches = list(leaves(caches or ()))
        for cache in self._caches:
            if type(cache) in _APPENDING:
                self._steps.append(_shortened(cache))
            elif type(cache) is stock.ArraysCache:
                self._keep(cache, {**vars(cache), "cache": list(cache.cache)})
            elif tokens > 1:
                self._keep(cache, copy.deepcopy(vars(cache)))
            else:  # it may overwrite one entry in place: to copy it for each token takes too long
                self.drop()
                return

    def undo(self) -> None:
        """Take the caches back, once. Does nothing if that is not possible."""
        for step in self._steps:
            step()
        self._steps = []

    def settle(self) -> None:
        """Evaluate the caches: after `undo`, what was built for the pass must not stay behind."""
        mx.eval([c.state for c in self._caches])

    def drop(self) -> None:
        """Free what is kept. The caches cannot be taken back any more."""
        self.possible, self.kept_bytes, self._steps = False, 0, []

    def _keep(self, cache: Any, before: dict[str, Any]) -> None:
        counters = _counters(before)

        def restore() -> None:
            for name, value in {**before, **counters}.items():
                setattr(cache, name, value)

        found: Any = tree_flatten(list(before.values()))
        arrays = (a for _, a in found if isinstance(a, mx.array))
        self.kept_bytes += sum(a.nbytes for a in arrays)
        self._steps.append(restore)


def _shortened(cache: Any) -> Callable[[], None]:
    """Restores a cache that only appends: everything but its keys and values, which may stay."""
    before = {name: value for name, value in vars(cache).items() if name not in _HELD}
    before.update(_counters(before))
    if cache.keys is None:
        before.update(dict.fromkeys(_HELD))

    def restore() -> None:
        for name, value in before.items():
            setattr(cache, name, value)

    return restore


def _counters(before: dict[str, Any]) -> dict[str, mx.array]:
    """Copies of a cache's counters, which batches change in place."""
    return {
        name: mx.array(value)
        for name, value in before.items()
        if isinstance(value, mx.array) and value.ndim <= 1
    }

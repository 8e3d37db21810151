"""mlx-lm's batches, whose KV caches are rebuilt one layer at a time.

When a sequence joins or leaves a batch, mlx-lm copies the KV caches of all layers and lets go of
the old ones afterwards: a server's KV cache would be in memory twice. Here each layer lets go of
its old rows before the next one is copied. The rows are a whole number of steps, as `KVAdmission`
counts them.
"""

from __future__ import annotations

from functools import partial
from itertools import zip_longest
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationBatch, PromptProcessingBatch
from mlx_lm.models.cache import ArraysCache, BatchKVCache

from .._errors import BudgetError
from .._experts.stream import is_streamed, stream
from .._memory.footprint import cache_bytes, leaves, whole_steps
from .._memory.process_memory import bytes_over_bound
from .._prefixes.states import ROWS


class PromptBatch(PromptProcessingBatch):
    """The prompts that are being computed."""

    def extend(self, batch: PromptProcessingBatch) -> None:
        # What joins has just been put together from kept caches: nothing of it is in memory yet.
        held = [cache_bytes([cache]) for cache in self.prompt_cache]
        super().extend(batch)
        _settle_joined(self.model, self.prompt_cache, batch.prompt_cache, held)

    def split(self, indices: list[int]) -> PromptProcessingBatch:
        parted = super().split(indices)
        settle(self.prompt_cache, parted.prompt_cache)
        return parted

    def extract_cache(self, idx: int) -> list[Any]:
        """The caches of one prompt. Keys and values are views of the batch's: copy what to keep."""
        found: list[Any] = _own_states(super().extract_cache(idx))
        for batch, cache in zip(leaves(self.prompt_cache), leaves(found), strict=True):
            if type(batch) is BatchKVCache and batch.keys is not None:
                rows = slice(int(batch.left_padding[idx].item()), batch._idx)
                cache.keys = batch.keys[idx : idx + 1, :, rows]
                cache.values = batch.values[idx : idx + 1, :, rows]
        return found

    def prompt(self, tokens: list[list[int]]) -> None:
        layers = list(self.prompt_cache)
        before = cache_bytes(layers)
        for cache in leaves(layers):
            _grow(cache, max(map(len, tokens)))
        _make_room(self.model, cache_bytes(layers) - before)
        for cache in leaves(layers):
            mx.eval(vars(cache))
        for cache in layers:
            cache.finalize = partial(_finalize, cache)
        try:
            super().prompt(tokens)
        finally:
            for cache in layers:
                del cache.finalize


class ReplyBatch(GenerationBatch):
    """The replies that are being generated."""

    def extend(self, batch: GenerationBatch) -> None:
        both = zip_longest(self.prompt_cache, batch.prompt_cache)
        held = [cache_bytes(caches) for caches in both]
        super().extend(batch)
        _settle_joined(self.model, self.prompt_cache, batch.prompt_cache, held)

    def extract_cache(self, idx: int) -> list[Any]:
        return _own_states(super().extract_cache(idx))

    def next(self) -> list[Any]:
        responses: list[Any] = super().next()
        if ended := [r.prompt_cache for r in responses if r.prompt_cache is not None]:
            settle(self.prompt_cache, *ended)
        return responses


def settle(*batches: list[Any]) -> None:
    """Evaluate caches that were cut out of the same ones, a layer of all of them at a time."""
    for layer in zip(*(caches for caches in batches if caches), strict=True):
        caches = list(leaves(layer))
        for name in ROWS:  # keys, then values
            mx.eval([vars(cache).get(name) for cache in caches])
            for cache in caches:
                if type(cache) is BatchKVCache and cache.keys is not None:
                    array = _with_rows(getattr(cache, name), whole_steps(cache._idx))
                    setattr(cache, name, array)
                    mx.eval(array)
        mx.eval([vars(cache) for cache in caches])


def _own_states(caches: list[Any]) -> list[Any]:
    """Copy states of fixed size: mlx-lm's are views, which keep those of the whole batch."""
    for cache in leaves(caches):
        if type(cache) is ArraysCache:
            cache.cache = [None if a is None else mx.contiguous(a) for a in cache.cache]
    return caches


def _finalize(cache: Any) -> None:
    """Move the rows of padded prompts to their places, and drop padding that all of them have.

    It would add up: mlx-lm drops it when a sequence leaves.
    """
    type(cache).finalize(cache)
    for batch in leaves([cache]):
        if type(batch) is BatchKVCache and batch.keys is not None:
            padding = min(batch.left_padding.tolist())
            batch.keys, batch.values = (a[..., padding:, :] for a in (batch.keys, batch.values))
            batch._idx -= padding
            batch.left_padding -= padding
    settle([cache])


def _grow(cache: Any, tokens: int) -> None:
    """Give a cache rows for the next tokens, in whole steps. Nothing is evaluated.

    mlx-lm adds steps to the rows in use: 757 tokens in chunks of 10 take 1,006 rows, not 768.
    """
    if type(cache) is BatchKVCache and cache.keys is not None:
        rows = whole_steps(cache._idx + tokens)
        for name in ROWS:
            if getattr(cache, name).shape[2] < rows:
                setattr(cache, name, _with_rows(getattr(cache, name), rows))


def has_room(model: Any, added: int) -> bool:
    """Is there room for a prompt's KV cache, if the expert cache gives up what it can?"""
    try:
        _make_room(model, added)
    except BudgetError:
        return False
    return True


def _make_room(model: Any, added: int) -> None:
    """Let the expert cache give up slots for what a batch adds, as before a pass.

    Raises:
        BudgetError: it does not fit, which `KVAdmission` should have prevented.
    """
    if is_streamed(model) and bytes_over_bound(mx.get_active_memory() + added) > 0:
        stream(model).make_room(added, "a larger batch", "send fewer requests at once")


def _settle_joined(model: Any, joined: list[Any], taken: list[Any], held: list[int]) -> None:
    """Evaluate caches that took in others, a layer at a time.

    mlx-lm still refers to the others: they are dropped. Each layer asks for its room when those
    before it have let go of what they were made from. Asked for all at once, a kept prompt that
    fits would be refused: it may be in memory for this batch alone.

    Args:
        model: whose they are.
        joined: what the batch has now.
        taken: the others; may be the same list.
        held: bytes of each layer that were in memory before, and will not be afterwards.
    """
    for i, (cache, before) in enumerate(zip_longest(joined, held, fillvalue=0)):
        _make_room(model, sum(map(_settled_bytes, leaves([cache]))) - before)
        settle([cache])
        if taken is not joined:
            taken[i] = None


def _settled_bytes(cache: Any) -> int:
    """Bytes of a cache once `settle` has given it whole steps of rows."""
    nbytes = cache_bytes([cache])
    if type(cache) is BatchKVCache and cache.keys is not None:
        return nbytes // cache.keys.shape[2] * whole_steps(cache._idx)
    return nbytes


def _with_rows(array: mx.array, rows: int) -> mx.array:
    """A KV cache's array with room for so many rows, [B, heads, rows, width], in its own memory."""
    if array.shape[2] < rows:
        return mx.pad(array, [(0, 0), (0, 0), (0, rows - array.shape[2]), (0, 0)])
    return mx.contiguous(array[..., :rows, :])

"""Memory of a forward pass besides the weights: KV cache and work space.

A `Footprint` gives both for any number of tokens, context and sequences. model_graph.py measures it
from a model's graph; this module does the arithmetic and reads sizes off caches. Nothing here
evaluates an array or keeps one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

STEP = 256
"""Tokens by which mlx-lm's caches grow."""
FLOOR_BYTES = 8 << 20
"""Work space of every pass: sampling, small arrays, what has started and not ended."""
_LOGIT_COPIES = 8  # logits of a token, and the sampler's copies


@dataclass(frozen=True)
class LayerCache:
    """Size of one layer's cache for one sequence.

    Attributes:
        token: bytes that each token adds.
        state: bytes at any length (linear attention, Mamba).
        kept: tokens of its window; None if it keeps all.
    """

    token: int
    state: int = 0
    kept: int | None = None


@dataclass(frozen=True)
class Footprint:
    """Memory of one sequence's passes besides the weights, in bytes.

    Attributes:
        layers: the caches of each decoder layer, in order.
        chunks, contexts: tokens of the measured passes, and of the contexts at their ends.
        peaks: peak of a pass with one operation running at a time, by chunk and context.
        totals: size of all results of a pass, as if none were freed, by chunk and context.
        logits: logits of one token.
        scores: attention scores between one new token and one of the context, of all heads and with
            copies; for attention without a fused kernel.
        unfinished: memory of started GPU operations beyond the need of the next ones
            (`_osinfo.unfinished_bytes`).
    """

    layers: tuple[tuple[LayerCache, ...], ...]
    chunks: tuple[int, int]
    contexts: tuple[int, int]
    peaks: tuple[tuple[int, int], tuple[int, int]]
    totals: tuple[tuple[int, int], tuple[int, int]]
    logits: int
    scores: int = 0
    unfinished: int = 0

    def of_layers(self, start: int, end: int) -> Footprint:
        """The footprint of some decoder layers: those of one rank, for example.

        Args:
            start, end: it includes layers `start` to `end - 1`.
        """
        return replace(self, layers=self.layers[start:end])

    @property
    def state(self) -> int:
        """Cache of a sequence at any length."""
        return sum(c.state for layer in self.layers for c in layer)

    @property
    def token(self) -> int:
        """Cache that each token adds."""
        return sum(c.token for layer in self.layers for c in layer)

    def kv(self, context: int, chunk: int = 0) -> int:
        """KV cache and state of a sequence, in bytes.

        Args:
            context: tokens of the sequence.
            chunk: tokens of its longest pass; a window holds them in addition.
        """
        total = 0
        for c in (c for layer in self.layers for c in layer):
            tokens = context if c.kept is None else min(context, c.kept + chunk)
            total += c.state + c.token * (tokens + STEP - 1)  # it grows by whole steps
        return total

    def grown(self, added: int, chunk: int = 0, windows_full: bool = False) -> int:
        """KV cache that a sequence's next tokens add, in bytes.

        Args:
            added: tokens that its caches allocate.
            chunk: as for `kv`.
            windows_full: its windows hold as much as they will after these tokens.
        """
        total = 0
        for c in (c for layer in self.layers for c in layer):
            if c.kept is None:
                total += c.token * added
            elif not windows_full:
                total += c.token * min(added, c.kept + chunk)
        return total

    def work(self, chunk: int, context: int, sequences: int = 1, quantized: bool = False) -> int:
        """Work space of a pass, in bytes.

        Args:
            chunk: new tokens of each sequence.
            context: tokens of each sequence after the pass.
            sequences: batch size.
            quantized: keys and values are quantized; attention then has no fused kernel.
        """
        peak = self._between(self.peaks, chunk, context)
        held = self.unfinished
        if held:
            total = sequences * self._between(self.totals, chunk, context)
            held = int(max(0.0, min(held, total - sequences * peak)))
        # A growing cache is copied, one layer after the other.
        most = max((c.token for layer in self.layers for c in layer if c.kept is None), default=0)
        if quantized:
            peak += self.scores * chunk * context
        each = int(peak) + most * whole_steps(context) + _LOGIT_COPIES * self.logits
        return sequences * each + held + FLOOR_BYTES

    def _between(
        self, corners: tuple[tuple[int, int], tuple[int, int]], chunk: int, context: int
    ) -> float:
        (c0, c1), (s0, s1) = self.chunks, self.contexts
        share = (max(context, s0) - s0) / (s1 - s0)
        low, high = (p[0] + share * (p[1] - p[0]) for p in corners)
        return low + max(0.0, high - low) * (max(chunk, c0) - c0) / (c1 - c0)

    def longest_chunk(
        self,
        work_bytes: int,
        past: int,
        longest: int,
        sequences: int = 1,
        quantized: bool = False,
    ) -> int:
        """The most new tokens of each sequence that fit into `work_bytes`; at least 1.

        Args:
            work_bytes: available work space.
            past: tokens of the context before the pass.
            longest: upper bound of the result.
            sequences, quantized: as for `work`.
        """
        low, high = 1, max(1, longest)
        while low < high:
            middle = (low + high + 1) // 2
            if self.work(middle, past + middle, sequences, quantized) <= work_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def kept_tokens(cache: Any) -> int | None:
    """Tokens of a cache's window; None if it keeps all."""
    return getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)


def whole_steps(tokens: int) -> int:
    return -(-tokens // STEP) * STEP


def allocated(caches: Sequence[Any], tokens: int) -> int:
    """Tokens that caches must allocate to take `tokens` more of each sequence."""
    for cache in leaves(caches):
        keys = getattr(cache, "keys", None)
        if isinstance(keys, mx.array) and kept_tokens(cache) is None:
            free = keys.shape[2] - tokens_in(cache)
            return 0 if tokens <= free else whole_steps(tokens)
    return whole_steps(tokens)


def windows_full(caches: Sequence[Any], tokens: int) -> bool:
    """Are all windows as long as they will be after `tokens` more of each sequence?"""
    for cache in leaves(caches):
        if (kept := kept_tokens(cache)) is not None:
            keys = getattr(cache, "keys", None)
            if not isinstance(keys, mx.array) or keys.shape[2] < kept + tokens - 1:
                return False
    return True


def tokens_in(cache: Any) -> int:
    """Tokens of each sequence in a single cache."""
    for name in ("offset", "_offset", "_idx"):  # of batches, `offset` is an array
        value = getattr(cache, name, None)
        if isinstance(value, int):
            return value
    return 0


def leaves(caches: Sequence[Any]) -> Iterator[Any]:
    """All single caches, including those inside cache lists."""
    for cache in caches:
        if cache is None:
            continue
        inner = getattr(cache, "caches", None)
        yield from leaves(inner) if inner is not None else (cache,)


def cache_bytes(caches: Sequence[Any]) -> int:
    """Bytes of caches, counted from their shapes: nothing is evaluated."""
    return sum(getattr(cache, "nbytes", 0) for cache in leaves(caches))

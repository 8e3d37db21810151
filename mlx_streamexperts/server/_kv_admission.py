"""Keeps a server that answers many requests at once within the memory that was promised.

A plan has room for the KV cache of `context_tokens` tokens and for passes over `prefill_tokens`
tokens. mlx-lm's server batches requests, which pads each to the longest, and keeps the KV caches of
replies for later prompts, neither within any bound. Here both are held to the plan's: a request
that does not fit beside the others waits, and kept caches make room for running ones.

Everything here belongs to the generation thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import (
    ArraysCache,
    LRUPromptCache,
    can_trim_prompt_cache,
    trim_prompt_cache,
)

from .._loading.combinations import trims
from .._memory.budget import Plan
from .._memory.footprint import STEP

# Logits, their logarithms and the sampler's copies, of this step and the next, in float32.
_LOGIT_BYTES = 24


class Room:
    """Tokens of KV cache that may be taken, and who has taken them.

    Attributes:
        plan: of the model that is loaded; None before.
        active: tokens (prompt and reply) of each sequence that is being generated.
        pending: tokens of the request that was admitted last and has not begun.
        state: bytes that each sequence keeps whatever its length (linear attention, Mamba). As
            planned, or None where the plan knows of none, until a sequence was seen.
        keep: takes the tokens and caches of a sequence that is taken out of a batch.
    """

    keep: Callable[[list[int], list[Any]], None] | None = None

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.state: int | None = None
        self.vocabulary = 1
        self.active: dict[int, int] = {}
        self.pending = 0

    def open(self, plan: Plan, vocabulary: int) -> None:
        """A model has been loaded."""
        self.plan, self.vocabulary = plan, vocabulary
        self.state = plan.state if plan.footprint is not None else plan.state or None

    def longest_reply(self, prompt_tokens: int) -> int | None:
        """Tokens that a reply to a prompt may have; None where nothing bounds it."""
        if self.plan is None:
            return None
        return self.plan.longest_context - prompt_tokens

    def admits(self, tokens: int) -> bool:
        """Does a request of so many tokens fit beside the active ones? One alone always does."""
        if not self.active or self.plan is None:
            return True
        sequences = len(self.active) + 1
        if _LOGIT_BYTES * self.vocabulary * sequences > self.plan.work or self.state is None:
            return False
        return self._bytes(tokens, *self.active.values()) <= self.plan.kv_room

    def kept_bytes(self) -> int:
        """What the caches of earlier replies may take now."""
        if self.plan is None:
            return 1 << 62
        taken = [t for t in (*self.active.values(), self.pending) if t]
        return max(0, self.plan.kv_room - (self._bytes(*taken) if taken else 0))

    def chunk_tokens(self, stated: int, prompts: int) -> int:
        """Tokens of each of `prompts` prompts that go into one pass together."""
        if self.plan is None:
            return stated
        return max(1, min(stated, self.plan.prefill_tokens // max(1, prompts)))

    def _bytes(self, *tokens: int) -> int:
        """KV cache that a batch takes: as much for each sequence as for the longest."""
        assert self.plan is not None
        longest = -(-max(tokens) // STEP) * STEP
        return len(tokens) * (longest * self.plan.kv_token + (self.state or 0))


class Batch(BatchGenerator):
    """mlx-lm's batch, whose sequences take room and whose prompts share a pass's tokens."""

    def __init__(self, model: Any, room: Room, **options: Any) -> None:
        super().__init__(model, **options)
        self._room = room
        self._stated_step = self.prefill_step_size
        room.active.clear()

    def insert_segments(self, *args: Any, **options: Any) -> Any:
        uids = super().insert_segments(*args, **options)
        for uid in uids:
            self._room.active[uid] = self._room.pending
        self._room.pending = 0
        return uids

    def remove(self, uids: Any, *args: Any, **options: Any) -> Any:
        if self._room.keep is not None:  # a stop string has ended it, or its client left
            for i, uid in enumerate(self._generation_batch.uids):
                if uid in uids:
                    cache = self._generation_batch.extract_cache(i)
                    self._room.keep(list(self._generation_batch.tokens[i]), cache)
        removed = super().remove(uids, *args, **options)
        for uid in uids:
            self._room.active.pop(uid, None)
        return removed

    def next(self) -> Any:
        waiting = len(self._prompt_batch) + len(self._unprocessed_sequences)
        prompts = min(waiting, self.prefill_batch_size)
        self.prefill_step_size = self._room.chunk_tokens(self._stated_step, prompts)
        prompt_responses, responses = super().next()
        if self._room.state is None and (sequences := len(self._generation_batch)):
            self._room.state = state_bytes(self._generation_batch.prompt_cache) // sequences
        for r in responses:
            if r.finish_reason is not None:
                self._room.active.pop(r.uid, None)
        return prompt_responses, responses


def state_bytes(caches: list[Any]) -> int:
    """Bytes of those caches that do not grow with their sequences."""
    inner = [c for cache in caches for c in getattr(cache, "caches", [cache])]
    return sum(c.nbytes for c in inner if isinstance(c, ArraysCache))


class PromptCache(LRUPromptCache):
    """mlx-lm's cache of earlier prompts and replies, no larger than the room that is left."""

    def __init__(self, room: Room, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._room = room

    def fetch_nearest_cache(self, model: Any, tokens: list[int]) -> Any:
        # What is fetched shares its memory with what it was fetched from until either is written.
        # So first fetch, then let go of what there is no more room for.
        found, rest = super().fetch_nearest_cache(model, tokens)
        self.trim_to(n_bytes=self._room.kept_bytes())
        if found is not None and not rest:  # the last token must run, or there are no logits
            if not can_trim_prompt_cache(found):
                return None, tokens
            trim_prompt_cache(found, 1)
            rest = tokens[-1:]
        return found, rest

    def insert_cache(
        self, model: Any, tokens: list[int], prompt_cache: list[Any], **options: Any
    ) -> None:
        # A cache taken out of a batch is a slice that was not computed yet: it would keep the KV
        # cache of the whole batch in memory, unseen by any count.
        mx.eval([c.state for c in prompt_cache])
        if not trims(prompt_cache):
            for cache in prompt_cache:
                cache.is_trimmable = _never
        super().insert_cache(model, tokens, prompt_cache, **options)
        self.trim_to(n_bytes=self._room.kept_bytes())


def _never() -> bool:
    """What a cache is to say of being trimmed that would not go on like a fresh one."""
    return False

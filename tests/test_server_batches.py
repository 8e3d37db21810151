"""Batches of the server: their KV caches take whole steps for their longest sequence, no more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx_lm.utils
import pytest
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlx_streamexperts._memory.footprint import leaves, whole_steps
from mlx_streamexperts.server import _batches
from mlx_streamexperts.server._batches import PromptBatch

TOKENS = families.token_stream(families.VOCAB, 600, seed=5).tolist()


@pytest.fixture
def batch(checkpoint: Callable[..., Path], not_compiled: None) -> PromptBatch:
    model, _ = mlx_lm.utils.load_model(checkpoint("deepseek_v32"))  # its caches are lists of two
    many: dict[str, Any] = {"samplers": [None] * 2, "logits_processors": [None] * 2}
    return PromptBatch(model, [0, 1], [make_prompt_cache(model) for _ in range(2)], **many)


def rows(batch: PromptBatch) -> set[tuple[int, int]]:
    """Rows in use and rows there are, of all caches."""
    return {(c._idx, c.keys.shape[2]) for c in leaves(batch.prompt_cache)}


def test_caches_grow_by_whole_steps(batch: PromptBatch) -> None:
    """mlx-lm adds steps to the rows in use: 508, then 760, where 512 and 768 are counted."""
    for begin in range(0, 550, 50):
        batch.prompt([TOKENS[begin : begin + 50]] * 2)
        assert rows(batch) == {(begin + 50, whole_steps(begin + 50))}


def test_padding_does_not_add_up(batch: PromptBatch) -> None:
    """It did where prompts end their parts (system, user) in different passes."""
    given = [TOKENS[:211], TOKENS[300:440]]
    done = [0, 0]
    for counts in (100, 60), (10, 40), (100, 10), (1, 30):
        batch.prompt([t[d : d + n] for t, d, n in zip(given, done, counts, strict=True)])
        done = [d + n for d, n in zip(done, counts, strict=True)]
        assert rows(batch) == {(max(done), whole_steps(max(done)))}
    for i, tokens in enumerate(given):
        alone = make_prompt_cache(batch.model)
        batch.model(mx.array([tokens]), cache=alone)
        for kept, own in zip(leaves(batch.extract_cache(i)), leaves(alone), strict=True):
            assert mx.allclose(kept.keys, own.keys[..., : own.offset, :], atol=1e-4)


def test_kept_caches_that_join_ask_for_all_the_room_that_they_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They asked for none: mlx-lm puts them together unevaluated, with their sizes."""
    asked: list[int] = []
    monkeypatch.setattr(_batches, "_make_room", lambda model, added: asked.append(added))

    def kept() -> list[KVCache]:
        caches = [KVCache() for _ in range(3)]
        for cache in caches:
            cache.update_and_fetch(*(mx.random.uniform(shape=(1, 4, 300, 64)) for _ in range(2)))
            mx.eval(cache.keys, cache.values)
        return caches

    def joining(*uids: int) -> PromptBatch:
        many: dict[str, Any] = {"samplers": [], "logits_processors": [], "max_tokens": []}
        return PromptBatch(
            None, list(uids), [copy.deepcopy(c) for c in prompts[: len(uids)]], **many
        )

    prompts = [kept(), kept()]
    joined = PromptBatch.empty(None, None)
    for uids in (0, 1), (2,):
        before = mx.get_active_memory()
        joined.extend(joining(*uids))
        took = mx.get_active_memory() - before
        assert len(asked) == 3  # layer by layer: what a layer was made from goes with it
        assert sum(asked) == len(uids) * 3 * 2 * 4 * whole_steps(300) * 64 * 4
        assert took - sum(asked) < 10_000  # and what has no rows
        asked.clear()

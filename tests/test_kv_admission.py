"""A request starts when its padded batch fits into the planned KV cache; until then it waits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import load_streamed
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from mlx_streamexperts import PrefixCache, demo_model, plan, stream
from mlx_streamexperts.server._kv_admission import (
    BoundedPromptCache,
    KVAdmission,
    constant_bytes,
)


@pytest.fixture
def admission() -> KVAdmission:
    """Room for 4096 tokens of 100 bytes each."""
    admission = KVAdmission()
    planned = plan(str(demo_model()), memory="1GB")
    planned = replace(planned, footprint=None, context_stated=True)
    planned = replace(planned, context_tokens=4096, kv=4096 * 100, prefill_tokens=64)
    admission.open(planned, vocabulary=1000)
    admission.state_bytes = 0  # a sequence was measured
    return admission


def test_a_request_waits_until_there_is_room(admission: KVAdmission) -> None:
    assert admission.admit(1000)
    admission.start([7])  # sequence 7 takes 1024 tokens
    assert not admission.admit(3000)  # padded to the longer one, both would take 2 x 3072
    assert not admission.admit(2049)  # 2 x 2304
    assert admission.admit(2000)  # 2 x 2048
    admission.start([8])
    assert not admission.admit(1)  # 3 x 2048
    assert admission.prompt_cache_budget() == 0
    admission.finish([7, 8])
    assert admission.admit(3000)
    assert admission.prompt_cache_budget() == (4096 - 3255) * 100  # it may run outside a batch


def test_each_sequence_takes_as_much_as_the_longest(admission: KVAdmission) -> None:
    admission.running = dict.fromkeys(range(3), 980)
    assert admission.admit(10)  # 4 x 1024
    assert not admission.admit(1025)
    admission.running[3] = 1
    assert not admission.admit(1)  # 5 x 1024


def test_prompts_of_a_pass_are_padded_to_the_longest_chunk(admission: KVAdmission) -> None:
    """Of 64 tokens, two prompts get 32 each; those may come after the 1000 of the longer one."""
    admission.running = {0: 1000}
    assert admission.prompt_cache_budget() == (4096 - 1024) * 100
    admission.running = {0: 1000, 1: 10}
    assert admission.prompt_cache_budget() == (4096 - 2 * 1280) * 100
    admission.running = {0: 992, 1: 10}
    assert admission.prompt_cache_budget() == (4096 - 2 * 1024) * 100


def test_state_that_does_not_grow_with_a_sequence_counts(admission: KVAdmission) -> None:
    assert admission.plan is not None
    planned = replace(admission.plan, kv=4096 * 100 + 50_000, state=50_000)
    admission.open(planned, vocabulary=1000)
    admission.running = {0: 980}
    assert admission.prompt_cache_budget() == 3072 * 100
    assert admission.admit(980)  # 2 x (1024 tokens and a state)
    assert not admission.admit(2000)  # two of 2048 tokens and one state fill the room
    admission.open(replace(planned, state=0), vocabulary=1000)  # a plan that knows of no state
    assert not admission.admit(1)  # until the first sequence has been measured


def test_the_planned_state_covers_the_measured_one(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_5_moe")
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        caches = make_prompt_cache(model)
        mx.eval(model(mx.array([[1, 2, 3, 4, 5]]), cache=caches))
        measured = constant_bytes(caches)
        assert 0 < measured <= expert_stream.plan.state <= 1.5 * measured


def test_a_request_alone_is_always_admitted(admission: KVAdmission) -> None:
    assert admission.admit(10**6)
    assert admission.reply_limit(4000) == 96


def test_kept_caches_get_what_is_left(admission: KVAdmission) -> None:
    assert admission.prompt_cache_budget() == 4096 * 100
    admission.running = {0: 100, 1: 300}  # 2 x 512
    assert admission.prompt_cache_budget() == (4096 - 1024) * 100
    admission.pending = 600  # 3 x 768
    assert admission.prompt_cache_budget() == (4096 - 3 * 768) * 100
    admission.pending = 10**6
    assert admission.prompt_cache_budget() == 0


@pytest.mark.parametrize("trims", [True, False])
def test_a_prompt_that_is_cached_whole_leaves_a_token_to_run(
    admission: KVAdmission, trims: bool
) -> None:
    """With none, mlx-lm fails the batch. A cache that cannot be shortened is not used."""
    kept = KVCache() if trims else ArraysCache(1)
    if trims:
        kept.update_and_fetch(*(mx.ones((1, 1, 3, 4)) for _ in range(2)))
    prompts = BoundedPromptCache(admission)
    prompts.insert_cache("model", [5, 6, 7], [kept])
    found, rest = prompts.fetch_nearest_cache("model", [5, 6, 7])
    assert rest == ([7] if trims else [5, 6, 7])
    assert found[0].offset == 2 if trims else found is None
    assert not trims or kept.offset == 3  # what is kept stays whole


def test_a_kept_prompt_comes_without_the_rows_that_are_not_used(admission: KVAdmission) -> None:
    """A request outside a batch would keep them beside its own."""
    kept = KVCache()
    kept.update_and_fetch(*(mx.ones((1, 1, 300, 4)) for _ in range(2)))
    prompts = BoundedPromptCache(admission)
    prompts.insert_cache("model", list(range(5, 305)), [kept])
    found, rest = prompts.fetch_nearest_cache("model", [*range(5, 55), 1, 2])
    assert rest == [1, 2]
    assert found[0].keys.shape == found[0].values.shape == (1, 1, 50, 4)
    admission.pending = 1010  # up to 1265 rows, since its own steps follow the 50
    assert admission.prompt_cache_budget() == (4096 - 1265) * 100


def test_a_prompt_from_the_drive_has_room_before_it_is_read(
    admission: KVAdmission, tmp_path: Path
) -> None:
    """Neither other prompts nor a shorter beginning in memory stay beside what is read."""
    model = load_streamed(demo_model(), 1 << 40)
    kept = PrefixCache(model, tmp_path, "1GB")

    def computed(tokens: int) -> list[KVCache]:
        caches: list[KVCache] = make_prompt_cache(model)
        for cache in caches:
            cache.update_and_fetch(*(mx.random.uniform(shape=(1, 1, tokens, 256)),) * 2)
            mx.eval(cache.keys, cache.values)
        return caches

    token_bytes = sum(c.nbytes for c in computed(256)) // 256
    assert admission.plan is not None
    admission.plan = replace(admission.plan, context_tokens=768, kv=768 * token_bytes)
    whole, other = list(range(512)), list(range(600, 1112))
    kept.save(whole, computed(512))
    base = mx.get_active_memory()
    prompts = BoundedPromptCache(admission, provider=SimpleNamespace(model=model, prefixes=kept))
    for tokens in (other, whole[:400]):  # more than there is room for: one of them goes
        prompts.insert_cache("model", tokens, computed(len(tokens)))
        mx.reset_peak_memory()
        admission.pending = len(whole)
        found, rest = prompts.fetch_nearest_cache("model", whole)
        assert (found[0].offset, rest) == (511, [511])
        assert mx.get_peak_memory() - base <= admission.plan.kv
        assert len(prompts) == 0
        admission.pending, found = 0, None


def test_prompts_share_the_tokens_of_a_pass(admission: KVAdmission) -> None:
    assert admission.plan is not None
    tokens = admission.plan.prefill_tokens
    assert admission.chunk_tokens(10**6, 1) == tokens
    for prompts in range(1, 9):
        assert admission.chunk_tokens(10**6, prompts) * prompts <= tokens
    assert admission.chunk_tokens(5, 1) == 5


def test_the_logits_of_a_batch_stay_in_the_work_space(admission: KVAdmission) -> None:
    admission.vocabulary = 10**9
    admission.running = {0: 1}
    assert not admission.admit(1)


def test_requests_are_bounded_if_only_the_expert_cache_was_stated(
    admission: KVAdmission,
) -> None:
    assert admission.plan is not None
    admission.plan = replace(admission.plan, memory=None)
    admission.running = dict.fromkeys(range(100), 4096)
    assert not admission.admit(10**6)
    assert admission.reply_limit(10) == 4086
    assert admission.prompt_cache_budget() == 0


def test_without_a_stated_context_the_kv_cache_takes_what_is_left(admission: KVAdmission) -> None:
    assert admission.plan is not None
    plan = replace(admission.plan, context_stated=False)
    assert plan.kv_room == plan.mlx_bound - plan.trunk - plan.cache - plan.work > 2 * plan.kv
    assert plan.longest_context == plan.kv_room // 100 - 256
    admission.open(plan, vocabulary=1000)
    assert admission.reply_limit(5000) == plan.longest_context - 5000

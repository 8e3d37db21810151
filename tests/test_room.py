"""The arithmetic of room: what a batch takes is what its padded sequences take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import load_streamed
from mlx_lm.models.cache import ArraysCache, KVCache, make_prompt_cache

from mlx_streamexperts import demo_model, plan, stream
from mlx_streamexperts.server._kv_admission import PromptCache, Room, state_bytes
from mlx_streamexperts.server._traffic import FIRST_TOKEN_BOUNDS, Traffic


@pytest.fixture
def room() -> Room:
    room = Room()
    planned = plan(str(demo_model()), memory="1GB")
    planned = replace(planned, footprint=None, context_stated=True)  # 100 bytes a token
    room.open(replace(planned, context_tokens=4096, kv=4096 * 100), vocabulary=1000)
    room.state = 0  # a sequence was seen
    return room


def test_each_sequence_takes_as_much_as_the_longest(room: Room) -> None:
    assert room.admits(4096)
    room.active = {0: 1000}
    assert room.admits(2000)  # 2 x 2048
    assert not room.admits(2049)  # 2 x 2304
    room.active = {0: 1000, 1: 1000, 2: 1000}
    assert room.admits(10)  # 4 x 1024
    assert not room.admits(1025)
    room.active[3] = 1
    assert not room.admits(1)  # 5 x 1024


def test_what_a_sequence_keeps_whatever_its_length_counts(room: Room) -> None:
    assert room.plan is not None
    room.open(replace(room.plan, kv=4096 * 100 + 50_000, state=50_000), vocabulary=1000)
    room.active = {0: 1000}
    assert room.admits(1000)  # 2 x (1024 tokens and a state)
    assert not room.admits(2000)  # two of 2048 tokens take the room, and one state
    assert room.kept_bytes() == 3072 * 100
    room.open(replace(room.plan, state=0), vocabulary=1000)  # a model of whose states it knows none
    assert not room.admits(1)  # until the first sequence was looked at


def test_states_of_a_model_are_planned_as_they_come(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("qwen3_5_moe")
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        caches = make_prompt_cache(model)
        mx.eval(model(mx.array([[1, 2, 3, 4, 5]]), cache=caches))
        measured = state_bytes(caches)
        assert 0 < measured <= expert_stream.plan.state <= 1.5 * measured


def test_one_alone_is_always_admitted(room: Room) -> None:
    assert room.admits(10**6)
    assert room.longest_reply(4000) == 96


def test_kept_caches_get_what_is_left(room: Room) -> None:
    assert room.kept_bytes() == 4096 * 100
    room.active = {0: 100, 1: 300}  # 2 x 512
    assert room.kept_bytes() == (4096 - 1024) * 100
    room.pending = 600  # 3 x 768
    assert room.kept_bytes() == (4096 - 3 * 768) * 100
    room.pending = 10**6
    assert room.kept_bytes() == 0


@pytest.mark.parametrize("trims", [True, False])
def test_a_prompt_that_is_cached_whole_leaves_a_token_to_run(room: Room, trims: bool) -> None:
    """With none, mlx-lm fails the batch. A cache that cannot be shortened is not used."""
    kept = KVCache() if trims else ArraysCache(1)
    if trims:
        kept.update_and_fetch(*(mx.ones((1, 1, 3, 4)) for _ in range(2)))
    prompts = PromptCache(room)
    prompts.insert_cache("model", [5, 6, 7], [kept])
    found, rest = prompts.fetch_nearest_cache("model", [5, 6, 7])
    assert rest == ([7] if trims else [5, 6, 7])
    assert found[0].offset == 2 if trims else found is None
    assert not trims or kept.offset == 3  # what is kept stays whole


def test_prompts_share_the_tokens_of_a_pass(room: Room) -> None:
    assert room.plan is not None
    tokens = room.plan.prefill_tokens
    assert room.chunk_tokens(10**6, 1) == tokens
    for prompts in range(1, 9):
        assert room.chunk_tokens(10**6, prompts) * prompts <= tokens
    assert room.chunk_tokens(5, 1) == 5


def test_the_logits_of_a_batch_stay_in_the_work_space(room: Room) -> None:
    room.vocabulary = 10**9
    room.active = {0: 1}
    assert not room.admits(1)


def test_everything_is_bounded_where_the_expert_cache_alone_was_stated(room: Room) -> None:
    assert room.plan is not None
    room.plan = replace(room.plan, memory=None)
    room.active = dict.fromkeys(range(100), 4096)
    assert not room.admits(10**6)
    assert room.longest_reply(10) == 4086
    assert room.kept_bytes() == 0


def test_a_context_that_nobody_stated_takes_what_is_left(room: Room) -> None:
    assert room.plan is not None
    plan = replace(room.plan, context_stated=False)
    assert plan.kv_room == plan.mlx_bound - plan.trunk - plan.cache - plan.work > 2 * plan.kv
    assert plan.longest_context == plan.kv_room // 100 - 256
    room.open(plan, vocabulary=1000)
    assert room.longest_reply(5000) == plan.longest_context - 5000


def test_traffic_counts() -> None:
    traffic = Traffic()
    assert traffic.begin(most=2)
    assert traffic.begin(most=2)
    assert not traffic.begin(most=2)
    for seconds in (0.05, FIRST_TOKEN_BOUNDS[0], 1e9):
        traffic.prompt(10, 4, seconds)
    traffic.token()
    traffic.end("completed")
    stats = traffic.stats()
    assert (stats.active, stats.requests["completed"], stats.tokens) == (1, 1, 1)
    assert (stats.prompt_tokens, stats.cached_tokens) == (30, 12)
    assert (stats.first_token[0], stats.first_token[-1], sum(stats.first_token)) == (2, 1, 3)
    assert stats.tokens_per_second > 0

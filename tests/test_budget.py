"""Dividing a budget: arithmetic on sizes; no model, no file."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlx_streamexperts import BudgetError, Plan, StreamConfig
from mlx_streamexperts._cache.expert_map import LayerNeed
from mlx_streamexperts._memory.budget import Sizes, check_resize, divide
from mlx_streamexperts._memory.footprint import Footprint, LayerCache

MB = 10**6
SIZES = Sizes(trunk=100 * MB, looked_up=10 * MB, disk=1380 * MB)
LAYERS = [LayerNeed(experts=64, expert_bytes=10 * MB, minimum=2, top_k=8)] * 2  # 1.28 GB
FOOTPRINT = Footprint(
    layers=((LayerCache(token=1000),), (LayerCache(token=1000),)),
    chunks=(2, 512),
    contexts=(512, 1 << 15),
    peaks=((0, 0), (10 * MB, 40 * MB)),
    totals=((0, 0), (10 * MB, 40 * MB)),
    logits=1000,
)


def divided(memory: str | int | None, **options: object) -> Plan:
    config = StreamConfig(memory=memory, **options)  # type: ignore[arg-type]
    return divide(SIZES, LAYERS, {}, config, FOOTPRINT)


def test_memory_is_trunk_and_cache_and_kv_and_work_space() -> None:
    plan = divided("600MB", context_tokens=1000)
    assert plan.trunk == SIZES.trunk
    assert plan.kv == FOOTPRINT.kv(1000)
    assert plan.work >= FOOTPRINT.work(32, 1000)
    assert plan.cache == sum(plan.slots) * 10 * MB  # the rest, in whole experts
    total = plan.trunk + plan.kv + plan.work + plan.cache
    assert plan.mlx_bound - 20 * MB < total <= plan.mlx_bound < 600 * MB
    assert str(plan).startswith("600 MB = trunk 100 MB + expert cache ")


def test_the_smallest_memory_is_stated_and_works() -> None:
    with pytest.raises(BudgetError, match="is too small: the trunk") as caught:
        divided("120MB", context_tokens=1000)
    least = divided(caught.value.needed_bytes, context_tokens=1000)
    assert least.slots == (2, 2)
    with pytest.raises(BudgetError):
        divided(least.minimum - 1, context_tokens=1000)


def test_a_prompt_is_divided_into_chunks_that_fit_the_work_space() -> None:
    plan = replace(divided("600MB", context_tokens=1 << 15), work=50 * MB, pass_bytes=50 * MB)
    chunks = plan.passes(1 << 15)
    assert sum(chunks) == 1 << 15
    assert chunks[0] > chunks[-2]  # later chunks have more keys to attend to
    past = 0
    for chunk in chunks:
        past += chunk
        assert FOOTPRINT.work(chunk, past) <= plan.work


def test_another_cache_size_must_keep_the_promise() -> None:
    plan = divided("600MB", context_tokens=1000)
    assert check_resize(plan, plan.cache, reserve=0, others=0) == plan.bound
    with pytest.raises(BudgetError, match="would break the promise of memory=600 MB"):
        check_resize(plan, plan.cache + 30 * MB, reserve=0, others=0)

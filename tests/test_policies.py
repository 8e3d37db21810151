"""Which expert each policy evicts. test_cache.py compares the policies with brute-force models."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from mlx_streamexperts._cache.expert_map import ExpertCache
from mlx_streamexperts._cache.policies import LRFU, LRU, POLICIES


def test_a_policy_by_example() -> None:
    policy = LRU(experts=10, slots=3)
    for expert in (4, 7, 9):
        policy.insert(expert)  # resident, and used
    policy.touch(4)  # used again
    assert policy.evict(keep={7}) == 9  # 7 is older, but has to stay
    policy.admit(3)  # resident, and not used yet
    policy.remove(3)  # dropped, because its read failed
    assert [policy.evict(keep=()) for _ in range(2)] == [7, 4]


def test_lru_takes_the_least_recently_used() -> None:
    cache = ExpertCache(10, 3, "lru")
    cache.place([0, 1, 2])
    cache.place([0])
    cache.place([3])
    assert cache.resident == [0, 2, 3]
    cache.place([2])
    cache.place([4])
    assert cache.resident == [2, 3, 4]


@pytest.mark.parametrize("half_life", [0.1, 2.0, math.inf])
def test_lrfu_counts_a_prompt_as_its_tokens_one_by_one(half_life: float) -> None:
    """Whatever the prompt's length; beyond 1,000 half-lives a float holds no count unscaled."""
    for seed, tokens in enumerate((2, 30, 3000)):
        chosen = np.random.default_rng(seed).integers(0, 6, (tokens, 1))
        at_once, one_by_one = (LRFU(8, 8, half_life) for _ in range(2))
        for policy in (at_once, one_by_one):
            for expert in range(8):
                policy.insert(expert)
        at_once.prompt(chosen.ravel())
        for expert in np.unique(chosen).tolist():
            at_once.touch(expert)
        for expert in chosen.ravel().tolist():
            one_by_one.touch(expert)
        orders = [[p.evict(()) for _ in range(8)] for p in (at_once, one_by_one)]
        assert orders[0] == orders[1]
        if tokens > 2:
            assert set(orders[0][:2]) == {6, 7}  # in the cache, and in no token


def test_lrfu_keeps_what_is_used_often_and_forgets_what_was() -> None:
    cache = ExpertCache(10, 3, "lrfu")
    for _ in range(5):
        cache.place([0, 1])
    for expert in range(2, 8):
        cache.place([expert])
    assert cache.resident == [0, 1, 7]  # under LRU 5, 6, 7
    for _ in range(40):
        for expert in (7, 8):
            cache.place([expert])
    cache.place([9])
    assert cache.resident == [7, 8, 9]


def test_s3fifo_lets_a_scan_pass() -> None:
    """Experts used once do not displace the ones used again and again; under LRU they do."""
    busy = list(range(8))
    rates = {}
    for policy in POLICIES:
        cache = ExpertCache(500, 10, policy)
        once = iter(range(8, 500))
        for _ in range(3):
            cache.place(busy)
        for _ in range(40):
            for expert in itertools.islice(once, 10):
                cache.place([expert])
            cache.place(busy)
        rates[policy] = cache.stats.hit_rate
    assert rates["s3fifo"] > 0.4
    assert rates["lrfu"] > 0.4
    assert rates["lru"] < 0.1


def test_s3fifo_main_queue_turns_until_it_finds_a_victim() -> None:
    """Newcomers below the probation queue's share do not pay for a busy main queue."""
    cache = ExpertCache(40, 20, "s3fifo")  # probation holds 2
    old = list(range(20))
    for _ in range(3):
        cache.place(old)  # used twice since they came: the next eviction moves all 20 to main
    cache.place([20])  # ... and evicts expert 0, the oldest there; 20 is alone on probation
    busy = [e for e in cache.resident if e != 20]
    cache.place(busy)  # every expert of the main queue has been used again
    cache.place([21])
    assert cache.slot_of[20] >= 0, "evicted from a probation queue that was not full"
    assert cache.slot_of[1] < 0, "the oldest of the main queue"

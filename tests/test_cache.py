"""The expert -> slot map and its policies against brute-force models, and sharing out a budget.

The models are written to be read, not to be fast: lists, the oldest first.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_streamexperts._cache.expert_map import CacheStats, ExpertCache, LayerNeed, share_slots
from mlx_streamexperts._cache.policies import POLICIES
from mlx_streamexperts._errors import BudgetError


def test_a_cache_by_example() -> None:
    cache = ExpertCache(experts=8, slots=3, policy="lru")
    assert cache.place([5, 2]) == [5, 2]  # both are missing: the caller reads them
    assert cache.slot_of[5] == 0 and cache.slot_of[2] == 1
    assert cache.slot_of[7] == -1  # not resident
    assert cache.place([2, 6]) == [6]  # 2 is a hit
    assert cache.place([7], keep=[2]) == [7]  # 5 was not used for the longest time
    assert cache.resident == [2, 6, 7]
    cache.drop(7)  # its read failed
    assert cache.resident == [2, 6]
    assert (cache.stats.hits, cache.stats.misses, cache.stats.evictions) == (1, 4, 1)


thorough = settings(max_examples=120, deadline=None)
every_policy = pytest.mark.parametrize("policy", sorted(POLICIES))


class Call(NamedTuple):
    """One call of `place`, and which of the experts it returns are then dropped."""

    needed: list[int]
    keep: list[int]  # of these, the resident ones, as far as there are slots
    drop: list[bool]
    again: list[int] = []  # positions in `needed` that a prompt's later tokens chose  # noqa: RUF012

    def chosen(self) -> np.ndarray:
        """[T, K]: one token, or a prompt of tokens that chose one expert each."""
        if not self.again:
            return np.array([self.needed], int)
        repeats = [self.needed[i % len(self.needed)] for i in self.again]
        return np.array([*self.needed, *repeats])[:, None]


class Scenario(NamedTuple):
    """A cache's size and what is asked of it."""

    experts: int
    slots: int
    calls: list[Call]


@st.composite
def scenarios(draw: st.DrawFn, drops: bool = True, most_slots: int = 24) -> Scenario:
    """Random calls; experts with low numbers are wanted more often, so that there are hits."""
    experts = draw(st.integers(1, 32))
    slots = draw(st.integers(1, min(experts, most_slots)))
    expert = st.integers(0, experts - 1) | st.integers(0, min(experts - 1, slots))
    call = st.builds(
        Call,
        st.lists(expert, max_size=slots, unique=True),
        st.lists(expert, max_size=3, unique=True),
        st.lists(st.booleans() if drops else st.just(False), max_size=2),
        st.just([]) | st.lists(st.integers(0, 31), max_size=12),
    )
    return Scenario(experts, slots, draw(st.lists(call, max_size=60)))


def possible_keep(call: Call, resident: Iterable[int], slots: int) -> list[int]:
    """The part of `call.keep` that the contract of `place` allows."""
    inside = set(resident)
    keep = [e for e in call.keep if e in inside and e not in call.needed]
    return keep[: slots - len(call.needed)]


# Brute-force models.


class ModelPolicy(Protocol):
    """What the model cache asks of a model policy."""

    def prompt(self, chosen: Sequence[int]) -> None: ...
    def hit(self, expert: int) -> None: ...
    def add(self, expert: int) -> None: ...
    def victim(self, keep: Collection[int]) -> int: ...
    def lose(self, expert: int) -> None: ...


class ModelLRU:
    """A list in order of last use; the first one allowed to go goes."""

    def __init__(self, experts: int, slots: int) -> None:
        self.order: list[int] = []

    def prompt(self, chosen: Sequence[int]) -> None:
        pass

    def hit(self, expert: int) -> None:
        self.order.remove(expert)
        self.order.append(expert)

    def add(self, expert: int) -> None:
        self.order.append(expert)

    def victim(self, keep: Collection[int]) -> int:
        expert = [e for e in self.order if e not in keep][0]  # noqa: RUF015
        self.order.remove(expert)
        return expert

    def lose(self, expert: int) -> None:
        self.order.remove(expert)


class ModelS3FIFO:
    """S3-FIFO as the paper tells it (SOSP 2023, section 4.1 and algorithm 1).

    New objects enter S, or M if G remembers them. S evicts while it has a tenth of the space: its
    oldest object moves to M, its use count cleared, if it was used more than once since it came;
    else it leaves and G remembers it. M evicts otherwise: its oldest object is put back with one
    use less until one without uses is found. An object that must stay is passed over; a queue
    that can give nothing leaves it to the other.
    """

    def __init__(self, experts: int, slots: int) -> None:
        self.s: list[int] = []
        self.m: list[int] = []
        self.g: list[int] = []
        self.uses: dict[int, int] = {}
        self.s_size = max(1, slots // 10)
        self.g_size = max(1, slots - slots // 10)

    def prompt(self, chosen: Sequence[int]) -> None:
        pass

    def hit(self, expert: int) -> None:
        self.uses[expert] = min(self.uses[expert] + 1, 3)

    def add(self, expert: int) -> None:
        self.uses[expert] = 0
        if expert in self.g:
            self.m.append(expert)
        else:
            self.s.append(expert)

    def victim(self, keep: Collection[int]) -> int:
        if len(self.s) >= self.s_size or not self.m:
            found = self.from_s(keep)
            if found is None:
                found = self.from_m(keep)
        else:
            found = self.from_m(keep)
            if found is None:
                found = self.from_s(keep)
            if found is None:  # S has just moved everything to M
                found = self.from_m(keep)
        assert found is not None
        del self.uses[found]
        return found

    def from_s(self, keep: Collection[int]) -> int | None:
        for expert in [e for e in self.s if e not in keep]:
            self.s.remove(expert)
            if self.uses[expert] <= 1:
                self.g = [*self.g, expert][-self.g_size :]
                return expert
            self.uses[expert] = 0
            self.m.append(expert)
        return None

    def from_m(self, keep: Collection[int]) -> int | None:
        while movable := [e for e in self.m if e not in keep]:
            expert = movable[0]
            self.m.remove(expert)
            if self.uses[expert] == 0:
                return expert
            self.uses[expert] -= 1
            self.m.append(expert)
        return None

    def lose(self, expert: int) -> None:
        del self.uses[expert]
        (self.s if expert in self.s else self.m).remove(expert)


class ModelLRFU:
    """Every use is remembered with its time; one counts half after two uses an expert.

    Time is the number of uses so far. A prompt's uses are those of its tokens, one after another,
    instead of the one use that serving it would be.
    """

    def __init__(self, experts: int, slots: int) -> None:
        self.half_life = 2 * experts
        self.uses: dict[int, list[int]] = {e: [] for e in range(experts)}
        self.inside: set[int] = set()
        self.counted: set[int] = set()
        self.now = 0

    def prompt(self, chosen: Sequence[int]) -> None:
        self.counted = set()
        for expert in chosen:
            self.use(expert)
        self.counted = set(chosen)

    def use(self, expert: int) -> None:
        if expert in self.counted:
            self.counted.remove(expert)
            return
        self.uses[expert].append(self.now)
        self.now += 1

    def count(self, expert: int) -> float:
        ages = [(self.now - t) / self.half_life for t in self.uses[expert]]
        return math.fsum(2.0**-age for age in ages if age < 300)

    def hit(self, expert: int) -> None:
        self.use(expert)

    def add(self, expert: int) -> None:
        self.use(expert)
        self.inside.add(expert)

    def victim(self, keep: Collection[int]) -> int:
        found = min(self.inside.difference(keep), key=self.count)
        self.inside.remove(found)
        return found

    def lose(self, expert: int) -> None:
        self.inside.remove(expert)


MODELS: dict[str, type[ModelLRU] | type[ModelS3FIFO] | type[ModelLRFU]] = {
    "lru": ModelLRU,
    "s3fifo": ModelS3FIFO,
    "lrfu": ModelLRFU,
}


class ModelCache:
    """The map by the rules of `ExpertCache`: slots from 0 up, then the one last left."""

    def __init__(self, experts: int, slots: int, policy: ModelPolicy) -> None:
        self.policy = policy
        self.slot_of: dict[int, int] = {}
        self.empty = list(reversed(range(slots)))
        self.ever: set[int] = set()
        self.evicted: list[int] = []
        self.hits = self.compulsory = self.capacity = 0

    def place(self, needed: Sequence[int], keep: Sequence[int]) -> list[int]:
        missing = [e for e in needed if e not in self.slot_of]
        for expert in needed:
            if expert in self.slot_of:
                self.hits += 1
                self.policy.hit(expert)
        for expert in missing:
            if not self.empty:
                victim = self.policy.victim([*needed, *keep])
                self.evicted.append(victim)
                self.empty.append(self.slot_of.pop(victim))
            self.slot_of[expert] = self.empty.pop()
            self.policy.add(expert)
            if expert in self.ever:
                self.capacity += 1
            else:
                self.compulsory += 1
            self.ever.add(expert)
        return missing

    def drop(self, expert: int) -> None:
        self.empty.append(self.slot_of.pop(expert))
        self.policy.lose(expert)


@every_policy
@thorough
@given(scenario=scenarios())
def test_policy_does_what_its_model_does(policy: str, scenario: Scenario) -> None:
    """Same misses, same evictions, same slots, same counters after every call."""
    compare_with_model(policy, *scenario)


@every_policy
@pytest.mark.parametrize("seed", range(12))
def test_policy_does_what_its_model_does_over_long_runs(policy: str, seed: int) -> None:
    """Routing as it is: a few popular experts, a long tail, and top-k of them at a time."""
    rng = np.random.default_rng(seed)
    experts = int(rng.integers(24, 96))
    slots = int(rng.integers(20, experts))
    weights = 1 / np.arange(1, experts + 1) ** rng.uniform(0.2, 1.6)
    calls = []
    for _ in range(300):
        top_k = int(rng.integers(1, slots // 2))
        needed = rng.choice(experts, top_k, replace=False, p=weights / weights.sum()).tolist()
        drop = (rng.random(top_k) < 0.02).tolist()
        calls.append(Call(needed, rng.permutation(experts)[:3].tolist(), drop))
        if seed % 2:  # a token much like the last one
            calls.append(Call(needed, [], drop))
        if seed % 3 == 0:  # a prompt
            again = rng.integers(0, top_k, 8).tolist()
            calls.append(Call(needed, [], drop, again))
    compare_with_model(policy, experts, slots, calls)


def compare_with_model(policy: str, experts: int, slots: int, calls: list[Call]) -> None:
    cache = ExpertCache(experts, slots, policy)
    model = ModelCache(experts, slots, MODELS[policy](experts, slots))
    for call in calls:
        keep = possible_keep(call, model.slot_of, slots)
        if call.needed:
            assert cache.wanted(call.chosen()) == call.needed
            if call.again:
                model.policy.prompt(call.chosen().ravel().tolist())
        missing = cache.place(call.needed, keep)
        assert missing == model.place(call.needed, keep)
        for expert, drop in zip(missing, call.drop, strict=False):
            if drop:
                cache.drop(expert)
                model.drop(expert)
        assert {e: int(cache.slot_of[e]) for e in cache.resident} == model.slot_of
        seen = CacheStats(
            hits=model.hits, compulsory=model.compulsory, capacity=model.capacity,
            evictions=len(model.evicted),
        )  # fmt: skip
        assert cache.stats == seen


# What holds for every policy.


@every_policy
@thorough
@given(scenario=scenarios())
def test_the_map_is_always_sound(policy: str, scenario: Scenario) -> None:
    experts, slots, calls = scenario
    cache = ExpertCache(experts, slots, policy)
    needed_so_far = 0
    ever: set[int] = set()
    for call in calls:
        before = cache.slot_of.copy()
        keep = possible_keep(call, cache.resident, slots)
        expected = [e for e in call.needed if before[e] < 0]
        missing = cache.place(call.needed, keep)
        assert missing == expected  # exactly the experts without a slot, in order
        stay = [e for e in (*call.needed, *keep) if before[e] >= 0]
        assert np.array_equal(cache.slot_of[stay], before[stay])  # neither evicted nor moved
        used = cache.slot_of[cache.resident]
        assert len(set(used.tolist())) == len(used)
        assert set(used.tolist()) <= set(range(slots))
        assert set(call.needed) <= set(cache.resident)
        room = slots - int((before >= 0).sum())
        gone = set(np.flatnonzero((before >= 0) & (cache.slot_of < 0)).tolist())
        assert len(gone) == max(0, len(missing) - room)  # nobody leaves while there is room
        needed_so_far += len(call.needed)
        ever |= set(call.needed)
        assert cache.stats.hits + cache.stats.misses == needed_so_far
        assert cache.stats.compulsory == len(ever)
        for expert, drop in zip(missing, call.drop, strict=False):
            if drop:
                cache.drop(expert)


@every_policy
def test_a_needed_resident_expert_is_not_evicted_by_the_same_call(policy: str) -> None:
    """Not even the next victim, when the misses come first in the list."""
    for oldest in range(4):
        cache = ExpertCache(8, 4, policy)
        for expert in (oldest, *(e for e in range(4) if e != oldest)):
            cache.place([expert])
        slot = cache.slot_of[oldest]
        assert cache.place([4, 5, 6, oldest]) == [4, 5, 6]
        assert cache.slot_of[oldest] == slot
        assert cache.resident == sorted([4, 5, 6, oldest])


@every_policy
def test_a_pinned_expert_stays_and_is_not_counted(policy: str) -> None:
    cache = ExpertCache(9, 4, policy, pinned=[8])
    rng = np.random.default_rng(0)
    assert cache.place([8]) == [8]
    for _ in range(200):
        chosen = rng.choice(8, 2, replace=False)
        cache.place([8, *cache.wanted(chosen)])
        cache.place_prefetched(rng.choice(9, 2, replace=False).tolist())
        assert cache.slot_of[8] == 0
        assert len(cache.resident) <= cache.movable == 3
    assert cache.stats.hits + cache.stats.prefetched + cache.stats.misses == 400
    waves = cache.waves([8, *range(8)], np.arange(9))
    assert [8 in wave for wave, _ in waves] == [True] + [False] * (len(waves) - 1)
    for wave, keep in waves:
        cache.place(wave, keep)
        assert cache.slot_of[8] == 0
    cache.clear()
    assert cache.place([8, 1]) == [8, 1]
    cache.drop(8)
    assert cache.resident == [1]


@every_policy
def test_kept_experts_stay_until_they_are_not_kept(policy: str) -> None:
    cache = ExpertCache(8, 3, policy)
    cache.place([0, 1, 2])
    for expert in (3, 4, 5, 6):
        cache.place([expert], keep=[0, 1])
        assert cache.resident == [0, 1, expert]
    cache.place([3, 4, 5])
    assert cache.resident == [3, 4, 5]


@every_policy
@thorough
@given(scenario=scenarios(drops=False), extra=st.data())
def test_too_many_experts_change_nothing(
    policy: str, scenario: Scenario, extra: st.DataObject
) -> None:
    """The call that cannot be served raises; the cache goes on as if it had not been asked."""
    experts, slots, calls = scenario
    cache = ExpertCache(experts, slots, policy)
    for call in calls:
        cache.place(call.needed, possible_keep(call, cache.resident, slots))
        if slots == experts:
            continue
        count = extra.draw(st.integers(slots + 1, experts))
        many = extra.draw(st.permutations(range(experts)))[:count]
        split = extra.draw(st.integers(1, count))
        needed, keep = many[:split], [e for e in many[split:] if cache.slot_of[e] >= 0]
        if len({*needed, *keep}) <= slots or all(cache.slot_of[e] >= 0 for e in needed):
            continue
        untouched = copy.deepcopy(cache)
        with pytest.raises(ValueError, match=f"{slots} slots"):
            cache.place(needed, keep)
        assert np.array_equal(cache.slot_of, untouched.slot_of)
        assert cache.stats == untouched.stats
        for expert in range(experts):  # the order of eviction is what it would have been
            cache.place([expert])
            untouched.place([expert])
            assert np.array_equal(cache.slot_of, untouched.slot_of)


@every_policy
def test_drop_empties_the_slot_for_reuse(policy: str) -> None:
    cache = ExpertCache(10, 4, policy)
    cache.place([0, 1, 2, 3])
    slot = int(cache.slot_of[2])
    cache.drop(2)
    assert cache.resident == [0, 1, 3]
    assert cache.place([2]) == [2]  # a miss again
    assert cache.slot_of[2] == slot
    assert cache.stats.evictions == 0
    cache.drop(2)
    assert cache.place([7]) == [7]
    assert (cache.slot_of[7], cache.resident) == (slot, [0, 1, 3, 7])
    for expert in range(10):  # a dropped expert is never chosen for eviction
        cache.place([expert])
        assert len(cache.resident) == 4


def test_slots_fill_in_order() -> None:
    """Loading all experts into an empty cache puts each into the slot of its own index."""
    cache = ExpertCache(12, 12)
    for first in range(0, 12, 5):
        cache.place(list(range(first, min(12, first + 5))))
    assert np.array_equal(cache.slot_of, np.arange(12))


def test_more_slots_than_experts_are_not_used() -> None:
    assert ExpertCache(4, 100).slots == 4


def test_nothing_needed_is_nothing_done() -> None:
    cache = ExpertCache(4, 2)
    assert cache.place([]) == []
    assert cache.stats == CacheStats()


def test_lrfu_goes_on_for_ever() -> None:
    """Weights grow without end; what is kept of them does not, and the order is the model's."""
    rng = np.random.default_rng(5)
    calls = [Call(rng.choice(4, 1).tolist(), [], []) for _ in range(6000)]
    compare_with_model("lrfu", 4, 2, calls)  # 750 half-lives


def test_hit_rate_of_nothing_is_one() -> None:
    assert CacheStats().hit_rate == 1.0
    assert CacheStats(hits=1, compulsory=2, capacity=1).hit_rate == 0.25
    assert CacheStats(hits=1, compulsory=2, capacity=1).misses == 3


def test_stats_add_up() -> None:
    total = CacheStats(1, 2, 3, 4, 5, 6)
    total.add(CacheStats(10, 20, 30, 40, 50, 60))
    assert total == CacheStats(11, 22, 33, 44, 55, 66)


# Sharing a budget out.


@st.composite
def layer_needs(draw: st.DrawFn) -> list[LayerNeed]:
    """Layers of different sizes, some of them equal to one another."""
    kinds = draw(
        st.lists(
            st.integers(1, 40).flatmap(
                lambda experts: st.builds(
                    LayerNeed, st.just(experts), st.integers(1, 50), st.integers(1, experts)
                )
            ),
            min_size=1,
            max_size=4,
        )
    )
    return draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=12))


def cost(slots: Sequence[int], layers: Sequence[LayerNeed]) -> int:
    return sum(n * x.expert_bytes for n, x in zip(slots, layers, strict=True))


def smallest(layers: Sequence[LayerNeed]) -> int:
    return cost([x.minimum for x in layers], layers)


@thorough
@given(layers=layer_needs(), extra=st.integers(0, 20_000))
def test_shares_keep_to_the_budget(layers: list[LayerNeed], extra: int) -> None:
    budget = smallest(layers) + extra
    slots = share_slots(budget, layers)
    assert cost(slots, layers) <= budget
    for n, layer in zip(slots, layers, strict=True):
        assert layer.minimum <= n <= layer.experts
    for (n, a), (m, b) in itertools.combinations(zip(slots, layers, strict=True), 2):
        if a == b:
            assert abs(n - m) <= 1
    # Somebody's next expert does not fit: a slot more for everybody would break the budget.
    wanting = [x.expert_bytes for n, x in zip(slots, layers, strict=True) if n < x.experts]
    if wanting:
        assert budget - cost(slots, layers) < max(wanting)


@thorough
@given(layers=layer_needs(), extra=st.integers(0, 20_000), more=st.integers(0, 3_000))
def test_a_larger_budget_is_used_more(layers: list[LayerNeed], extra: int, more: int) -> None:
    budget = smallest(layers) + extra
    less_used = cost(share_slots(budget, layers), layers)
    assert less_used <= cost(share_slots(budget + more, layers), layers)


@thorough
@given(
    layer=st.builds(LayerNeed, st.integers(8, 512), st.integers(1, 10**8), st.integers(1, 8)),
    count=st.integers(1, 80),
    share=st.floats(0, 1.2),
    more=st.integers(0, 3),
)
def test_equal_layers_share_equally(layer: LayerNeed, count: int, share: float, more: int) -> None:
    """As in every published model: all that fits is used, and no layer loses as budgets grow."""
    layers = [layer] * count
    budget = max(smallest(layers), int(share * count * layer.experts * layer.expert_bytes))
    slots = share_slots(budget, layers)
    assert max(slots) - min(slots) <= 1
    assert sum(slots) == min(count * layer.experts, budget // layer.expert_bytes)
    larger = share_slots(budget + more * layer.expert_bytes, layers)
    assert all(a <= b for a, b in zip(slots, larger, strict=True))


@thorough
@given(layers=layer_needs(), missing=st.integers(1, 1_000))
def test_the_budget_that_the_error_names_works(layers: list[LayerNeed], missing: int) -> None:
    with pytest.raises(BudgetError) as e:
        share_slots(max(0, smallest(layers) - missing), layers)
    needed = e.value.needed_bytes
    assert f"{needed:,}" in str(e.value)
    assert cost(share_slots(needed, layers), layers) == needed
    with pytest.raises(BudgetError) as again:
        share_slots(needed - 1, layers)
    assert again.value.needed_bytes == needed


def test_minima_of_uneven_layers_come_first() -> None:
    """A small layer's minimum may be all its experts; the others share what is left."""
    layers = [LayerNeed(4, 10, 4), LayerNeed(100, 10, 4), LayerNeed(100, 10, 4)]
    assert share_slots(400, layers) == [4, 18, 18]


def test_no_layers_take_nothing() -> None:
    assert share_slots(100, []) == []


@every_policy
@pytest.mark.parametrize("seed", range(20))
def test_hits_told_late_change_nothing(policy: str, seed: int) -> None:
    """`hit` defers what `wanted` and `place` do at once: the same victims, the same counts."""
    order = np.random.default_rng(seed)
    at_once, late = ExpertCache(24, 10, policy), ExpertCache(24, 10, policy)
    for step in range(400):
        # Mostly of a few: many calls in a row then hit.
        experts = order.choice(24 if order.random() < 0.1 else 8, 4, replace=False)
        if order.random() < 0.02:
            guesses = order.choice(24, 3, replace=False).tolist()
            assert at_once.place_prefetched(guesses) == late.place_prefetched(guesses)
        if (late.slot_of[experts] >= 0).all():
            late.hit(experts)
        else:
            late.place(late.wanted(experts))
        at_once.place(at_once.wanted(experts))
        assert np.array_equal(at_once.slot_of, late.slot_of), step
        assert at_once.stats == late.stats

"""Which expert is in which slot: the map of one layer, its statistics, and sharing out a budget.

An `ExpertCache` is the only place that changes a layer's expert -> slot map; a policy (policies.py)
chooses which expert leaves. Pure Python and NumPy: no MLX and no I/O.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .._errors import BudgetError
from .policies import POLICIES, PolicyMaker


@dataclass(slots=True)
class CacheStats:
    """Counters of a cache. Each expert counts once per call of its layer.

    Attributes:
        hits: needed experts that were resident because of an earlier use.
        prefetched: needed experts whose prefetch had ended or was in flight.
        compulsory: misses of experts that were never resident before; no cache could avoid them.
        capacity: misses of experts that had been evicted.
        evictions: experts that were evicted to make room.
        wasted: prefetched experts that were evicted before any use.
    """

    hits: int = 0
    prefetched: int = 0
    compulsory: int = 0
    capacity: int = 0
    evictions: int = 0
    wasted: int = 0

    @property
    def misses(self) -> int:
        """Needed experts that had to be read while a layer waited."""
        return self.compulsory + self.capacity

    @property
    def hit_rate(self) -> float:
        """Share of needed experts that were resident; 1.0 before any use.

        Prefetched experts count as not resident: a prefetch saves time, not a read.
        """
        seen = self.hits + self.prefetched + self.misses
        return self.hits / seen if seen else 1.0

    def add(self, other: CacheStats) -> None:
        """Add another cache's counts to these.

        Args:
            other: the counts to add.
        """
        self.hits += other.hits
        self.prefetched += other.prefetched
        self.compulsory += other.compulsory
        self.capacity += other.capacity
        self.evictions += other.evictions
        self.wasted += other.wasted


class ExpertCache:
    """The expert -> slot map of one layer.

    Args:
        experts: routed experts of the layer.
        slots: how many experts fit; more slots than experts are not used.
        policy: a name in `POLICIES`, or a function that makes a policy.
        pinned: experts that every token uses. Once placed they stay; nothing counts them.

    Attributes:
        movable: slots that the other experts take turns in.
        slot_of: int32 [experts], each expert's slot or -1.
        stats: counters.
        version: a number that changes with the map.
    """

    def __init__(
        self,
        experts: int,
        slots: int,
        policy: str | PolicyMaker = "lru",
        pinned: Collection[int] = (),
    ) -> None:
        self.experts, self.slots = experts, min(slots, experts)
        self.movable = max(0, self.slots - len(pinned))
        self._pinned = frozenset(pinned)
        self.slot_of = np.full(experts, -1, np.int32)
        self.stats = CacheStats()
        self.version = 0
        self._make_policy = POLICIES[policy] if isinstance(policy, str) else policy
        self._policy = self._make_policy(experts, self.movable)
        self._free = list(range(self.slots - 1, -1, -1))  # popped from the end: slot 0 first
        self._seen = np.zeros(experts, bool)
        self._hits: list[np.ndarray] = []  # of calls that the policy was not told of yet
        self._prefetched: dict[int, None] = {}  # and not used since, oldest first

    @property
    def resident(self) -> list[int]:
        """Experts that have a slot, in index order, without pinned ones."""
        return [e for e in np.flatnonzero(self.slot_of >= 0).tolist() if e not in self._pinned]

    def wanted(self, experts: np.ndarray) -> list[int]:
        """The distinct experts that a call chose, in order of first choice.

        Call this once per call of the layer and before `place`: the policy learns from it how often
        a call of several tokens chose each expert.

        Args:
            experts: int [..., K], the choices of each token.
        """
        self._catch_up()
        chosen = experts.ravel()
        if len(chosen) > experts.shape[-1]:
            self._policy.prompt(chosen)
        return list(dict.fromkeys(chosen.tolist()))

    def hit(self, experts: np.ndarray) -> list[int]:
        """Do the work of `wanted` and `place` for a token whose experts [K] were all resident.

        The policy is told of many such calls at once, before it next decides: on a GPU, 20 us a
        layer would be a tenth of its time.
        """
        distinct = list(dict.fromkeys(experts.tolist()))  # some routers name one expert twice
        prefetched = [e for e in distinct if e in self._prefetched] if self._prefetched else []
        for expert in prefetched:
            del self._prefetched[expert]
            self._seen[expert] = True
        self.stats.prefetched += len(prefetched)
        self.stats.hits += len(distinct) - len(prefetched)
        self._hits.append(experts if len(distinct) == len(experts) else np.array(distinct))
        if len(self._hits) == 64:
            self._catch_up()
        return distinct

    def _catch_up(self) -> None:
        """Tell the policy of the hits that it has not been told of."""
        if self._hits:
            self._policy.touch_all(np.concatenate(self._hits))
            self._hits.clear()

    def place(self, needed: Sequence[int], keep: Iterable[int] = ()) -> list[int]:
        """Give every needed expert a slot; returns the misses, whose bytes must now be read.

        Hits are touched before any miss is placed, and neither a needed expert nor one in `keep` is
        evicted. The caller reads the returned experts or calls `drop` on them.

        Args:
            needed: distinct experts; with `keep` no more of them than there are slots.
            keep: resident experts that must stay although this call does not need them.

        Raises:
            ValueError: there are more of them than slots.
        """
        self._catch_up()
        missing = [e for e in needed if self.slot_of[e] < 0]
        self.version += bool(missing)
        stay = {*needed, *keep, *self._pinned} if missing else ()
        if len(stay) > self.slots:
            raise ValueError(f"{len(stay)} experts needed at once, {self.slots} slots")
        prefetched = uncounted = 0
        for expert in needed:
            if expert in self._pinned:
                uncounted += 1
            elif self.slot_of[expert] >= 0:
                self._policy.touch(expert)
                if expert in self._prefetched:
                    del self._prefetched[expert]
                    self._seen[expert] = True
                    prefetched += 1
        self.stats.prefetched += prefetched
        counted = [e for e in missing if e not in self._pinned] if uncounted else missing
        self.stats.hits += len(needed) - uncounted - len(counted) - prefetched
        for expert in missing:
            if not self._free:
                self._evict(stay)
            self.slot_of[expert] = self._free.pop()
            if expert in self._pinned:
                continue
            self._policy.insert(expert)
            if self._seen[expert]:
                self.stats.capacity += 1
            else:
                self.stats.compulsory += 1
                self._seen[expert] = True
        return missing

    def place_prefetched(self, candidates: Sequence[int], keep: Collection[int] = ()) -> list[int]:
        """Give experts that may be needed soon a slot.

        No candidate is evicted for another. The number of prefetched experts that have not been
        used is limited to twice the candidates, or to half of the slots that the candidates leave
        if that is less (but never below the number of candidates). Above the limit the oldest of
        them make room, so that prefetches do not drive out experts that are used.

        Args:
            candidates: distinct experts, the likeliest first.
            keep: other experts that must stay, because they are being read.

        Returns:
            The candidates whose bytes must now be read; the caller reads them or calls `drop`.
        """
        self._catch_up()
        count = len(candidates)
        unused = min(2 * count, max(count, (self.movable - count) // 2))
        stay = {*candidates, *keep} - self._pinned
        room = self.movable - sum(self.slot_of[e] >= 0 for e in stay)
        placed: list[int] = []
        for expert in candidates:
            if self.slot_of[expert] >= 0 or expert in self._pinned:
                continue
            if len(placed) == room:
                break
            if len(self._prefetched) >= unused:
                stale = next((e for e in self._prefetched if e not in stay), None)
                if stale is None:
                    break
                self.drop(stale)
                self.stats.wasted += 1
            elif not self._free:
                self._evict(stay)
            self.slot_of[expert] = self._free.pop()
            self._policy.admit(expert)
            self._prefetched[expert] = None
            self.version += 1
            placed.append(expert)
        return placed

    def _evict(self, keep: Collection[int]) -> None:
        victim = self._policy.evict(keep)
        self._free.append(int(self.slot_of[victim]))
        self.slot_of[victim] = -1
        self.stats.evictions += 1
        if victim in self._prefetched:
            del self._prefetched[victim]
            self.stats.wasted += 1

    def waves(self, needed: Sequence[int], uses: np.ndarray) -> list[tuple[list[int], list[int]]]:
        """Divide more experts than there are slots into waves; the most used experts come last.

        Resident experts come first, then the others in the given order, and at the end the experts
        that the call uses most, as many as there are slots. Those of them that are resident already
        stay throughout, in up to half of the slots. A wave takes half of the remaining slots, so
        that the next one can be read while it computes. Pinned experts run with the first wave.

        Args:
            needed: distinct experts.
            uses: int [experts], how many of the call's rows choose each.

        Returns:
            The waves, each with the experts that must stay while it is placed: those that stay
            throughout, and the wave before, which still computes (but not if there is one slot).
        """
        slots, pinned = self.movable, [e for e in needed if e in self._pinned]
        needed = [e for e in needed if e not in self._pinned] if pinned else needed
        ranked = sorted(needed, key=lambda e: (-int(uses[e]), e))
        most_used = set(ranked[:slots])
        resident = [e for e in ranked if self.slot_of[e] >= 0]
        others = sorted((e for e in needed if self.slot_of[e] < 0), key=lambda e: e in most_used)
        stay = [e for e in resident if e in most_used][: max(0, min(slots // 2, slots - 2))]
        size = max(1, (slots - len(stay)) // 2)
        order = resident + others
        waves = [order[i : i + size] for i in range(0, len(order), size)]
        waves[0] = [*pinned, *waves[0]]
        if slots == 1:
            return [(wave, []) for wave in waves]
        before: list[list[int]] = [[], *waves]
        return [(wave, [*stay, *last]) for wave, last in zip(waves, before, strict=False)]

    def succeed(self, before: ExpertCache) -> dict[int, int]:
        """Take over from a cache of another size, which must not be used any more.

        The experts that the other's policy would evict last get slots here, as many as fit; pinned
        ones always. A miss counts as compulsory only if the expert was never resident in either.

        Args:
            before: a cache of the same layer. This one is empty.

        Returns:
            The slot in the other cache of each expert that has one here. The caller copies their
            bytes or calls `drop`.
        """
        before._catch_up()
        was = before.slot_of.copy()
        order = [before._policy.evict(()) for _ in before.resident]  # the first to go comes first
        pinned = [e for e in self._pinned if was[e] >= 0]
        kept = [*pinned, *order[len(order) - min(len(order), self.movable) :]]
        for expert in kept:
            self.place([expert])
        self._seen = before._seen
        return {e: int(was[e]) for e in kept}

    def clear(self) -> None:
        """Empty every slot, even if an exception left the map half changed."""
        self.slot_of[:] = -1
        self.version += 1
        self._policy = self._make_policy(self.experts, self.movable)
        self._free = list(range(self.slots - 1, -1, -1))
        self._prefetched.clear()
        self._hits.clear()

    def drop(self, expert: int) -> None:
        """Empty the slot of an expert whose bytes did not arrive."""
        self._catch_up()
        self._free.append(int(self.slot_of[expert]))
        self.slot_of[expert] = -1
        self.version += 1
        if expert in self._pinned:
            return
        self._policy.remove(expert)
        self._prefetched.pop(expert, None)


@dataclass(frozen=True, slots=True)
class LayerNeed:
    """What one layer asks of the budget.

    Attributes:
        experts: routed experts in the layer.
        expert_bytes: bytes of one of them, all its tensors together.
        minimum: the fewest slots that the layer works with.
        top_k: experts of one token; with fewer slots they pass through in waves.
    """

    experts: int
    expert_bytes: int
    minimum: int
    top_k: int = 1


def fewest_slots(top_k: int) -> int:
    """The fewest slots that a layer works with.

    Two are enough: one is read while the other computes. With fewer than top-k, no expert stays for
    the next token.
    """
    return min(2, top_k)


def share_slots(budget_bytes: int, layers: Sequence[LayerNeed]) -> list[int]:
    """Share out a budget so that every layer gets the same fraction of its experts.

    The bytes that rounding leaves become single slots of the layers furthest below that fraction.

    Returns:
        Slots of each layer, at most as many as its experts, all within the budget.

    Raises:
        BudgetError: the budget is less than the minima of all layers.
    """
    least = sum(layer.minimum * layer.expert_bytes for layer in layers)
    if least > budget_bytes:
        raise BudgetError(
            f"a cache of {budget_bytes:,} bytes cannot hold the fewest experts that each of "
            f"{len(layers)} layers needs at once; the smallest that works is {least:,} bytes",
            needed_bytes=least,
        )

    def at(fraction: float) -> list[int]:
        return [min(x.experts, max(x.minimum, int(fraction * x.experts))) for x in layers]

    def cost(slots: list[int]) -> int:
        return sum(n * x.expert_bytes for n, x in zip(slots, layers, strict=True))

    low, high = 0.0, 1.0
    if cost(at(high)) <= budget_bytes:
        return at(high)
    for _ in range(40):  # minima may push the sum up, so bisect for the fraction that fits
        middle = (low + high) / 2
        low, high = (middle, high) if cost(at(middle)) <= budget_bytes else (low, middle)
    slots = at(low)
    left = budget_bytes - cost(slots)
    for i in sorted(range(len(layers)), key=lambda i: slots[i] / layers[i].experts):
        if slots[i] < layers[i].experts and layers[i].expert_bytes <= left:
            slots[i] += 1
            left -= layers[i].expert_bytes
    return slots

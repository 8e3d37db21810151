"""Replay a trace through a cache of any size and policy, or through the optimal policy.

A replay makes the same calls to `ExpertCache` as the live layer, so its counts are the live ones.
No model, no MLX, and no I/O except reading traces.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .._cache.expert_map import CacheStats, ExpertCache
from .._cache.policies import PolicyMaker
from .._errors import StreamError
from .._experts.trace import Routing, read_trace


@dataclass
class LayerReplay:
    """Counts of one layer's cache.

    Attributes:
        stats: of all calls.
        needed, missed: experts needed by calls of one token, and those of them that missed.
        tokens: calls of one token.
        prompt_missed: misses of calls of several tokens.
    """

    stats: CacheStats = field(default_factory=CacheStats)
    needed: int = 0
    missed: int = 0
    tokens: int = 0
    prompt_missed: int = 0

    def add(self, other: LayerReplay) -> None:
        self.stats.add(other.stats)
        self.needed += other.needed
        self.missed += other.missed
        self.tokens += other.tokens
        self.prompt_missed += other.prompt_missed

    @property
    def decode_hit_rate(self) -> float:
        """Hit rate of calls of one token; 1.0 without any."""
        return 1 - self.missed / self.needed if self.needed else 1.0

    def note(self, tokens: int, needed: int, missed: int) -> None:
        """Count one call."""
        if tokens == 1:
            self.tokens += 1
            self.needed += needed
            self.missed += missed
        else:
            self.prompt_missed += missed


def replay_layer(
    calls: Iterable[np.ndarray],
    experts: int,
    slots: int,
    policy: str | PolicyMaker = "lru",
    hot: Sequence[int] = (),
) -> LayerReplay:
    """Run one layer's calls, int [T, K] each, through a cache of the live kind.

    Args:
        hot: experts read before the first call, as many as have slots; reading them counts as no
            miss.
    """
    cache = ExpertCache(experts, slots, policy)
    if hot:
        cache.place(list(hot[: cache.slots]))
        cache.stats = CacheStats()
    result = LayerReplay(cache.stats)
    for rows in calls:
        needed, before = cache.wanted(rows), cache.stats.misses
        if len(needed) <= cache.slots:
            cache.place(needed)
        else:
            uses = np.bincount(rows.ravel(), minlength=experts)
            for wave, keep in cache.waves(sorted(needed), uses):
                cache.place(wave, keep)
        result.note(len(rows), len(needed), cache.stats.misses - before)
    return result


def best_layer(calls: Sequence[np.ndarray], experts: int, slots: int) -> LayerReplay:
    """The fewest misses of any policy, with the future known.

    Belady's rule ("A study of replacement algorithms for a virtual-storage computer", IBM Systems
    Journal 5 (2), 1966) evicts the expert whose next use is farthest away. A call that needs more
    experts than there are slots is assumed to hit every resident expert and to keep the best of all
    experts that it saw. Waves cannot always do that, so the result is a lower bound there.
    """
    never = len(calls)
    needs = [list(dict.fromkeys(rows.ravel().tolist())) for rows in calls]
    following: list[list[int]] = []
    next_use = [never] * experts
    for i in range(len(needs) - 1, -1, -1):
        following.append([next_use[e] for e in needs[i]])
        for e in needs[i]:
            next_use[e] = i
    following.reverse()

    result, stats = LayerReplay(), CacheStats()
    resident: dict[int, int] = {}  # expert -> its next use
    seen: set[int] = set()
    slots = min(slots, experts)
    for rows, needed, later in zip(calls, needs, following, strict=True):
        missing = [e for e in needed if e not in resident]
        stats.hits += len(needed) - len(missing)
        stats.compulsory += sum(e not in seen for e in missing)
        stats.capacity += sum(e in seen for e in missing)
        seen.update(missing)
        resident.update(zip(needed, later, strict=True))
        if (surplus := len(resident) - slots) > 0:
            stay = set(needed) if len(needed) <= slots else set()
            leaving = sorted((e for e in resident if e not in stay), key=lambda e: -resident[e])
            for expert in leaving[:surplus]:
                del resident[expert]
            stats.evictions += surplus
        result.note(len(rows), len(needed), len(missing))
    result.stats = stats
    return result


BEST = "belady"
"""Name of the optimum, in place of a policy."""


def replay_routing(
    routing: Routing,
    slots: Sequence[int],
    policy: str | PolicyMaker = "lru",
    hot: Sequence[Sequence[int]] = (),
) -> list[LayerReplay]:
    """Run a trace through caches of given sizes; one result for each layer.

    Args:
        slots: of each layer.
        policy: one of `POLICIES`, `BEST`, or a function that makes a policy.
        hot: experts of each layer that are read beforehand.
    """
    results = []
    for i, (calls, experts, count) in enumerate(
        zip(routing.layers, routing.experts, slots, strict=True)
    ):
        if count >= experts:  # wholly resident: the live layer counts nothing
            results.append(LayerReplay())
        elif policy == BEST:
            results.append(best_layer(calls, experts, count))
        else:
            before = hot[i] if hot else ()
            results.append(replay_layer(calls, experts, count, policy, before))
    return results


def total(layers: Iterable[LayerReplay]) -> LayerReplay:
    """Sums over layers."""
    result = LayerReplay()
    for layer in layers:
        result.add(layer)
    return result


def replay(
    trace: Path, slots: Sequence[int], policy: str = "lru"
) -> tuple[CacheStats, list[CacheStats]]:
    """Run a trace file through the live cache; statistics of all layers together, and of each.

    Raises:
        StreamError: not a trace, or one of a model with other layers.
    """
    routing = read_trace(trace)
    if len(routing.experts) != len(slots):
        raise StreamError(
            f"{trace}: recorded with {len(routing.experts)} expert layers, the model has "
            f"{len(slots)}"
        )
    layers = replay_routing(routing, slots, policy)
    return total(layers).stats, [x.stats for x in layers]

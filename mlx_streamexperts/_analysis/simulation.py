"""Simulate caches offline: replay traces through policies and sizes, and through the optimum.

Uneven shares, layers kept whole and hot sets are fitted on some traces and judged on others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from .._cache.expert_map import LayerNeed, fewest_slots, share_slots
from .._cache.policies import LRFU, POLICIES, PolicyMaker
from .._errors import StreamError
from .._experts.trace import Routing
from .._memory.budget import Plan
from .._memory.hardware import Machine
from .predict import Range, predict
from .replay import BEST, LayerReplay, replay_routing, total
from .sharing import hot_experts, keep_whole, miss_curves, share_by_gain

CANDIDATES: dict[str, PolicyMaker] = {
    **POLICIES,
    "lfu": partial(LRFU, half_life=math.inf),
    "lrfu-1": partial(LRFU, half_life=1.0),
    "lrfu-4": partial(LRFU, half_life=4.0),
}
"""Policies by name: those of the live cache, plain LFU, and LRFU with other half-lives."""

FIRST_CALLS = 100
"""Calls of each layer in which a hot set can show its effect."""


@dataclass(frozen=True)
class Row:
    """One trace, or all together, at one cache size under one policy.

    Attributes:
        trace: its name, or "all".
        share: resident part of all expert bytes.
        way: division of the budget over layers: "even", "by gain", "1 whole", ...
        slots: of each layer.
        hits, compulsory, capacity: as in `CacheStats`.
        hit_rate, decode_hit_rate: of all calls, and of those of one token.
        missed_per_token: misses of a decoded token, over all layers.
        prompt_missed: misses of calls of several tokens.
        layer_hit_rates: `hit_rate` by layer.
        tokens_per_s: predicted for decoding; None without the experts' sizes.
    """

    trace: str
    share: float
    policy: str
    way: str
    slots: tuple[int, ...]
    hits: int
    compulsory: int
    capacity: int
    hit_rate: float
    decode_hit_rate: float
    missed_per_token: float
    prompt_missed: int
    layer_hit_rates: tuple[float, ...]
    tokens_per_s: float | None = None


@dataclass(frozen=True)
class Warmth:
    """Misses of a trace's first calls, with an empty cache and with a hot set read beforehand.

    Attributes:
        read: experts of the hot set that were read.
        cold, hot: misses of the first prompt.
        cold_calls, hot_calls: misses of each layer's first calls.
    """

    trace: str
    share: float
    policy: str
    read: int
    cold: int
    hot: int
    cold_calls: int
    hot_calls: int


@dataclass
class Report:
    """Result of `simulate`."""

    rows: list[Row] = field(default_factory=list)
    warmth: list[Warmth] = field(default_factory=list)


def simulate(
    traces: Sequence[Routing],
    shares: Sequence[float],
    policies: Sequence[str],
    machine: Machine,
    fit: Sequence[Routing] = (),
    fit_policy: str = "lrfu",
) -> Report:
    """Replay every trace at every share under every policy.

    Args:
        shares: resident parts of all expert bytes.
        policies: of `CANDIDATES`, or `BEST`.
        machine: tokens/s are predicted for it.
        fit: traces to fit other divisions and a hot set on; `traces` judge them.
        fit_policy: policy of what is fitted.

    Raises:
        StreamError: traces of different models, or a share too small to work.
    """
    first = traces[0]
    for other in (*traces, *fit):
        if (other.experts, other.expert_bytes) != (first.experts, first.expert_bytes):
            raise StreamError(f"{other.name} and {first.name} are traces of different models")
    report = Report()
    top_k = max(rows.shape[1] for t in (*traces, *fit) for calls in t.layers for rows in calls)
    even = {share: _even_slots(first, share, top_k) for share in shares}
    for share in shares:
        for policy in policies:
            report.rows += _rows(traces, share, policy, "even", even[share], machine)
    if fit:
        curves, hot = miss_curves(fit, CANDIDATES[fit_policy]), hot_experts(fit)
        for share in shares:
            for way, slots in _divisions(first, even[share], top_k, curves).items():
                report.rows += _rows(traces, share, fit_policy, way, slots, machine)
            report.warmth += [_warmth(t, share, fit_policy, even[share], hot) for t in traces]
    return report


def _even_slots(routing: Routing, share: float, top_k: int) -> list[int]:
    """Slots of each layer, as the live cache divides this part of all expert bytes."""
    sizes = routing.expert_bytes or (1,) * len(routing.experts)
    needs = [
        LayerNeed(n, b, fewest_slots(top_k), top_k)
        for n, b in zip(routing.experts, sizes, strict=True)
    ]
    budget = share * sum(n.experts * n.expert_bytes for n in needs)
    return share_slots(int(budget + 1e-6), needs)


def _divisions(
    routing: Routing, even: list[int], top_k: int, curves: Sequence[np.ndarray]
) -> dict[str, list[int]]:
    """Other divisions of the same bytes, by name."""
    sizes = routing.expert_bytes or (1,) * len(routing.experts)
    least = [min(n, top_k) for n in even]
    ways = {"by gain": share_by_gain(even, sizes, least, curves)}
    for count in (1, 2):
        slots = keep_whole(count, even, routing.experts, sizes, least, curves)
        if slots is not None and count < len(even):
            ways[f"{count} whole"] = slots
    return ways


def _rows(
    traces: Sequence[Routing], share: float, policy: str, way: str, slots: Sequence[int],
    machine: Machine,
) -> list[Row]:  # fmt: skip
    """One row for each trace, and one for all of them if there are several."""
    maker = policy if policy == BEST else CANDIDATES[policy]

    def row(name: str, trace: Routing, layers: list[LayerReplay]) -> Row:
        summed = total(layers)
        return Row(
            trace=name,
            share=share,
            policy=policy,
            way=way,
            slots=tuple(slots),
            hits=summed.stats.hits,
            compulsory=summed.stats.compulsory,
            capacity=summed.stats.capacity,
            hit_rate=summed.stats.hit_rate,
            decode_hit_rate=summed.decode_hit_rate,
            missed_per_token=summed.missed / max(1, max(x.tokens for x in layers)),
            prompt_missed=summed.prompt_missed,
            layer_hit_rates=tuple(x.stats.hit_rate for x in layers),
            tokens_per_s=speed(trace, slots, layers, machine),
        )

    replays = [replay_routing(trace, slots, maker) for trace in traces]
    rows = [row(t.name, t, layers) for t, layers in zip(traces, replays, strict=True)]
    if len(traces) > 1:
        together = [total(layers) for layers in zip(*replays, strict=True)]
        rows.append(row("all", traces[0], together))
    return rows


def speed(
    routing: Routing, slots: Sequence[int], layers: Sequence[LayerReplay], machine: Machine
) -> float | None:
    """Predicted decode rate: `predict`'s likely value at the replayed hit rate.

    Wholly resident layers neither sync nor read. Without the model's sizes in the trace, computing
    is taken to read the experts' bytes alone.

    Returns:
        None if the trace lacks the experts' sizes.
    """
    if not routing.expert_bytes:
        return None
    top_k = routing.model.get("top_k") or max(r.shape[1] for c in routing.layers for r in c)
    cold = sum(
        min(top_k, n) * b for n, b in zip(routing.experts, routing.expert_bytes, strict=True)
    )
    plan = Plan(
        memory=None,
        trunk=routing.model.get("trunk", 0),
        experts=sum(n * b for n, b in zip(routing.experts, routing.expert_bytes, strict=True)),
        cache=sum(n * b for n, b in zip(slots, routing.expert_bytes, strict=True)),
        kv=0,
        work=0,
        slots=tuple(slots),
        layer_experts=routing.experts,
        top_k=top_k,
        prefill_tokens=2048,
        context_tokens=0,
        disk=0,
        active_bytes_per_token=routing.model.get("active_bytes_per_token", cold),
        cold_bytes_per_token=cold,
        minimum=0,
        model_type=routing.model.get("model_type", ""),
    )
    streamed = [x for x, n, e in zip(layers, slots, routing.experts, strict=True) if n < e]
    rate = total(streamed).decode_hit_rate
    return predict(plan, machine, 1, Range(rate, rate, rate)).tokens_per_s.likely


def _warmth(
    trace: Routing, share: float, policy: str, slots: Sequence[int], hot: list[list[int]]
) -> Warmth:
    """Misses that a hot set saves at the start of a trace."""
    begin = replace(trace, layers=tuple(calls[:FIRST_CALLS] for calls in trace.layers))
    prompt = replace(trace, layers=tuple(calls[:1] for calls in trace.layers))
    maker = CANDIDATES[policy]
    misses = [
        total(replay_routing(part, slots, maker, before)).stats.misses
        for part in (prompt, begin)
        for before in ((), hot)
    ]
    return Warmth(trace.name, share, policy, sum(slots), *misses)


def with_expert_bytes(routing: Routing, expert_bytes: int) -> Routing:
    """The same routing, as if its experts had another size."""
    model = dict(routing.model)
    if model:
        old = sum(routing.expert_bytes) * model["top_k"]
        new = len(routing.experts) * expert_bytes * model["top_k"]
        model["active_bytes_per_token"] += new - old
    return replace(routing, expert_bytes=(expert_bytes,) * len(routing.experts), model=model)

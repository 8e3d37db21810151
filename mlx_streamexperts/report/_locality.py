"""What recorded routing says of locality: reuse, overlap, and what caches of any size would do.

Works on `Routing`; no model, no MLX. Calls of one token are decoding, others are prompts.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .._analysis.replay import BEST
from .._analysis.simulation import simulate
from .._experts.trace import Routing
from .._memory.hardware import Machine

_LAGS = (1, 2, 4, 8, 16)


def one_after_another(traces: Sequence[Routing]) -> Routing:
    """Several recordings of one model as one, in order: a machine that goes on serving."""
    joined = tuple(list(itertools.chain(*calls)) for calls in zip(*(t.layers for t in traces)))  # noqa: B905
    return replace(traces[0], name="all, one after another", layers=joined)


def caches(
    traces: Sequence[Routing], shares: Sequence[float], chosen: str, machine: Machine
) -> dict[str, Any]:
    """Hit rates by share, policy, layer and prompt; misses by kind. Replayed, not measured.

    Args:
        chosen: the policy in force, beside LRU and the optimum.
    """
    policies = list(dict.fromkeys(("lru", chosen, BEST)))
    joined = one_after_another(traces)
    together = simulate([joined], shares, policies, machine).rows
    alone = simulate(traces, shares, [chosen], machine).rows
    return {
        "policy": chosen,
        "shares": list(shares),
        "by_policy": [
            {
                "share": r.share,
                "policy": r.policy,
                "hit_rate": r.hit_rate,
                "decode_hit_rate": r.decode_hit_rate,
                "hits": r.hits,
                "compulsory": r.compulsory,
                "capacity": r.capacity,
            }
            for r in together
        ],
        "by_layer": [
            {"share": r.share, "hit_rates": list(r.layer_hit_rates)}
            for r in together
            if r.policy == chosen
        ],
        "by_prompt_alone": [
            {"prompt": int(r.trace), "share": r.share, "hit_rate": r.hit_rate}
            for r in alone
            if r.trace != "all"
        ],
    }


def by_kind(rows: Sequence[dict[str, Any]], kinds: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Hit rates of prompts by themselves, put together by task and by language.

    Args:
        rows: `by_prompt_alone` of `caches`.
        kinds: task and language of each prompt.

    Returns:
        `share`: resident, the one nearest to a quarter; `deviation`: standard deviation over the
        prompts, 0 of one; `task` and `language`: mean, lowest and highest of each.
    """
    share = min((r["share"] for r in rows), key=lambda s: abs(s - 0.25))
    rates = {r["prompt"]: r["hit_rate"] for r in rows if r["share"] == share}

    def put_together(names: Sequence[str]) -> list[dict[str, Any]]:
        found = {n: [rates[i] for i, m in enumerate(names) if m == n] for n in names}
        return [
            {
                "name": name,
                "prompts": len(some),
                "hit_rate": statistics.fmean(some),
                "low": min(some),
                "high": max(some),
            }
            for name, some in found.items()
        ]

    return {
        "share": share,
        "deviation": statistics.stdev(rates.values()) if len(rates) > 1 else 0.0,
        "task": put_together([task for task, _ in kinds]),
        "language": put_together([language for _, language in kinds]),
    }


def reuse_distances(routing: Routing) -> dict[str, Any]:
    """How many other experts of its layer were used since an expert's last use, while decoding.

    A cache of LRU hits exactly the uses whose distance is below its slots. Distances are shares of
    the layer's experts, so that layers of different sizes add up.

    Returns:
        `shares` and `uses`: the part of all uses whose distance is at most that share;
        `first_uses`: the part that has none.
    """
    distances: list[float] = []
    first = total = 0
    for calls, experts in zip(routing.layers, routing.experts, strict=True):
        order: list[int] = []  # most recent first
        for rows in calls:
            needed = list(dict.fromkeys(rows.ravel().tolist()))
            for expert in needed if len(rows) == 1 else ():
                total += 1
                if expert in order:
                    distances.append(order.index(expert) / experts)
                else:
                    first += 1
            used = set(needed)
            order = needed + [e for e in order if e not in used]
    grid = [i / 32 for i in range(33)]
    found = np.sort(np.array(distances))
    uses = np.searchsorted(found, grid, side="right") / max(1, total)
    return {"shares": grid, "uses": uses.tolist(), "first_uses": first / max(1, total)}


def token_overlap(traces: Sequence[Routing]) -> list[dict[str, float]]:
    """The part of a token's experts that the token `lag` before it used too, in the same layer.

    `by_chance` is what independent, even routing would give: top-k of all experts.
    """
    rows = []
    for lag in _LAGS:
        shared: list[float] = []
        chance: list[float] = []
        for trace in traces:
            for calls, experts in zip(trace.layers, trace.experts, strict=True):
                sets = [set(r.ravel().tolist()) for r in calls if len(r) == 1]
                for a, b in zip(sets, sets[lag:]):  # noqa: B905
                    shared.append(len(a & b) / len(b))
                    chance.append(len(a) / experts)
        if shared:
            rows.append(
                {
                    "lag": lag,
                    "shared": statistics.fmean(shared),
                    "by_chance": statistics.fmean(chance),
                }
            )
    return rows


def request_overlap(traces: Sequence[Routing]) -> list[list[float]]:
    """How alike two requests use experts: cosine of their counts of uses, mean over layers."""
    uses = [
        [
            np.bincount(np.concatenate([r.ravel() for r in calls]), minlength=n).astype(float)
            for calls, n in zip(t.layers, t.experts, strict=True)
        ]
        for t in traces
    ]

    def alike(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
        cosines = [
            float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))
            for x, y in zip(a, b, strict=True)
        ]
        return statistics.fmean(cosines)

    return [[alike(a, b) for b in uses] for a in uses]

"""report.Locality of recorded routing: reuse, overlap, and hit rates of caches of any size.

Works on traces (`Routing`), without the model. Calls of one token are decoding, others are prompts.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .._analysis.replay import BEST
from .._analysis.simulation import simulate
from .._experts.trace import Routing
from .._memory.hardware import NAMED_MACHINES
from . import _report as report

_LAGS = (1, 2, 4, 8, 16)


def locality(
    traces: Sequence[Routing], shares: Sequence[float], policy: str, kinds: Sequence[report.Kind]
) -> report.Locality:
    """Everything about some prompts' traces, replayed at each of the resident `shares`.

    Args:
        policy: in force; LRU and the optimum are replayed beside it.
        kinds: of the prompts.
    """
    # A server's view: one request after another.
    layers = tuple(list(itertools.chain(*calls)) for calls in zip(*(t.layers for t in traces)))  # noqa: B905
    joined = replace(traces[0], name="all, one after another", layers=layers)
    machine = next(iter(NAMED_MACHINES.values()))  # any will do: only counts are used
    together = simulate([joined], shares, list(dict.fromkeys(("lru", policy, BEST))), machine).rows
    mine = [r for r in together if r.policy == policy]
    alone = simulate(traces, shares, [policy], machine).rows
    prompts = [
        report.PromptRow(int(r.trace), r.share, r.hit_rate) for r in alone if r.trace != "all"
    ]
    return report.Locality(
        tokens=sum(len(rows) for rows in joined.layers[0]),
        caches=report.Caches(
            policy=policy,
            shares=list(shares),
            by_policy=[report.from_json(report.CacheRow, vars(r)) for r in together],
            by_layer=[report.LayerRow(r.share, list(r.layer_hit_rates)) for r in mine],
            by_prompt_alone=prompts,
        ),
        by_kind=by_kind(prompts, kinds),
        reuse=reuse_distances(joined),
        token_overlap=token_overlap(traces),
        request_overlap=request_overlap(traces),
    )


def by_kind(rows: Sequence[report.PromptRow], kinds: Sequence[report.Kind]) -> report.ByKind:
    """Hit rates of prompts by themselves, by task and by language."""
    share = min((r.share for r in rows), key=lambda s: abs(s - 0.25))
    rates = {r.prompt: r.hit_rate for r in rows if r.share == share}

    def grouped(names: Sequence[str]) -> list[report.KindRow]:
        found = {n: [rates[i] for i, m in enumerate(names) if m == n] for n in names}
        return [
            report.KindRow(name, len(some), statistics.fmean(some), min(some), max(some))
            for name, some in found.items()
        ]

    deviation = statistics.stdev(rates.values()) if len(rates) > 1 else 0.0
    by_task, by_language = grouped([k.task for k in kinds]), grouped([k.language for k in kinds])
    return report.ByKind(share, deviation, by_task, by_language)


def reuse_distances(routing: Routing) -> report.Reuse:
    """How many other experts of its layer were used since an expert's last use, while decoding.

    An LRU cache hits exactly the uses whose distance is below its slots. Distances are shares of
    the layer's experts, so that layers of different sizes add up.
    """
    distances: list[float] = []  # infinite for first uses
    for calls, experts in zip(routing.layers, routing.experts, strict=True):
        order: list[int] = []  # most recent first
        for rows in calls:
            needed = list(dict.fromkeys(rows.ravel().tolist()))
            for expert in needed if len(rows) == 1 else ():
                known = expert in order
                distances.append(order.index(expert) / experts if known else np.inf)
            order = needed + [e for e in order if e not in needed]
    grid, total = [i / 32 for i in range(33)], max(1, len(distances))
    uses = np.searchsorted(np.sort(np.array(distances)), grid, side="right") / total
    return report.Reuse(grid, uses.tolist(), distances.count(np.inf) / total)


def token_overlap(traces: Sequence[Routing]) -> list[report.Overlap]:
    """The part of a token's experts that the token `lag` before it used too, in the same layer.

    `by_chance` is the part under independent, even routing: top-k of all experts.
    """
    rows = []
    for lag in _LAGS:
        pairs = [
            (len(a & b) / len(b), len(a) / experts)
            for trace in traces
            for calls, experts in zip(trace.layers, trace.experts, strict=True)
            for sets in [[set(r.ravel().tolist()) for r in calls if len(r) == 1]]
            for a, b in zip(sets, sets[lag:])  # noqa: B905
        ]
        if pairs:
            rows.append(report.Overlap(lag, *map(statistics.fmean, zip(*pairs, strict=True))))
    return rows


def request_overlap(traces: Sequence[Routing]) -> list[list[float]]:
    """How alike two requests use experts: cosine of their counts of uses, mean over layers."""
    similarity = []
    for layer, experts in enumerate(traces[0].experts):
        calls = [np.concatenate([r.ravel() for r in t.layers[layer]]) for t in traces]
        uses = np.stack([np.bincount(x, minlength=experts) for x in calls])  # [traces, E]
        unit = uses / np.linalg.norm(uses, axis=1, keepdims=True)
        similarity.append(unit @ unit.T)  # [traces, traces]
    return np.mean(similarity, axis=0).tolist()

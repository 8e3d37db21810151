"""Uneven shares of a budget, layers kept whole, and hot sets, fitted on some traces for others.

`simulate` judges them on traces that were not used to fit them. No MLX, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .._cache.policies import PolicyMaker
from .._experts.trace import Routing
from .replay import replay_layer


def miss_curves(traces: Sequence[Routing], policy: str | PolicyMaker) -> list[np.ndarray]:
    """Capacity misses of each layer by its slots, summed over traces: float [experts + 1] each.

    Replayed at 17 sizes with straight lines between them; 0 slots count as 1.
    """
    curves = []
    for layer, experts in enumerate(traces[0].experts):
        sizes = np.unique(np.linspace(1, experts, 17).round().astype(int))
        misses = [
            sum(
                replay_layer(t.layers[layer], experts, int(n), policy).stats.capacity
                for t in traces
            )
            for n in sizes
        ]
        curves.append(np.interp(np.arange(experts + 1), sizes, misses))
    return curves


def share_by_gain(
    slots: Sequence[int], expert_bytes: Sequence[int], least: Sequence[int],
    curves: Sequence[np.ndarray],
) -> list[int]:  # fmt: skip
    """Give the bytes of an even division to the layers that gain most from them.

    Each step picks the layer and the number of slots that save most misses per byte. It looks
    beyond the next slot, since a curve may be flat first and steep later.

    Args:
        slots: the even division.
        least: slots that a layer keeps whatever it gains.
    """
    left = sum(n * b for n, b in zip(slots, expert_bytes, strict=True))
    shares = list(least)
    left -= sum(n * b for n, b in zip(shares, expert_bytes, strict=True))
    while True:
        best: tuple[float, int, int] | None = None
        for i, curve in enumerate(curves):
            most = min(len(curve) - 1 - shares[i], left // expert_bytes[i])
            if most < 1:
                continue
            steps = np.arange(1, most + 1)
            gains = (curve[shares[i]] - curve[shares[i] + steps]) / (steps * expert_bytes[i])
            step = int(np.argmax(gains))
            if best is None or gains[step] > best[0]:
                best = float(gains[step]), i, step + 1
        if best is None:
            return shares
        shares[best[1]] += best[2]
        left -= best[2] * expert_bytes[best[1]]


def keep_whole(
    count: int, slots: Sequence[int], experts: Sequence[int], expert_bytes: Sequence[int],
    least: Sequence[int], curves: Sequence[np.ndarray],
) -> list[int] | None:  # fmt: skip
    """Keep the `count` layers with most misses wholly resident; the others share the rest evenly.

    None if that leaves the others less than `least`.
    """
    order = sorted(range(len(slots)), key=lambda i: -curves[i][slots[i]])
    whole, others = order[:count], order[count:]
    left = sum(n * b for n, b in zip(slots, expert_bytes, strict=True))
    left -= sum(experts[i] * expert_bytes[i] for i in whole)
    shares = list(experts)
    for done, i in enumerate(others):
        shares[i] = min(experts[i], max(0, left) // ((len(others) - done) * expert_bytes[i]))
        left -= shares[i] * expert_bytes[i]
    return shares if all(shares[i] >= least[i] for i in others) else None


def hot_experts(traces: Sequence[Routing]) -> list[list[int]]:
    """Each layer's experts, most used first, over some traces."""
    order = []
    for layer, experts in enumerate(traces[0].experts):
        uses = np.zeros(experts, np.int64)
        for trace in traces:
            for rows in trace.layers[layer]:
                uses += np.bincount(rows.ravel(), minlength=experts)
        order.append(np.argsort(-uses, kind="stable").tolist())
    return order

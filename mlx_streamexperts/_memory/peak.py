"""Computes the peak memory of evaluating an MLX graph, without evaluating it.

`mx.export_function` lists a graph's operations with the shapes of their inputs and outputs. This
module puts them into MLX's order of evaluation and adds up the results alive at each step. It knows
no models.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

# MLX primitives whose result shares its input's memory; those in `_NEEDS_ORDER` copy an input that
# is not contiguous.
VIEWS = {
    "Transpose", "Broadcast", "BroadcastAxes", "Slice", "Split", "Squeeze", "ExpandDims",
    "AsStrided", "StopGradient", "Depends", "View", "Flatten", "Unflatten", "Reshape",
}  # fmt: skip
_KEEPS_ORDER = {"Squeeze", "ExpandDims", "StopGradient", "Depends", "View"}
_WIDTH = 20  # MLX_BFS_MAX_WIDTH
_NEEDS_ORDER = {"Flatten", "Unflatten", "Reshape"}

# Operations that may write their result over an input of the same size that nothing else needs.
_DONATES = {
    "Abs", "Add", "AsType", "Ceil", "Cos", "Divide", "Erf", "Exp", "Expm1", "Floor", "Log", "Log1p",
    "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative", "Power",
    "RMSNorm", "Round", "Rsqrt", "Select", "Sigmoid", "Sin", "SliceUpdate", "Softmax", "Sqrt",
    "Square", "Subtract", "Tanh",
}  # fmt: skip


def evaluation_order(
    nodes: Sequence[dict[str, Any]], outputs: Sequence[str]
) -> list[dict[str, Any]]:
    """Operations in the order in which MLX evaluates them.

    As `eval_impl` in MLX's transforms.cpp: breadth first from the results, depth first while more
    than `_WIDTH` operations wait, and the whole order reversed.

    Args:
        nodes: the graph's primitives, as `mx.export_function` reports them.
        outputs: names of the graph's results.
    """
    maker = {n: i for i, node in enumerate(nodes) for n, _, _ in node["outputs"]}
    children = [[maker[n] for n, _, _ in node["inputs"] if n in maker] for node in nodes]
    children.append([maker[n] for n in outputs if n in maker])  # root of the graph
    waits: Counter[int] = Counter()  # uses not yet seen
    unseen = [len(nodes)]
    while unseen:
        for i in children[unseen.pop()]:
            if not waits[i]:
                unseen.append(i)
            waits[i] += 1
    tape, done = [len(nodes)], 0
    stack: list[tuple[int, int]] = []
    while done < len(tape) or stack:
        if done < len(tape):
            (a, first), done = (tape[done], 0), done + 1
        else:
            a, first = stack.pop()
        for place in range(first, len(children[a])):
            if len(tape) - done >= _WIDTH:
                stack.append((a, place))
                break
            i = children[a][place]
            waits[i] -= 1
            if waits[i] == 0:
                tape.append(i)
    return [nodes[i] for i in reversed(tape[1:])]


def peak_bytes(nodes: Sequence[dict[str, Any]], outputs: Sequence[str], held: Sequence[str]) -> int:
    """Peak memory of evaluating a graph, in bytes, beyond that of its `held` inputs.

    Args:
        nodes: operations in the order of their evaluation.
        outputs: arrays that are kept at the end.
        held: inputs that are freed after their last use. Other inputs are kept and not counted.
    """
    root: dict[str, str] = {}  # array -> array whose memory it shares
    ordered: set[str] = set()  # contiguous arrays
    size: dict[str, int] = {}
    uses: Counter[str] = Counter()  # by owner of the memory
    steps = []  # of each node: its name, owners of its inputs, results that own memory
    owned = set(held)
    for node in nodes:
        ins = [(n, math.prod(shape) * dtype.size) for n, shape, dtype in node["inputs"]]
        for n, nbytes in ins:
            if n not in root:  # a weight, a constant or an input
                root[n] = n
                ordered.add(n)
                size[n] = nbytes if n in owned else 0
        parents = [root[n] for n, _ in ins]
        uses.update(parents)
        name, fresh = node["name"], []
        is_view = name in VIEWS and (name not in _NEEDS_ORDER or ins[0][0] in ordered)
        for n, shape, dtype in node["outputs"]:
            if is_view:
                root[n] = root[ins[0][0]]
                if name in _KEEPS_ORDER | _NEEDS_ORDER and ins[0][0] in ordered:
                    ordered.add(n)
            else:
                root[n], size[n] = n, math.prod(shape) * dtype.size
                ordered.add(n)
                fresh.append(n)
        steps.append((name, parents, fresh))
    for n in outputs:
        uses[root.get(n, n)] += 1
    now = base = sum(size.get(n, 0) for n in owned)
    peak = now
    merged: dict[str, str] = {}

    def owner(n: str) -> str:
        while n in merged:
            n = merged[n]
        return n

    for name, parents, fresh in steps:
        owners = [owner(p) for p in parents]
        gone = Counter(owners)
        for n in fresh:
            donor = None
            if name in _DONATES:
                last = (o for o in owners if size[o] and uses[o] == gone[o])
                donor = next((o for o in last if size[o] == size[n]), None)
            if donor is not None:
                merged[donor] = n  # the same memory under another name
                gone.pop(donor)
            else:
                now += size[n]
        peak = max(peak, now)
        for o, count in gone.items():
            uses[o] -= count
            if uses[o] == 0:
                now -= size[o]
        for n in fresh:
            if uses[n] == 0:
                now -= size[n]
    return peak - base

"""What a forward pass takes beside the weights: KV cache and work space, from the model's graph.

MLX is lazy: a pass can be built without computing anything, and `mx.export_function` tells every
operation of it with the shapes of its inputs and outputs. Walking them in order, with each result
freed after its last use, gives the peak of any attention that a family has: scores that are
materialised or not, masks, sparse indexers, sliding windows, states. It is the graph of this
machine's device, which decides whether attention has a fused kernel (`use_fallback` in MLX's
`backend/*/scaled_dot_product_attention.cpp`).

Nothing here evaluates an array or keeps one.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models import cache as stock

from .._hooks import intercept, swapped

# Results that share their input's memory (MLX's primitives of these names copy nothing), where the
# input is contiguous for the last two.
_VIEWS = {
    "Transpose", "Broadcast", "BroadcastAxes", "Slice", "Split", "Squeeze", "ExpandDims",
    "AsStrided", "StopGradient", "Depends", "View", "Flatten", "Unflatten", "Reshape",
}  # fmt: skip
_KEEPS_ORDER = {"Squeeze", "ExpandDims", "StopGradient", "Depends", "View"}
_WIDTH = 20  # MLX_BFS_MAX_WIDTH
_NEEDS_ORDER = {"Flatten", "Unflatten", "Reshape"}

# Operations that write their result over an input of the same size that nothing else needs.
_DONATES = {
    "Abs", "Add", "AsType", "Ceil", "Cos", "Divide", "Erf", "Exp", "Expm1", "Floor", "Log", "Log1p",
    "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum", "Multiply", "Negative", "Power",
    "RMSNorm", "Round", "Rsqrt", "Select", "Sigmoid", "Sin", "SliceUpdate", "Softmax", "Sqrt",
    "Square", "Subtract", "Tanh",
}  # fmt: skip


def in_order(nodes: Sequence[dict[str, Any]], outputs: Sequence[str]) -> list[dict[str, Any]]:
    """Operations in the order in which MLX evaluates them.

    Breadth first from the results, a stack where more than `_WIDTH` wait, and all of it backwards
    (`eval_impl` in MLX's transforms.cpp).
    """
    maker = {n: i for i, node in enumerate(nodes) for n, _, _ in node["outputs"]}
    children = [[maker[n] for n, _, _ in node["inputs"] if n in maker] for node in nodes]
    children.append([maker[n] for n in outputs if n in maker])  # of what waits for all of them
    waits: Counter[int] = Counter()  # for how many uses to be seen
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
    """The most memory that evaluating a graph takes beyond what `held` inputs have at its start.

    Args:
        nodes: operations in the order of their evaluation.
        outputs: arrays that are still wanted at the end.
        held: inputs that are freed after their last use. Other inputs belong to somebody else.
    """
    root: dict[str, str] = {}  # array -> whose memory it has
    ordered: set[str] = set()  # contiguous arrays
    size: dict[str, int] = {}
    uses: Counter[str] = Counter()  # by owner of the memory
    place = []  # of each node: owners of its inputs, results that own memory
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
        is_view = name in _VIEWS and (name not in _NEEDS_ORDER or ins[0][0] in ordered)
        for n, shape, dtype in node["outputs"]:
            if is_view:
                root[n] = root[ins[0][0]]
                if name in _KEEPS_ORDER | _NEEDS_ORDER and ins[0][0] in ordered:
                    ordered.add(n)
            else:
                root[n], size[n] = n, math.prod(shape) * dtype.size
                ordered.add(n)
                fresh.append(n)
        place.append((name, parents, fresh))
    for n in outputs:
        uses[root.get(n, n)] += 1
    now = base = sum(size.get(n, 0) for n in owned)
    peak = now
    merged: dict[str, str] = {}

    def owner(n: str) -> str:
        while n in merged:
            n = merged[n]
        return n

    for name, parents, fresh in place:
        owners = [owner(p) for p in parents]
        gone = Counter(owners)
        for n in fresh:
            donor = None
            if name in _DONATES:
                last = (o for o in owners if size[o] and uses[o] == gone[o])
                donor = next((o for o in last if size[o] == size[n]), None)
            if donor is not None:
                merged[donor] = n  # the memory goes on under another name
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


# Tokens of the passes that are traced, and of the contexts at whose end they are. Between these
# work space is taken to be a straight line, which is never less than the true one: the most of
# several straight lines curves upwards. Beyond them it goes on as it ended.
_CHUNKS = (2, 512)
_CONTEXTS = (512, 1 << 15)
# A model whose graph has operations for every token is traced with few; so that its attention shows
# beside those, at the end of a long context.
_LOOPED_CHUNKS = (2, 24)
_LOOPED_CONTEXTS = (512, 1 << 21)
_PROBE = (16, 32)  # tokens after which caches are measured
_MARGIN = 1.1  # predicted work space was 0.93 to 1.05 of what was measured, over 57 families
STEP = 256  # mlx-lm's caches grow by so many tokens
_FEW = 8
_ITEM_BYTES = 4  # of an estimate: float32
_log = logging.getLogger(__name__)
_FLOOR_BYTES = 8 << 20  # sampling, small arrays
_LOGIT_COPIES = 8  # logits of a token, and the sampler's copies
_GROWING = (stock.KVCache, stock.RotatingKVCache, stock.ChunkedKVCache)


@dataclass(frozen=True)
class LayerCache:
    """What the cache of one layer takes for one sequence.

    Attributes:
        token: bytes that each token adds.
        state: bytes whatever the length (linear attention, Mamba).
        kept: the last tokens that it keeps; None where it keeps all.
    """

    token: int
    state: int = 0
    kept: int | None = None


@dataclass(frozen=True)
class Footprint:
    """Memory of one sequence's passes beside the weights, in bytes.

    Attributes:
        layers: the caches of each decoder layer, in order.
        chunks, contexts: tokens of a pass, and tokens of the context at its end, of `peaks`.
        peaks: what a pass's operations take one after the other, by chunk and context.
        totals: what they would take if nothing were freed before the end of the pass.
        logits: one token's.
        scores: attention's between one new token and one of the context, where they are
            materialised: of all heads, with copies.
        unfinished: what a GPU's operations hold after they were begun, beyond what the next ones
            need (`platform.unfinished_bytes`).
    """

    layers: tuple[tuple[LayerCache, ...], ...]
    chunks: tuple[int, int]
    contexts: tuple[int, int]
    peaks: tuple[tuple[int, int], tuple[int, int]]
    totals: tuple[tuple[int, int], tuple[int, int]]
    logits: int
    scores: int = 0
    unfinished: int = 0

    def of_layers(self, start: int, end: int) -> Footprint:
        """The footprint of some decoder layers, where several machines share the model.

        Args:
            start, end: the first of them, and the one after the last.
        """
        return replace(self, layers=self.layers[start:end])

    @property
    def state(self) -> int:
        """What a sequence keeps whatever its length."""
        return sum(c.state for layer in self.layers for c in layer)

    @property
    def token(self) -> int:
        """What one token adds to all caches."""
        return sum(c.token for layer in self.layers for c in layer)

    def kv(self, context: int, chunk: int = 0) -> int:
        """KV cache and state of a sequence.

        Args:
            context: its tokens.
            chunk: tokens of its longest pass, which a window holds besides.
        """
        total = 0
        for c in (c for layer in self.layers for c in layer):
            tokens = context if c.kept is None else min(context, c.kept + chunk)
            total += c.state + c.token * (tokens + STEP - 1)  # it grows by whole steps
        return total

    def grown(self, added: int, chunk: int = 0) -> int:
        """KV cache that a sequence's next tokens add.

        Args:
            added: tokens that its caches allocate.
            chunk: as for `kv`.
        """
        total = 0
        for c in (c for layer in self.layers for c in layer):
            total += c.token * (added if c.kept is None else min(added, c.kept + chunk))
        return total

    def work(self, chunk: int, context: int, sequences: int = 1, quantized: bool = False) -> int:
        """Work space of a pass.

        Args:
            chunk: its tokens of each sequence.
            context: tokens of each sequence after it.
            sequences: that it has side by side.
            quantized: keys and values are, so that attention has no fused kernel.
        """
        peak = self._between(self.peaks, chunk, context)
        held = self.unfinished
        if held:
            total = sequences * self._between(self.totals, chunk, context)
            held = int(max(0.0, min(held, total - sequences * peak)))
        # A cache that grows is copied, one layer after the other.
        most = max((c.token for layer in self.layers for c in layer if c.kept is None), default=0)
        if quantized:
            peak += self.scores * chunk * context
        each = int(peak) + most * _up(context) + _LOGIT_COPIES * self.logits
        return sequences * each + held + _FLOOR_BYTES

    def _between(
        self, corners: tuple[tuple[int, int], tuple[int, int]], chunk: int, context: int
    ) -> float:
        (c0, c1), (s0, s1) = self.chunks, self.contexts
        share = (max(context, s0) - s0) / (s1 - s0)
        low, high = (p[0] + share * (p[1] - p[0]) for p in corners)
        return low + max(0.0, high - low) * (max(chunk, c0) - c0) / (c1 - c0)

    def longest_chunk(
        self,
        work_bytes: int,
        past: int,
        longest: int,
        sequences: int = 1,
        quantized: bool = False,
    ) -> int:
        """The most tokens of a pass for which that much work space will do; at least 1.

        Args:
            work_bytes: there is.
            past: tokens of the context before the pass.
            longest: tokens that are to come.
            sequences: that the pass has side by side.
            quantized: as for `work`.
        """
        low, high = 1, max(1, longest)
        while low < high:
            middle = (low + high + 1) // 2
            if self.work(middle, past + middle, sequences, quantized) <= work_bytes:
                low = middle
            else:
                high = middle - 1
        return low


def measure(
    model: nn.Module, switches: Sequence[tuple[nn.Module, int]], config: dict[str, Any]
) -> Footprint:
    """The footprint of a model, of which nothing is evaluated.

    An estimate takes its place where the model's graph cannot be built here (a family may need
    another device), or where MLX cannot tell one of its operations.

    Args:
        model: mlx-lm's, its weights evaluated or not.
        switches: its expert modules, with the width of an expert's hidden layer each.
        config: config.json's part about the language model.
    """
    try:
        layers, logits = _caches(model)
        chunks, contexts = _CHUNKS, _CONTEXTS
        if _trace(model, switches, 3, 3).operations != _trace(model, switches, 4, 4).operations:
            chunks, contexts = _LOOPED_CHUNKS, _LOOPED_CONTEXTS
        few, many = ([_trace(model, switches, c, n) for n in contexts] for c in chunks)

        def corners(of: Callable[[_Trace], int]) -> tuple[tuple[int, int], tuple[int, int]]:
            (a, b), (c, d) = (of(few[0]), of(few[1])), (of(many[0]), of(many[1]))
            return (a, max(a, b)), (c, max(c, d))

        peaks = corners(lambda t: int(_MARGIN * t.peak))
        return Footprint(layers, chunks, contexts, peaks, corners(lambda t: t.total), logits)
    except Exception as e:
        reason = f"{type(e).__name__}: {e}"
        _log.warning(f"KV cache and work space of this model are estimated: {reason}")
        return _estimate(switches, config)


def _estimate(switches: Sequence[tuple[nn.Module, int]], config: dict[str, Any]) -> Footprint:
    """A generous footprint from a configuration: all layers attend to everything, unfused."""

    def number(*keys: str, default: int) -> int:
        return next((v for k in keys if isinstance(v := config.get(k), int) and v > 0), default)

    hidden = number("hidden_size", "d_model", default=4096)
    heads = number("num_attention_heads", "n_heads", default=32)
    width = number("num_key_value_heads", default=heads) * number(
        "head_dim", default=max(1, hidden // heads)
    )
    inner = max((n for _, n in switches), default=hidden)
    layers = number("num_hidden_layers", "n_layers", default=len(switches))
    top_k = number("num_experts_per_tok", "top_k_experts", "moe_topk", default=8)
    row = top_k * 4 * (hidden + inner) + 20 * max(hidden, number("intermediate_size", default=1))
    each = tuple(_ITEM_BYTES * (row + 6 * heads * n) for n in _CONTEXTS)
    (a, b), (c, d) = ([chunk * n for n in each] for chunk in _CHUNKS)
    return Footprint(
        ((LayerCache(2 * width * _ITEM_BYTES),),) * layers,
        _CHUNKS,
        _CONTEXTS,
        ((a, b), (c, d)),
        ((3 * a, 3 * b), (3 * c, 3 * d)),
        _ITEM_BYTES * number("vocab_size", default=1 << 17),
    )


def _up(tokens: int) -> int:
    return -(-tokens // STEP) * STEP


def allocated(caches: Sequence[Any], tokens: int) -> int:
    """Tokens that caches have to allocate room for, to take some more of each sequence."""
    for cache in leaves(caches):
        keys = getattr(cache, "keys", None)
        if isinstance(keys, mx.array) and _kept(cache) is None:
            free = keys.shape[2] - tokens_in(cache)
            return 0 if tokens <= free else _up(tokens)
    return _up(tokens)


def tokens_in(cache: Any) -> int:
    """Tokens of each sequence in a single cache."""
    for name in ("offset", "_offset", "_idx"):  # of batches, `offset` is an array
        value = getattr(cache, name, None)
        if isinstance(value, int):
            return value
    return 0


def leaves(caches: Sequence[Any]) -> Iterator[Any]:
    """Single caches, of lists of caches those within."""
    for cache in caches:
        if cache is None:
            continue
        inner = getattr(cache, "caches", None)
        yield from leaves(inner) if inner is not None else (cache,)


def _arrays(caches: Sequence[Any]) -> list[mx.array]:
    """Every array that caches hold, in a fixed order."""
    found: Any = tree_flatten([vars(c) for c in leaves(caches)])
    return [a for _, a in found if isinstance(a, mx.array)]


def _exchange(caches: Sequence[Any], arrays: Sequence[mx.array]) -> None:
    """Give caches other arrays, in the order of `_arrays`."""
    fresh = iter(arrays)
    for cache in leaves(caches):
        for name, value in vars(cache).items():
            new = tree_map(lambda v: next(fresh) if isinstance(v, mx.array) else v, value)
            setattr(cache, name, new)


def _caches(model: nn.Module) -> tuple[tuple[tuple[LayerCache, ...], ...], int]:
    """What the caches of each layer take, and bytes of a token's logits."""
    found, logits = [], 0
    for tokens in _PROBE:
        fresh = copied(model)
        caches: list[Any] = stock.make_prompt_cache(fresh)
        result = fresh(mx.zeros((1, tokens), mx.int32), cache=caches)
        logits = result.nbytes // tokens
        found.append(caches)
    layers = []
    for few, many in zip(*found, strict=True):
        pairs = zip(leaves([few]), leaves([many]), strict=True)
        layers.append(tuple(_measured(a, b) for a, b in pairs))
    return tuple(layers), logits


def _measured(few: Any, many: Any) -> LayerCache:
    """What a cache takes, from the same one after few tokens and after many."""
    if isinstance(keys := getattr(many, "keys", None), mx.array):  # allocated in steps
        return LayerCache(many.nbytes // keys.shape[2], 0, _kept(many))
    a, b = (sum(x.nbytes for x in _arrays([c])) for c in (few, many))
    token = -(-(b - a) // (_PROBE[1] - _PROBE[0]))
    return LayerCache(token, max(0, b - _PROBE[1] * token))


def _kept(cache: Any) -> int | None:
    """The last tokens that a cache keeps; None where it keeps all."""
    return getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """The same model of the same arrays: what is left in its modules is left in the copy.

    Args:
        memo: filled with the copies, by the identity of what was copied.
    """
    memo = {} if memo is None else memo
    arrays: Any = tree_flatten(model)
    memo.update((id(a), a) for _, a in arrays if isinstance(a, mx.array))
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class _Trace:
    """What a traced pass takes in bytes, one operation after the other and all together."""

    peak: int
    total: int
    operations: int


def _trace(
    model: nn.Module, switches: Sequence[tuple[nn.Module, int]], chunk: int, context: int
) -> _Trace:
    """A pass of `chunk` tokens at the end of `context`."""
    caches = _filled(copied(model), max(0, context - chunk), context)
    memo: dict[int, Any] = {}
    model = copied(model, memo)
    switches = [(memo[id(module)], width) for module, width in switches]
    weights: dict[str, Any] = dict(tree_flatten(model.parameters()))
    cached = {f"cache {i:06}": a for i, a in enumerate(_arrays(caches))}
    nodes: list[dict[str, Any]] = []
    outputs: list[str] = []
    held: list[str] = []

    def note(found: dict[str, Any]) -> None:
        if found["type"] == "primitive":
            nodes.append(found)
        elif found["type"] == "outputs":
            outputs.extend(n for n, _, _ in found["outputs"])
        elif found["type"] == "keyword_inputs":
            held.extend(n for key, n in found["keywords"] if key in cached)

    def run(tokens: mx.array, **arrays: mx.array) -> list[mx.array]:
        model.update(tree_unflatten([(k, arrays[k]) for k in weights]))
        _exchange(caches, [arrays[k] for k in cached])
        with _standing_in(switches) as results:
            logits = model(tokens, cache=caches)
        return [*_arrays(caches), logits if chunk == 2 else results[-1]]

    with _exportable():
        mx.export_function(note, run, (mx.zeros((1, chunk), mx.int32),), {**weights, **cached})
    results = (r for node in nodes if node["name"] not in _VIEWS for r in node["outputs"])
    total = sum(math.prod(shape) * dtype.size for _, shape, dtype in results)
    return _Trace(peak_bytes(in_order(nodes, outputs), outputs, held), total, len(nodes))


def _filled(model: nn.Module, tokens: int, capacity: int) -> list[Any]:
    """Caches that hold `tokens` tokens and have room for `capacity`; nothing of it is computed."""
    caches: list[Any] = stock.make_prompt_cache(model)
    if tokens == 0:
        return caches
    known = all(type(c) in (*_GROWING, stock.ArraysCache) for c in leaves(caches))
    # A state's graph may have operations for every token: few will do, for it keeps its size.
    model(mx.zeros((1, min(tokens, _FEW) if known else tokens), mx.int32), cache=caches)
    for cache in leaves(caches) if known else ():
        if type(cache) is stock.ArraysCache or cache.keys is None:
            continue
        kept = _kept(cache)
        room = _up(capacity) if kept is None else min(tokens, kept)
        for name in ("keys", "values"):
            array = getattr(cache, name)
            shape = (*array.shape[:2], room, array.shape[3])
            setattr(cache, name, mx.zeros(shape, array.dtype))
        cache.offset = tokens
        if isinstance(cache, stock.RotatingKVCache):
            cache._idx = room
        elif isinstance(cache, stock.ChunkedKVCache):
            cache.start_position = tokens - room
    return caches


@contextmanager
def _exportable() -> Iterator[None]:
    """Put operations that MLX can tell in the place of those that it cannot, for this thread."""
    mine = threading.get_ident()
    instead: dict[str, Callable[..., mx.array]] = {
        "contiguous": lambda a, *_, **__: mx.abs(a),
        "to_fp8": lambda a, *_, **__: mx.abs(a).astype(mx.uint8),
        "from_fp8": lambda a, dtype=mx.bfloat16, **__: a.astype(dtype),
    }
    originals: dict[str, Callable[..., mx.array]] = {}

    def either(name: str) -> Callable[..., mx.array]:
        def call(*args: Any, **kwargs: Any) -> mx.array:
            ours = threading.get_ident() == mine
            return (instead if ours else originals)[name](*args, **kwargs)

        return call

    with _exporting:  # the originals too: another thread's stand-ins are none
        originals.update((name, getattr(mx, name)) for name in instead)
        with swapped(mx, **{name: either(name) for name in instead}):
            yield


_exporting = threading.Lock()


@contextmanager
def _standing_in(switches: Sequence[tuple[nn.Module, int]]) -> Iterator[list[mx.array]]:
    """Let expert modules only take the memory that streamed ones do; yields their results.

    The (token, expert) rows of a call have input, gate, up, activation and output each; a wave
    computes while the one before is collected.
    """
    results: list[mx.array] = []
    kinds = [(module, type(module)) for module, _ in switches]

    def call_of(inner: int) -> Callable[..., mx.array]:
        def call(self: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
            width = x.shape[-1]
            chosen = mx.sum(x).astype(x.dtype) + mx.sum(indices).astype(x.dtype)
            scratch = mx.zeros(4 * indices.size * (width + inner), x.dtype) + chosen
            y = mx.zeros((*indices.shape, width), x.dtype) + mx.sum(scratch)
            results.append(y)
            return y

        return call

    try:
        for module, inner in switches:
            intercept(module, call_of(inner))
        yield results
    finally:
        for module, kind in kinds:
            module.__class__ = kind

"""Measures a model's footprint from the graph of its own forward pass.

MLX is lazy, so a pass can be built without computing anything. Its graph shows the peak of whatever
attention a family has: materialized scores, masks, sparse indexers, sliding windows, states. The
graph is that of this machine's device, which decides whether attention has a fused kernel
(`use_fallback` in MLX's `backend/*/scaled_dot_product_attention.cpp`). Nothing here evaluates an
array or keeps one.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from .._hooks import intercept, logits_of, swapped_in_thread
from .footprint import FLOOR_BYTES, Footprint, LayerCache, kept_tokens, leaves, whole_steps
from .peak import VIEWS, evaluation_order, peak_bytes

_log = logging.getLogger(__name__)

# Tokens of the measured passes, and of the contexts at their ends. Between them work space is
# interpolated linearly. That is never too little: it is the maximum of several linear functions,
# and so convex. Beyond them it continues linearly.
_CHUNKS = (2, 512)
_CONTEXTS = (512, 1 << 15)
# For a model whose graph has operations for every token: few tokens, so that the graph stays small,
# at the end of a long context, so that attention still shows.
_LOOPED_CHUNKS = (2, 24)
_LOOPED_CONTEXTS = (512, 1 << 21)
# Passes whose numbers of operations tell such a graph. From 9 tokens on mlx-vlm runs them together;
# an operation more or less, for padding, is no loop.
_COMPARED = (16, 32)
_CACHED = (16, 32)  # tokens after which caches are measured
_MARGIN = 1.1  # predicted work space was 0.93 to 1.05 of the measured one, over 57 families
_FEW = 8
_ITEM_BYTES = 4  # of an estimate: float32
# By name: mlx-vlm has classes of its own beside mlx-lm's.
_GROWING = {"KVCache", "RotatingKVCache", "ChunkedKVCache"}
_KNOWN = _GROWING | {"ArraysCache", "PoolingCache"}


def measure(
    model: nn.Module, switches: Sequence[tuple[nn.Module, int]], config: dict[str, Any]
) -> Footprint:
    """Measure a model's footprint; nothing is evaluated.

    If the graph cannot be built here (a family may need another device), or MLX cannot export one
    of its operations, the footprint is estimated from the configuration, with a warning.

    Args:
        model: a model of mlx-lm, its weights evaluated or not.
        switches: its expert modules, each with the width of an expert's hidden layer; may be none.
        config: the language model's part of config.json.
    """
    try:
        return _measure(model, switches)
    except Exception as e:
        reason = f"{type(e).__name__}: {e}"
        _log.warning(f"KV cache and work space of this model are estimated: {reason}")
        return _estimate(switches, config)


def _measure(model: nn.Module, switches: Sequence[tuple[nn.Module, int]]) -> Footprint:
    with unevaluated():
        layers, logits = _caches(model)
        chunks, contexts = _CHUNKS, _CONTEXTS
        few, many = (_pass_size(model, switches, n, n).operations for n in _COMPARED)
        if many - few >= _COMPARED[1] - _COMPARED[0]:
            chunks, contexts = _LOOPED_CHUNKS, _LOOPED_CONTEXTS
        low, high = ([_pass_size(model, switches, c, n) for n in contexts] for c in chunks)

        def corners(of: Callable[[_PassSize], int]) -> tuple[tuple[int, int], tuple[int, int]]:
            (a, b), (c, d) = (of(low[0]), of(low[1])), (of(high[0]), of(high[1]))
            return (a, max(a, b)), (c, max(c, d))

        peaks = corners(lambda t: int(_MARGIN * t.peak))
        return Footprint(layers, chunks, contexts, peaks, corners(lambda t: t.total), logits)


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


def _arrays(caches: Sequence[Any]) -> list[mx.array]:
    """Every array that caches hold, in a fixed order."""
    found: Any = tree_flatten([vars(c) for c in leaves(caches)])
    return [a for _, a in found if isinstance(a, mx.array)]


def _exchange(caches: Sequence[Any], arrays: Sequence[mx.array]) -> None:
    """Replace the arrays of caches, in the order of `_arrays`."""
    fresh = iter(arrays)
    for cache in leaves(caches):
        for name, value in vars(cache).items():
            new = tree_map(lambda v: next(fresh) if isinstance(v, mx.array) else v, value)
            setattr(cache, name, new)


def _caches(model: nn.Module) -> tuple[tuple[tuple[LayerCache, ...], ...], int]:
    """Size of the caches of each layer, and bytes of a token's logits."""
    found, logits = [], 0
    for tokens in _CACHED:
        fresh = copied(model)
        caches = _empty_caches(fresh)
        result = logits_of(fresh(mx.zeros((1, tokens), mx.int32), cache=caches))
        logits = result.nbytes // tokens
        found.append(caches)
    layers = []
    for few, many in zip(*found, strict=True):
        pairs = zip(leaves([few]), leaves([many]), strict=True)
        layers.append(tuple(_measured(a, b) for a, b in pairs))
    return tuple(layers), logits


def _measured(few: Any, many: Any) -> LayerCache:
    """Size of a cache, from the same one after few tokens and after many."""
    if isinstance(keys := getattr(many, "keys", None), mx.array):  # allocated in steps
        return LayerCache(many.nbytes // keys.shape[2], 0, kept_tokens(many))
    a, b = (sum(x.nbytes for x in _arrays([c])) for c in (few, many))
    ratio = getattr(many, "ratio", 0)
    if ratio > _CACHED[1] and (buffer := many.buf_kv) is not None:  # it has pooled nothing yet
        return LayerCache(-(-buffer.nbytes // ratio**2), b)
    token = -(-(b - a) // (_CACHED[1] - _CACHED[0]))
    return LayerCache(token, max(0, b - _CACHED[1] * token))


def copied(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of a model with the same arrays: running the copy leaves nothing in the original.

    Args:
        memo: filled with the copies, by the `id` of their originals.
    """
    memo = {} if memo is None else memo
    arrays: Any = tree_flatten(model)
    memo.update((id(a), a) for _, a in arrays if isinstance(a, mx.array))
    return copy.deepcopy(model, memo)


@dataclass(frozen=True)
class _PassSize:
    """Size of a pass in bytes: with one operation at a time, and of all results together."""

    peak: int
    total: int
    operations: int


def _pass_size(
    model: nn.Module, switches: Sequence[tuple[nn.Module, int]], chunk: int, context: int
) -> _PassSize:
    """Size of a pass of `chunk` tokens at the end of `context` tokens."""
    caches = _filled(copied(model), max(0, context - chunk), context)
    memo: dict[int, Any] = {}
    model = copied(model, memo)
    switches = [(memo[id(module)], width) for module, width in switches]
    weights: dict[str, Any] = dict(tree_flatten(model.parameters()))
    cached = {f"cache {i:06}": a for i, a in enumerate(_arrays(caches))}

    def run(tokens: mx.array, **arrays: mx.array) -> list[mx.array]:
        model.update(tree_unflatten([(k, arrays[k]) for k in weights]))
        _exchange(caches, [arrays[k] for k in cached])
        with _standing_in(switches) if switches else _noted(model) as results:
            logits = logits_of(model(tokens, cache=caches))
        return [*_arrays(caches), logits if chunk == 2 else results[-1]]

    return _graph_size(run, (mx.zeros((1, chunk), mx.int32),), {**weights, **cached}, set(cached))


def work_of(
    run: Callable[[dict[str, mx.array]], list[mx.array]], given: dict[str, mx.array]
) -> tuple[int, int]:
    """Memory that a computation takes beside its input, in bytes; it is not run.

    Args:
        run: returns the results, given arrays like those of `given` of which it may read no number.
        given: arrays of its input by name.

    Returns:
        The peak with one operation running at a time, and the size of all results together.

    Raises:
        Exception: `run` does, or MLX cannot export one of its operations.
    """
    names = {f"input {i:06}": name for i, name in enumerate(given)}
    arrays = {key: given[name] for key, name in names.items()}
    with unevaluated():
        size = _graph_size(lambda **a: run({names[k]: a[k] for k in a}), (), arrays, set())
    return int(_MARGIN * size.peak) + FLOOR_BYTES, size.total


def _graph_size(
    run: Callable[..., list[mx.array]],
    args: tuple[mx.array, ...],
    arrays: dict[str, mx.array],
    freed: set[str],
) -> _PassSize:
    """Size of the graph that `run(*args, **arrays)` builds.

    Args:
        freed: names of `arrays` that are freed after their last use.
    """
    nodes: list[dict[str, Any]] = []
    outputs: list[str] = []
    held: list[str] = []

    def note(found: dict[str, Any]) -> None:
        if found["type"] == "primitive":
            nodes.append(found)
        elif found["type"] == "outputs":
            outputs.extend(n for n, _, _ in found["outputs"])
        elif found["type"] == "keyword_inputs":
            held.extend(n for key, n in found["keywords"] if key in freed)

    with _exportable():
        mx.export_function(note, run, args, arrays)
    results = (r for node in nodes if node["name"] not in VIEWS for r in node["outputs"])
    total = sum(math.prod(shape) * dtype.size for _, shape, dtype in results)
    return _PassSize(peak_bytes(evaluation_order(nodes, outputs), outputs, held), total, len(nodes))


def _filled(model: nn.Module, tokens: int, capacity: int) -> list[Any]:
    """Caches with `tokens` tokens and room for `capacity`; nothing of them is evaluated."""
    caches = _empty_caches(model)
    if tokens == 0:
        return caches
    known = all(type(c).__name__ in _KNOWN for c in leaves(caches))
    # A state's graph may have operations for every token; a few do, since its size is constant.
    model(mx.zeros((1, min(tokens, _FEW) if known else tokens), mx.int32), cache=caches)
    for cache in leaves(caches) if known else ():
        kind = type(cache).__name__
        if kind == "PoolingCache" and cache.buf_kv is not None:
            like = cache.buf_kv if cache.pooled is None else cache.pooled  # [B, _, D]
            shape = (like.shape[0], tokens // cache.ratio, like.shape[2])
            cache.pooled = mx.zeros(shape, like.dtype)
        if kind not in _GROWING or cache.keys is None:
            continue
        kept = kept_tokens(cache)
        room = whole_steps(capacity) if kept is None else min(tokens, kept)
        for name in ("keys", "values"):
            array = getattr(cache, name)
            shape = (*array.shape[:2], room, array.shape[3])
            setattr(cache, name, mx.zeros(shape, array.dtype))
        cache.offset = tokens
        if kind == "RotatingKVCache":
            cache._idx = room
        elif kind == "ChunkedKVCache":
            cache.start_position = tokens - room
    return caches


def unevaluated() -> AbstractContextManager[None]:
    """Let a family's own evaluations do nothing, for this thread.

    mlx-vlm's DeepSeek V4 starts each token of a short pass, and its qwen4_exp each layer of a
    token. They would read all experts here.
    """
    return swapped_in_thread(mx, eval=lambda *_: None, async_eval=lambda *_: None)


def _exportable() -> AbstractContextManager[None]:
    """Replace operations that MLX cannot export by others of the same size, for this thread."""
    return swapped_in_thread(
        mx,
        contiguous=lambda a, *_, **__: mx.abs(a),
        to_fp8=lambda a, *_, **__: mx.abs(a).astype(mx.uint8),
        from_fp8=lambda a, dtype=mx.bfloat16, **__: a.astype(dtype),
    )


@contextmanager
def _noted(model: nn.Module) -> Iterator[list[mx.array]]:
    """Yields the results of the last layer of a model without experts."""
    results: list[mx.array] = []
    last = model.layers[-1]
    kind: Any = type(last)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = kind.__call__(self, *args, **kwargs)
        results.append(result if isinstance(result, mx.array) else result[0])
        return result

    intercept(last, call)
    try:
        yield results
    finally:
        last.__class__ = kind


@contextmanager
def _standing_in(switches: Sequence[tuple[nn.Module, int]]) -> Iterator[list[mx.array]]:
    """Replace calls of expert modules by arrays of a streamed layer's size; yields their results.

    Each (token, expert) row has input, gate, up, activation and output. One wave computes while the
    wave before it is collected.
    """
    results: list[mx.array] = []
    kinds = [(module, type(module)) for module, _ in switches]

    def call_of(inner: int) -> Callable[..., mx.array]:
        def call(
            self: Any,
            x: mx.array,
            indices: mx.array,
            weights: Any = None,
            *shared: Any,
            **more: Any,
        ) -> mx.array:
            width = x.shape[-1]
            chosen = mx.sum(x).astype(x.dtype) + mx.sum(indices).astype(x.dtype)
            scratch = mx.zeros(4 * indices.size * (width + inner), x.dtype) + chosen
            y = mx.zeros((*indices.shape, width), x.dtype) + mx.sum(scratch)
            results.append(y)
            # mlx-vlm's SwitchGLU adds shared experts; they are added to a streamed layer's result.
            return self._combine(y, weights, *shared, **more) if shared else y

        return call

    try:
        for module, inner in switches:
            intercept(module, call_of(inner))
        yield results
    finally:
        for module, kind in kinds:
            module.__class__ = kind


def _empty_caches(model: nn.Module) -> list[Any]:
    """A model's empty KV caches."""
    from mlx_lm.models.cache import make_prompt_cache  # here: plans from sizes alone do without

    made: list[Any] = make_prompt_cache(model)
    return made

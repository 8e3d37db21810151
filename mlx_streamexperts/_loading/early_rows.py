"""Reads rows of streamed tables before the layers that look them up are called.

Which rows a pass needs follows from its token ids alone. The family's own code computes them: an
n-gram module is called once more, on a copy of its cache, with tables that only note the ids
(`rehearsal`). A wrong guess costs a read and never changes a result, since every layer looks up
its own ids afterwards.

Per-layer embeddings are looked up first thing in a pass: there is nothing to be early for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .._experts.bank import numbers
from .._experts.refusals import refuse_transforms
from .._experts.rows import Rows, RowTable, rehearsal
from .._hooks import Pass, intercept

Run = Callable[[Callable[[], Any], int, Any], Any]
"""Runs a pass, given its number of tokens and its caches."""


def reading_early(rows: Rows, language: nn.Module, run: Run | None) -> Run | None:
    """Let a model's passes begin to read their rows at once.

    Args:
        rows: its streamed tables.
        language: the part of the model whose calls are passes.
        run: runs a pass; None for the pass itself.

    Returns:
        What runs a pass from now on; `run` itself if its rows cannot be read before.
    """
    if not rows.tables:
        return run
    hashers: list[Any] = []  # of qwen4_exp: each looks up its rows within its layer
    for _, module in language.named_modules():
        kind = type(module).__name__
        if kind == "NgramEmbedding":  # of longcat_flash_ngram: one table after the other
            _rehearse_first(module)
        elif kind == "Qwen4ExpNGramEmbedding":
            hashers.append(module)
    engrams = hasattr(language, "_ensure_engram_hash")  # of deepseek_v41
    if not hashers and not engrams:
        return run

    def step(one: Callable[[], Any], tokens: int, caches: Any) -> Any:
        if engrams:
            _note_engrams(language)
        if isinstance(one, Pass) and caches:
            ids = one.given.get(one.names[0])
            _read([_rehearsed(h, ids, caches[h.layer_idx]) for h in hashers])
        return one() if run is None else run(one, tokens, caches)

    return step


def _rehearsed(module: nn.Module, ids: Any, cache: Any) -> Sequence[tuple[RowTable, mx.array]]:
    """The tables and row ids that a call of an n-gram module would look up, not evaluated."""
    if not isinstance(ids, mx.array) or ids.ndim != 2:
        return []
    try:
        with rehearsal() as noted:
            module(ids, copy.deepcopy(cache))
    except (IndexError, TypeError, ValueError):  # a batch that the family takes apart first, say
        return []
    return noted


def _read(noted: Sequence[Sequence[tuple[RowTable, mx.array]]]) -> None:
    pairs = [pair for some in noted for pair in some]
    try:
        mx.eval([ids for _, ids in pairs])  # waits once for all
    except ValueError as e:
        refuse_transforms(e)
        raise
    for table, ids in pairs:
        table.read_early(numbers(ids))


def _rehearse_first(module: nn.Module) -> None:
    """Let a module that looks up rows in several tables begin with the reads of all of them."""
    kind: Any = type(module)

    def call(self: nn.Module, input_ids: mx.array, cache: Any = None) -> Any:
        with rehearsal() as noted:
            kind.__call__(self, input_ids, copy.deepcopy(cache))
        _read([noted])
        return kind.__call__(self, input_ids, cache)

    intercept(module, call)


def _note_engrams(language: Any) -> None:
    """Let the module that computes all engrams' row ids at the start of a pass begin their reads.

    The model makes it when it is first called.
    """
    language._ensure_engram_hash()
    module = language.engram_hash
    if module is None or hasattr(type(module), "reads_early"):
        return
    kind: Any = type(module)
    engrams = [layer.engram for layer in language.layers if layer.engram is not None]

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> mx.array:
        ids: mx.array = kind.__call__(self, *args, **kwargs)  # [B, L, engrams, columns]
        _read([[(e.embed.table, ids[:, :, e.layer_hash_index]) for e in engrams]])
        return ids

    intercept(module, call)
    type(module).reads_early = True

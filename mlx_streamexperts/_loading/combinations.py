"""Which families mlx-lm computes correctly in batches, with trimmed caches and with draft models.

This module alone owns these facts. tests/test_combinations.py checks them against stock mlx-lm for
every family, in both directions. Anything untested counts as wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import maybe_quantize_kv_cache, speculative_generate_step
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    KVCache,
    QuantizedKVCache,
    RotatingKVCache,
    make_prompt_cache,
)
from mlx_lm.utils import _download, load_tokenizer

from .._config import StreamConfig
from .._errors import TokenError, UnsupportedModelError
from .._experts.refusals import refuse_transforms
from .._hooks import logits_of
from .._memory.model_graph import unevaluated
from .discover import discover
from .lazy_load import MLX_VLM, original_load_model
from .libraries import library

BATCHED = frozenset(
    (
        "bailing_hybrid", "bailing_moe_v3", "deepseek_v32", "glm_moe_dsa", "kimi_k3", "kimi_linear",
        "lfm2_moe", "longcat_flash", "qwen3_5", "qwen3_5_moe", "qwen3_next",
    )
)  # fmt: skip
"""Modules of mlx_lm.models that cache more than keys and values and batch correctly with padding.

In other such families padding leaks into the cache (bailing_moe_linear, jamba, nemotron_h: the
state; longcat_flash_ngram: the preceding tokens; minimax_m3_vl: the selected blocks;
granitemoehybrid: the state, if a padded prompt takes several passes).
"""

_KEYS_AND_VALUES = (KVCache, RotatingKVCache)  # mlx-lm masks the padding of these itself
_EXACT = (KVCache, QuantizedKVCache)  # trimming restores their earlier state exactly
# So it does for a RotatingKVCache until its window is full; then `is_trimmable` is False.
_EXACT_WHEN_THEY_SAY_SO = (*_EXACT, RotatingKVCache)


def family(model: nn.Module) -> str:
    """Name of the module that defines a model's class, in mlx-lm or in the checkpoint."""
    return type(model).__module__.rpartition(".")[2]


def batches(model: nn.Module, caches: list[Any]) -> bool:
    """Does a padded batch give each sequence the same result as a batch of its own?

    Args:
        model: a model of mlx-lm.
        caches: its caches, from `make_prompt_cache`.
    """
    return family(model) in BATCHED or all(type(c) in _KEYS_AND_VALUES for c in caches)


def trims(caches: list[Any]) -> bool:
    """Does a trimmed cache continue like one that never had the removed tokens?"""
    return _all(caches, _EXACT_WHEN_THEY_SAY_SO)


def drafts(caches: list[Any]) -> bool:
    """Can tokens be removed at any length, as a draft model requires?"""
    return _all(caches, _EXACT)


def token_rows(model: nn.Module) -> int | None:
    """The model's vocabulary size, from a pass that is built but not evaluated; None if that fails.

    Args:
        model: a model with all its layers, before any is replaced.
    """
    try:
        return int(_pass(model, make_prompt_cache(model), 1).shape[-1])
    except Exception:  # model code may raise anything, and some of it runs on Metal only
        return None


@dataclass(frozen=True)
class Options:
    """Command-line options that not every family supports.

    Attributes:
        draft_model: folder or repository of a draft model, or None.
        kv_bits, kv_group_size: quantization of the KV cache; None for none.
        max_kv_size: tokens of a rotating KV cache; None for one that keeps all.
    """

    draft_model: str | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    max_kv_size: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """The options of a parsed command line; those it does not have keep their defaults."""
        return cls(
            draft_model=getattr(args, "draft_model", None),
            kv_bits=getattr(args, "kv_bits", None),
            kv_group_size=getattr(args, "kv_group_size", cls.kv_group_size),
            max_kv_size=getattr(args, "max_kv_size", None),
        )


def check_options(
    folder: str | Path, config: StreamConfig, options: Options, trust_remote_code: bool = False
) -> None:
    """Refuse options that do not work with this model, before any weight is read.

    Args:
        folder: the model folder.
        config: as for `load`.
        options: the options to check.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        UnsupportedModelError: an option does not work; the message names it and the family.
        StreamError: the model cannot be loaded, as for `load`.
    """
    if options.draft_model is None and options.kv_bits is None:
        return
    if mx.distributed.init().size() > 1:  # a rank has only its own part of the model's files
        return
    if library(Path(folder), config) == MLX_VLM:  # it quantizes the caches that it can, by layer
        return
    model = discover(Path(folder), config, {"trust_remote_code": trust_remote_code}).model
    if options.draft_model is not None:
        _check_drafts(model, make_prompt_cache(model))
        _check_draft_tokens(model, Path(folder), options.draft_model)
    if options.kv_bits is not None:
        _check_quantized(model, options)


def _check_drafts(model: nn.Module, caches: list[Any]) -> None:
    if not drafts(caches):
        raise UnsupportedModelError(
            f"draft_model (--draft-model) does not work with {family(model)}: rejected draft "
            f"tokens cannot be removed from its cache ({_names(caches)}); run without it"
        )


def _check_draft_tokens(model: nn.Module, folder: Path, draft_model: str) -> None:
    """Check that the draft model knows every token of the prompt and of the model."""
    try:
        words = len(load_tokenizer(folder))
        draft, _ = original_load_model(_download(draft_model), lazy=True)
    except Exception:  # loading them will report what is wrong with their files
        return
    words = min(words, token_rows(model) or words)
    if (rows := token_rows(draft) or words) < words:
        raise UnsupportedModelError(
            f"--draft-model {draft_model} knows {rows} tokens, {family(model)} and its tokenizer "
            f"{words}: it would read past its table; use one with the same tokenizer"
        )


def _check_quantized(model: nn.Module, options: Options) -> None:
    """Build, without evaluating, a prompt, the cache's quantization, and two more passes."""
    caches = make_prompt_cache(model, options.max_kv_size)
    kinds = _names(caches)
    try:
        _pass(model, caches, 2)
        maybe_quantize_kv_cache(caches, 0, options.kv_group_size, options.kv_bits)
        _pass(model, caches, 2)
        _pass(model, caches, 1)
    except Exception as e:  # model code may raise anything
        asked = f"--kv-bits {options.kv_bits} --kv-group-size {options.kv_group_size}"
        if options.max_kv_size is not None:
            asked += f" --max-kv-size {options.max_kv_size}"
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UnsupportedModelError(
            f"{asked} does not work with {family(model)}, whose cache is {kinds}: {reason}"
        ) from e


class PassCheck:
    """Checks each forward pass of a streamed model before it runs.

    Args:
        model: the model.
        rows: its vocabulary size, or None if unknown.
        pads: padded batches are the library's own affair. mlx-vlm's are compared with its own
            results only: it computes some of them otherwise than single prompts.
    """

    def __init__(self, model: nn.Module, rows: int | None, pads: bool = False) -> None:
        self._model, self._rows = model, rows
        self._batches = pads or batches(model, make_prompt_cache(model))
        self._seen: mx.array | None = None  # padding array of the last decode step checked

    def __call__(self, ids: mx.array | None, caches: Any) -> None:
        """Refuse a pass that mlx-lm would compute wrongly.

        Only the model's intercepted call may call this: it inspects its caller's caller.

        Args:
            ids: token ids [B, T], or None if the pass was given embeddings.
            caches: the caches of the call, or None.

        Raises:
            TokenError: the model has no such token.
            UnsupportedModelError: mlx-lm computes padded batches, or draft models, of this family
                wrongly.
        """
        if ids is None:
            return
        # Sampled tokens, always valid, are uint32; a tokenizer's are not. So decoding never waits.
        if ids.shape[1] > 1 or ids.dtype != mx.uint32:
            check_tokens(ids, self._rows)
        if not caches:
            return
        if ids.shape[0] > 1 and not self._batches:
            self._check_padding(caches, ids.shape[1] == 1)
        if sys._getframe(2).f_code in SPECULATIVE:
            _check_drafts(self._model, caches)

    def _check_padding(self, caches: list[Any], is_step: bool) -> None:
        for cache in _leaves(caches):
            padding = getattr(cache, "left_padding", None)
            if is_step and padding is not None and padding is self._seen:
                return  # same sequences as before: mlx-lm makes a new array if they change
            for name in ("left_padding", "_right_padding", "lengths", "_lengths"):
                amounts = getattr(cache, name, None)
                if isinstance(amounts, mx.array) and np.ptp(np.array(amounts)) > 0:
                    raise UnsupportedModelError(
                        "mlx-lm computes batches of prompts of unequal length wrongly for "
                        f"{family(self._model)}: their padding changes the text. Run one prompt "
                        "after the other (the server does so by itself)"
                    )
            if not isinstance(cache, ArraysCache):
                self._seen = padding
                return


def check_tokens(ids: mx.array, rows: int | None) -> None:
    """Refuse tokens that a model does not have: looking them up would read past its table.

    Args:
        ids: token ids of any shape.
        rows: the model's vocabulary size, or None if unknown.

    Raises:
        TokenError: the model has no such token; the message names it.
    """
    if rows is None or not ids.size or not mx.issubdtype(ids.dtype, mx.integer):
        return
    try:
        values = np.array(ids)
    except ValueError as e:
        refuse_transforms(e)
        raise
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= rows:
        raise TokenError(
            f"token {low if low < 0 else high}: the model has no such token, only 0 to {rows - 1}. "
            "Its tokenizer may know more tokens than the model: remove them from the prompt"
        )


def _code(code: CodeType) -> Iterator[CodeType]:
    """A function's code object and those of the functions inside it."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _code(inner)


# mlx-lm checks only before the first token whether the cache can be trimmed.
SPECULATIVE = frozenset(_code(speculative_generate_step.__code__))
"""Code of mlx-lm's loop for draft models."""


def _pass(model: Any, caches: list[Any], tokens: int) -> mx.array:
    """Logits [1, tokens, vocabulary] of a pass, not evaluated."""
    with unevaluated():
        return logits_of(model(mx.zeros((1, tokens), mx.int32), cache=caches))


def _leaves(caches: Iterable[Any]) -> Iterator[Any]:
    for cache in caches:
        yield from _leaves(cache.caches) if isinstance(cache, CacheList) else (cache,)


def _all(caches: list[Any], kinds: tuple[type, ...]) -> bool:
    return all(type(c) in kinds for c in _leaves(caches))


def _names(caches: list[Any]) -> str:
    return ", ".join(sorted({type(c).__name__ for c in _leaves(caches)}))

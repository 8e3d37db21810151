"""What mlx-lm computes rightly with which family: batches, trimmed caches, draft models.

This module alone owns those facts; tests/test_combinations.py tries every family on stock mlx-lm
and holds them to what it finds, in both directions. What was not tried is taken to be wrong.
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
from .discover import discover, original_load_model

BATCHED = frozenset(
    (
        "bailing_hybrid", "bailing_moe_v3", "deepseek_v32", "glm_moe_dsa", "kimi_k3", "kimi_linear",
        "lfm2_moe", "longcat_flash", "qwen3_5", "qwen3_5_moe", "qwen3_next",
    )
)  # fmt: skip
"""Modules of mlx_lm.models that keep more than keys and values, and whose padded batches are right.

The others of that kind let padding into what they keep (bailing_moe_linear, jamba, nemotron_h: a
state; longcat_flash_ngram: the tokens before; minimax_m3_vl: the blocks that it looks at;
granitemoehybrid: a state, where a padded prompt takes several passes).
"""

_KEYS_AND_VALUES = (KVCache, RotatingKVCache)  # mlx-lm masks the padding of these itself
_EXACT = (KVCache, QuantizedKVCache)  # trimmed, they are what they were before
# Until its window is full a RotatingKVCache is; then it says itself that it cannot be trimmed.
_EXACT_WHEN_THEY_SAY_SO = (*_EXACT, RotatingKVCache)


def family(model: nn.Module) -> str:
    """The module of mlx-lm, or of the checkpoint, that a model's class comes from."""
    return type(model).__module__.rpartition(".")[2]


def batches(model: nn.Module, caches: list[Any]) -> bool:
    """Does mlx-lm compute a padded batch of this model as it computes each sequence alone?

    Args:
        model: a model of mlx-lm's.
        caches: what `make_prompt_cache` makes for it.
    """
    return family(model) in BATCHED or all(type(c) in _KEYS_AND_VALUES for c in caches)


def trims(caches: list[Any]) -> bool:
    """Does a cache that says that it can be trimmed go on, once trimmed, like a fresh one?"""
    return _all(caches, _EXACT_WHEN_THEY_SAY_SO)


def drafts(caches: list[Any]) -> bool:
    """Can tokens be taken back at any length, as draft models need it?"""
    return _all(caches, _EXACT)


def token_rows(model: nn.Module) -> int | None:
    """How many tokens a model knows, from a pass that is never computed; None if that fails.

    Args:
        model: with all its layers as mlx-lm made them. No weight is read.
    """
    try:
        return int(_pass(model, make_prompt_cache(model), 1).shape[-1])
    except Exception:  # whatever a model's own code raises: it may run on Metal alone
        return None


@dataclass(frozen=True)
class Options:
    """What a command line asks of a model beside a reply.

    Attributes:
        draft_model: folder or repository of a model that guesses ahead; None for none.
        kv_bits, kv_group_size: how the KV cache is quantized; None for not at all.
        max_kv_size: tokens of a KV cache that forgets; None for one that does not.
    """

    draft_model: str | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    max_kv_size: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Options:
        """Those of a parsed command line, whichever of them it knows."""
        return cls(
            draft_model=getattr(args, "draft_model", None),
            kv_bits=getattr(args, "kv_bits", None),
            kv_group_size=getattr(args, "kv_group_size", cls.kv_group_size),
            max_kv_size=getattr(args, "max_kv_size", None),
        )


def check_options(
    folder: str | Path, config: StreamConfig, options: Options, trust_remote_code: bool = False
) -> None:
    """Refuse what cannot work with this model, before any weight is read.

    Args:
        folder: of the model.
        config: as for `load`.
        options: what is asked for.
        trust_remote_code: run the model code that the checkpoint brings, if it does.

    Raises:
        UnsupportedModelError: names the option and the family.
        StreamError: what `load` raises.
    """
    if options.draft_model is None and options.kv_bits is None:
        return
    if mx.distributed.init().size() > 1:  # a rank has its own part of the model's files alone
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
            f"--draft-model (draft_model=) does not work with {family(model)}: tokens that were "
            f"guessed wrong cannot be taken out of its cache ({_names(caches)}) again; run without"
        )


def _check_draft_tokens(model: nn.Module, folder: Path, draft_model: str) -> None:
    """The draft model sees the prompt and what the model has chosen."""
    try:
        words = len(load_tokenizer(folder))
        draft, _ = original_load_model(_download(draft_model), lazy=True)
    except Exception:  # whatever is wrong with their files comes up when they are loaded
        return
    words = min(words, token_rows(model) or words)
    if (rows := token_rows(draft) or words) < words:
        raise UnsupportedModelError(
            f"--draft-model {draft_model} knows {rows} tokens, {family(model)} and its tokenizer "
            f"{words}: it would read past its table; take one of the same tokenizer"
        )


def _check_quantized(model: nn.Module, options: Options) -> None:
    """Build, but never compute, a prompt, the cache's quantization, and what follows it."""
    caches = make_prompt_cache(model, options.max_kv_size)
    kinds = _names(caches)
    try:
        _pass(model, caches, 2)
        maybe_quantize_kv_cache(caches, 0, options.kv_group_size, options.kv_bits)
        _pass(model, caches, 2)
        _pass(model, caches, 1)
    except Exception as e:  # whatever a model's own code raises
        asked = f"--kv-bits {options.kv_bits} --kv-group-size {options.kv_group_size}"
        if options.max_kv_size is not None:
            asked += f" --max-kv-size {options.max_kv_size}"
        reason = " ".join(str(e).split()) or type(e).__name__
        raise UnsupportedModelError(
            f"{asked} does not work with {family(model)}, whose cache is of {kinds}: {reason}"
        ) from e


class PassCheck:
    """Looks at each forward pass of a streamed model before it runs.

    Args:
        model: the model.
        rows: tokens that it knows, or None.
    """

    def __init__(self, model: nn.Module, rows: int | None) -> None:
        self._model, self._rows = model, rows
        self._batches = batches(model, make_prompt_cache(model))
        self._seen: mx.array | None = None  # padding of a step that was looked at

    def __call__(self, ids: mx.array | None, caches: Any) -> None:
        """Refuse a pass that mlx-lm would compute wrongly. To be called by the model's call alone.

        Args:
            ids: token ids [B, T], or None where embeddings stand in for them.
            caches: those of the call, or None.

        Raises:
            TokenError: the model has no row for a token.
            UnsupportedModelError: a padded batch, or a draft model, of a family for which mlx-lm
                computes those wrongly.
        """
        if ids is None:
            return
        # A sampler's choice, one of the model's own tokens, is uint32; what comes from a tokenizer
        # is not. So decoding never waits for this.
        if ids.shape[1] > 1 or ids.dtype != mx.uint32:
            check_tokens(ids, self._rows)
        if not caches:
            return
        if ids.shape[0] > 1 and not self._batches:
            self._check_padding(caches, ids.shape[1] == 1)
        if sys._getframe(2).f_code in _SPECULATIVE:
            _check_drafts(self._model, caches)

    def _check_padding(self, caches: list[Any], is_step: bool) -> None:
        for cache in _leaves(caches):
            padding = getattr(cache, "left_padding", None)
            if is_step and padding is not None and padding is self._seen:
                return  # nobody has come or left: mlx-lm would have made a new array
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
    """Refuse tokens for which a model has no row: looking them up would read past its table.

    Args:
        ids: token ids of any shape.
        rows: tokens that the model knows, or None where that is unknown.

    Raises:
        TokenError: names the token.
    """
    if rows is None or not ids.size or not mx.issubdtype(ids.dtype, mx.integer):
        return
    # As int64: the largest uint32 and a negative int32 are what they are.
    try:
        values = np.array(ids)
    except ValueError as e:
        refuse_transforms(e)
        raise
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= rows:
        raise TokenError(
            f"token {low if low < 0 else high}: the model has no such token, only 0 to {rows - 1}. "
            "Its tokenizer may know more tokens than the model: take those out of the prompt"
        )


def _code(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions within."""
    yield code
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _code(inner)


# mlx-lm asks only before the first token whether it can take tokens back.
_SPECULATIVE = frozenset(_code(speculative_generate_step.__code__))


def _pass(model: Any, caches: list[Any], tokens: int) -> mx.array:
    """Logits [1, tokens, vocabulary] of a pass that is built, and never computed."""
    logits: mx.array = model(mx.zeros((1, tokens), mx.int32), cache=caches)
    return logits


def _leaves(caches: Iterable[Any]) -> Iterator[Any]:
    for cache in caches:
        yield from _leaves(cache.caches) if isinstance(cache, CacheList) else (cache,)


def _all(caches: list[Any], kinds: tuple[type, ...]) -> bool:
    return all(type(c) in kinds for c in _leaves(caches))


def _names(caches: list[Any]) -> str:
    return ", ".join(sorted({type(c).__name__ for c in _leaves(caches)}))

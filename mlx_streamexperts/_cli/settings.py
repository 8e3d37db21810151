"""What a parsed command line asks for: streaming options, a model, the ranks that share it."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from .._config import StreamConfig, from_arguments
from .._errors import BudgetError, StreamError
from .._io.checkpoint import check_tokenizer
from .._loading.combinations import Options, check_options
from .._loading.demo import demo_model
from .._loading.drafts import Draft
from .._loading.libraries import require_mlx_lm
from .._loading.load import local_folder, plan, resolve

_JOIN_SECONDS = 120
_DEMO_CACHE = "10MB"  # about a quarter of its experts, so that there is something to see


def join_ranks() -> mx.distributed.Group:
    """The processes that `mlx.launch` started with this one, or this process alone.

    If the others do not join within `_JOIN_SECONDS`, this process ends with a traceback: rank 0 of
    MLX's ring backend would wait for ever, in C++ and holding Python's lock.

    Raises:
        StreamError: the others cannot be reached.
    """
    if (rank := os.environ.get("MLX_RANK")) is not None:
        faulthandler.dump_traceback_later(_JOIN_SECONDS, exit=True)
    try:
        return mx.distributed.init()
    except RuntimeError as e:
        raise StreamError(
            f"rank {rank} cannot reach the other processes of this run: {e}. Have all of them "
            "been started, with the same hostfile?"
        ) from e
    finally:
        if rank is not None:
            faulthandler.cancel_dump_traceback_later()


@contextmanager
def only_rank_0_prints(group: mx.distributed.Group) -> Iterator[None]:
    """Drop the output of all ranks but one: they compute the same text."""
    if group.rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def stream_settings(
    args: argparse.Namespace, instead: str | None
) -> tuple[StreamConfig, str | None]:
    """The streaming options of a parsed command line, and the model to load.

    Without `--model` it is the embedded model. That one fits into any machine's memory, so it gets
    a small expert cache unless a budget is stated. The model is None if a prompt cache file names
    it.

    Args:
        args: the parsed command line.
        instead: what to do about a model of mlx-vlm, as a sentence; None if the command runs it.

    Raises:
        UnsupportedModelError: the model cannot do what an option asks for, loads through mlx-vlm
            where the command does not, or has a tokenizer that is code and not trusted.
        StreamError: an option or a size is invalid, or there is no such model.
    """
    config, model = from_arguments(args), args.model
    files = getattr(args, "prompt_cache_file", None), getattr(args, "draft_model", None)
    if None not in files:
        raise StreamError(
            "--prompt-cache-file does not work with --draft-model: the file has no KV cache of the "
            "draft model; leave one of them out"
        )
    if model is None and getattr(args, "prompt_cache_file", None) is None:
        model = str(demo_model())
        notice = f"No --model given: using the embedded demonstration model, {model}"
        if config.memory is None and config.cache is None:
            config = replace(config, cache=_DEMO_CACHE)
            notice += (
                f", with an expert cache of {_DEMO_CACHE} so that it streams (--cache changes it)"
            )
        if mx.distributed.init().rank() == 0:
            print(notice, file=sys.stderr)
    if model is not None:
        trust = bool(getattr(args, "trust_remote_code", False))
        model = str(local_folder(model, config, trust=trust))
        if instead is not None:
            require_mlx_lm(model, config, "this command", instead)
            check_tokenizer(Path(model), trust)
    stated = config.reserve is not None
    config = following_stock_options(config, args, args)
    if model is not None:
        check_options(model, config, Options.of(args), trust)
        if not stated:
            check_draft_fits(args, model, config)
    return config, model


def following_stock_options(
    config: StreamConfig, args: argparse.Namespace, ours: argparse.Namespace
) -> StreamConfig:
    """Take memory options that are not stated from mlx-lm's own options.

    Args:
        config: our options, those of the settings file included.
        args: the command line with mlx-lm's options. They win over a settings file.
        ours: the command line with our options. They win over mlx-lm's.
    """
    step, kv_size = getattr(args, "prefill_step_size", None), getattr(args, "max_kv_size", None)
    if step and ours.prefill_tokens is None:
        config = replace(config, prefill_tokens=step)
    if kv_size and ours.context_tokens is None:
        config = replace(config, context_tokens=kv_size)
    draft = draft_model(args)
    if draft is not None and config.reserve is None:
        config = draft.leave_room(config)
        print(f"Keeping {draft.told(config)}", file=sys.stderr)
    return config


def draft_model(args: argparse.Namespace) -> Draft | None:
    """The draft model that a command line names.

    Raises:
        CheckpointError: there is none, or its files are damaged or incomplete.
    """
    name = getattr(args, "draft_model", None)
    return None if name is None else Draft.read(name, resolve(name))


def check_draft_fits(args: argparse.Namespace, model: str, config: StreamConfig) -> None:
    """Refuse a draft model that does not fit beside the model, before any weight is read.

    Args:
        args: the command line that may name one.
        model: the model to stream.
        config: the options, with a reserve for the draft model.

    Raises:
        BudgetError: names the draft model, its parts, and the smallest memory that works.
    """
    draft = draft_model(args)
    if draft is None or mx.distributed.init().size() > 1:  # several machines take none
        return
    try:
        plan(model, config=config, trust_remote_code=getattr(args, "trust_remote_code", False))
    except BudgetError as e:
        raise BudgetError(
            f"{e} The reserve is {draft.told(config)}; a smaller one needs less, or run without",
            needed_bytes=e.needed_bytes,
        ) from e

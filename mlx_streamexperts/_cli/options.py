"""Shared by all command lines: our options beside mlx-lm's, the embedded model, and errors."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path

import mlx.core as mx

from .._config import StreamConfig, add_arguments, format_size, from_arguments, parse_size
from .._errors import StreamError
from .._experts.stream import ExpertStream
from .._io.checkpoint import read_checkpoint
from .._loading.combinations import Options, check_options
from .._loading.demo import demo_model
from .._loading.libraries import require_mlx_lm
from .._loading.load import local_folder, resolve

_JOIN_SECONDS = 120
_DEMO_CACHE = "10MB"  # about a quarter of its experts, so that there is something to see


def add_output_arguments(
    parser: argparse.ArgumentParser, out: str, overwritten: str, required: bool = True
) -> None:
    """Add the options that all commands that write a folder share.

    Args:
        parser: the parser to extend.
        out: help text of `--out`.
        overwritten: who left the content that `--overwrite` discards, for its help text.
        required: the command does nothing without `--out`.
    """
    parser.add_argument("--out", type=Path, required=required, help=out)
    parser.add_argument(
        "--overwrite", action="store_true", help=f"discard what {overwritten} left in --out"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the model code that the checkpoint brings, if it does",
    )
    parser.add_argument(
        "--no-progress", action="store_false", dest="progress", help="show no progress bars"
    )


def add_prefix_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the prefix cache."""
    group = parser.add_argument_group("prefix cache")
    group.add_argument(
        "--prefix-cache",
        metavar="DIR",
        help="keep the KV caches of prompts in this folder, so that the same beginning is not "
        "computed again, by later runs either (default: nothing is written)",
    )
    group.add_argument(
        "--prefix-bytes",
        default="50GB",
        metavar="SIZE",
        help="what the folder may take (default: %(default)s)",
    )


def check_prefix_arguments(args: argparse.Namespace) -> None:
    """Refuse what does not work with a prefix cache.

    Raises:
        StreamError: names the option, or a size is not understood.
    """
    if args.prefix_cache is None:
        return
    parse_size(args.prefix_bytes)
    for option in ("draft_model", "prompt_cache_file"):
        if getattr(args, option, None) is not None:
            flag = "--" + option.replace("_", "-")
            raise StreamError(f"--prefix-cache does not work with {flag}; leave one of them out")


def make_parser(
    parser: argparse.ArgumentParser, prog: str, description: str | None
) -> argparse.ArgumentParser:
    """Add the options of expert streaming to a parser of mlx-lm's, or to an empty one."""
    parser.prog, parser.description = prog, description
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for action in parser._actions:
        if action.dest == "prefill_step_size":
            action.default = None  # the plan decides
            action.help = (
                "Number of prompt tokens to process at a time; the same as --prefill-tokens."
            )
        if action.dest == "model":
            action.default = None
            action.help = (
                "model folder or Hugging Face repository with routed experts. Default: the small "
                "demonstration model that comes with the package."
            )
    add_arguments(parser)
    return parser


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


def failed(error: Exception, streams: Sequence[ExpertStream] = ()) -> int:
    """Print an error, and tell the other ranks of a distributed run; returns the exit status."""
    reason = str(error)
    for s in streams:
        if isinstance(error, StreamError):
            s.leave(reason)
        else:  # MLX noticed that the connection is gone; the watch knows which rank is lost
            reason = s.lost_rank() or reason
            s.close()
    print(f"error: {reason}", file=sys.stderr)
    return 1


def interrupted() -> int:
    """Say that Ctrl-C has ended the command; returns the exit status."""
    print("\nstopped by Ctrl-C", file=sys.stderr)  # below the text so far, or the terminal's ^C
    return 130


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
        UnsupportedModelError: the model cannot do what an option asks for, or loads through mlx-vlm
            where the command does not.
        StreamError: an option or a size is invalid, or there is no such model.
    """
    config, model = from_arguments(args), args.model
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
    config = following_stock_options(config, args, args)
    if model is not None:
        check_options(model, config, Options.of(args), trust)
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
    draft = getattr(args, "draft_model", None)
    if draft is not None and config.reserve is None:
        reserve = read_checkpoint(resolve(draft)).nbytes
        print(f"Keeping {format_size(reserve)} for the draft model {draft}", file=sys.stderr)
        config = replace(config, reserve=reserve)
    return config

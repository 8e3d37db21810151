"""What every command line shares: our options beside mlx-lm's, and the embedded model."""

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

from .._config import StreamConfig, add_arguments, format_size, from_arguments
from .._errors import StreamError
from .._experts.stream import ExpertStream
from .._io.checkpoint import read_checkpoint
from .._loading.combinations import Options, check_options
from .._loading.demo import demo_model
from .._loading.load import local_folder, resolve

_JOIN_SECONDS = 120
_DEMO_CACHE = "10MB"  # about a quarter of its experts, so that there is something to see


def add_output_arguments(
    parser: argparse.ArgumentParser, out: str, overwritten: str, required: bool = True
) -> None:
    """What the commands that write a folder share.

    Args:
        parser: to be extended.
        out: what `--out` is.
        overwritten: whose leavings `--overwrite` discards.
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


def make_parser(
    parser: argparse.ArgumentParser, prog: str, description: str | None
) -> argparse.ArgumentParser:
    """Extend one of mlx-lm's parsers with the options of expert streaming."""
    parser.prog, parser.description = prog, description
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    for action in parser._actions:
        if action.dest == "prefill_step_size":
            action.default = None  # what the plan has room for
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
    """The processes that `mlx.launch` started with this one; a group of one where it did not.

    Ends this process with a traceback where they do not all come within `_JOIN_SECONDS`: rank 0 of
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
    """All ranks compute the same text."""
    if group.rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def failed(error: Exception, streams: Sequence[ExpertStream] = ()) -> int:
    """Say what went wrong, to the other ranks of a distributed run too; returns the exit status."""
    reason = str(error)
    for s in streams:
        if isinstance(error, StreamError):
            s.leave(reason)
        else:  # MLX noticed that the connection is gone; which rank it is, the watch knows
            reason = s.lost_rank() or reason
            s.close()
    print(f"error: {reason}", file=sys.stderr)
    return 1


def stream_settings(args: argparse.Namespace) -> tuple[StreamConfig, str | None]:
    """The streaming options of a parsed command line, and the model to load.

    The embedded model stands in where none is named; it fits any machine, so it then gets a small
    expert cache unless the command line states a budget. The model is None where a prompt cache
    file names it.

    Raises:
        UnsupportedModelError: the model cannot do what an option asks for.
        StreamError: an option or a size is not understood, or there is no such model.
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
    config = following_stock_options(config, args, args)
    if model is not None:
        check_options(model, config, Options.of(args), trust)
    return config, model


def following_stock_options(
    config: StreamConfig, args: argparse.Namespace, ours: argparse.Namespace
) -> StreamConfig:
    """Let mlx-lm's own options decide what ours leave open about memory.

    Args:
        config: what our options and the settings file come to.
        args: the command line that has mlx-lm's options. They win over a settings file.
        ours: the command line that has ours. These win over mlx-lm's.
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

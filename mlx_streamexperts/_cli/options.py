"""Shared by all command lines: our options beside mlx-lm's, and how a command fails.

Nothing here imports mlx-lm, so that `--help` and a mistyped option are answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from .._config import add_arguments, parse_size
from .._errors import StreamError
from .stock_parsers import stock_parser

if TYPE_CHECKING:
    from .._experts.stream import ExpertStream

MEDIA = {
    "image": "picture that the prompt is about: file or URL. It may be repeated, and takes several",
    "audio": "sound that the prompt is about: file or URL",
    "video": "film that the prompt is about: file or URL",
}

_INTERRUPTED = 130  # the exit status after Ctrl-C
_MODULES, _ENTRY = "python -m mlx_streamexperts.", ("mlx_streamexperts", "__main__.py")


def as_called(text: str) -> str:
    """A text with our commands written as the user has called this one."""
    program = Path(sys.argv[0])
    if program.name == "streamexperts" or program.parts[-2:] == _ENTRY:
        return text.replace(_MODULES, "streamexperts ")
    return text


def describe(parser: argparse.ArgumentParser, command: str, description: str | None) -> None:
    """Give a parser the name and the help text of one of our commands."""
    parser.prog = as_called(_MODULES + command)
    parser.description = None if description is None else as_called(description)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = functools.partial(_wrong, parser)  # type: ignore[method-assign]


def _wrong(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Refuse a command line in one line: argparse prints all options before it."""
    what, _, wrong = message.partition(": ")
    if what == "unrecognized arguments":
        message += _meant(parser, wrong.split()[0])
    end = "" if message.endswith("?") else ";"
    print(f"error: {message}{end} {parser.prog} --help shows the options", file=sys.stderr)
    sys.exit(2)


def _meant(parser: argparse.ArgumentParser, wrong: str) -> str:
    """What an unknown argument may be meant for, as a question; empty if nothing is alike."""
    known = [o for a in parser._actions if a.dest != "help" for o in a.option_strings]
    if wrong.startswith("-"):
        alike = difflib.get_close_matches(wrong.partition("=")[0], known, n=1)
        return f"; did you mean {alike[0]}?" if alike else ""
    named = "--model" in known and ("/" in wrong or Path(wrong).is_dir())
    return f"; did you mean --model {wrong}?" if named else ""


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
    add_reading_arguments(parser)


def add_reading_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that goes through a whole checkpoint."""
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
        StreamError: names the option, a size is not understood, or the folder takes no files.
    """
    if args.prefix_cache is None:
        return
    parse_size(args.prefix_bytes)
    folder = Path(args.prefix_cache)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as e:
        raise StreamError(f"--prefix-cache {folder}: cannot be created: {e.strerror}") from e
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StreamError(f"--prefix-cache {folder}: nothing can be written there")
    for option in ("draft_model", "prompt_cache_file"):
        if getattr(args, option, None) is not None:
            flag = "--" + option.replace("_", "-")
            raise StreamError(f"--prefix-cache does not work with {flag}; leave one of them out")


def make_parser(
    parser: argparse.ArgumentParser, command: str, description: str | None
) -> argparse.ArgumentParser:
    """Add the options of expert streaming to a parser of mlx-lm's, or to an empty one."""
    describe(parser, command, description)
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


def program_parser(module: str, command: str, description: str | None) -> argparse.ArgumentParser:
    """The parser of a program of mlx-lm, with our streaming and recording options.

    Args:
        module: the program's module, such as `mlx_lm.chat`.
        command: name of our command.
        description: text for `--help`.
    """
    return with_our_options(stock_parser(module), command, description)


def with_our_options(
    parser: argparse.ArgumentParser, command: str, description: str | None
) -> argparse.ArgumentParser:
    """Add our streaming and recording options to a program's parser."""
    make_parser(parser, command, description)
    add_report_arguments(parser)
    if command in ("generate", "chat"):
        add_prefix_arguments(parser)
    return parser


def add_report_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that record a run and print figures at its end."""
    group = parser.add_argument_group("recording")
    group.add_argument(
        "--timeline", help="write where the time went to this file, for ui.perfetto.dev"
    )
    group.add_argument(
        "--trace", help="write which experts the routers chose to this file (JSON lines)"
    )
    group.add_argument(
        "--layer-hits", action="store_true", help="print each layer's hit rate at the end"
    )


def add_media_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose mlx-vlm to a parser of mlx-lm's, for its `--help`."""
    group = parser.add_argument_group(
        "pictures, sound and film",
        "With one of these, or a model that only mlx-vlm has, mlx-vlm's generate runs, with its "
        "options: --loader mlx-vlm --help shows them",
        conflict_handler="resolve",  # mlx-lm has --image, for one family
    )
    add_media_options(group)


def add_media_options(parser: argparse._ActionsContainer) -> None:
    """Add the options for pictures, sound and film."""
    for name, text in MEDIA.items():
        parser.add_argument(
            f"--{name}", nargs="+", action="extend", metavar="FILE", default=None, help=text
        )


def failed(error: Exception, streams: Sequence[ExpertStream] = ()) -> int:
    """Print an error, and tell the other ranks of a distributed run; returns the exit status."""
    reason = str(error)
    for s in streams:
        if isinstance(error, StreamError):
            s.leave(reason)
        else:  # MLX noticed that the connection is gone; the watch knows which rank is lost
            reason = s.lost_rank() or reason
            s.close()
    print(f"error: {as_called(reason)}", file=sys.stderr)
    return 1


def ended(main: Callable[[], int]) -> int:
    """Run a command; Ctrl-C ends it with one line. Returns the exit status.

    A further Ctrl-C ends the process at once, whatever is still being closed at its exit.
    """
    try:
        status = main()
    except KeyboardInterrupt:
        status = interrupted()
    if status == _INTERRUPTED and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


def interrupted() -> int:
    """Say that Ctrl-C has ended the command; returns the exit status."""
    print("\nstopped by Ctrl-C", file=sys.stderr)  # below the text so far, or the terminal's ^C
    return _INTERRUPTED

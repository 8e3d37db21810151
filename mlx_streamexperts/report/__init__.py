"""Measure how a streamed model runs here, and write a page and a JSON file about it.

python -m mlx_streamexperts.report --out report
python -m mlx_streamexperts.report --model ./my-model --memory 24GB --sustained 10 --out report

Method, drive, locality, power and quality, each with figures and the sentence that answers its
question. The page is one file that loads nothing; docs/report-schema.md describes the JSON.
Quick by default on the embedded model, thorough otherwise: --quick and --full choose. Ctrl-C
ends it with a page of what was measured. Needs the extra `report`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .._cli.options import make_parser

__all__ = ["main", "setup_arg_parser"]

_NUMBERS: dict[str, tuple[type, str]] = {
    "sustained": (float, "minutes of decoding on and on"),
    "prompts": (int, "of the shipped prompts (default: all)"),
    "prompt_tokens": (int, "a prompt's tokens at most"),
    "tokens": (int, "generated after each prompt"),
    "repeats": (int, "of everything that is timed"),
    "seconds": (float, "of the drive at each size and depth"),
    "points": (int, "throttled drives, by rate and by latency"),
    "items": (int, "of the bundled task (default: all)"),
}
"""Numbers of a study: kind and help text."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of `report`, and those of streaming."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder (default: report)")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="minutes; default without --model")
    how.add_argument("--full", action="store_true", help="default with --model")
    for name, (kind, text) in _NUMBERS.items():
        unit = "MINUTES" if name == "sustained" else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=unit, help=text)
    parser.add_argument("--note", default="", help="for readers, shown on the page")
    parser.add_argument(
        "--render", type=Path, metavar="JSON", help="only write the page of this report again"
    )
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code of a tokenizer that is code (Kimi's)",
    )
    return make_parser(parser, "report", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    from ._command import run  # now: this imports mlx-lm, which takes a second

    return run(args)

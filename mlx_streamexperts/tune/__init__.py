"""Find the fastest settings for a model on this machine and your prompts, and save them.

python -m mlx_streamexperts.tune --model ./my-model --memory 24GB --prompts prompts.txt
python -m mlx_streamexperts.tune --cache 10MB --once '{"threads": 16}'

Options that are stated stay as they are; the others are tried within the memory that is promised.
Candidates take turns with the defaults. A candidate is better only if it beats them by more than
the defaults differ from themselves, and its results must be the same to the last bit. The winner is
saved in a settings file, for --settings of every command and StreamConfig.load.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from .._cli.options import make_parser
from .._lazy import lazy_names

__all__ = ["Runner", "Tuner", "Workload", "main", "setup_arg_parser", "space"]

__getattr__, __dir__ = lazy_names(
    __name__, {"._command": "Runner Tuner Workload space"}, "main setup_arg_parser"
)


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of tuning, and those of streaming."""
    parser = argparse.ArgumentParser()
    add = parser.add_argument
    add("--model")
    add("--prompts", type=Path, metavar="FILE",
        help="your prompts: JSON lines with \"prompt\", or text with blank lines between. Default: "
        "four texts that come with the package")  # fmt: skip
    add("--tokens", type=int, default=32, help="timed tokens of a prompt's reply (default: 32)")
    add("--warm-up", type=int, default=16, help="untimed tokens before, each run (default: 16)")
    add("--page-cache", choices=("keep", "drop"), default="keep",
        help="keep what the system has cached of the files, or drop it before each run "
        "(default: keep)")  # fmt: skip
    add("--time-limit", type=seconds, default="10m", help="90s, 10m or 2h, say (default: 10m)")
    add("--trials", type=int, help="try at most so many candidates")
    add("--out", type=Path, default="tuned.json", metavar="FILE",
        help="save the winning settings in this file (default: tuned.json)")  # fmt: skip
    add("--ledger", type=Path, help="a line of JSON for each trial. Default: beside --out")
    add("--resume", action="store_true", help="go on with an earlier run's ledger")
    add("--overwrite", action="store_true", help="discard an earlier run's ledger and begin anew")
    add("--once", type=settings, metavar="JSON",
        help="run one trial of these settings, print its line and save nothing")  # fmt: skip
    add("--quality-budget", type=float, metavar="SHARE",
        help="afterwards, measure lossy settings on the prompts and name the fastest one that "
        "raises perplexity by at most this (0.01 is 1 %%). Nothing lossy is saved")  # fmt: skip
    add("--dry-run", action="store_true", help="print the values to try, and load nothing")
    add("--trust-remote-code", action="store_true", help="run code that comes with the checkpoint")
    return make_parser(parser, "tune", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    from ._command import run  # now: this imports mlx-lm, which takes a second

    return run(args)


def seconds(text: str) -> float:
    """Seconds of "90", "90s", "10m" or "2h"; argparse names this function if it raises."""
    if (match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text)) is None:
        raise ValueError
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def settings(text: str) -> dict[str, Any]:
    """The settings in a JSON object; argparse names this function if it raises."""
    if not isinstance(found := json.loads(text), dict):
        raise ValueError
    return found

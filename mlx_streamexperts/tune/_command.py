"""Find the fastest settings for a model on this machine and your prompts, and keep them.

python -m mlx_streamexperts.tune --model ./my-model --memory 24GB --prompts prompts.txt
python -m mlx_streamexperts.tune --cache 10MB --once '{"threads": 16}'

Options that are stated stay as they are; the others are tried within the memory that is promised.
Candidates take turns with the defaults, and count as better only where they beat them by more than
the defaults differ from themselves. Every result must be the same, to the last bit. What wins is
saved as a profile, which `load`, `patch` and every command pick up for this model, machine and
budget.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._cache.expert_map import POLICIES
from .._cli.options import failed, make_parser, stream_settings
from .._cli.terminal import Row, print_rows
from .._errors import StreamError
from .._experts.stream import expert_files
from .._io.files import direct_works
from .._io.output import exclusive
from .._loading.profiles import CACHE_SHARE, Place, default_file, place_of, write_profile
from .._progress import progress_bar
from ._ledger import Ledger
from ._runner import Runner, Workload, read_prompts, shipped_prompts
from ._search import Settings, Space
from ._tuner import Outcome, Run, Tuner

__all__ = ["Ledger", "Outcome", "Run", "Runner", "Tuner", "Workload", "main", "space"]

_VALUES: Space = {
    CACHE_SHARE: (1.0, 0.85, 0.7, 0.5),
    "bypass_page_cache": ("auto", "on", "off"),
    "prefetch": ("auto", "off", "on"),
    "overlap": ("auto", "off", "on"),
    "threads": (8, 4, 16, 2, 32),
    "read_size": ("4MiB", "1MiB", "16MiB"),
    "policy": ("lrfu", *(p for p in POLICIES if p != "lrfu")),
    "prefetch_depth": (1, 2, 3),
    "run_ahead": ("auto", "off", "on"),
}
"""What is tried of each setting, the default first; likely ones come early."""


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of tuning, and those of streaming."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="your prompts: JSON lines with \"prompt\", or text with blank lines between. Default: "
        "four texts that come with the package",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, default=32, help="timed tokens of a prompt's reply (default: 32)"
    )
    parser.add_argument(
        "--warm-up", type=int, default=16, help="untimed tokens before, each run (default: 16)"
    )
    parser.add_argument(
        "--page-cache", choices=("keep", "drop"), default="keep",
        help="keep what the system has cached of the files, or drop it before each run "
        "(default: keep)",
    )  # fmt: skip
    parser.add_argument(
        "--time-limit", type=_seconds, default="10m", help="such as 90s, 10m or 2h (default: 10m)"
    )
    parser.add_argument("--trials", type=int, help="try no more candidates than that")
    parser.add_argument(
        "--ledger", type=Path, help="a line of JSON for each trial. Default: beside the profile"
    )
    parser.add_argument("--resume", action="store_true", help="go on with an earlier run's ledger")
    parser.add_argument(
        "--overwrite", action="store_true", help="discard an earlier run's ledger and begin anew"
    )
    parser.add_argument(
        "--out", type=Path,
        help="save the profile here, to be loaded with --profile. Default: the user's folder of "
        "profiles, where it is found by itself",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the search (default: 0)")
    parser.add_argument(
        "--once", type=_settings, metavar="JSON",
        help="run one trial of these settings, print its line and save nothing",
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be tried, and load nothing"
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    return make_parser(parser, "python -m mlx_streamexperts.tune", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    try:
        config, model = stream_settings(args)
        assert model is not None
        if config.pipeline:
            raise StreamError("tuning is for one machine: leave out --pipeline")
        prompts = read_prompts(args.prompts) if args.prompts else shipped_prompts()
        if args.tokens < 2 or args.warm_up < 1:
            raise StreamError("--tokens must be at least 2, --warm-up at least 1")
        workload = Workload(tuple(prompts), args.tokens, args.warm_up, args.page_cache)
        runner = Runner(Path(model), config, workload, args.trust_remote_code)
        place = place_of(runner.located.layers, config)
        return _tune(args, runner, place)
    except (StreamError, OSError) as e:  # the latter of the ledger or the profile
        return failed(e)


def space(runner: Runner) -> Space:
    """What can be tried with a model on this machine: nothing that was stated.

    Raises:
        StreamError: nothing is streamed.
    """
    config, plan = runner.config, runner.plan
    if plan.slots == plan.layer_experts:
        raise StreamError("all experts are resident: nothing is streamed, so nothing can be tuned")
    values = {
        name: tried
        for name, tried in _VALUES.items()
        if (config.cache is None if name == CACHE_SHARE else not config.stated(name))
    }
    if not direct_works(Path(expert_files(runner.located.layers)[0])):
        values.pop("bypass_page_cache", None)
    if mx.default_device() == mx.cpu and "run_ahead" in values:
        values["run_ahead"] = ("auto", "on")  # auto is off there
    return values


def _tune(args: argparse.Namespace, runner: Runner, place: Place) -> int:
    """Everything after the options are understood."""
    values = space(runner)
    profile: Path = args.out or default_file(place, runner.name)
    ledger: Path = args.ledger or profile.with_suffix(".ledger.jsonl")
    if args.dry_run:
        print(
            json.dumps(
                {**runner.subject(), "space": values, "ledger": str(ledger),
                 "profile": str(profile), "budget": place.budget, "plan": str(runner.plan)}
            )
        )  # fmt: skip
        return 0
    subject = {**runner.subject(), "place": vars(place)}
    once = args.once is not None
    opened = (
        nullcontext()
        if once and args.ledger is None
        else _opened(ledger, subject, args.resume, args.overwrite)
    )
    with opened as book:
        if book is not None and book.torn:
            print(f"{ledger}: its last line was torn; that trial is lost", file=sys.stderr)
        if not once:
            print(f"Tuning {runner.plan}; every trial: {ledger}", file=sys.stderr)
        bar = _Bar(args.progress and not once, args.trials)
        with bar.shown:
            tuner = Tuner(
                runner.run, values, book, args.time_limit, args.trials, seed=args.seed,
                stock=runner.stock, on_record=bar.note,
            )  # fmt: skip
            if once:
                record = tuner.once(args.once)
                print(json.dumps(record), flush=True)
                return 0 if record["ratio"] is not None else 1
            outcome = tuner.tune()
        if outcome.settings:
            measured = {
                **{k: v for k, v in vars(outcome).items() if k not in ("settings", "disqualified")},
                **{k: v for k, v in subject.items() if k not in ("place", "model", "options")},
            }
            write_profile(profile, place, subject["model"], outcome.settings, measured)
    print_rows(_rows(outcome, profile, ledger), "Tuning")
    return 0


@contextmanager
def _opened(file: Path, subject: dict[str, Any], resume: bool, overwrite: bool) -> Iterator[Ledger]:
    """The ledger, and nobody else tuning into its folder: the two would time each other."""
    with exclusive(file.parent, "tuning"), Ledger(file, subject, resume, overwrite) as ledger:
        yield ledger


class _Bar:
    """Shows how far it is, with the best so far."""

    def __init__(self, shown: bool, total: int | None) -> None:
        self.shown = progress_bar("Tuning", shown, total, unit=" trials")
        self._best = 1.0

    def note(self, record: dict[str, Any]) -> None:
        if record["phase"] == "search":
            self.shown.update()
            if record["kept"] and record["ratio"] > self._best:
                self._best = record["ratio"]
                self.shown.set_postfix_str(f"best {self._best:.3f}x {_said(record['settings'])}")
        if record.get("disqualified"):
            text = f"DISQUALIFIED {_said(record['settings'])}: {record['why']}. Please report this"
            self.shown.write(text, file=sys.stderr)


def _rows(outcome: Outcome, profile: Path, ledger: Path) -> list[Row]:
    ends = {
        "time": "the time is over",
        "trials": "as many as were asked for",
        "nothing left to try": "nothing is left to try",
        "interrupted": "interrupted; --resume goes on",
    }
    rows = [
        ("Trials", f"{outcome.trials}, {ends[outcome.ended]}"),
        ("Noise", f"the defaults differed from themselves by {outcome.spread:.1%}"),
    ]
    if outcome.disqualified:
        rows.append(("Disqualified", f"{len(outcome.disqualified)}: see the ledger, and report it"))
    if outcome.settings:
        how = "verified" if outcome.verified else "in one measurement, not verified"
        rows += [
            ("Best", _said(outcome.settings)),
            (
                "Gain",
                f"{outcome.gain:.3f} times the defaults' tokens/s ({how}): "
                f"{outcome.tokens_per_s:.2f} against {outcome.baseline_tokens_per_s:.2f}",
            ),
            ("Profile", str(profile)),
        ]
    else:
        rows.append(("Best", "the defaults: nothing beat them by more than the noise; no profile"))
        if profile.is_file():
            rows.append(("Profile", f"{profile} of an earlier run was left as it is"))
    return [*rows, ("Ledger", str(ledger))]


def _said(settings: Settings) -> str:
    return ", ".join(f"{k} {v}" for k, v in settings.items()) or "the defaults"


def _seconds(text: str) -> float:
    """Seconds of "90", "90s", "10m" or "2h"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no time: write for example 90s, 10m or 2h")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def _settings(text: str) -> Settings:
    try:
        settings = json.loads(text)
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object of settings")
    return settings

"""The command `tune`, once its options are understood."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from contextlib import ExitStack
from pathlib import Path

import mlx.core as mx

from .._analysis.quality import measure, recommendation
from .._cache.expert_map import POLICIES
from .._cli.options import failed
from .._cli.settings import stream_settings
from .._cli.terminal import Row, print_rows
from .._config import SAVED, StreamConfig
from .._errors import StreamError
from .._experts.lossy import refuse_lossy
from .._experts.stream import expert_files
from .._io.files import direct_works
from .._io.output import exclusive
from .._loading.demo import demo_model
from .._loading.tuned_for import tuned_for
from .._progress import progress_bar
from ._ledger import Ledger
from ._runner import CACHE_SHARE, Runner, Workload, read_prompts, shipped_prompts
from ._search import Settings, Space
from ._tuner import Outcome, Record, Run, Tuner

__all__ = ["Ledger", "Outcome", "Run", "Runner", "Tuner", "Workload", "run", "space"]

_INSTEAD = "Use python -m mlx_streamexperts.generate, which prints tokens per second and hit rates"
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
    "keep_awake": ("auto", "off", "on"),
}
"""Values of each setting, the default first; likely winners come early."""


def run(args: argparse.Namespace) -> int:
    """Run the command; returns the exit status."""
    try:
        config, model = stream_settings(args, _INSTEAD)
        assert model is not None
        refuse_lossy(config.lossy, "tuning")
        if config.pipeline:
            raise StreamError("tuning is for one machine: leave out --pipeline")
        prompts = read_prompts(args.prompts) if args.prompts else shipped_prompts()
        if args.tokens < 2 or args.warm_up < 1:
            raise StreamError("--tokens must be at least 2, --warm-up at least 1")
        workload = Workload(tuple(prompts), args.tokens, args.warm_up, args.page_cache)
        runner = Runner(Path(model), config, workload, args.trust_remote_code)
        return _tune(args, runner, config)
    except (StreamError, OSError) as e:  # the latter of the ledger or --out
        return failed(e)


def space(runner: Runner) -> Space:
    """The settings to try with a model on this machine: those that were not stated.

    Raises:
        StreamError: nothing is streamed.
    """
    config, plan = runner.config, runner.plan
    if plan.slots == plan.layer_experts:
        raise StreamError("all experts are resident: nothing is streamed, so nothing can be tuned")
    option = {CACHE_SHARE: "cache"}
    values = {n: v for n, v in _VALUES.items() if getattr(config, option.get(n, n)) is None}
    if not direct_works(Path(expert_files(runner.located.layers)[0])):
        values.pop("bypass_page_cache", None)
    if mx.default_device() == mx.cpu:
        values.pop("keep_awake", None)  # there is no GPU to keep awake
        if "run_ahead" in values:
            values["run_ahead"] = ("auto", "on")  # auto is off there
    return values


def together(values: Space) -> list[Settings]:
    """Memory that a smaller expert cache leaves pays only if the page cache may use it."""
    if "bypass_page_cache" not in values:
        return []
    shares = values.get(CACHE_SHARE, ())[1:]
    return [{CACHE_SHARE: share, "bypass_page_cache": "off"} for share in shares]


def _tune(args: argparse.Namespace, runner: Runner, config: StreamConfig) -> int:
    """Search and save. `config` has the options as they were stated."""
    values = space(runner)
    here = tuned_for(runner.located.layers, config)
    subject = {**runner.subject(), "space": values, **here}
    ledger: Path = args.ledger or args.out.with_suffix(".ledger.jsonl")
    if args.dry_run:
        files = {"ledger": str(ledger), "out": str(args.out)}
        print(json.dumps({**subject, **files, "plan": str(runner.plan)}))
        return 0
    once, book = args.once is not None, None
    with ExitStack() as stack:
        if args.ledger or not once:
            # Two runs at the same time would measure each other.
            stack.enter_context(exclusive(ledger.parent, "tuning"))
            book = Ledger(ledger, subject, args.resume, args.overwrite)
            if book.torn:
                print(f"{ledger}: its last line was torn; that trial is lost", file=sys.stderr)
        bar = stack.enter_context(
            progress_bar("Tuning", config.progress and not once, args.trials, unit=" trials")
        )

        def note(record: Record) -> None:
            bar.update(record["phase"] == "search")
            if record["phase"] == "baseline" and not once:
                room = f"there is time for about {tuner.candidates} candidates"
                bar.write(f"The defaults are measured; {room}", file=sys.stderr)
            if record.get("kept"):
                bar.set_postfix_str(f"{record['ratio']:.3f}x {_said(record['settings'])}")
            if record.get("disqualified"):
                text = f"DISQUALIFIED {_said(record['settings'])}: {record['why']}"
                bar.write(f"{text}. Please report this", file=sys.stderr)

        tuner = Tuner(
            runner.run, values, book, args.time_limit, args.trials,
            stock=runner.stock, together=together(values), on_record=note,
        )  # fmt: skip
        if once:
            record = tuner.once(args.once)
            print(json.dumps(record), flush=True)
            return 0 if record["ratio"] is not None else 1
        print(f"Tuning {runner.plan}; every trial: {ledger}", file=sys.stderr)
        seconds = args.time_limit
        limit = f"{seconds:.3g} s" if seconds < 60 else f"{seconds / 60:.3g} minutes"
        print(
            f"It takes at most about {limit} (--time-limit); Ctrl-C ends it with the best so far",
            file=sys.stderr,
        )
        outcome = tuner.tune()
        rows = _rows(outcome)
        if outcome.best:
            _save(outcome.best, runner, config, args.out)
            rows += [("Settings", str(args.out)), ("Use", _command(args))]
        if args.quality_budget is not None:
            best = outcome.best["settings"] if outcome.best else {}
            rows.append(("Lossy", _lossy(args, runner, best)))
    print_rows([*rows, ("Ledger", str(ledger))], "Tuning")
    return 0


def _lossy(args: argparse.Namespace, runner: Runner, best: Settings) -> str:
    """What leaving experts out would bring on the prompts, beside the best settings."""
    model = args.model or str(demo_model())
    config, texts = runner.applied(best, runner.config), runner.workload.prompts
    try:
        found = measure(
            model, config, texts, prompt=16, items=0, trust=args.trust_remote_code,
            progress=args.progress,
        )  # fmt: skip
        return recommendation(list(found), args.quality_budget)
    except StreamError as e:
        return f"not measured: {e}"


def _save(best: Record, runner: Runner, config: StreamConfig, out: Path) -> None:
    """Write the stated and the winning settings, with notes on their origin."""
    config = runner.applied(best["settings"], config)
    about = {
        "model": runner.name,
        "gain": best["ratio"],
        "verified": best["phase"] == "verify",
        "tokens_per_s": best["tokens_per_s"],
        "date": best["time"],
        **tuned_for(runner.located.layers, config),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    StreamConfig(**{name: getattr(config, name) for name in SAVED}, about=about).save(out)


def _command(args: argparse.Namespace) -> str:
    """A command line that uses the settings."""
    words = ["python", "-m", "mlx_streamexperts.generate", "--settings", str(args.out)]
    for name in ("model", "store", "hot_set"):
        if (value := getattr(args, name)) is not None:
            words += ["--" + name.replace("_", "-"), value]
    return shlex.join(words)


def _rows(outcome: Outcome) -> list[Row]:
    rows = [
        ("Trials", f"{outcome.trials}, {outcome.ended}"),
        ("Noise", f"the defaults differed from themselves by {outcome.spread:.1%}"),
    ]
    if outcome.disqualified:
        rows.append(("Disqualified", f"{len(outcome.disqualified)}: see the ledger, and report it"))
    if not (best := outcome.best):
        return [*rows, ("Best", "the defaults: nothing beat them by more than the noise")]
    how = "verified" if best["phase"] == "verify" else "in one measurement, not verified"
    gain = (
        f"{best['ratio']:.3f} times the defaults' tokens/s ({how}): "
        f"{best['tokens_per_s']:.2f} against {best['baseline_tokens_per_s']:.2f}"
    )
    return [*rows, ("Best", _said(best["settings"])), ("Gain", gain)]


def _said(settings: Settings) -> str:
    return ", ".join(f"{k} {v}" for k, v in settings.items()) or "the defaults"

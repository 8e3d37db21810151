"""Judge caches offline: replay traces through policies and sizes, and through the optimum.

python -m mlx_streamexperts.simulate chat.jsonl --machine "M4 Max 128 GB"
python -m mlx_streamexperts.simulate today.jsonl --fit monday.jsonl tuesday.jsonl --plot rates.svg

Traces come from `with stream(model).trace("chat.jsonl"):`. Misses of experts never seen before
(compulsory) and of evicted ones (capacity) are counted apart: only the latter depend on the policy.
Counts of lru, lrfu and s3fifo equal the live cache's. Tokens/s are predictions, by `predict`'s
formula. --fit fits uneven shares of the budget, layers kept whole and a hot set on its traces, and
judges them on the others.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from ._analysis.plots import plot_rates
from ._analysis.replay import BEST
from ._analysis.simulation import CANDIDATES, FIRST_CALLS, Report, simulate, with_expert_bytes
from ._cli.options import describe, ended
from ._config import parse_size
from ._errors import StreamError
from ._experts.trace import read_trace
from ._memory.hardware import NAMED_MACHINES as NAMED_MACHINES
from ._memory.hardware import Machine, named_machine

_DEFAULT_POLICIES = ("lru", "s3fifo", "lfu", "lrfu", BEST)
_DEFAULT_SHARES = "0.125,0.25,0.375,0.5,0.75"


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser()
    describe(parser, "simulate", __doc__)
    parser.add_argument(
        "traces", nargs="+", type=Path, metavar="TRACE", help="recorded with --trace"
    )
    parser.add_argument(
        "--fit", nargs="+", type=Path, default=[], metavar="TRACE", help="other traces to fit on"
    )
    parser.add_argument(
        "--policies",
        default=",".join(_DEFAULT_POLICIES),
        help=f"of {', '.join((*CANDIDATES, BEST))} (default: %(default)s)",
    )
    parser.add_argument(
        "--shares", default=_DEFAULT_SHARES, help="resident shares (default: %(default)s)"
    )
    parser.add_argument(
        "--machine",
        default="M4 Max 128 GB",
        metavar="NAME",
        help="to predict tokens/s for: a chip and its memory (default: %(default)s)",
    )
    parser.add_argument("--ssd", help="another drive: bytes/s and latency, e.g. 7GB/s:100us")
    parser.add_argument("--expert-bytes", help="pretend that an expert has this size, e.g. 6.75MB")
    parser.add_argument("--layers", action="store_true", help="print hit rates by layer")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw hit rates: .png or .svg")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    try:
        machine = _machine(args)
        traces, fit = ([read_trace(p) for p in paths] for paths in (args.traces, args.fit))
        if args.expert_bytes:
            size = parse_size(args.expert_bytes)
            traces, fit = ([with_expert_bytes(t, size) for t in x] for x in (traces, fit))
        policies = args.policies.split(",")
        if unknown := [p for p in policies if p not in CANDIDATES and p != BEST]:
            raise StreamError(
                f"unknown policy {unknown[0]!r}: choose of {', '.join((*CANDIDATES, BEST))}"
            )
        report = simulate(traces, _shares(args.shares), policies, machine, fit)
        if args.plot:
            plot_rates(report.rows, args.plot)
    except StreamError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(report), indent=1) if args.json else "\n".join(_lines(report, args)))
    return 0


def _machine(args: argparse.Namespace) -> Machine:
    """The machine that tokens/s are predicted for."""
    machine = named_machine(args.machine)
    return machine.with_drive(args.ssd) if args.ssd else machine


def _conclusion(report: Report) -> Iterator[str]:
    """What the replay of each trace says: the best policy, and what more memory would bring."""
    for name in dict.fromkeys(r.trace for r in report.rows):
        yield ""
        rows = [r for r in report.rows if r.trace == name and r.policy != BEST]
        shares = sorted({r.share for r in rows})
        best = {s: max((r for r in rows if r.share == s), key=lambda r: r.hit_rate) for s in shares}
        for share, row in best.items():
            worst = min((r for r in rows if r.share == share), key=lambda r: r.hit_rate)
            yield (
                f"{name}: with {share:.1%} resident the best is {row.policy} ({row.hit_rate:.1%} "
                f"hits; {worst.policy} has {worst.hit_rate:.1%})."
            )
        if len(shares) > 1:
            first, last = best[shares[0]], best[shares[-1]]
            fewer = first.missed_per_token - last.missed_per_token
            yield (
                f"From {first.share:.1%} to {last.share:.1%} resident saves {fewer:.1f} of the "
                f"{first.missed_per_token:.1f} experts that a token reads from the drive."
            )


def _shares(text: str) -> list[float]:
    try:
        shares = [float(x) for x in text.split(",")]
    except ValueError as e:
        raise StreamError(f"--shares {text!r}: write for example 0.25,0.5") from e
    if not all(0 < x <= 1 for x in shares):
        raise StreamError(f"--shares {text!r}: each above 0, at most 1")
    return shares


def _lines(report: Report, args: argparse.Namespace) -> list[str]:
    """The report for people."""
    machine = _machine(args)
    head = f"{'share':>6s}  {'policy':8s} {'division':8s}"
    where = f"{machine.name} whose drive reads {machine.drive_text}"
    lines = [f"Tokens/s are predicted for an {where} (--machine and --ssd state another)"]
    for name in dict.fromkeys(r.trace for r in report.rows):
        lines += ["", name, f"{head} {'hits':>7s} {'compuls.':>9s} {'capacity':>9s} "]
        lines[-1] += f"{'decode hits':>11s} {'missed/token':>12s} {'tokens/s':>9s} (predicted)"
        for r in report.rows:
            if r.trace != name:
                continue
            rate = "-" if r.tokens_per_s is None else f"{r.tokens_per_s:.3g}"
            lines.append(
                f"{r.share:6.1%}  {r.policy:8s} {r.way:8s} {r.hit_rate:7.1%} {r.compulsory:9d} "
                f"{r.capacity:9d} {r.decode_hit_rate:11.1%} {r.missed_per_token:12.2f} {rate:>9s}"
            )
            if args.layers:
                lines.append("        by layer: " + " ".join(f"{x:.0%}" for x in r.layer_hit_rates))
    if report.warmth:
        lines += ["", f"Hot set read beforehand; misses of the first prompt, {FIRST_CALLS} calls:"]
    for w in report.warmth:
        lines.append(
            f"{w.share:6.1%}  {w.trace:24s} {w.read} read, {w.cold} -> {w.hot}, "
            f"{w.cold_calls} -> {w.hot_calls}"
        )
    lines += _conclusion(report)
    return lines


if __name__ == "__main__":
    sys.exit(ended(main))

"""The command `doctor`: _options.py says what it does."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .._cli.options import failed
from .._config import from_arguments
from .._errors import BudgetError, StreamError
from ._examination import (
    Examination,
    RanksExamination,
    examine,
    examine_machines,
    examine_ranks,
    rank_files,
)
from ._options import setup_arg_parser
from ._selftest import Finding, as_dict, describe_device, finding_lines, selftest
from ._text import lines, machine_lines


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 1 on an error or if the self-test fails, 2 if the model does not fit.
    """
    args = setup_arg_parser().parse_args(argv)
    try:
        if args.selftest:
            return _selftest(args)
        if args.ranks > 1 and args.files is not None:
            print("\n".join(rank_files(args)))
            return 0
        if args.model is None and args.ranks == 1 and args.trace is None:
            machines = examine_machines(args)
            print(
                json.dumps([m.as_dict() for m in machines], indent=1)
                if args.json
                else "\n".join(machine_lines(machines))
            )
            return 0
        found: Examination | RanksExamination
        found = examine_ranks(args) if args.ranks > 1 else examine(args)
    except BudgetError as e:
        print(f"{args.model or 'the model'}: does not fit: {e}", file=sys.stderr)
        return 2
    except StreamError as e:
        return failed(e)
    print(json.dumps(found.as_dict(), indent=1) if args.json else "\n".join(lines(found)))
    return 0


def _selftest(args: argparse.Namespace) -> int:
    """Print each check's finding as it comes; returns the exit status."""
    out = sys.stderr if args.json else sys.stdout
    about = describe_device()
    print(f"Self-test on {about['device']} {about['name']}, MLX {about['mlx']}", file=out)
    findings: list[Finding] = []

    def begin(name: str, count: int) -> None:
        print(f"{len(findings) + 1:2d}/{count} {name} ...", end=" ", flush=True, file=out)

    for finding in selftest(from_arguments(args), args.model and Path(args.model), begin):
        findings.append(finding)
        print("\n".join(finding_lines(finding)), flush=True, file=out)
    wrong = sum(not f.passed for f in findings)
    seconds = sum(f.seconds for f in findings)
    print(
        f"FAIL: {wrong} of {len(findings)} checks did not pass; see above what avoids them"
        if wrong
        else f"PASS: all {len(findings)} checks, in {seconds:.0f} s",
        file=out,
    )
    if args.json:
        print(json.dumps(as_dict(findings), indent=1))
    return int(wrong > 0)

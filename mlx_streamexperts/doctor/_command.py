"""Will a model run on this machine, how fast, and what limits it? From headers, before loading.

python -m mlx_streamexperts.doctor                          which models suit this machine?
python -m mlx_streamexperts.doctor --model mlx-community/Kimi-K2.5
python -m mlx_streamexperts.doctor --model ./my-model --machine "m4 max 128" --drive 7GB/s
python -m mlx_streamexperts.doctor --selftest

From a Hub repository only headers are fetched (a few megabytes), never weights. Speeds are
predictions with a range; measured figures are marked. --selftest tests on this machine what
streaming promises.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from .._cli.options import failed, make_parser
from .._config import from_arguments
from .._errors import BudgetError, StreamError
from .._memory.hardware import NAMED_MACHINES
from ._examination import (
    Examination,
    RanksExamination,
    examine,
    examine_machines,
    examine_ranks,
    rank_files,
)
from ._selftest import Finding, as_dict, describe_device, finding_lines, selftest
from ._text import lines, machine_lines


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of `doctor`, and those of streaming."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument(
        "--machine",
        action="append",
        metavar="NAME",
        help="predict for this Mac instead of measuring this machine: a chip and its memory, such "
        "as 'm4 max 128' (repeatable; or 'all' for " + ", ".join(NAMED_MACHINES) + ")",
    )
    parser.add_argument(
        "--drive",
        metavar="RATE",
        help="take the drive to give this rate, such as 7GB/s, or 7GB/s:100us with a latency",
    )
    parser.add_argument(
        "--drive-seconds",
        type=float,
        default=4.0,
        metavar="N",
        help="measure the drive so long (default: 4). Many drives slow down when they grow hot, "
        "after a minute, say",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=1000,
        help="prompt length for the time to the first token",
    )
    parser.add_argument("--trace", type=Path, help="use the hit rate of this recorded trace")
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        help="judge the model on this many machines together (--pipeline). --memory and --machine "
        "then apply to each; or give one for each: --memory 96GB,64GB, and --machine once per rank",
    )
    parser.add_argument(
        "--link",
        default="1GB/s:300us",
        help="with --ranks: rate and latency of the network (default: 1GB/s:300us)",
    )
    parser.add_argument(
        "--files",
        type=int,
        metavar="RANK",
        help="with --ranks: print only the names of the files that this rank needs",
    )
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="test on this machine what streaming promises, with small models that need no "
        "download (a minute or two); --model FOLDER names files to read",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return make_parser(parser, "python -m mlx_streamexperts.doctor", __doc__)


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

"""Predict the stand-ins of mlx-vlm's models on Macs, from their headers alone.

    python examples/fullsize/predict.py            # a minute
    python examples/fullsize/predict.py --write    # the same, and the README's table anew

Nothing here is measured: it is what `doctor --machine` says of each stand-in. The formula is in
mlx_streamexperts/_analysis/predict.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import vlm
import write
from layout import HERE

from mlx_streamexperts.doctor import examine
from mlx_streamexperts.doctor._command import setup_arg_parser as doctor_arguments
from mlx_streamexperts.doctor._examination import DoesNotFit, Verdict

README = HERE / "README.md"
BEGIN, END = "<!-- predictions: begin -->\n", "<!-- predictions: end -->\n"
MACS = ("M4 Pro 32 GB", "M4 Max 64 GB", "M2 Max 96 GB", "M5 Max 128 GB")
HEAD = (
    "| model | Mac | budget | trunk | experts resident | tokens/s, predicted | "
    "first of 1,000 tokens | limited by |\n|---|---|---|---|---|---|---|---|\n"
)


def rows(folder: Path, name: str) -> list[str]:
    """A line of the table for each Mac.

    Args:
        folder: the stand-in; its trunk may be holes.
        name: the model's.
    """
    machines = [x for mac in MACS for x in ("--machine", mac)]
    found = examine(doctor_arguments().parse_args(["--model", str(folder), *machines]))
    return [_row(name, one) for one in found.machines]


def _row(name: str, found: Verdict | DoesNotFit) -> str:
    if isinstance(found, DoesNotFit):
        needed = f"needs {found.needed / 1e9:.0f} GB"
        return f"| {name} | {found.machine.name} | does not fit, {needed} | | | | | |\n"
    plan, p = found.plan, found.prediction
    # Arithmetic is not modelled, so a prompt that hardly reads has no prediction.
    first = f"{p.first_token.rounded(2)} s" if plan.resident_share < 0.9 else "not predicted"
    return (
        f"| {name} | {found.machine.name} | {plan.bound / 1e9:.0f} GB | {plan.trunk / 1e9:.1f} GB "
        f"| {plan.resident_share:.0%} | {p.tokens_per_s.rounded(2)} | {first} | {p.limit} |\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="replace the table in README.md")
    args = parser.parse_args(argv)
    table = HEAD
    for name in vlm.MODELS:
        with tempfile.TemporaryDirectory() as folder:
            write.write(name, Path(folder) / name, trunk=False)
            table += "".join(rows(Path(folder) / name, name))
    print(table, end="")
    if args.write:
        before, _, rest = README.read_text().partition(BEGIN)
        README.write_text(before + BEGIN + table + END + rest.partition(END)[2])
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Tables, in Markdown, of what the scripts of this folder left.

python benchmarks/gpu/summary.py RESULTS
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def exact(r: dict[str, Any]) -> list[str]:
    """Settings that were bit-identical, and schedules."""
    lines = ["| model | settings tried | bit-identical |", "|---|---|---|"]
    for model, rows in r["decoding"].items():
        if "skipped" in rows:
            lines.append(f"| {model} | none | {rows['skipped']} |")
            continue
        same = sum(row["identical"] for row in rows.values())
        lines.append(f"| {model} | {len(rows)} | {same} |")
    s = r["schedules"]
    outcome = "none differed" if not s["different"] else "; ".join(s["different"])
    lines += [
        "",
        f"Random schedules: {s['schedules']}, of {s['steps']} steps, with {s['passes']} run-ahead "
        f"passes; {s['taken_back']} steps taken back, {s['compared']} results compared: {outcome}.",
    ]
    return lines


def speed(r: dict[str, Any]) -> list[str]:
    """A layer's time with nothing missing."""
    lines = ["| model | ms a layer | of stock (spread of rounds) |", "|---|---|---|"]
    for name, row in r["rows"].items():
        spread = " to ".join(f"{x:.2f}" for x in row["spread"])
        lines.append(f"| {name} | {row['ms_a_layer']:.3f} | {row['of_stock']:.2f} ({spread}) |")
    return lines


def standin(r: dict[str, Any]) -> list[str]:
    """Ways and drives."""
    lines = [
        "| resident, drive, way | layers run | ms a token | roofline, ms | of it | hit rate | "
        "MB a token needed, read | passes | asked |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in r["rows"].items():
        lines.append(
            f"| {name} | {row['layers']} | {row['ms']:.0f} | {row['roofline_ms']:.0f} "
            f"({row['bound_by']}) | {row['efficiency']:.2f} | {row['hit_rate']:.3f} | "
            f"{row['needed_mb']:.0f}, {row['read_mb']:.0f} | {row['passes']:.2f} | "
            f"{row['asked']:.1f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="the folder")
    args = parser.parse_args()
    for file in sorted(args.results.glob("*.json")):
        r = json.loads(file.read_text())
        table = {"exact": exact, "speed": speed}.get(file.stem, standin)
        print(f"**{file.stem}**: {r['device']}, {r['cores']} cores, MLX {r['mlx']}\n")
        print("\n".join(table(r)), end="\n\n")


if __name__ == "__main__":
    main()

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
    lines = [
        "| model | settings tried | bit-identical | prompts tried | bit-identical | others |",
        "|---|---|---|---|---|---|",
    ]
    for model, rows in r["decoding"].items():
        if "skipped" in rows:
            lines.append(f"| {model} | none | {rows['skipped']} | | | |")
            continue
        same = sum(row["identical"] for row in rows.values())
        apart = [x["difference"] for x in r.get("prompts", {}).get(model, {}).values()]
        zero = sum(x == 0 for x in apart)
        most = f"{max(apart):.1e} of the largest logit at most" if zero < len(apart) else ""
        lines.append(f"| {model} | {len(rows)} | {same} | {len(apart)} | {zero} | {most} |")
    s = r["schedules"]
    outcome = "none differed" if not s["different"] else "; ".join(s["different"])
    told = (
        f"Random schedules: {s['schedules']}, of {s['steps']} steps, with {s['passes']} run-ahead "
        f"passes; {s['taken_back']} steps taken back, {s['compared']} results compared: {outcome}."
    )
    return [*lines, "", told] if r["decoding"] else [told]


def speed(r: dict[str, Any]) -> list[str]:
    """A token's time with nothing missing."""
    lines = ["| | ms a token | of stock (spread of rounds) |", "|---|---|---|"]
    for regime, rows in r["rows"].items():
        for name, row in rows.items():
            if name == "same":
                lines.append(f"| **{regime}** (same tokens as stock: {row}) | | |")
                continue
            spread = " to ".join(f"{x:.2f}" for x in row["spread"])
            way = f", chose {row['way']!r}" if "way" in row else ""
            lines.append(
                f"| {name}{way} | {row['ms_a_token']:.1f} | {row['of_stock']:.2f} ({spread}) |"
            )
    return lines


def standin(r: dict[str, Any]) -> list[str]:
    """Ways, or prompts, and drives."""
    first = "resident, drive" if "tokens" in r else "resident, drive, way"
    lines = [
        f"| {first} | layers run | ms | roofline, ms | of it | hit rate | MB needed, read | passes "
        "| asked |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in r["rows"].items():
        passes = f"{row['passes']:.2f} | {row['asked']:.1f}" if "passes" in row else "| "
        lines.append(
            f"| {name} | {row['layers']} | {row['ms']:.0f} | {row['roofline_ms']:.0f} "
            f"({row['bound_by']}) | {row['efficiency']:.2f} | {row['hit_rate']:.3f} | "
            f"{row['needed_mb']:.0f}, {row['read_mb']:.0f} | {passes} |"
        )
    return lines


TABLES = {"exact": exact, "speed": speed, "schedules": exact}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="the folder")
    args = parser.parse_args()
    for file in sorted(args.results.glob("*.json")):
        r = json.loads(file.read_text())
        table = TABLES.get(file.stem.split("-")[0], standin)
        print(f"**{file.stem}**: {r['device']}, {r['cores']} cores, MLX {r['mlx']}\n")
        print("\n".join(table(r)), end="\n\n")


if __name__ == "__main__":
    main()

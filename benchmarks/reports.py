"""Turn report files that users sent into one table, the newest of each machine and model first.

    python benchmarks/reports.py sent/*.json > table.md

A row for each file: what was measured, and how far the formula of `doctor` was off where the file
says it. Files that are no whole reports are named on standard error and left out; the exit status
is then 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_streamexperts._config import format_size
from mlx_streamexperts.report._report import SCHEMA, VERSION

HEAD = (
    "| machine | model | memory or cache | resident | tokens/s (range of prompts) | first token of "
    "| hits | drive | date, mlx, mlx-lm |\n|---|---|---|---|---|---|---|---|---|\n"
)


def main(files: Sequence[str]) -> int:
    """Print the table; returns the exit status."""
    rows, wrong = [], 0
    for name in files:
        try:
            found = json.loads(Path(name).read_text())
            if (found["schema"], found["version"]) != (SCHEMA, VERSION) or found["unfinished"]:
                raise ValueError("not a whole report of this version")
            rows.append((found["created"], row(found)))
        except (OSError, ValueError, LookupError, TypeError) as e:
            print(f"{name}: left out: {e!r}", file=sys.stderr)
            wrong += 1
    print(HEAD + "".join(text for _, text in sorted(rows, reverse=True)), end="")
    return int(wrong > 0)


def row(found: dict[str, Any]) -> str:
    """The line of one report."""
    method, speed = found["method"], found["speed"]
    machine, options = method["machine"], method["options"]
    device = machine["device"].get("device_name") or machine["processor"] or machine["architecture"]
    rate, prompts = speed["tokens_per_s"], speed["by_prompt"]
    hits = sum(p["hit_rate"] for p in prompts) / len(prompts)
    first = max(speed["by_prompt_length"], key=lambda p: p["prompt_tokens"])
    rates = [r["rate"] for r in (found["ssd"] or {}).get("rates", [])]
    budget = options["memory"] or options["cache"] or "default"
    if isinstance(budget, int | float):
        budget = format_size(budget)
    cells = (
        f"{device}, {format_size(machine['memory_bytes'])}",
        method["model"]["name"],
        budget,
        f"{method['resident_share']:.0%}",
        f"{rate['median']:.3g} ({rate['low']:.3g} to {rate['high']:.3g})",
        f"{first['prompt_tokens']}: {first['seconds']['median']:.3g} s",
        f"{hits:.0%}",
        f"{format_size(max(rates))}/s" if rates else "not measured",
        f"{found['created'][:10]}, {method['versions']['mlx']}, {method['versions']['mlx-lm']}",
    )
    return "| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

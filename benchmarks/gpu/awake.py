"""Does small work for the GPU during waits (`keep_awake`) help or harm? The same logits both ways.

A model of 24 layers with random weights decodes random tokens with a quarter of its experts
resident, from drives of stated rates (`_analysis/throttle.py`, files in the page cache). Two models
take turns: one never beats, one beats during every wait. Figures are medians of the rounds' ratios,
and their spread. An NVIDIA data-centre card keeps its clocks up by itself; there this shows what
beats cost. On a Mac it shows whether they pay.

    python benchmarks/gpu/awake.py --out RESULTS
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import PLAIN, report
from random_model import write_random_model

from mlx_streamexperts._analysis.exactness import decode, load_streamed, random_tokens, resize
from mlx_streamexperts._analysis.exactness import same as same_bits
from mlx_streamexperts._analysis.throttle import slowed

_DRIVES = {"2": 2e9, "7.4": 7.4e9, "unthrottled": 1e15}  # GB/s


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--tokens", type=int, default=48, help="a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--share", type=float, default=0.25, help="resident experts")
    parser.add_argument("--run-ahead", default="auto", choices=("auto", "on", "off"))
    args = parser.parse_args()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = write_random_model(
            Path(work) / "model", layers=24, experts=64, top_k=8, hidden=2048, inner=1024, bits=4,
            dtype=mx.bfloat16,
        )  # fmt: skip
        config = replace(PLAIN, cache=2 << 30, run_ahead=args.run_ahead)
        ways = {w: load_streamed(folder, replace(config, keep_awake=w)) for w in ("off", "on")}
        for _, s in ways.values():
            resize(s, args.share)
        for drive, rate in _DRIVES.items():
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            same = True
            with slowed(rate, 80e-6):
                for model, s in ways.values():
                    decode(model, random_tokens(args.tokens))  # kernels compiled, the cache warm
                    s.reset()
                for round_ in range(args.rounds):
                    tokens, logits = random_tokens(args.tokens, 1 + round_), {}
                    for way in sorted(ways, reverse=bool(round_ % 2)):
                        logits[way], median = decode(ways[way][0], tokens)
                        seconds[way].append(median)
                    same = same and same_bits(logits["off"], logits["on"])
            ratios = [a / b for a, b in zip(seconds["off"], seconds["on"], strict=True)]
            rows[drive] = {
                "ms_a_token": {w: 1e3 * statistics.median(each) for w, each in seconds.items()},
                "speed_with_beats": statistics.median(ratios),
                "spread": [min(ratios), max(ratios)],
                "beats": ways["on"][1].stats().beats,
                "waited_share": ways["off"][1].stats().read.wait_seconds
                / (args.tokens * sum(seconds["off"])),
                "hit_rate": ways["off"][1].stats().cache.hit_rate,
                "same": same,
            }
            print(drive, rows[drive], flush=True)
            report(args.out, "awake", {"rows": rows, "run_ahead": args.run_ahead})


if __name__ == "__main__":
    main()

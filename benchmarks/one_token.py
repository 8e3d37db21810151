"""The timeline of one decode step as a picture, and where its time went.

    python benchmarks/one_token.py --random /tmp/f32 --share 0.25 --out docs/one-token.svg

Decodes past the page cache until the expert cache is full and the trials have settled, then records
one step. Needs the `plots` extra. The trace itself (`--trace FILE`) opens in ui.perfetto.dev.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import mlx.core as mx
import mlx_lm.utils
from decode import prompt_tokens
from mlx_lm.models.cache import make_prompt_cache
from random_model import write_random_model

from mlx_streamexperts import StreamConfig, demo_model, patch, stream

COLOURS = {
    "sync": "#4c78a8", "map": "#b279a2", "wait": "#e45756", "build": "#72b7b2",
    "read": "#f58518", "prefetch": "#eeca3b",
}  # fmt: skip


def draw(events: list[dict[str, Any]], title: str, out: Path) -> None:
    """Bars over milliseconds: a row for the layers' phases, one for each reader thread."""
    names = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    spans = [e for e in events if e["ph"] == "X"]
    rows = sorted(names, key=lambda tid: (names[tid] != "layers", names[tid]))
    figure, axes = plt.subplots(figsize=(11, 0.35 * len(rows) + 1.4))
    for name, colour in COLOURS.items():
        for y, tid in enumerate(rows):
            bars = [(e["ts"] / 1e3, e["dur"] / 1e3) for e in spans
                    if e["tid"] == tid and e["name"] == name]  # fmt: skip
            if bars:
                axes.broken_barh(
                    bars, (y - 0.4, 0.8), facecolor=colour, edgecolor="white", linewidth=0.3
                )
        axes.plot([], [], color=colour, linewidth=6, label=name)
    axes.set_yticks(range(len(rows)), [names[t] for t in rows])
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds")
    axes.set_title(title)
    axes.legend(ncols=len(COLOURS), loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
    figure.savefig(out, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--random", type=Path, help="write (once) and use a 4.8 GB float32 model")
    parser.add_argument("--share", type=float, default=0.25)
    parser.add_argument("--warm-up", type=int, default=60, help="steps before the recorded one")
    parser.add_argument("--prefetch", default="on")
    parser.add_argument("--overlap", default="on")
    parser.add_argument("--trace", type=Path, help="keep the trace in this file")
    parser.add_argument("--out", type=Path, required=True, help="picture (.svg)")
    args = parser.parse_args()
    folder = write_random_model(args.random) if args.random else args.model
    tokens = prompt_tokens(folder, args.warm_up + 1)
    config = StreamConfig(
        cache=1 << 60, progress=False, bypass_page_cache="on", prefetch=args.prefetch,
        overlap=args.overlap,
    )  # fmt: skip
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(folder)
    with stream(model) as expert_stream, tempfile.TemporaryDirectory() as scratch:
        expert_stream.resize(int(args.share * expert_stream.plan.experts))
        cache = make_prompt_cache(model)
        for t in tokens[:-1]:
            mx.eval(model(mx.array([[t]]), cache=cache))
        expert_stream.reset()
        file = args.trace or Path(scratch) / "trace.json"
        with expert_stream.timeline(file) as timeline:
            mx.eval(model(mx.array([[tokens[-1]]]), cache=cache))
            summary = timeline.summary()
        stats = expert_stream.stats()
        draw(
            json.loads(file.read_text())["traceEvents"],
            f"one token, {args.share:.0%} of experts resident: {stats.cache.hits} hits, "
            f"{stats.cache.prefetched} prefetched ({stats.prefetch.late} late), "
            f"{stats.cache.misses} misses, {stats.read.bytes / 1e6:.0f} MB read",
            args.out,
        )
        for name, seconds in summary.items():
            print(f"{name:8s} {1e3 * seconds:8.2f} ms  {seconds / summary['elapsed']:6.1%}")


if __name__ == "__main__":
    main()

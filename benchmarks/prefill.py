"""Prompts through streamed experts against stock mlx-lm with everything resident.

    python benchmarks/prefill.py                       # the embedded model
    python benchmarks/prefill.py --random /tmp/f32     # 4.8 GB of float32, as in decode.py

Time to first token and bytes read, by prompt length, share of experts resident and tokens a chunk,
past the page cache. Each run begins with the cache as the run before left it: after the first round
that is what a prompt leaves. Rounds take turns with stock; medians, and of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from adapters.measure import prompt_logits
from decode import prompt_tokens
from random_model import write_random_model

from mlx_streamexperts import StreamConfig, demo_model, patch, stream


def prefill(model: nn.Module, tokens: list[int], chunk: int) -> float:
    """Seconds until the logits after the prompt are there, by `mlx_lm.generate`'s own code."""
    start = time.perf_counter()
    prompt_logits(model, tokens, chunk)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--random", type=Path, help="write (once) and use a 4.8 GB float32 model")
    parser.add_argument("--shares", default="0.5,0.25,0.125")
    parser.add_argument("--prompts", default="64,1024", help="prompt lengths in tokens")
    parser.add_argument("--chunks", default="256,2048", help="tokens a forward pass")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = write_random_model(args.random) if args.random else args.model
    lengths = [int(n) for n in args.prompts.split(",")]
    tokens = prompt_tokens(folder, max(lengths))
    stock, _ = mlx_lm.utils.load_model(folder)
    rows: list[dict[str, Any]] = []
    for share in map(float, args.shares.split(",")):
        config = StreamConfig(cache=1 << 60, progress=False, bypass_page_cache="on")
        with patch(config=config):
            model, _ = mlx_lm.utils.load_model(folder)
        with stream(model) as expert_stream:
            expert_stream.resize(int(share * expert_stream.plan.experts))
            for length in lengths:
                for chunk in sorted({min(int(c), length) for c in args.chunks.split(",")}):
                    prefill(model, tokens[:length], chunk)
                    ratios, seconds, read, peak = [], [], [], []
                    for _ in range(args.rounds):
                        base = prefill(stock, tokens[:length], length)
                        expert_stream.reset()
                        mx.reset_peak_memory()
                        before = mx.get_active_memory()
                        seconds.append(prefill(model, tokens[:length], chunk))
                        peak.append(mx.get_peak_memory() - before)
                        ratios.append(base / seconds[-1])
                        read.append(expert_stream.stats().read.bytes)
                    sweeps = statistics.median(read) / expert_stream.plan.experts
                    rows.append(
                        {
                            "share": share, "prompt": length, "chunk": chunk,
                            "seconds": statistics.median(seconds),
                            "tokens_per_s": length / statistics.median(seconds),
                            "ratio_to_stock": statistics.median(ratios),
                            "read_bytes": statistics.median(read), "of_all_experts": sweeps,
                            "peak_bytes": max(peak), "phases": expert_stream.stats().seconds,
                        }
                    )  # fmt: skip
                    r = rows[-1]
                    print(
                        f"{share:6.1%} resident, prompt {length:5d} by {chunk:5d}: "
                        f"{r['seconds']:7.3f} s  {r['tokens_per_s']:8.1f} tok/s  "
                        f"{r['ratio_to_stock']:.2f} of stock  read {r['read_bytes'] / 1e6:8.1f} MB "
                        f"({sweeps:.2f} of all experts)  work {r['peak_bytes'] / 1e6:.1f} MB",
                        flush=True,
                    )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

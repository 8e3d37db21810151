"""Several sequences at once: streamed against stock, in batches and in turns.

    python benchmarks/batch.py                                       # the embedded model
    python benchmarks/batch.py --random FOLDER --tokens 12           # 4.8 GB of float32

Every sequence has its own given text (another topic, on the embedded model), so that all systems
do the same work. *batch*: one pass for a token of each, as `mlx_lm.batch_generate` and the
server do; tokens that share an expert share its read. *in turns*: a pass for each sequence, one
after the other, as interleaved requests without batching. Stock and streamed models take turns in
each round, after an untimed one; medians of tokens/s of all sequences together, and of the rounds'
ratios. The page cache holds the files, unless `--cold`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as host
import statistics
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
from decode import prompt_tokens, repeated, timed, topics
from mlx_lm.models.cache import make_prompt_cache
from random_model import write_random_model

from mlx_streamexperts import StreamConfig, demo_model, patch, stream

WARM_UP = 8  # untimed steps of every run


def texts(folder: Path, sequences: int, length: int) -> np.ndarray:
    """Tokens [sequences, length]: real texts for the embedded model, else random ones."""
    if own := topics(folder):
        return np.array([repeated(own[i % len(own)], length) for i in range(sequences)])
    return np.array(prompt_tokens(folder, sequences * length)).reshape(sequences, length)


def batch(model: nn.Module, tokens: np.ndarray) -> float:
    """Seconds of the timed steps of all sequences in one pass each; tokens [B, T]."""
    cache = make_prompt_cache(model)

    def step(each: np.ndarray) -> None:
        mx.eval(model(mx.array(each[:, None]), cache=cache))

    return timed(model, tokens.T, WARM_UP, step)


def in_turns(model: nn.Module, tokens: np.ndarray) -> float:
    """The same, a pass for every sequence."""
    caches = [make_prompt_cache(model) for _ in tokens]

    def step(each: np.ndarray) -> None:
        for token, cache in zip(each.tolist(), caches, strict=True):
            mx.eval(model(mx.array([[token]]), cache=cache))

    return timed(model, tokens.T, WARM_UP, step)


WAYS = {"batch": batch, "in turns": in_turns}


def measure(
    stock: nn.Module, model: nn.Module, tokens: np.ndarray, way: str, rounds: int
) -> dict[str, Any]:
    """Rounds of both models in turns, one way; tokens [B, T]."""
    run, s, count = WAYS[way], stream(model), len(tokens) * (tokens.shape[1] - WARM_UP)
    run(model, tokens)
    rates: dict[str, list[float]] = {"stock": [], "streamed": []}
    for _ in range(rounds):
        for name, who in (("stock", stock), ("streamed", model)):
            rates[name].append(count / run(who, tokens))
    ratios = [a / b for a, b in zip(rates["streamed"], rates["stock"], strict=True)]
    stats = s.stats()
    used = stats.cache.hits + stats.cache.prefetched + stats.cache.misses
    return {
        "tokens_per_s": statistics.median(rates["streamed"]),
        "stock_tokens_per_s": statistics.median(rates["stock"]),
        "of_stock": statistics.median(ratios),
        "spread": [min(ratios), max(ratios)],
        "experts_a_token": used / count / len(s.layers),
        "hit_rate": stats.cache.hit_rate,
        "read_bytes_per_token": stats.read.bytes / count,
    }


def line(row: dict[str, Any]) -> str:
    """A row in words."""
    low, high = row["spread"]
    return (
        f"{row['tokens_per_s']:7.2f} tok/s, {row['of_stock']:.2f} ({low:.2f} to {high:.2f}) of "
        f"stock's {row['stock_tokens_per_s']:.2f}; {row['experts_a_token']:.2f} experts a token "
        f"and layer, hits {row['hit_rate']:.0%}, {row['read_bytes_per_token'] / 1e6:.2f} MB a token"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--random", type=Path, help="write (once) and use a 4.8 GB float32 model")
    parser.add_argument("--sizes", default="1,2,4,8", help="sequences at once")
    parser.add_argument("--shares", default="0.5,0.25", help="resident shares")
    parser.add_argument("--tokens", type=int, default=24, help="timed tokens of each sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cold", action="store_true", help="read past the page cache")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    folder = write_random_model(args.random) if args.random else args.model
    stock, _ = mlx_lm.utils.load_model(folder)
    config = StreamConfig(
        cache=1 << 60, progress=False, bypass_page_cache="on" if args.cold else "off"
    )
    rows: dict[str, dict[str, Any]] = {}
    for share in map(float, args.shares.split(",")):
        with patch(config=config):
            model, _ = mlx_lm.utils.load_model(folder)
        with stream(model) as s:
            s.resize(int(share * s.plan.experts))
            for size in map(int, args.sizes.split(",")):
                tokens = texts(folder, size, WARM_UP + args.tokens)
                for way in WAYS if size > 1 else ["batch"]:
                    row = measure(stock, model, tokens, way, args.rounds)
                    rows[f"{share:.0%} resident, {size} {way}"] = row
                    print(f"{share:.0%} {size} {way:8s} {line(row)}", flush=True)
    report = {
        "machine": f"{host.machine()}, {os.cpu_count()} cores, {mx.default_device()}",
        "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "model": folder.name,
        "warm_up_tokens": WARM_UP, "timed_tokens": args.tokens, "rounds": args.rounds,
        "page_cache": "bypassed" if args.cold else "warm", "results": rows,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

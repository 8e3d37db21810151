"""The cost of a miss with and without a packed store, read past the page cache.

    python benchmarks/store.py                        # the embedded model, experts of 77 kB
    python benchmarks/store.py --random FOLDER        # 1.5 GB of 4-bit experts in nine parts

The same model three times in one process: from its checkpoint, from a store made of it, and from
the store with every read's checksum compared. All have the same slots; rounds of one-token steps on
the same tokens take turns, in another order each round. Reads go past the page cache (an error
if the file system cannot), so that every miss goes to the drive. Printed over all rounds: the
decode rate (median, lowest, highest); reads and bytes per token; reads/s and bytes/s while waiting,
which overstate the drive if reads overlap computation; the time waited per missing expert; and
the share of time waiting. Ratios are medians over rounds, with lowest and highest.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import Counter
from pathlib import Path

import mlx_lm.utils
from decode import decode, prompt_tokens
from random_model import write_random_model

from mlx_streamexperts import StreamConfig, demo_model, pack, patch, stream


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--random", type=Path, help="write (once) and use a 4-bit random model")
    parser.add_argument("--experts", type=int, default=128, help="of the random model, per layer")
    parser.add_argument("--inner", type=int, default=768, help="of the random model's experts")
    parser.add_argument("--share", type=float, default=0.25, help="resident share")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = args.model
    if args.random:
        folder = write_random_model(args.random, bits=4, experts=args.experts, inner=args.inner)
    tokens = prompt_tokens(folder, args.warm_up + args.tokens)
    with tempfile.TemporaryDirectory(dir=folder.parent if args.random else None) as out:
        assert pack.main(["--model", str(folder), "--out", out]) == 0
        models = {}
        for name, store in (("checkpoint", None), ("store", out), ("verified", out)):
            config = StreamConfig(
                cache=1 << 60, progress=False, bypass_page_cache="on", store=store,
                verify_reads=name == "verified",
            )  # fmt: skip
            with patch(config=config):
                models[name], _ = mlx_lm.utils.load_model(folder)
            s = stream(models[name])
            s.resize(int(args.share * s.plan.experts))
        layer = stream(models["store"]).layers[0]
        print(f"{layer.expert_bytes / 1e6:.3f} MB an expert in {len(layer.tensors)} parts")
        seconds: dict[str, list[float]] = {name: [] for name in models}
        waits: dict[str, list[float]] = {name: [] for name in models}  # per missing expert
        sums: dict[str, Counter[str]] = {name: Counter() for name in models}
        order = list(models)
        for _ in range(args.rounds):
            for name in order:
                seconds[name].append(decode(models[name], tokens, args.warm_up))
                stats = stream(models[name]).stats()
                waits[name].append(stats.read.wait_seconds / stats.cache.misses)
                sums[name].update(
                    reads=stats.read.reads, bytes=stats.read.bytes, wait=stats.read.wait_seconds,
                    misses=stats.cache.misses, hits=stats.cache.hits,
                )  # fmt: skip
            order = order[1:] + order[:1]
        for name, n in sums.items():
            steps = args.tokens * args.rounds
            rates = [args.tokens / x for x in seconds[name]]
            print(
                f"{name:10s} {statistics.median(rates):6.2f} tokens/s "
                f"({min(rates):.2f} to {max(rates):.2f}), "
                f"{n['reads'] / n['misses']:.2f} reads a miss, "
                f"{n['reads'] / steps:.0f} reads and {n['bytes'] / steps / 1e6:.2f} MB a token, "
                f"{n['reads'] / n['wait']:.0f} reads/s and {n['bytes'] / n['wait'] / 1e9:.2f} GB/s "
                f"while waiting, {statistics.median(waits[name]) * 1e3:.3f} ms a miss, "
                f"waiting {n['wait'] / sum(seconds[name]):.0%}, "
                f"hits {n['hits'] / (n['hits'] + n['misses']):.0%}"
            )
        for a, b in (("store", "checkpoint"), ("verified", "store")):
            print(f"{a} / {b}: {_ratio(seconds[b], seconds[a])} times the rate, ", end="")
            print(f"{_ratio(waits[a], waits[b])} times the wait a miss")


def _ratio(a: list[float], b: list[float]) -> str:
    """Median, lowest and highest of the rounds' ratios."""
    ratios = [x / y for x, y in zip(a, b, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()

"""What a miss costs with and without a packed store, read past the page cache.

    python benchmarks/store.py [--model FOLDER] [--random FOLDER]

The same model twice in one process, once from its checkpoint and once from a store made of it, at
the same slots: rounds of one-token steps on the same tokens take turns. Read past the page cache
where the system can. Prints the reads a token, the drive's rate, the share of time waiting, and the
ratio of the decode rates.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
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
    parser.add_argument("--share", type=float, default=0.25, help="resident share")
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--warm-up", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    folder = write_random_model(args.random, bits=4) if args.random else args.model
    tokens = prompt_tokens(folder, args.warm_up + args.tokens)
    with tempfile.TemporaryDirectory(dir=folder.parent if args.random else None) as out:
        assert pack.main(["--model", str(folder), "--out", out]) == 0
        models = {}
        for name, store in (("checkpoint", None), ("store", out)):
            config = StreamConfig(
                cache=1 << 60, progress=False, bypass_page_cache="on", store=store
            )
            with patch(config=config):
                models[name], _ = mlx_lm.utils.load_model(folder)
            s = stream(models[name])
            s.resize(int(args.share * s.plan.experts))
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(args.rounds):
            for name, model in models.items():
                seconds[name].append(decode(model, tokens, args.warm_up))
        for name, model in models.items():
            stats, rate = stream(model).stats(), args.tokens / statistics.median(seconds[name])
            print(
                f"{name:10s} {rate:6.2f} tokens/s ({args.tokens / max(seconds[name]):.2f} to "
                f"{args.tokens / min(seconds[name]):.2f}), {stats.read.reads / args.tokens:.0f} "
                f"reads and {stats.read.bytes / args.tokens / 1e6:.2f} MB a token, "
                f"waiting {stats.read.wait_seconds / seconds[name][-1]:.0%}, "
                f"hits {stats.cache.hit_rate:.0%}"
            )
        pairs = zip(seconds["checkpoint"], seconds["store"], strict=True)
        print(
            f"store / checkpoint: {statistics.median(a / b for a, b in pairs):.2f} times the rate"
        )


if __name__ == "__main__":
    main()

"""Decode speed of streamed experts against stock mlx-lm with everything resident.

    python benchmarks/decode.py                       # the embedded model
    python benchmarks/decode.py --random /tmp/f32    # 4.8 GB of float32: bound by reads

Stock and streamed models take turns in one process, round by round, on the same tokens, so that
the ratio survives a noisy machine. "warm" reads through the page cache after a pass filled it;
"cold" bypasses it (O_DIRECT or F_NOCACHE), so that every miss goes to the drive. Each setting is
warmed up with untimed tokens until its cache is full. The share waiting is the time that the model
stood still for reads. Efficiency is the roofline's time, max(stock's token, missed bytes / the
drive's bandwidth for such reads with a full queue), over the time measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform as host
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from random_model import write_random_model

from mlx_streamexperts import StreamConfig, demo_model, patch, stream
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._analysis.measure import drive_rates
from mlx_streamexperts._analysis.throttle import Throttle
from mlx_streamexperts._config import parse_size
from mlx_streamexperts._experts.stream import ExpertStream, expert_files, is_streamed


def topics(folder: Path) -> list[list[int]]:
    """Tokens of the embedded model's texts, or of a copy's; none where nothing was learned."""
    prompts = folder / "prompts.json"
    if not prompts.exists():
        return []
    tokenizer = mlx_lm.utils.load_tokenizer(folder)
    return [tokenizer.encode(p["prompt"]) for p in json.loads(prompts.read_text())]


def drive_rate(expert_stream: ExpertStream, bypass: bool) -> float:
    """Bytes/s of random reads as large as an expert's largest tensor, with a full queue."""
    files = [(f, Path(f).stat().st_size) for f in expert_files(expert_stream.layers)]
    tensors = [t for layer in expert_stream.layers for t in layer.tensors.values()]
    size = max(t.stored.row_bytes for t in tensors)
    (found,) = drive_rates(files, size, (expert_stream.config.threads,), bypass)
    return found.rate


def repeated(tokens: list[int], count: int) -> list[int]:
    """So many of them, again from the first where there are too few."""
    return (tokens * (count // len(tokens) + 1))[:count]


def prompt_tokens(folder: Path, count: int) -> list[int]:
    """Real text for the embedded model, random tokens where nothing was learned."""
    if texts := topics(folder):
        return repeated([t for text in texts for t in text], count)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(0, vocab, count).tolist()


def timed(
    model: nn.Module, steps: Iterable[Any], warm_up: int, run: Callable[[Any], None]
) -> float:
    """Seconds of running the steps after the first `warm_up`, from where a stream counts anew."""
    for i, step in enumerate(steps):
        if i == warm_up:
            if is_streamed(model):
                stream(model).reset()
            start = time.perf_counter()
        run(step)
    return time.perf_counter() - start


def decode(model: nn.Module, tokens: list[int], warm_up: int) -> float:
    """Seconds for one-token steps over `tokens` after `warm_up` of them."""
    cache = make_prompt_cache(model)
    return timed(model, tokens, warm_up, lambda t: mx.eval(model(mx.array([[t]]), cache=cache)))


read_into = platform.read_into


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--random", type=Path, help="write (once) and use a 4.8 GB float32 model")
    parser.add_argument("--shares", default="1,0.5,0.25,0.125", help="resident shares to try")
    parser.add_argument(
        "--states", default="warm,cold", help="of the page cache: warm, cold or throttled"
    )
    parser.add_argument("--throttle", default="1.5GB", help="bytes/s of the throttled drive")
    parser.add_argument("--tokens", type=int, default=100, help="timed decode steps a round")
    parser.add_argument("--warm-up", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policy", default=StreamConfig().with_defaults().policy)
    parser.add_argument("--overlap", default="auto")
    parser.add_argument("--prefetch", default="auto")
    parser.add_argument("--store", help="a packed store of the model")
    parser.add_argument("--json", type=Path, help="write the results here too")
    args = parser.parse_args()
    folder = write_random_model(args.random) if args.random else args.model
    tokens = prompt_tokens(folder, args.warm_up + args.tokens)

    stock, _ = mlx_lm.utils.load_model(folder)
    rows: dict[str, dict[str, Any]] = {}
    for state in args.states.split(","):
        bypass = "on" if state == "cold" else "off"
        rate = parse_size(args.throttle) if state == "throttled" else None
        config = StreamConfig(
            cache=1 << 60, progress=False, bypass_page_cache=bypass, policy=args.policy,
            overlap=args.overlap, prefetch=args.prefetch, store=args.store,
        )  # fmt: skip
        for share in map(float, args.shares.split(",")):
            if share == 1 and state != "warm":
                continue  # reads nothing
            with patch(config=config):
                model, _ = mlx_lm.utils.load_model(folder)
            with stream(model) as expert_stream:
                if share < 1:
                    expert_stream.resize(int(share * expert_stream.plan.experts))
                name = f"{share:.1%} resident" + ("" if share == 1 else f", {state}")
                if rate is not None:
                    platform.read_into = Throttle(rate)
                decode(model, tokens, args.warm_up)
                ratios, speeds, base, drive = [], [], [], []
                for _ in range(args.rounds):
                    # Drives vary from minute to minute: measured in every round.
                    drive.append(rate or drive_rate(expert_stream, bypass == "on"))
                    a = decode(stock, tokens, args.warm_up)
                    b = decode(model, tokens, args.warm_up)
                    base.append(args.tokens / a)
                    speeds.append(args.tokens / b)
                    ratios.append(a / b)
                platform.read_into = read_into
                stats = expert_stream.stats()
                bandwidth = statistics.median(drive)
                # Roofline: the longer of computing with everything resident and of reading what
                # was needed and not there (reads of experts that nobody then used excluded).
                missed = (stats.cache.misses + stats.cache.prefetched) / args.tokens
                missed *= expert_stream.layers[0].expert_bytes
                compute = 1 / statistics.median(base)
                reading = 0.0 if state == "warm" else missed / bandwidth
                bound = max(compute, reading)
                rows[name] = {
                    "tokens_per_s": statistics.median(speeds),
                    "spread": [min(speeds), max(speeds)],
                    "stock_tokens_per_s": statistics.median(base),
                    "ratio_to_stock": statistics.median(ratios),
                    "hit_rate": stats.cache.hit_rate,
                    "read_bytes_per_token": stats.read.bytes / args.tokens,
                    "waiting_share": stats.read.wait_seconds * speeds[-1] / args.tokens,
                    "drive_bytes_per_s": bandwidth,
                    "drive_spread": [min(drive), max(drive)],
                    "needed_bytes_per_token": missed,
                    "bound_by": "reads" if reading > compute else "compute",
                    "efficiency": bound * statistics.median(speeds),
                    "read_ahead": asdict(stats.prefetch)
                    | {
                        "used": stats.cache.prefetched,
                        "wasted": stats.cache.wasted,
                        "layers": stats.prefetching_layers,
                    },
                    "seconds": stats.seconds,
                }
                r = rows[name]
                print(
                    f"{name:22s} {r['tokens_per_s']:8.2f} tok/s  {r['ratio_to_stock']:.3f} of stock"
                    f"  hits {r['hit_rate']:.1%}  {r['read_bytes_per_token'] / 1e6:8.2f} MB/token"
                    f"  waiting {r['waiting_share']:.0%}  drive {bandwidth / 1e9:.2f} GB/s"
                    f"  {r['efficiency']:.2f} of the roofline ({r['bound_by']})",
                    flush=True,
                )
    report = {
        "machine": f"{host.machine()}, {os.cpu_count()} cores, {mx.default_device()}",
        "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__, "model": folder.name,
        "prompt_tokens": 0, "warm_up_tokens": args.warm_up, "timed_tokens": args.tokens,
        "rounds": args.rounds, "policy": args.policy, "results": rows,
    }  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()

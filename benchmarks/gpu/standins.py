"""Streaming the stand-ins of the headline models from simulated ("played") drives, on a GPU.

    python benchmarks/gpu/standins.py --out RESULTS --model qwen3.5-397b --shares 0.25,0.5,0.75
    python benchmarks/gpu/standins.py --out RESULTS --model kimi-k2.5 --layers 8 --prompt 512

If a share of all experts is more than the GPU holds, the model is cut to the layers that fit, and a
token's time is scaled to the whole model. Played drives move no bytes (played.py says why); "this
machine" really reads a sparse file into the slots.

Tokens are drawn from a few hundred, so that experts recur. Hit rates are stated beside every
figure, and are not those of a trained model. For each way, the measured time is compared with the
roofline, the slower of compute and reads:
    sync         the host waits for every layer's indices; the next layer's experts are prefetched
    speculate    run-ahead, speculating on the layers for which it pays
    predict      run-ahead, each token begun by a pass that predicts its experts
(Rows measured before 2026-11-28 call these ask, trust and scout.)
`--prompt` times prompts instead, in one pass of so many tokens each.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from common import earlier, everything_in_memory, report
from mlx_lm.models.cache import make_prompt_cache
from played import SHAPES, Played, Standin, load, write

from mlx_streamexperts import _osinfo as platform

DRIVES = {
    "2.4": 2.4e9, "7.4": 7.4e9, "12.6": 12.6e9, "17.5": 17.5e9, "unthrottled": 1e15,
    "this machine": 0.0,
}  # fmt: skip
READ_INTO = platform.read_into
SETTLING = 5  # tokens before those that are timed


def steps(model: nn.Module, cache: list[Any], tokens: np.ndarray) -> list[float]:
    """Seconds of each of some one-token steps."""
    seconds = []
    for t in tokens.tolist():
        start = time.perf_counter()
        mx.eval(model(mx.array([[t]]), cache=cache))
        seconds.append(time.perf_counter() - start)
    return seconds


def attach(drive: str) -> None:
    """Let reads come from this drive."""
    platform.read_into = Played(DRIVES[drive]) if DRIVES[drive] else READ_INTO


def row(standin: Standin, drive: str, seconds: list[float], compute: float) -> dict[str, Any]:
    """What some passes did, and the roofline: the slower of compute and what had to be read."""
    stats, count = standin.stream.stats(), len(seconds)
    missed = (stats.cache.misses + stats.cache.prefetched) / count
    needed = missed * standin.stream.layers[0].expert_bytes
    each = statistics.mean(seconds)
    reading = needed / DRIVES[drive] if DRIVES[drive] else 0.0
    bound, whole = max(compute, reading), standin.whole
    return {
        "layers": standin.layers,
        "ms": 1e3 * each * whole,
        "spread_ms": [1e3 * min(seconds) * whole, 1e3 * max(seconds) * whole],
        "compute_ms": 1e3 * compute * whole,
        "hit_rate": stats.cache.hit_rate,
        "needed_mb": needed * whole / 1e6,
        "read_mb": stats.read.bytes * whole / count / 1e6,
        "reads": stats.read.reads / count,
        "roofline_ms": 1e3 * bound * whole,
        "efficiency": bound / each,
        "bound_by": "reads" if bound > compute else "compute",
        "seconds": {k: v / count for k, v in stats.seconds.items()},
    }


def decode(
    standin: Standin, way: str, drive: str, text: np.ndarray, compute: float
) -> dict[str, Any]:
    """Time the text's tokens, one at a time, one way from one drive."""
    model, s = standin.model, standin.stream
    standin.policy.fixed = way
    for layer in s.layers:
        if layer.prefetcher is not None:
            layer.prefetcher.always = way == "sync"
    cache = make_prompt_cache(model)
    attach("unthrottled")
    steps(model, cache, text[:SETTLING])
    attach(drive)
    s.reset()
    seconds = steps(model, cache, text[SETTLING:])
    done = s.stats().run_ahead
    return row(standin, drive, seconds, compute) | {
        "passes": done.passes / max(1, done.steps),
        "asked": done.synced / len(seconds),
        "foretold": done.predicted,
        "came_true": done.predicted_used,
    }


def prompt(standin: Standin, drive: str, tokens: np.ndarray, compute: float) -> dict[str, Any]:
    """Time one pass of many tokens."""
    attach(drive)
    standin.stream.reset()
    return row(standin, drive, [once(standin.model, tokens)], compute)


def once(model: nn.Module, tokens: np.ndarray) -> float:
    """Seconds of a pass of all the tokens."""
    start = time.perf_counter()
    mx.eval(model(mx.array(tokens[None]), cache=make_prompt_cache(model))[:, -1])
    return time.perf_counter() - start


def decoding(standin: Standin, args: argparse.Namespace, text: np.ndarray, rows: Any) -> None:
    """Every way on every drive. Each goes on in the text: none has just seen its part."""
    model, s = standin.model, standin.stream
    with everything_in_memory(s):
        compute = statistics.median(steps(model, make_prompt_cache(model), text[:16])[4:])
    attach("unthrottled")
    steps(model, make_prompt_cache(model), text[: args.warm_up])  # fills the cache
    at = args.warm_up
    for drive in args.drives.split(","):
        for way in args.ways.split(","):
            part = text[at : at + SETTLING + args.tokens]
            at += len(part)
            r = rows[f"{args.share:.0%}, {drive}, {way}"] = decode(
                standin, way, drive, part, compute
            )
            print(f"{args.share:.0%}, {drive:12s} {way:6s}", line(r), flush=True)
            report(args.out, args.name, {"rows": rows})


def prompting(standin: Standin, args: argparse.Namespace, text: np.ndarray, rows: Any) -> None:
    """A prompt on every drive."""
    with everything_in_memory(standin.stream):
        once(standin.model, text[: args.prompt])
        compute = once(standin.model, text[: args.prompt])
    attach("unthrottled")
    once(standin.model, text[: args.prompt])
    for i, drive in enumerate(args.drives.split(","), 1):
        part = text[i * args.prompt : (i + 1) * args.prompt]
        r = rows[f"{args.share:.0%}, {drive}"] = prompt(standin, drive, part, compute)
        print(f"{args.share:.0%}, {drive:12s}", line(r), flush=True)
        report(args.out, args.name, {"tokens": args.prompt, "rows": rows})


def line(r: dict[str, Any]) -> str:
    """A row to read while it runs."""
    passes = f"{r['passes']:.2f} passes, {r['asked']:.1f} asked, " if "passes" in r else ""
    return (
        f"{r['ms']:7.1f} ms, roofline {r['roofline_ms']:7.1f} ({r['bound_by']}), "
        f"{r['efficiency']:.2f}; hits {r['hit_rate']:.2f}, {passes}{r['reads']:.0f} reads; "
        + " ".join(f"{k} {1e3 * v:.0f}" for k, v in r["seconds"].items())
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--model", choices=tuple(SHAPES), required=True)
    parser.add_argument("--shares", default="0.25,0.5,0.75", help="of the experts in memory")
    parser.add_argument("--drives", default=",".join(DRIVES), help="GB/s")
    parser.add_argument("--ways", default="sync,speculate,predict")
    parser.add_argument("--tokens", type=int, default=16, help="timed steps of each setting")
    parser.add_argument("--warm-up", type=int, default=120, help="tokens that fill the cache")
    parser.add_argument("--layers", type=int, help="with experts; default: all, or what fits")
    parser.add_argument("--words", type=int, default=100, help="different tokens in the text")
    parser.add_argument("--prompt", type=int, help="time prompts of so many tokens")
    args = parser.parse_args()
    shape = SHAPES[args.model]
    weights = 1 / np.arange(1, args.words + 1)
    text = np.random.default_rng(0).choice(args.words, 20_000, p=weights / weights.sum())
    args.name = f"{'prompt' if args.prompt else 'standin'}-{args.model}"
    rows = earlier(args.out, args.name)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "model"
        write(args.model, folder, args.layers or shape.layers)
        for share in map(float, args.shares.split(",")):
            args.share = share
            standin = load(args.model, folder, share, args.layers or shape.layers)
            with standin.stream:
                (prompting if args.prompt else decoding)(standin, args, text, rows)
            del standin
            mx.clear_cache()


if __name__ == "__main__":
    main()

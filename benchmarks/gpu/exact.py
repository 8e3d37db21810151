"""Exactness and hazards on this machine's default device: streamed against stock, bit by bit.

First decoding at several cache sizes, with and without run-ahead and reading ahead; then random
schedules: several sequences whose steps are built lazily, evaluated in any order or never, taken
back, read into banks in use, with caches resized in between. Shapes are few and large enough for
GPU kernels: MLX's CUDA backend gave NaN for stock models of 64 columns.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from common import PLAIN, decode, report, same
from mlx_lm.models.cache import make_prompt_cache
from random_model import write_random_model

from mlx_streamexperts import ExpertStream, demo_model, patch, stream
from mlx_streamexperts.bank import in_place_works

WAYS = {
    "asked": PLAIN,
    "asked, reading ahead": replace(PLAIN, prefetch="on"),
    "asked, in lots": replace(PLAIN, overlap="on"),
    "run ahead": replace(PLAIN, run_ahead="on"),
    "run ahead, as it pays": replace(PLAIN, run_ahead="auto", prefetch="auto"),
}
SHARES = (1.0, 0.9, 0.5, 0.25)


def models(folder: Path) -> dict[str, Path]:
    """The models tried: name and folder."""
    shape: dict[str, Any] = {"layers": 6, "experts": 32, "top_k": 8, "hidden": 512, "inner": 256}
    return {
        "4-bit, bfloat16": write_random_model(folder / "4bit", bits=4, dtype=mx.bfloat16, **shape),
        "unquantized, float32": write_random_model(folder / "float32", **shape),
        "the shipped model": demo_model(),
    }


def load(folder: Path, config: Any) -> tuple[nn.Module, ExpertStream]:
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(folder)
    return model, stream(model)


def resize(s: ExpertStream, share: float) -> None:
    """Leave room for a share of the experts, at least one token's."""
    slots = [max(n.top_k, int(share * n.experts)) for n in s.needs()]
    s.resize(sum(n * x.expert_bytes for n, x in zip(slots, s.layers, strict=True)))


def decoding(folder: Path, steps: int) -> dict[str, Any]:
    """Decode at every cache size, every way."""
    tokens = np.random.default_rng(0).integers(0, 400, steps).tolist()
    stock, _ = mlx_lm.utils.load_model(folder)
    expected, _ = decode(stock, tokens)
    again, _ = decode(stock, tokens)
    if not same(expected, again):
        return {"skipped": "stock mlx-lm does not repeat its own numbers here, or they are NaN"}
    rows = {}
    for name, config in WAYS.items():
        model, s = load(folder, config)
        with s:
            for share in SHARES:
                resize(s, share)
                s.reset()
                got, _ = decode(model, tokens)
                stats = s.stats()
                rows[f"{name}, {share:.0%}"] = {
                    "identical": same(expected, got),
                    "misses": stats.cache.misses + stats.cache.prefetched,
                    "passes": stats.run_ahead.passes,
                    "steps": stats.run_ahead.steps,
                }
    return rows


def schedules(folder: Path, count: int, seconds: float, seed: int) -> dict[str, Any]:
    """Random schedules until one differs, `count` were run, or the time is up."""
    stock, _ = mlx_lm.utils.load_model(folder)
    ways = {name: WAYS[name] for name in ("run ahead", "run ahead, as it pays", "asked, in lots")}
    loaded = {name: load(folder, config) for name, config in ways.items()}
    chance = random.Random(seed)
    done = steps = compared = passes = taken_back = 0
    different: list[str] = []
    start = time.perf_counter()
    while done < count and not different and time.perf_counter() - start < seconds:
        name = chance.choice(list(loaded))
        model, s = loaded[name]
        s.reset()
        if chance.random() < 0.3:
            resize(s, chance.choice(SHARES[1:]) * chance.random())
        sequences = [(make_prompt_cache(stock), make_prompt_cache(model)) for _ in range(3)]
        pending: list[tuple[mx.array, mx.array]] = []
        for _ in range(chance.randrange(4, 16)):
            mine, theirs = sequences[chance.randrange(3)]
            tokens = mx.array([[chance.randrange(400)]])
            pending.append((stock(tokens, cache=mine), model(tokens, cache=theirs)))
            steps += 1
            if chance.random() < 0.1:  # as speculative decoding rejects a draft
                for cache in (*mine, *theirs):
                    cache.trim(1)
                taken_back += 1
            if chance.random() < 0.1:
                pending.clear()  # an abandoned pass
            chance.shuffle(pending)
            while len(pending) > chance.randrange(4):
                expected, got = pending.pop()
                compared += 1
                if not mx.array_equal(expected, got).item():
                    different.append(f"schedule {done} of seed {seed}: {name}")
        passes += s.stats().run_ahead.passes
        done += 1
    for _, s in loaded.values():
        s.close()
    return {
        "schedules": done, "steps": steps, "compared": compared, "passes": passes,
        "taken_back": taken_back, "different": different,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--steps", type=int, default=40, help="decode steps; 0: schedules only (default: 40)"
    )
    parser.add_argument("--schedules", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--seconds", type=float, default=90, help="longest for them (default: 90)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result: dict[str, Any] = {"in_place": in_place_works(), "decoding": {}}
    with tempfile.TemporaryDirectory() as work:
        tried = models(Path(work))
        for name, folder in tried.items() if args.steps else ():
            result["decoding"][name] = rows = decoding(folder, args.steps)
            print(name, len(rows), "settings", flush=True)
        # A CPU is ten times faster in float32.
        on_cpu = mx.default_device() == mx.cpu
        folder = tried["unquantized, float32" if on_cpu else "4-bit, bfloat16"]
        result["schedules"] = schedules(folder, args.schedules, args.seconds, args.seed)
    report(args.out, "exact", result)
    wrong = [
        f"{model}: {row}"
        for model, rows in result["decoding"].items()
        for row, r in rows.items()
        if isinstance(r, dict) and not r["identical"]
    ] + result["schedules"]["different"]
    print("\n".join(wrong) or "identical throughout")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())

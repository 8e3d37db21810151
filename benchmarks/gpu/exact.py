"""Exactness and hazards on this machine's default device: streamed against stock, bit by bit.

First decoding at several cache sizes, with and without run-ahead and prefetching; then whole
prompts at several cache sizes; then random schedules: several sequences whose steps are built
lazily, evaluated in any order or never, taken back, read into banks in use, with caches resized in
between. Shapes are few and large enough for GPU kernels: MLX's CUDA backend gave NaN for stock
models of 64 columns.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
from common import report

from mlx_streamexperts import demo_model
from mlx_streamexperts._analysis.exactness import (
    decoding,
    prompts,
    random_tokens,
    reference,
    schedules,
    ways,
)
from mlx_streamexperts._analysis.random_model import write_random_model
from mlx_streamexperts._experts.bank import in_place_works


def models(folder: Path) -> dict[str, Path]:
    """The models tried: name and folder."""
    shape: dict[str, Any] = {"layers": 6, "experts": 32, "top_k": 8, "hidden": 512, "inner": 256}
    return {
        "4-bit, bfloat16": write_random_model(folder / "4bit", bits=4, dtype=mx.bfloat16, **shape),
        "unquantized, float32": write_random_model(folder / "float32", **shape),
        "the shipped model": demo_model(),
    }


def every_way(folder: Path, steps: int) -> dict[str, Any]:
    """Decode at every cache size, every way."""
    tokens = random_tokens(steps)
    expected = reference(folder, tokens)
    if expected is None:
        return {"skipped": "stock mlx-lm does not repeat its own numbers here, or they are NaN"}
    return {
        f"{name}, {share:.0%}": asdict(row)
        for name, config in ways().items()
        for share, row in decoding(folder, tokens, expected, config).items()
    }


LENGTHS = (9, 48, 200)
"""Of the prompts: hardly enough for their rows to be sorted, and few and many for each expert."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--steps", type=int, default=40, help="decode steps; 0: schedules only (default: 40)"
    )
    parser.add_argument("--schedules", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--seconds", type=float, default=60, help="longest for them (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result: dict[str, Any] = {"in_place": in_place_works(), "decoding": {}, "prompts": {}}
    with tempfile.TemporaryDirectory() as work:
        tried = models(Path(work))
        for name, folder in tried.items() if args.steps else ():
            result["decoding"][name] = rows = every_way(folder, args.steps)
            result["prompts"][name] = whole = {
                f"{length} tokens, {share:.0%}": asdict(row)
                for (length, share), row in prompts(folder, LENGTHS).items()
            }
            print(name, len(rows), "settings,", len(whole), "with prompts", flush=True)
        # A CPU is ten times faster in float32.
        on_cpu = mx.default_device() == mx.cpu
        folder = tried["unquantized, float32" if on_cpu else "4-bit, bfloat16"]
        tried_ways = {k: v for k, v in ways().items() if k.startswith("run ahead") or "lots" in k}
        ran = schedules(folder, tried_ways, args.schedules, args.seconds, args.seed)
        result["schedules"] = asdict(ran)
    report(args.out, "exact", result)
    wrong = [
        f"{model}: {row}"
        for model, rows in result["decoding"].items()
        for row, r in rows.items()
        if isinstance(r, dict) and not r["identical"]
    ]
    wrong += [
        f"{model}: prompt of {row}: {r['difference']:.1e} of the largest logit"
        for model, rows in result["prompts"].items()
        for row, r in rows.items()
        if r["difference"] > r["bound"]
    ]
    wrong += result["schedules"]["different"]
    print("\n".join(wrong) or "as promised throughout")
    return bool(wrong)


if __name__ == "__main__":
    raise SystemExit(main())

"""Decode speed with nothing missing: stock, everything resident, and a cache that holds it all.

The last maps experts to slots like any cache, and happens to hold what is asked for: what is left
is the price of streaming itself, with a wait for the device in every layer and with run-ahead.
Layers have the shape of Qwen3.5-397B-A17B's with fewer experts, so that stock mlx-lm fits too.
Rounds take turns; medians and their spread.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from common import PLAIN, generate, report
from random_model import write_random_model

from mlx_streamexperts import patch, stream
from mlx_streamexperts.stream import is_streamed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    for name, default in (("layers", 24), ("experts", 48), ("top-k", 10), ("hidden", 4096)):
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--inner", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    work = tempfile.TemporaryDirectory()
    folder = write_random_model(
        Path(work.name) / "model", layers=args.layers, experts=args.experts, top_k=args.top_k,
        hidden=args.hidden, inner=args.inner, bits=4, dtype=mx.bfloat16,
    )  # fmt: skip
    models: dict[str, nn.Module] = {"stock": mlx_lm.utils.load_model(folder)[0]}
    for name, config in {
        "resident": PLAIN,
        "held, asked": PLAIN,
        "held, run ahead": replace(PLAIN, run_ahead="auto"),
    }.items():
        with patch(config=config):
            models[name], _ = mlx_lm.utils.load_model(folder)
        if name != "resident":
            for layer in stream(models[name]).layers:
                layer.resident = False  # the map is in use, and holds everything
    expected, _ = generate(models["stock"], 1, args.tokens)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    identical = True
    for i in range(args.rounds + 2):
        for name, model in models.items():
            tokens, each = generate(model, 1, args.tokens)
            identical = identical and tokens == expected
            if i >= 2:  # kernels compiled, trials over
                seconds[name].append(each)
    rows: dict[str, Any] = {}
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["stock"], times, strict=True)]
        rows[name] = {
            "ms_a_layer": 1e3 * statistics.median(times) / args.layers,
            "of_stock": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
        }
        if is_streamed(models[name]):
            s = stream(models[name])
            rows[name]["run_ahead_steps"] = s.stats().run_ahead.exact_at_once
            rows[name]["asked"] = s.stats().run_ahead.asked
    for name, row in rows.items():
        print(name, row, flush=True)
    report(args.out, "speed", {"shape": vars(args) | {"out": ""}, "same": identical, "rows": rows})
    work.cleanup()


if __name__ == "__main__":
    main()

"""What streaming does on this machine's default device, in a few minutes: for GPU backends.

Checks that kernels see bytes written in place, compares decode logits with stock bit by bit at
several cache sizes, states how far prefill differs, and times decode layer by layer with everything
resident, with every expert a hit, and with misses. Random weights; the shape is an argument.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from random_model import write_random_model

from mlx_streamexperts import StreamConfig, patch, stream
from mlx_streamexperts.bank import in_place_works


def decode(model: nn.Module, tokens: list[int]) -> tuple[list[np.ndarray], float]:
    """Logits of one-token steps and the median seconds of a step."""
    cache, logits, seconds = make_prompt_cache(model), [], []
    for t in tokens:
        start = time.perf_counter()
        step = model(mx.array([[t]]), cache=cache)
        mx.eval(step)
        seconds.append(time.perf_counter() - start)
        logits.append(np.array(step.astype(mx.float32))[0, 0])
    return logits, statistics.median(seconds[len(seconds) // 3 :])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--prefetch", default="auto")
    parser.add_argument("--overlap", default="auto")
    args = parser.parse_args()
    print(f"{mx.default_device()}, MLX {mx.__version__}: in place {in_place_works()}")
    folder = Path(tempfile.mkdtemp()) / "model"
    write_random_model(
        folder, layers=args.layers, experts=args.experts, hidden=args.hidden, inner=args.inner,
        bits=args.bits, dtype=mx.bfloat16,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, 1000, args.tokens).tolist()
    prompt = mx.array(np.random.default_rng(1).integers(0, 1000, 512).tolist())[None]
    stock, _ = mlx_lm.utils.load_model(folder)
    expected, base = decode(stock, tokens)
    whole = stock(prompt).astype(mx.float32)
    print(f"stock: {1e3 * base / args.layers:.3f} ms a layer")
    config = StreamConfig(
        cache=1 << 60, progress=False, prefetch=args.prefetch, overlap=args.overlap
    )
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(folder)
    with stream(model) as expert_stream:
        for slots in (args.experts, args.experts - 1, args.experts // 2, args.experts // 8, 8):
            expert_stream._open((slots,) * args.layers)
            decode(model, tokens)
            expert_stream.reset()
            got, seconds = decode(model, tokens)
            same = all(np.array_equal(a, b) for a, b in zip(expected, got, strict=True))
            stats = expert_stream.stats()
            mine = model(prompt).astype(mx.float32)
            apart = (mx.abs(mine - whole).max() / mx.abs(whole).max()).item()
            print(
                f"{slots:4d} slots: decode identical {same}, {1e3 * seconds / args.layers:.3f} ms "
                f"a layer ({seconds / base:.2f}x stock), hits {stats.cache.hit_rate:.1%}, waiting "
                f"{1e3 * stats.read.wait_seconds / args.tokens / args.layers:.3f} ms a layer; "
                f"{stats.cache.prefetched} read ahead and used; "
                f"prefill of 512 differs by {apart:.2e}"
            )


if __name__ == "__main__":
    main()

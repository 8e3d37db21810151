"""Host time of one expert layer whose chosen experts are all resident, top-10 of 512.

Compares the layer's call with mlx-lm's own module over the same slots, which builds the same
matmuls. The difference is what streaming adds in Python. Indices are evaluated beforehand, so that
nothing waits for the device, and the matmuls are not sent to it: that is the same work here or in
`mx.eval`. Prefetching is off; it would add its own cost.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
from random_model import write_random_model

from mlx_streamexperts import StreamConfig, patch, stream

EXPERTS, TOP_K, CALLS = 512, 10, 400


def microseconds(call: Callable[[mx.array], mx.array], indices: list[mx.array]) -> float:
    """Median time of building one call."""
    times = []
    for chosen in indices:
        start = time.perf_counter()
        y = call(chosen)
        times.append(time.perf_counter() - start)
        mx.eval(y)
    return 1e6 * statistics.median(times)


def main() -> None:
    folder = Path(tempfile.mkdtemp()) / "model"
    write_random_model(folder, layers=2, experts=EXPERTS, hidden=64, inner=64, bits=4)
    config = StreamConfig(cache=1 << 40, progress=False, prefetch="off")
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(folder)
    with stream(model) as expert_stream:
        expert_stream._open((EXPERTS - 1,) * 2)
        layer = expert_stream.layers[0]
        x, rng = mx.zeros((1, 1, 64)), np.random.default_rng(0)
        for e in range(0, EXPERTS - TOP_K, TOP_K):
            mx.eval(layer(x, mx.arange(e, e + TOP_K)[None, None]))
        known = layer.cache.resident
        indices = [mx.array(rng.choice(known, TOP_K, replace=False))[None, None]
                   for _ in range(CALLS)]  # fmt: skip
        mx.eval(indices)
        mx.async_eval = lambda *arrays: None
        for _ in range(3):
            whole = microseconds(lambda chosen: layer(x, chosen), indices)
            matmuls = microseconds(lambda chosen: layer.switch(x, chosen), indices)
            print(f"{whole:.1f} us a call, {matmuls:.1f} us of it the matmuls' graph: "
                  f"{whole - matmuls:.1f} us of bookkeeping")  # fmt: skip
        print(f"hit rate {layer.cache.stats.hit_rate:.1%} since the start")


if __name__ == "__main__":
    main()

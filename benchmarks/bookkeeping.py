"""Host time of one expert layer whose chosen experts are all resident, top-10 of 512.

Compares the layer's call with mlx-lm's own module over the same slots, which builds the same
matmuls. The difference is what streaming adds in Python. Indices are evaluated beforehand, so that
nothing waits for the device, and the matmuls are not sent to it: that is the same work here or in
`mx.eval`. Prefetching is off; it would add its own cost.

Then a layer of the embedded model, 8 of 64 experts, half of them resident, on a drive that takes no
time: the calling thread's CPU time if two experts are missing, and if none is, from the checkpoint
(nine reads an expert) and from a packed store (one).
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

from mlx_streamexperts import StreamConfig, demo_model, pack, patch, stream
from mlx_streamexperts import _osinfo as platform

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


def missing(store: str | None) -> dict[int, float]:
    """Median CPU time of a layer's call by the number of experts that are missing."""
    config = StreamConfig(
        cache=1 << 40, progress=False, prefetch="off", run_ahead="off", overlap="off", cores=1,
        bypass_page_cache="off", store=store,
    )  # fmt: skip
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(demo_model())
    rng, found = np.random.default_rng(0), {}
    with stream(model) as expert_stream:
        expert_stream.resize(expert_stream.plan.experts // 2)
        layer = expert_stream.layers[3]
        x = mx.zeros((1, 1, model.args.hidden_size))
        for misses in (2, 0):
            times = []
            for _ in range(50 + CALLS):
                here = layer.cache.resident
                away = np.setdiff1d(np.arange(layer.experts), here)
                few = 8 if len(here) < 8 else misses
                chosen = [*rng.choice(here, 8 - few, False), *rng.choice(away, few, False)]
                indices = mx.array(rng.permutation(chosen).astype(np.int32))[None, None]
                mx.eval(indices)
                start = time.thread_time_ns()
                y = layer(x, indices)
                times.append((time.thread_time_ns() - start) / 1e3)
                mx.eval(y)
            found[misses] = statistics.median(times[50:])
    return found


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
    store = str(folder.parent / "store")
    pack.main(["--out", store, "--no-progress"])
    platform.read_into = lambda fd, buffers, offset: sum(map(len, buffers))
    for name, place in (("checkpoint", None), ("packed store", store)):
        for _ in range(3):
            found = missing(place)
            print(f"{name}: {found[2]:.0f} us with two missing, {found[0]:.0f} us with none")


if __name__ == "__main__":
    main()

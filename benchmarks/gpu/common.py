"""What the scripts of this folder share."""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_streamexperts import StreamConfig
from mlx_streamexperts.output import write_json

# Everything off that chooses by trial: a script says what it wants.
PLAIN = StreamConfig(cache=1 << 60, progress=False, prefetch="off", run_ahead="off")


def decode(model: nn.Module, tokens: list[int]) -> tuple[list[np.ndarray], float]:
    """Logits [V] of one-token steps, each evaluated, and the median seconds of a step."""
    cache, logits, seconds = make_prompt_cache(model), [], []
    for t in tokens:
        start = time.perf_counter()
        step = model(mx.array([[t]]), cache=cache)
        mx.eval(step)
        seconds.append(time.perf_counter() - start)
        logits.append(np.array(step.astype(mx.float32))[0, -1])
    return logits, statistics.median(seconds[len(seconds) // 3 :])


def generate(model: nn.Module, first: int, count: int) -> tuple[list[int], float]:
    """Greedy tokens as mlx-lm generates, a step built while the last one runs, and the median
    seconds of a step.
    """
    cache, out, seconds = make_prompt_cache(model), [], []
    token = mx.array([first])
    for _ in range(count):
        start = time.perf_counter()
        following = mx.argmax(model(token[None], cache=cache)[:, -1], axis=-1)
        mx.async_eval(following)
        out.append(token.item())
        token = following
        seconds.append(time.perf_counter() - start)
    return out, statistics.median(seconds[count // 3 :])


def same(expected: list[np.ndarray], got: list[np.ndarray]) -> bool:
    """Are all logits the same bits, and numbers?"""
    return all(
        np.array_equal(a, b) and np.isfinite(a).all() for a, b in zip(expected, got, strict=True)
    )


def report(out: Path, name: str, content: dict[str, Any]) -> None:
    """Write a script's results for `summary.py`."""
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "mlx": mx.__version__,
        "cores": os.cpu_count(),
    }
    write_json(out / f"{name}.json", {**about, **content})

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
from mlx_lm.models.cache import make_prompt_cache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_streamexperts.exactness import PLAIN as PLAIN
from mlx_streamexperts.output import write_json


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


def report(out: Path, name: str, content: dict[str, Any]) -> None:
    """Write a script's results for `summary.py`."""
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "mlx": mx.__version__,
        "cores": os.cpu_count(),
    }
    write_json(out / f"{name}.json", {**about, **content})

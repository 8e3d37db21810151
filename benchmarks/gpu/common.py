"""Shared by the scripts of this folder."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mlx_streamexperts import ExpertStream
from mlx_streamexperts._analysis.exactness import PLAIN as PLAIN
from mlx_streamexperts._experts.layer import ExpertLayer, SyncedForward
from mlx_streamexperts._experts.speculative.policy import SpeculationPolicy
from mlx_streamexperts._io.output import write_json


class Fixed(SpeculationPolicy):
    """Starts steps in one way, whatever is measured."""

    fixed = "sync"

    @property
    def start(self) -> str:
        return self.fixed


@contextmanager
def everything_in_memory(s: ExpertStream) -> Iterator[None]:
    """Experts are taken from whatever slot is theirs by number: nothing is asked or mapped."""

    def run(self: ExpertLayer, x: mx.array, indices: mx.array, _: bool = True) -> SyncedForward:
        return SyncedForward(self.switch(x, indices % self.cache.slots), [], False)

    with (
        mock.patch.object(ExpertLayer, "forward_synced", run),
        mock.patch.object(s.run_ahead, "_usable", False),
    ):
        yield


def generate(
    model: nn.Module, first: int, count: int, ahead: bool = True
) -> tuple[list[int], list[float]]:
    """Greedy tokens as mlx-lm generates, and the seconds of each step.

    Args:
        ahead: a step is built while the last one runs, as mlx-lm does; or each is waited for.
    """
    cache, out, seconds = make_prompt_cache(model), [], []
    token = mx.array([first])
    for _ in range(count):
        start = time.perf_counter()
        following = mx.argmax(model(token[None], cache=cache)[:, -1], axis=-1)
        (mx.async_eval if ahead else mx.eval)(following)
        out.append(token.item())
        token = following
        seconds.append(time.perf_counter() - start)
    mx.eval(token)
    return out, seconds


def report(out: Path, name: str, content: dict[str, Any]) -> None:
    """Write a script's results for `summary.py`."""
    out.mkdir(parents=True, exist_ok=True)
    about = {
        "device": str(mx.device_info().get("device_name", mx.default_device())),
        "mlx": mx.__version__,
        "cores": os.cpu_count(),
    }
    write_json(out / f"{name}.json", {**about, **content})


def earlier(out: Path, name: str) -> dict[str, Any]:
    """The rows that an earlier run left there, to add to."""
    file = out / f"{name}.json"
    rows: dict[str, Any] = json.loads(file.read_text())["rows"] if file.exists() else {}
    return rows

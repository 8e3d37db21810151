"""What a report says of the drive: its rates, the reads of generation, and speed on slower drives.

Slower drives are this one behind a `Throttle`. The curve over the measured points is `predict`'s
formula with this machine's measured time beside reads; points of named machines have their drive's
latency besides, and so lie a little below it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from .._analysis.measure import drive_rates
from .._analysis.predict import Range, predict
from .._analysis.throttle import slowed
from .._experts.stream import ExpertStream, stream
from .._io.ranges import ByteRange
from .._io.reader import DEMAND, ExpertReader
from .._memory.budget import Plan
from .._memory.hardware import NAMED_MACHINES, Machine
from ._speed import combined, generate, summary

_PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)


def rates_by_size(
    expert_stream: ExpertStream, files: Sequence[str], depths: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    """Rate and latency of random reads by size and depth, the sizes of this model's among them.

    Args:
        seconds: for each pair.
    """
    sized = [(f, Path(f).stat().st_size) for f in files]
    layer = expert_stream.layers[0]
    own = {max(4096, t.stored.row_bytes) for t in layer.tensors.values()}
    sizes = sorted({16 << 10, 128 << 10, 1 << 20, 4 << 20, max(own)})
    bypass = expert_stream.bypasses_page_cache
    return [
        asdict(r)
        for size in sizes
        if size < max(s for _, s in sized)
        for r in drive_rates(sized, size, depths, bypass, seconds)
    ]


@dataclass
class ReadLog:
    """Every read of a generation: bytes, was it ahead, and when it was queued, begun and ended."""

    reads: list[tuple[int, bool, float, float, float]] = field(default_factory=list)

    def note(
        self, ranges: Sequence[ByteRange], priority: int, queued: float, begin: float, end: float
    ) -> None:
        """As `ExpertReader.on_read`. Called by several threads: appending is atomic."""
        nbytes = sum(len(r.into) for r in ranges)
        self.reads.append((nbytes, priority != DEMAND, queued, begin, end))

    def summary(self) -> dict[str, Any]:
        """Percentiles of what there was; depth is counted at each read's beginning, itself too."""
        if not self.reads:
            return {"reads": 0, "percentiles": [], "ahead": 0}
        nbytes, ahead, queued, begin, end = np.array(self.reads, float).T
        begun = np.searchsorted(np.sort(begin), begin, side="right")
        ended = np.searchsorted(np.sort(end), begin, side="right")
        table = {
            "bytes": nbytes,
            "latency_s": end - begin,
            "queued_s": begin - queued,
            "depth": (begun - ended).astype(float),
        }
        return {
            "reads": len(self.reads),
            "ahead": int(ahead.sum()),
            "percentiles": [
                {"percentile": p, **{k: float(np.percentile(v, p)) for k, v in table.items()}}
                for p in _PERCENTILES
            ],
        }


@contextmanager
def logged(reader: ExpertReader) -> Iterator[ReadLog]:
    """Log a reader's reads meanwhile."""
    log = ReadLog()
    reader.on_read.add(log.note)
    try:
        yield log
    finally:
        reader.on_read.remove(log.note)


def sensitivity(
    model: nn.Module, prompt: list[int], tokens: int, repeats: int,
    drive: float, points: int,
) -> dict[str, Any]:  # fmt: skip
    """Tokens/s behind slower drives, measured and modelled.

    The points lie around the drive whose reads take as long as all the rest of a token, and the
    latency that does, for there is something to see.

    Args:
        drive: bytes/s of this machine's own drive: a throttle cannot give more.
        points: drives of either kind.
    """
    expert_stream = stream(model)
    generate(model, prompt, tokens)  # the cache is warm from here on
    runs = [generate(model, prompt, tokens) for _ in range(repeats)]
    own, plan = combined(runs), expert_stream.plan
    hit_rate = own["hit_rate"]
    even = own["read_bytes"] / own["other_s"]
    rates = [r for i in range(points) if (r := even * 2.0 ** (2 - i)) < drive] or [drive / 2]
    # A layer's reads share a latency as far as they are in flight together.
    turns = max(1.0, own["reads"] / expert_stream.config.threads / len(plan.slots))
    each = own["other_s"] / (turns * len(plan.slots))
    latencies = [each * 2.0 ** (i - points + 2) for i in range(points)]

    def behind(rate: float, latency: float) -> dict[str, Any]:
        with slowed(rate, latency):
            again = [generate(model, prompt, tokens).tokens_per_s for _ in range(repeats)]
        return {
            "bytes_per_s": None if math.isinf(rate) else rate,
            "latency_s": latency,
            "tokens_per_s": summary(again),
            "modelled_tokens_per_s": modelled(plan, own["other_s"], rate, latency, hit_rate),
        }

    return {
        "unthrottled": {"tokens_per_s": summary([r.tokens_per_s for r in runs]), **own},
        "by_rate": [behind(r, 0.0) for r in rates],
        "by_latency": [behind(math.inf, x) for x in latencies],
        "curve": [
            {
                "bytes_per_s": r,
                "tokens_per_s": modelled(plan, own["other_s"], r, 0.0, hit_rate),
            }
            for r in np.geomspace(min(rates) / 2, 40e9, 40).tolist()
        ],
        "machines": [
            {
                "name": m.name,
                "bytes_per_s": m.drive_rate,
                "this_compute_tokens_per_s": modelled(
                    plan, own["other_s"], m.drive_rate, m.drive_latency, hit_rate
                ),
                "its_tokens_per_s": asdict(
                    predict(plan, m, 1, Range(hit_rate, hit_rate, hit_rate)).tokens_per_s
                ),
            }
            for m in NAMED_MACHINES.values()
        ],
    }


def modelled(
    plan: Plan, other_s: float, bytes_per_s: float, latency: float, hit_rate: float
) -> float:
    """`predict`'s tokens/s for a drive, with all but reads as measured here.

    Args:
        other_s: seconds of a token beside waiting for reads.
        latency: seconds that a layer with a miss waits besides.
    """
    machine = Machine(
        name="this machine behind another drive",
        memory=0,
        memory_rate=math.inf,
        drive_rate=bytes_per_s,
        drive_latency=latency,
        sync_seconds=0.0,
        layer_seconds=other_s / max(1, len(plan.slots)),
    )
    return predict(plan, machine, 1, Range(hit_rate, hit_rate, hit_rate)).tokens_per_s.likely


def error_of_model(points: Sequence[dict[str, Any]]) -> float | None:
    """Median of how far the modelled rates lie off the measured ones, as a share."""
    off = [abs(p["modelled_tokens_per_s"] / p["tokens_per_s"]["median"] - 1) for p in points]
    return statistics.median(off) if off else None

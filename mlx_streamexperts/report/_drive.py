"""The drive: its rates, the reads of generation, and speed behind slower drives.

A slower drive is this one behind a `Throttle`. The curve counts what was read behind slower drives,
wrong prefetches included, and this machine's measured time beside reads. Points of named machines
include their drive's latency, and so lie a little below it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import mlx.nn as nn
import numpy as np

from .._analysis.measure import DriveRate, drive_rates
from .._analysis.predict import Range, predict
from .._analysis.throttle import slowed
from .._experts.stream import ExpertStream, expert_files, stream
from .._io.ranges import ByteRange
from .._io.reader import DEMAND
from .._memory.hardware import NAMED_MACHINES
from . import _report as report
from ._speed import combined, generate

_PERCENTILES = (1, 10, 25, 50, 75, 90, 99, 100)


def rates_by_size(
    expert_stream: ExpertStream, depths: Sequence[int], seconds: float
) -> list[DriveRate]:
    """Random reads by size and depth, `seconds` each; one size is the model's largest row."""
    files = [(f, Path(f).stat().st_size) for f in expert_files(expert_stream.layers)]
    largest = max(t.stored.row_bytes for t in expert_stream.layers[0].tensors.values())
    sizes = sorted({16 << 10, 128 << 10, 1 << 20, 4 << 20, max(4096, largest)})
    bypass = expert_stream.bypasses_page_cache
    sizes = [n for n in sizes if n < max(size for _, size in files)]
    return [r for n in sizes for r in drive_rates(files, n, depths, bypass, seconds)]


class ReadLog:
    """Every read of a generation."""

    def __init__(self) -> None:
        self._reads: list[tuple[float, ...]] = []  # bytes, prefetch?, queued, begin, end

    def note(self, ranges: Sequence[ByteRange], priority: int, *times: float) -> None:
        """Log a job of `ExpertReader`. Several threads call this; appending is atomic."""
        self._reads.append((sum(len(r.into) for r in ranges), priority != DEMAND, *times))

    def summary(self) -> report.Reads:
        """Percentiles of each figure by itself; depth includes the read that begins."""
        if not self._reads:
            return report.Reads(0, 0, [])
        nbytes, ahead, queued, begin, end = np.array(self._reads, float).T  # [reads] each
        begun = np.searchsorted(np.sort(begin), begin, side="right")
        depth = begun - np.searchsorted(np.sort(end), begin, side="right")
        columns = (nbytes, end - begin, begin - queued, depth)
        at = np.percentile(columns, _PERCENTILES, axis=1).tolist()  # [percentiles, columns]
        rows = [report.Percentile(p, *row) for p, row in zip(_PERCENTILES, at, strict=True)]
        return report.Reads(len(self._reads), int(ahead.sum()), rows)


def sensitivity(
    model: nn.Module, prompt: list[int], tokens: int, repeats: int, drive: float, points: int
) -> report.Sensitivity:
    """Tokens/s behind slower drives, measured and modelled.

    The points lie around the drive whose reads take as long as the rest of a token, and around the
    latency that does: the effect is visible there.

    Args:
        drive: bytes/s of this machine's own drive: a throttle cannot give more.
        points: drives of either kind.
    """
    plan, threads = stream(model).plan, stream(model).config.threads
    layers = len(plan.slots)
    generate(model, prompt, tokens)  # the cache is warm from here on

    def measured() -> report.Decoding:
        return combined([generate(model, prompt, tokens) for _ in range(repeats)])

    def behind(rate: float, latency: float) -> report.Decoding:
        with slowed(rate, latency):
            return measured()

    own = measured()
    hits = Range(own.hit_rate, own.hit_rate, own.hit_rate)
    even = own.read_bytes / own.other_s
    rates = [r for i in range(points) if (r := even * 2.0 ** (2 - i)) < drive] or [drive / 2]
    # A layer's reads share a latency as far as they are in flight together.
    each = own.other_s / max(layers, own.reads / threads)
    latencies = [each * 2.0 ** (i - points + 2) for i in range(points)]
    slow = [(r, 0.0, behind(r, 0.0)) for r in rates]
    late = [(math.inf, x, behind(math.inf, x)) for x in latencies]
    read_bytes = statistics.fmean(d.read_bytes for _, _, d in slow)
    rounds = statistics.fmean(d.reads for _, _, d in slow + late) / threads

    # Reads take longer than their bytes alone: threads wait for each other at the end of a layer,
    # and other programs for the processor. The page's own points say how much.
    rate_factor = _factor(own, [(read_bytes / r, d) for r, _, d in slow])
    latency_factor = _factor(own, [(rounds * x, d) for _, x, d in late])

    def modelled(rate: float, latency: float) -> float:
        reads = rate_factor * read_bytes / rate + latency_factor * rounds * latency
        return 1 / seconds_behind(own, reads)

    def points_of(found: list[tuple[float, float, report.Decoding]]) -> list[report.Throttled]:
        return [
            report.Throttled(None if math.isinf(r) else r, x, d.tokens_per_s, modelled(r, x))
            for r, x, d in found
        ]

    by_rate, by_latency = points_of(slow), points_of(late)
    off = [abs(p.modelled_tokens_per_s / p.tokens_per_s.median - 1) for p in by_rate + by_latency]
    curve = np.geomspace(min(rates) / 2, 40e9, 40).tolist()
    machines = []
    for m in NAMED_MACHINES.values():
        here, there = modelled(m.drive_rate, m.drive_latency), predict(plan, m, 1, hits)
        machines.append(report.NamedMachine(m.name, m.drive_rate, here, there.tokens_per_s))
    return report.Sensitivity(
        unthrottled=own,
        by_rate=by_rate,
        by_latency=by_latency,
        curve=[report.CurvePoint(r, modelled(r, 0.0)) for r in curve],
        machines=machines,
        median_error_of_model=statistics.median(off) if off else None,
        rate_factor=rate_factor,
        latency_factor=latency_factor,
    )


def _factor(own: report.Decoding, points: list[tuple[float, report.Decoding]]) -> float:
    """How many times as long as they should take reads took: the median over points, at least 1."""
    shares = [(1 / d.tokens_per_s.median - own.other_s) / ideal for ideal, d in points]
    return max(1.0, statistics.median(shares))


def seconds_behind(own: report.Decoding, read_seconds: float) -> float:
    """A token's seconds if the drive needs `read_seconds` for its reads.

    Reads never take less than on this machine's own drive. What a faster one would save is not
    claimed. They are as many as behind slower drives: prefetching reads more there, since it pays.
    """
    return own.other_s + max(own.wait_s, read_seconds)

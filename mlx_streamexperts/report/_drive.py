"""The drive: its rates, the reads of generation, and speed behind slower drives.

A slower drive is this one behind a `Throttle`. The curve over the measured points is `predict`'s
formula with this machine's measured time beside reads. Points of named machines include their
drive's latency, and so lie a little below it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlx.nn as nn
import numpy as np

from .._analysis.measure import DriveRate, drive_rates
from .._analysis.predict import Range, predict
from .._analysis.throttle import slowed
from .._experts.stream import ExpertStream, expert_files, stream
from .._io.ranges import ByteRange
from .._io.reader import DEMAND, ExpertReader
from .._memory.hardware import NAMED_MACHINES, Machine
from . import _report as report
from ._report import Repeats
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
    return [
        rate
        for size in sizes
        if size < max(s for _, s in files)
        for rate in drive_rates(files, size, depths, bypass, seconds)
    ]


@dataclass
class ReadLog:
    """Every read of a generation: bytes, is it a prefetch, and when it was queued, began, ended."""

    reads: list[tuple[int, bool, float, float, float]] = field(default_factory=list)

    def note(
        self, ranges: Sequence[ByteRange], priority: int, queued: float, begin: float, end: float
    ) -> None:
        """As `ExpertReader.on_read`. Called by several threads: appending is atomic."""
        nbytes = sum(len(r.into) for r in ranges)
        self.reads.append((nbytes, priority != DEMAND, queued, begin, end))

    def summary(self) -> report.Reads:
        """Percentiles of each figure by itself; depth includes the read that begins."""
        if not self.reads:
            return report.Reads(0, 0, [])
        nbytes, ahead, queued, begin, end = np.array(self.reads, float).T  # [reads] each
        begun = np.searchsorted(np.sort(begin), begin, side="right")
        ended = np.searchsorted(np.sort(end), begin, side="right")
        columns = (nbytes, end - begin, begin - queued, (begun - ended).astype(float))
        rows = [
            report.Percentile(p, *(float(np.percentile(column, p)) for column in columns))
            for p in _PERCENTILES
        ]
        return report.Reads(len(self.reads), int(ahead.sum()), rows)


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
    generate(model, prompt, tokens)  # the cache is warm from here on

    def measured() -> tuple[report.Decoding, Repeats]:
        runs = [generate(model, prompt, tokens) for _ in range(repeats)]
        return combined(runs), Repeats.of([r.tokens_per_s for r in runs])

    token, rate = measured()
    own = report.Unthrottled(**vars(token), tokens_per_s=rate)
    hits = Range(own.hit_rate, own.hit_rate, own.hit_rate)

    def modelled(rate: float, latency: float) -> float:
        """`predict`'s tokens/s with all but reads as measured here."""
        each = own.other_s / max(1, len(plan.slots))
        machine = Machine("", 0, math.inf, rate, latency, sync_seconds=0.0, layer_seconds=each)
        return predict(plan, machine, 1, hits).tokens_per_s.likely

    def behind(rate: float, latency: float) -> report.Throttled:
        with slowed(rate, latency):
            _, again = measured()
        stated = None if math.isinf(rate) else rate
        return report.Throttled(stated, latency, again, modelled(rate, latency))

    even = own.read_bytes / own.other_s
    rates = [r for i in range(points) if (r := even * 2.0 ** (2 - i)) < drive] or [drive / 2]
    # A layer's reads share a latency as far as they are in flight together.
    turns = max(1.0, own.reads / threads / len(plan.slots))
    each = own.other_s / (turns * len(plan.slots))
    by_rate = [behind(r, 0.0) for r in rates]
    by_latency = [behind(math.inf, each * 2.0 ** (i - points + 2)) for i in range(points)]
    off = [
        abs(p.modelled_tokens_per_s / p.tokens_per_s.median - 1) for p in (*by_rate, *by_latency)
    ]
    curve = np.geomspace(min(rates) / 2, 40e9, 40).tolist()
    return report.Sensitivity(
        unthrottled=own,
        by_rate=by_rate,
        by_latency=by_latency,
        curve=[report.CurvePoint(r, modelled(r, 0.0)) for r in curve],
        machines=[
            report.NamedMachine(
                m.name,
                m.drive_rate,
                modelled(m.drive_rate, m.drive_latency),
                predict(plan, m, 1, hits).tokens_per_s,
            )
            for m in NAMED_MACHINES.values()
        ],
        median_error_of_model=statistics.median(off) if off else None,
    )

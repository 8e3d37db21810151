"""Says how much time a packed store would save, from where a checkpoint's experts lie.

Pure arithmetic over places and assumed costs; it reads nothing and changes nothing.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .._io.checkpoint import extents
from .._osinfo import PAGE_BYTES
from .layer import ExpertLayer

# Fitted to the waits per missing expert in benchmarks/README.md ("A packed store"; Linux, eight
# reads in flight, past the page cache). They give 0.33 and 1.43 ms for experts of 77 kB and 1.47 MB
# in nine parts (measured: 0.37 and 1.44), and 0.07 and 0.77 ms from a store (0.10 and 0.81).
_RANGE_SECONDS = 30e-6  # each read by itself
_COPY_RATE = 3.5e9  # bytes/s; reads that are not aligned go through a buffer
_DRIVE_RATE = 2e9  # bytes/s

WORTH = 0.1
"""A gain below this share is not told."""


@dataclass(frozen=True)
class StoreGain:
    """An expert that is missing, read from the checkpoint and from a store.

    Attributes:
        reads: reads of an expert now, on average.
        seconds: estimated time of these reads.
        saved: seconds of them that a store would save.
    """

    reads: float
    seconds: float
    saved: float


def store_gain(layers: Sequence[ExpertLayer], read_bytes: int) -> StoreGain:
    """Estimate the gain: reads x 30 us + bytes not aligned / 3.5 GB/s + bytes / 2 GB/s.

    Args:
        layers: with the places where experts are read.
        read_bytes: longest single read.
    """
    count = now = packed = copied = nbytes = 0
    for layer in layers:
        for expert in {0, layer.experts // 2}:  # experts of a layer are stored alike
            for _, begin, end in extents([t.stored for t in layer.tensors.values()], [expert]):
                now += -(-(end - begin) // read_bytes)
                if begin % PAGE_BYTES:
                    copied += end - begin
            packed += -(-layer.expert_bytes // read_bytes)
            nbytes += layer.expert_bytes
            count += 1
    saved = max(0.0, (now - packed) * _RANGE_SECONDS + copied / _COPY_RATE)
    seconds = now * _RANGE_SECONDS + copied / _COPY_RATE + nbytes / _DRIVE_RATE
    return StoreGain(now / count, seconds / count, saved / count)


def how_to_pack(folder: Path) -> str:
    """The commands to type."""
    model = shlex.quote(str(folder))
    return f"streamexperts pack --model {model} --out packed, then --store packed"

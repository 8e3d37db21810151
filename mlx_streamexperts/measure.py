"""Measurements of this machine that decide how fast a streamed model runs.

Each takes about a second, reads only, and is used by `doctor`. None is cached: what a machine can
do depends on what else it does.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx
import numpy as np

from .ranges import ByteRange
from .reader import ExpertReader, Ticket

if TYPE_CHECKING:
    from .stream import ExpertStream


@dataclass(frozen=True)
class DriveRate:
    """Random reads of one size at one queue depth.

    Attributes:
        read_bytes: size of a read.
        depth: reads in flight.
        rate: bytes/s.
        latency: median seconds from asking to the last byte.
        latency_p99: seconds within which 99 of 100 reads ended.
    """

    read_bytes: int
    depth: int
    rate: float
    latency: float
    latency_p99: float


def drive_rates(
    files: Sequence[tuple[str, int]],
    read_bytes: int,
    depths: Sequence[int],
    direct: bool,
    seconds: float = 1.0,
) -> list[DriveRate]:
    """Read at random places of `files` for about `seconds` at each depth.

    Args:
        files: path and size in bytes of each; larger ones are read more often.
        read_bytes: size of a read: one expert's.
        depths: reads in flight at once.
        direct: bypass the page cache; without it, warm files measure memory.

    Raises:
        ExpertReadError: a file could not be read.
    """
    sizes = np.array([max(0, size - read_bytes) for _, size in files], float)
    if not sizes.sum():
        return []
    rng = np.random.default_rng(0)
    results = []
    for depth in depths:
        # One reader thread a read in flight; a read is never split.
        reader = ExpertReader(depth, read_bytes, direct)
        memory = [memoryview(bytearray(read_bytes)) for _ in range(depth)]
        latencies: list[float] = []
        start, done = time.perf_counter(), 0
        try:
            while time.perf_counter() - start < seconds:
                tickets = []
                for into in memory:
                    file = int(rng.choice(len(files), p=sizes / sizes.sum()))
                    offset = int(rng.integers(0, int(sizes[file]) + 1))
                    r = ByteRange(files[file][0], offset, into, "drive test", 0, "")
                    tickets.append(reader.submit([r]))
                for ticket in tickets:
                    ticket.wait()
                    latencies.append(ticket.seconds)
                    done += read_bytes
            elapsed = time.perf_counter() - start
        finally:
            reader.close()
        median, slow = (float(x) for x in np.percentile(latencies, (50, 99)))
        results.append(DriveRate(read_bytes, depth, done / elapsed, median, slow))
    return results


def drive_bandwidth(expert_stream: ExpertStream, bypass: bool, seconds: float = 1.0) -> float:
    """Bytes/s of reading random experts with the queue never empty: what the drive can give.

    Args:
        expert_stream: the model whose experts are read; its cache is left alone.
        bypass: read past the page cache.
        seconds: about how long.
    """
    reader = ExpertReader(direct=bypass)
    size = max(x.expert_bytes for x in expert_stream.layers)
    halves = [memoryview(bytearray(size * 8)) for _ in range(2)]
    order, start, done = np.random.default_rng(1), time.perf_counter(), 0
    pending: list[Ticket] = []
    try:
        while time.perf_counter() - start < seconds:
            layer = expert_stream.layers[order.integers(len(expert_stream.layers))]
            if len(pending) == 2:
                pending.pop(0).wait()
            memory, at, ranges = halves[0], 0, []
            halves.reverse()
            for expert in order.choice(layer.experts, min(8, layer.experts), replace=False):
                for t in layer.tensors.values():
                    into = memory[at : at + t.stored.row_bytes]
                    file, offset = t.stored.files[expert], t.stored.offsets[expert]
                    ranges.append(ByteRange(file, offset, into, "", int(expert), ""))
                    at += len(into)
            pending.append(reader.submit(ranges))
            done += at
        for ticket in pending:
            ticket.wait()
        return done / (time.perf_counter() - start)
    finally:
        reader.close()


def memory_rate(nbytes: int = 256 << 20, repeats: int = 7) -> float:
    """Bytes/s of a matrix-vector product in float32, which like decoding reads weights once."""
    matrix = mx.ones((nbytes // 4 // 4096, 4096), mx.float32)
    x = mx.ones((4096,), mx.float32)
    mx.eval(matrix, x, matrix @ x)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(matrix @ x)
        times.append(time.perf_counter() - start)
    return matrix.nbytes / float(np.median(times))


def layer_seconds(layers: int = 20, kernels: int = 25) -> float:
    """Seconds of launching one layer's kernels (about 25 in mlx-lm's decode) on tiny arrays."""
    one = mx.ones((1, 64))
    mx.eval(one)
    times = []
    for _ in range(7):
        x, start = one, time.perf_counter()
        for _ in range(layers * kernels):
            x = mx.softmax(x)
        mx.eval(x)
        times.append(time.perf_counter() - start)
    return float(np.median(times)) / layers


def sync_seconds(layers: int = 60, width: int = 2048) -> float:
    """What reading one layer's indices on the host adds to a chain of small kernels, in seconds."""
    matrix = mx.random.normal((width, width)) * width**-0.5
    mx.eval(matrix)

    def chain(ask: bool) -> float:
        x = mx.ones((1, width))
        start = time.perf_counter()
        for _ in range(layers):
            x = mx.tanh(x @ matrix)
            if ask:
                np.array(mx.argpartition(x, kth=8, axis=-1)[:, :8])
        mx.eval(x)
        return time.perf_counter() - start

    chain(True)
    differences = [chain(True) - chain(False) for _ in range(9)]
    return max(0.0, float(np.median(differences))) / layers

"""Measurements of this machine that decide how fast a streamed model runs.

Each takes a second, or as long as it is told, and only reads. None is cached: results depend on
what else the machine does.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .._io.files import ShardFiles
from .._io.ranges import ByteRange

Place = tuple[str, int, int]
"""Bytes of a file: its path, begin and end."""

_PLACES = 1024  # that a thread reads in turn: enough that none is still in a drive's cache


@dataclass(frozen=True)
class DriveRate:
    """Random reads of one size at one queue depth."""

    read_bytes: int  #: of a read
    depth: int  #: reads in flight that were aimed at: threads that read one after another
    rate: float  #: bytes/s
    latency: float  #: median seconds from asking to the last byte
    latency_p99: float  #: seconds within which 99 of 100 reads ended
    mean_depth: float = 0.0  #: reads in flight on average, as measured; older reports lack it
    by_second: tuple[float, ...] = ()  #: bytes/s in each whole second; older reports lack it

    @property
    def sustained(self) -> float:
        """Bytes/s in the second half of the seconds: a drive that grows hot slows down."""
        half = self.by_second[len(self.by_second) // 2 :]
        return sum(half) / len(half) if half else self.rate


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
        read_bytes: size of a read.
        depths: reads in flight at once.
        direct: bypass the page cache; without it, warm files measure memory.

    Raises:
        ExpertReadError: a file could not be read.
    """
    sizes = np.array([max(0, size - read_bytes) for _, size in files], float)
    if not sizes.sum():
        return []

    def places(rng: np.random.Generator) -> list[Place]:
        order = rng.choice(len(files), _PLACES, p=sizes / sizes.sum())
        begins = [(files[i][0], int(rng.integers(0, int(sizes[i]) + 1))) for i in order]
        return [(file, begin, begin + read_bytes) for file, begin in begins]

    return [_drive_rate(places, d, direct, seconds) for d in depths]


def expert_rate(parts: Sequence[Place], depth: int, direct: bool, seconds: float) -> DriveRate:
    """Read experts' parts in a random order for about `seconds`: what misses will do.

    Args:
        parts: the reads that experts take; as many of them as must not still be in a drive's cache.
        depth, direct: as in `drive_rates`.

    Raises:
        ExpertReadError: a file could not be read.
    """

    def places(rng: np.random.Generator) -> list[Place]:
        return [parts[i] for i in rng.permutation(len(parts))]

    return _drive_rate(places, depth, direct, seconds)


def _drive_rate(
    places: Callable[[np.random.Generator], list[Place]], depth: int, direct: bool, seconds: float
) -> DriveRate:
    """One thread for each read in flight: it begins its next read when its last has ended."""
    shards = ShardFiles(direct, {})
    begin = threading.Barrier(depth)

    def read(seed: int) -> list[tuple[float, float, int]]:
        own = places(np.random.default_rng((depth, seed)))
        memory = memoryview(bytearray(max(end - first for _, first, end in own)))
        ranges = [
            [ByteRange(file, first, memory[: end - first], "drive test", 0, "")]
            for file, first, end in own
        ]
        spans = []
        begin.wait()
        over = time.perf_counter() + seconds
        for place in itertools.cycle(ranges):
            start = time.perf_counter()
            shards.read(place)
            now = time.perf_counter()
            spans.append((start, now, len(place[0].into)))
            if now >= over:
                return spans
        raise AssertionError("places without end")

    try:
        with ThreadPoolExecutor(depth) as pool:
            threads = [pool.submit(read, i) for i in range(depth)]
            spans = np.array([span for thread in threads for span in thread.result()])
    finally:
        shards.close()
    begun, ended, nbytes = spans.T  # [reads] each
    elapsed = float(ended.max() - begun.min())
    median, slow = (float(x) for x in np.percentile(ended - begun, (50, 99)))
    # A read counts in the second in which it ended; the last second is not whole.
    second = (ended - begun.min()).astype(int)
    by_second = np.bincount(second, nbytes)[: max(1, int(seconds))]
    return DriveRate(
        read_bytes=round(float(nbytes.mean())),
        depth=depth,
        rate=float(nbytes.sum()) / elapsed,
        latency=median,
        latency_p99=slow,
        mean_depth=float((ended - begun).sum()) / elapsed,
        by_second=tuple(map(float, by_second)) if elapsed >= 1 else (),
    )


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


def arithmetic_rate(weight_bits: float, seconds: float = 0.05) -> float:
    """Operations/s of a product of matrices as a prompt has them, with weights of this many bits.

    Args:
        weight_bits: with their scales; 16 or more for weights that are not quantized.
        seconds: the product is made longer until it takes this long.
    """
    width, tokens = 1024, 64
    weight = mx.random.normal((width, width))
    bits = min((2, 3, 4, 5, 6, 8), key=lambda b: abs(b + 0.5 - weight_bits))
    packed = mx.quantize(weight, bits=bits) if weight_bits < 16 else None

    def product(x: mx.array) -> mx.array:
        if packed is None:
            return x @ weight
        return mx.quantized_matmul(x, *packed, bits=bits)

    while True:
        x = mx.random.normal((tokens, width))
        mx.eval(x, product(x))
        start = time.perf_counter()
        mx.eval(product(x), product(x))
        elapsed = time.perf_counter() - start
        if elapsed >= seconds or tokens >= 1 << 15:
            return 4 * tokens * width * width / elapsed
        tokens *= 2


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
    """Seconds that reading one layer's indices on the host adds to a chain of small kernels."""
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

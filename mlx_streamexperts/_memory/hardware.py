"""Figures of machines that decide how fast a streamed model runs, and their sources."""

from __future__ import annotations

from dataclasses import dataclass

from .._config import parse_size
from .._errors import StreamError


@dataclass(frozen=True)
class Machine:
    """Figures of a machine that decide the speed of a streamed model.

    Attributes:
        name: for reports.
        memory: bytes that a process may use for the model.
        memory_rate: bytes/s at which kernels read weights.
        drive_rate: bytes/s of reads of one expert's size at full queue depth.
        drive_latency: seconds of one such read with nothing else in flight.
        sync_seconds: cost of reading one layer's router indices from the device.
        layer_seconds: cost of launching one layer's kernels, whatever they read.
    """

    name: str
    memory: int
    memory_rate: float
    drive_rate: float
    drive_latency: float = 100e-6
    sync_seconds: float = 500e-6
    layer_seconds: float = 250e-6


# Memory and its bandwidth: Apple's specifications. Drive rates: 17.5 GB/s is flash-moe's own
# measurement; the others are reviewers' sequential figures and the weakest numbers here. The 0.5 ms
# a sync and layer: boyle counts 50 ms a token at 60 layers on an M5 Max, less with shorter queues.
# The 0.25 ms of a layer's launches: what streamlx's 33.3 tokens/s of Qwen3.6-35B-A3B, wholly
# resident on a 120 GB/s M4 Air, leave after the time of its bytes.
NAMED_MACHINES: dict[str, Machine] = {
    m.name: m
    for m in (
        Machine("M2 Max 96 GB", 96 * 10**9, 400e9, 6.0e9),
        Machine("M4 Max 128 GB", 128 * 10**9, 546e9, 7.0e9),
        Machine("M3 Max 48 GB", 48 * 10**9, 400e9, 17.5e9),
        Machine("M5 Max 128 GB", 128 * 10**9, 614e9, 13.0e9, sync_seconds=800e-6),
        Machine("M4 32 GB", 32 * 10**9, 120e9, 3.0e9),
        Machine("M4 Pro 64 GB", 64 * 10**9, 273e9, 5.5e9),
        Machine("iPhone class 12 GB", 12 * 10**9, 77e9, 2.0e9, drive_latency=200e-6),
    )
}
"""Machines that others have published results on, and two smaller Macs; by specification."""


def named_machine(name: str) -> Machine:
    """One of `NAMED_MACHINES`.

    Raises:
        StreamError: no machine has that name.
    """
    if name not in NAMED_MACHINES:
        raise StreamError(f"unknown machine {name!r}: choose of {', '.join(NAMED_MACHINES)}")
    return NAMED_MACHINES[name]


def parse_rate(text: str, latency: float) -> tuple[float, float]:
    """Parse `7GB/s:100us` into bytes/s and seconds of latency.

    Args:
        latency: the default, for `7GB/s` alone.

    Raises:
        StreamError: the text has another form.
    """
    rate, _, stated = text.partition(":")
    try:
        units = {"us": 1e-6, "ms": 1e-3}
        if stated:
            latency = float(stated[:-2]) * units[stated[-2:]]
        return float(parse_size(rate.removesuffix("/s"))), latency
    except (KeyError, ValueError) as e:
        raise StreamError(f"{text!r}: write for example 7GB/s or 7GB/s:100us") from e

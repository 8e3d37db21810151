"""Figures of machines that decide how fast a streamed model runs, and their sources."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .._config import format_size, parse_size
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
        drive_share: part of `drive_rate` that reads of experts may reach: low, high. (1, 1) for a
            measured rate.
        sync_share: part of `sync_seconds` that the best case counts. 1 for a measured time.
        arithmetic_rate: operations/s in products of matrices, which limit long prompts; 0 if it is
            not known.
        arithmetic_share: part of it that prompts reach: low, high. (1, 1) for a measured rate.
    """

    name: str
    memory: int
    memory_rate: float
    drive_rate: float
    drive_latency: float = 100e-6
    sync_seconds: float = 500e-6
    layer_seconds: float = 250e-6
    drive_share: tuple[float, float] = (1.0, 1.0)
    sync_share: float = 1.0
    arithmetic_rate: float = 0.0
    arithmetic_share: tuple[float, float] = (1.0, 1.0)

    def with_drive(self, stated: str) -> Machine:
        """The same machine with the drive that is stated; its rate is taken as it is.

        Args:
            stated: for example "7GB/s", or "7GB/s:100us" with a read's latency.

        Raises:
            StreamError: the text has another form.
        """
        rate, latency = parse_rate(stated, self.drive_latency)
        return replace(self, drive_rate=rate, drive_latency=latency, drive_share=(1.0, 1.0))

    @property
    def drive_text(self) -> str:
        """The rate that reads of experts may reach, for people: "4.05 GB/s to 5.94 GB/s"."""
        low, high = (f"{format_size(share * self.drive_rate)}/s" for share in self.drive_share)
        return low if low == high else f"{low} to {high}"


# GB/s of memory by Apple's specifications. The chips with two figures: see `_SLOWER`.
_MEMORY_GB_S: dict[str, tuple[int, ...]] = {
    "": (68, 100, 100, 120, 153),
    "Pro": (200, 200, 150, 273, 307),
    "Max": (400, 400, 400, 546, 614),
    "Ultra": (800, 800, 819),
}
_SLOWER = {("M3 Max", 36): 300, ("M3 Max", 96): 300, ("M4 Max", 36): 410, ("M5 Max", 36): 460}

# GB/s of the drive, one basis for every Mac: sequential reads as reviewers measure them with
# Blackmagic's disk test, on drives of 1 TB or more. M2 2.8, M1 Pro 5.8, M2 Pro 5.4, M3 Max as M1
# Max, M4 2.0 to 2.8, M5 6.3, M5 Max 13.6 and 86 % more than M4 Max. Small drives reach half.
# Projects' own figures are not used: they may include the page cache (17.5 GB/s of an M3 Max).
_DRIVE_GB_S: dict[str, tuple[float, ...]] = {
    "": (2.7, 2.7, 2.7, 2.7, 6.3),
    "Pro": (5.4, 5.4, 5.4, 7.0, 13.0),
    "Max": (5.4, 5.4, 5.4, 7.0, 13.0),
    "Ultra": (5.4, 5.4, 5.4),
}


# Operations/s of the GPU in 10^12: float32 by specification, with the most cores. M5's cores have
# matrix units; Apple states four times M4's rate, and MLX's prompts were 3.3 to 4.1 times
# as fast there.
_ARITHMETIC_T: dict[str, tuple[float, ...]] = {
    "": (2.6, 3.6, 4.1, 4.6, 18.0),
    "Pro": (5.3, 6.8, 7.4, 9.3, 37.0),
    "Max": (10.6, 13.6, 16.3, 18.4, 74.0),
    "Ultra": (21.2, 27.2, 32.6),
}
_ARITHMETIC_SHARE = (0.3, 0.7)

DRIVE_SHARE = (0.75, 1.1)
"""Of a drive's sequential rate, what reads of experts reach. Decoding here reached 0.75 to 0.92 of
what a drive of a stated rate allows; the same Mac's drives differ by their size."""


def apple_machine(chip: str, memory_gb: int) -> Machine:
    """A Mac by its specification.

    The 0.5 ms of a sync is a guess between machines: boyle counts 50 ms a token at 60 layers on an
    M5 Max, but its 15.5 tokens/s of Qwen3-235B there leave at most 0.4 ms a layer. The 0.25 ms of a
    layer's launches is what streamlx's 33.3 tokens/s of Qwen3.6-35B-A3B, wholly resident on a 120
    GB/s M4 Air, leave after the time of its bytes.

    Args:
        chip: "M4", "M4 Max" and so on.
        memory_gb: its memory in GB.

    Raises:
        KeyError, IndexError: there is no such chip.
    """
    generation, _, kind = chip.partition(" ")
    number = int(generation[1:]) - 1
    if number < 0:
        raise IndexError(chip)
    rate = _SLOWER.get((chip, memory_gb), _MEMORY_GB_S[kind][number])
    drive = _DRIVE_GB_S[kind][number]
    name = f"{chip} {memory_gb} GB"
    return Machine(
        name,
        memory_gb * 10**9,
        rate * 1e9,
        drive * 1e9,
        drive_share=DRIVE_SHARE,
        sync_share=0.5,
        arithmetic_rate=_ARITHMETIC_T[kind][number] * 1e12,
        arithmetic_share=_ARITHMETIC_SHARE,
    )


# What people write around a chip's name.
_WORDS = set(
    re.findall(r"\w+", "apple mac macbook imac air pro mini studio book with and of the a ram")
)
_WORDS |= {"memory", "unified", "chip", "gpu", "cpu"}

NAMED_MACHINES: dict[str, Machine] = {
    m.name: m
    for m in (
        apple_machine("M2 Max", 96),
        apple_machine("M4 Max", 128),
        apple_machine("M3 Max", 48),
        apple_machine("M5 Max", 128),
        apple_machine("M4", 32),
        apple_machine("M4 Pro", 64),
        Machine("iPhone class 12 GB", 12 * 10**9, 77e9, 2.0e9, 200e-6, drive_share=DRIVE_SHARE),
    )
}
"""Machines that others have published results on, and two smaller Macs; by specification."""


def named_machine(name: str) -> Machine:
    """One of `NAMED_MACHINES`, or any Mac: "M4 Max 128 GB", spelled loosely ("m4max 128").

    Raises:
        StreamError: no machine has that name, or it lacks the memory.
    """
    if name in NAMED_MACHINES:
        return NAMED_MACHINES[name]
    said = re.sub(r"[,/()-]", " ", name.lower())
    found = re.search(r"\bm(\d+) ?(pro|max|ultra)?(?![a-z])", said)
    rest = said if found is None else f"{said[: found.start()]} {said[found.end() :]}"
    cores = r"\d+ ?(?:cores?|inch)\b"
    sizes = re.findall(r"(\d+) ?(tb?|gb?|gib|)(?![\w.])", re.sub(cores, " ", rest))
    words = re.sub(r"[\d.]+ ?(?:[tg]i?b?)?(?![a-z])", " ", re.sub(cores, " ", rest)).split()
    if found is None or len(sizes) > 1 or set(words) - _WORDS:
        raise StreamError(
            f"unknown machine {name!r}: write a chip and its memory, as in 'M4 Max 128 GB'"
        )
    chip = f"M{found[1]} {(found[2] or '').title()}".strip()
    known = _DRIVE_GB_S.get((found[2] or "").title(), ())
    if not 1 <= int(found[1]) <= len(known):
        raise StreamError(
            f"{name!r}: no figures of an Apple {chip} are known here, only of M1 to "
            f"M{len(_DRIVE_GB_S[''])} (also Pro, Max) and M1 to M{len(_DRIVE_GB_S['Ultra'])} Ultra"
        )
    if not sizes:
        raise StreamError(f"{name!r}: how much memory? Write for example '{chip} 64 GB'")
    memory = int(sizes[0][0]) * (1024 if sizes[0][1].startswith("t") else 1)
    if not 8 <= memory <= 1024:
        raise StreamError(f"{name!r}: no Mac has {memory} GB of memory")
    return apple_machine(chip, memory)


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

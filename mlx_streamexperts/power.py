"""What a machine says of its own power and heat. Where it says nothing, nothing is made up.

Sources: on Apple silicon `zeus_apple_silicon` (its counters need no rights), on Linux RAPL's
counters (mostly readable by root only), on NVIDIA cards NVML (`pynvml`), and the kernel's
temperature zones. Libraries are optional; every source that is missing says why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
THERMAL = Path("/sys/class/thermal")
_APPLE_PARTS = {"cpu_total_mj": "CPU", "gpu_mj": "GPU", "dram_mj": "DRAM", "ane_mj": "ANE"}


class Source(Protocol):
    """Energy of some part of the machine."""

    name: str

    def begin(self) -> None:
        """Start counting."""

    def end(self) -> dict[str, float]:
        """Joules by part since `begin`."""


@dataclass
class Sensors:
    """What there is.

    Attributes:
        energy: sources of energy.
        temperatures: degrees Celsius now, by name of the sensor.
        throttling: why clocks are held down now, by device; empty texts where they are not.
        missing: why a source that this system could have is not there, by its name.
    """

    energy: list[Source] = field(default_factory=list)
    temperatures: dict[str, Callable[[], float]] = field(default_factory=dict)
    throttling: dict[str, Callable[[], str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def begin(self) -> None:
        """Start counting energy."""
        for source in self.energy:
            source.begin()

    def end(self) -> dict[str, float]:
        """Joules by part since `begin`; empty where nothing counts."""
        joules: dict[str, float] = {}
        for source in self.energy:
            for part, value in source.end().items():
                joules[f"{source.name} {part}".strip()] = value
        return joules

    def heat(self) -> dict[str, float]:
        """Degrees Celsius by sensor; those that fail just now are left out."""
        degrees = {}
        for name, read in self.temperatures.items():
            with suppress(Exception):  # a zone that is asleep, a card that is gone
                degrees[name] = read()
        return degrees

    def throttled(self) -> list[str]:
        """Devices whose clocks are held down at present, and why."""
        found = []
        for name, read in self.throttling.items():
            with suppress(Exception):
                if why := read():
                    found.append(f"{name}: {why}")
        return found


def find_sensors() -> Sensors:
    """Every source of this machine that works now."""
    sensors = Sensors()
    if sys.platform == "darwin":
        _add_apple(sensors)
    else:
        _add_rapl(sensors)
        _add_zones(sensors)
    _add_nvml(sensors)
    return sensors


class _Counters:
    """Counters of joules that only rise, but for those that start over at `wrap` joules."""

    def __init__(self, name: str, read: Callable[[], float], wrap: float = 0.0) -> None:
        self.name, self._read, self._wrap = name, read, wrap
        self._before = 0.0

    def begin(self) -> None:
        self._before = self._read()

    def end(self) -> dict[str, float]:
        used = self._read() - self._before
        return {"": used + self._wrap if used < 0 else used}


class _Apple:
    """Windows of `zeus_apple_silicon`, in millijoules; parts that a chip lacks are None."""

    name = "Apple silicon"

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def begin(self) -> None:
        self._monitor.begin_window("report")

    def end(self) -> dict[str, float]:
        metrics = self._monitor.end_window("report")
        values = {part: getattr(metrics, key, None) for key, part in _APPLE_PARTS.items()}
        return {part: value / 1e3 for part, value in values.items() if value is not None}


def _add_apple(sensors: Sensors) -> None:
    try:
        from zeus_apple_silicon import AppleEnergyMonitor

        sensors.energy.append(_Apple(AppleEnergyMonitor()))
    except ImportError:
        sensors.missing["Apple silicon"] = (
            "zeus-apple-silicon is not installed: pip install 'mlx-streamexperts[power]'"
        )
    except RuntimeError as e:
        sensors.missing["Apple silicon"] = str(e)
    sensors.missing["temperature"] = "macOS tells programs without rights no temperatures"


def _add_rapl(sensors: Sensors) -> None:
    """Packages, and memory beside them; the cores are counted in their package."""
    refused = False
    for zone in sorted(POWERCAP.glob("*:*")):
        with suppress(OSError, ValueError):
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "psys", "dram")):
                continue
            file = zone / "energy_uj"
            try:
                file.read_text()
            except PermissionError:
                refused = True
                continue
            wrap = int((zone / "max_energy_range_uj").read_text()) / 1e6
            sensors.energy.append(
                _Counters(f"RAPL {name}", lambda f=file: int(f.read_text()) / 1e6, wrap)  # type: ignore[misc]
            )
    if not any(s.name.startswith("RAPL") for s in sensors.energy):
        sensors.missing["RAPL"] = (
            f"{POWERCAP} may be read by root only"
            if refused
            else "this machine shows no energy counters (usual in virtual machines)"
        )


def _add_zones(sensors: Sensors) -> None:
    for zone in sorted(THERMAL.glob("thermal_zone*")):
        with suppress(OSError, ValueError):
            name = (zone / "type").read_text().strip()
            int((zone / "temp").read_text())
            sensors.temperatures[f"{name} ({zone.name.removeprefix('thermal_zone')})"] = (
                lambda f=zone / "temp": int(f.read_text()) / 1e3  # type: ignore[misc]
            )
    if not sensors.temperatures:
        sensors.missing["temperature"] = "this machine shows no temperature zones"


def _add_nvml(sensors: Sensors) -> None:
    """NVIDIA cards, where their library is installed."""
    if sys.platform == "darwin":
        return
    try:
        import pynvml as nvml
    except ImportError:
        sensors.missing["NVML"] = "nvidia-ml-py is not installed; only NVIDIA cards need it"
        return
    try:
        nvml.nvmlInit()
        for i in range(nvml.nvmlDeviceGetCount()):
            card, name = nvml.nvmlDeviceGetHandleByIndex(i), f"GPU {i}"
            nvml.nvmlDeviceGetTotalEnergyConsumption(card)  # cards before Volta do not count
            sensors.energy.append(
                _Counters(
                    name,
                    lambda c=card: nvml.nvmlDeviceGetTotalEnergyConsumption(c) / 1e3,  # type: ignore[misc]
                )
            )
            sensors.temperatures[name] = lambda c=card: float(  # type: ignore[misc]
                nvml.nvmlDeviceGetTemperature(c, nvml.NVML_TEMPERATURE_GPU)
            )
            sensors.throttling[name] = lambda c=card: _reasons(nvml, c)  # type: ignore[misc]
    except nvml.NVMLError as e:
        sensors.missing["NVML"] = str(e)


def _reasons(nvml: Any, card: Any) -> str:
    """Why a card's clocks are held down; being idle is no reason."""
    bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)
    names = {
        "SwPowerCap": "power cap",
        "SwThermalSlowdown": "heat",
        "HwSlowdown": "heat or power, by the hardware",
    }
    return ", ".join(
        text
        for key, text in names.items()
        if bits & getattr(nvml, f"nvmlClocksThrottleReason{key}", 0)
    )

"""A machine's own readings of power and heat; nothing is guessed if there are none.

On Apple silicon `zeus_apple_silicon` (its counters need no rights) and macOS's thermal pressure; on
Linux RAPL (mostly readable by root only), the kernel's temperature zones, and `pynvml` for NVIDIA
cards. Libraries are optional; every missing source says why.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from .._osinfo import thermal_pressure

POWERCAP = Path("/sys/class/powercap")
THERMAL = Path("/sys/class/thermal")
_APPLE_PARTS = {"cpu_total_mj": "CPU", "gpu_mj": "GPU", "dram_mj": "DRAM", "ane_mj": "ANE"}
_PRESSURES = {0: "", 1: "moderate", 2: "heavy", 3: "trapping", 4: "sleeping"}
_REASONS = {
    "SwPowerCap": "power cap",
    "SwThermalSlowdown": "heat",
    "HwSlowdown": "heat or power, by the hardware",
}
_NO_LIBRARY = {
    "Apple silicon": "zeus-apple-silicon is not installed: pip install zeus-apple-silicon",
    "NVML": "nvidia-ml-py is not installed; only NVIDIA cards need it",
}


@dataclass
class Sensors:
    """The readings that this machine offers, each a function by name, and why others are missing.

    `temperature` is in degrees Celsius; `throttling` is why a device's clocks are held down now.
    """

    energy: dict[str, Callable[[], float]] = field(default_factory=dict)  # joules, ever rising
    temperature: dict[str, Callable[[], float]] = field(default_factory=dict)
    throttling: dict[str, Callable[[], str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    _begun: dict[str, float] = field(default_factory=dict)

    def begin(self) -> None:
        """Start counting energy."""
        self._begun = self.look()

    def look(self) -> dict[str, float]:
        """Read every counter, as often as one may wrap; one that fails is dropped for good."""
        joules = {}
        for name, read in list(self.energy.items()):
            try:
                joules[name] = read()
            except Exception as e:  # any of a library's own
                del self.energy[name]
                self.missing[name] = f"failed while measuring: {type(e).__name__}"
        return joules

    def end(self) -> dict[str, float]:
        """Joules by part since `begin`; empty if nothing counts."""
        return {name: joules - self._begun[name] for name, joules in self.look().items()}

    def heat(self) -> dict[str, float]:
        """Degrees Celsius by sensor; those that fail just now are left out."""
        return _working(self.temperature)

    def throttled(self) -> list[str]:
        """Devices whose clocks are held down now, and why."""
        return [f"{name}: {why}" for name, why in _working(self.throttling).items() if why]


def _working(reads: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    found = {}
    for name, read in reads.items():
        with suppress(Exception):  # a zone that is asleep, a card that is gone
            found[name] = read()
    return found


def counted(parts: dict[str, float]) -> dict[str, float]:
    """The parts that add up: `psys` is the whole platform and includes the packages."""
    return {k: v for k, v in parts.items() if "psys" in k} or parts


def find_sensors() -> Sensors:
    """Every source of this machine that works now."""
    sensors = Sensors()
    for name, add in (_MAC if sys.platform == "darwin" else _LINUX).items():
        try:
            add(sensors)
        except ImportError:
            sensors.missing[name] = _NO_LIBRARY[name]
        except Exception as e:  # any of a library's own
            sensors.missing[name] = str(e)
    return sensors


def _apple(sensors: Sensors) -> None:
    sensors.missing["temperature"] = "macOS shows temperatures to privileged programs only"
    from zeus_apple_silicon import AppleEnergyMonitor

    read = AppleEnergyMonitor().get_cumulative_energy
    for key, part in _APPLE_PARTS.items():
        if getattr(read(), key, None) is not None:  # a chip has it
            sensors.energy[f"Apple silicon {part}"] = lambda key=key: getattr(read(), key) / 1e3  # type: ignore[misc]


def _pressure(sensors: Sensors) -> None:
    sensors.throttling["thermal pressure"] = _thermal_pressure(ctypes.CDLL(None))


def _thermal_pressure(system: Any) -> Callable[[], str]:
    """macOS's reading of heat in words, by its C library."""
    read = thermal_pressure(system)
    return lambda: _PRESSURES.get(level := read(), f"level {level}")


def _unwrapped(read: Callable[[], float], wrap: float) -> Callable[[], float]:
    """A counter that starts over at `wrap`, as one that only rises."""
    last = total = read()

    def rising() -> float:
        nonlocal last, total
        now = read()
        last, total = now, total + (now - last) % wrap
        return total

    return rising


def _number(file: Path, scale: float) -> Callable[[], float]:
    return lambda: int(file.read_text()) * scale


def _rapl(sensors: Sensors) -> None:
    """Packages, and memory beside them; the cores are counted in their package."""
    why = "this machine shows no energy counters (usual in virtual machines)"
    for zone in sorted(POWERCAP.glob("*:*")):
        try:
            name = (zone / "name").read_text().strip()
            if name.startswith(("package", "psys", "dram")):
                wrap = _number(zone / "max_energy_range_uj", 1e-6)()
                joules = _unwrapped(_number(zone / "energy_uj", 1e-6), wrap)
                sensors.energy[f"RAPL {name}"] = joules
        except PermissionError:
            why = f"{POWERCAP} may be read by root only"
        except (OSError, ValueError):
            pass
    if not sensors.energy:
        raise OSError(why)


def _zones(sensors: Sensors) -> None:
    for zone in sorted(THERMAL.glob("thermal_zone*")):
        with suppress(OSError, ValueError):
            name, number = (zone / "type").read_text().strip(), zone.name[len("thermal_zone") :]
            degrees = _number(zone / "temp", 1e-3)
            degrees()
            sensors.temperature[f"{name} ({number})"] = degrees
    if not sensors.temperature:
        raise OSError("this machine shows no temperature zones")


def _nvml(sensors: Sensors) -> None:
    """NVIDIA cards: one before Volta has a temperature, but counts no energy."""
    import pynvml as nvml

    def reasons(card: Any) -> str:  # idle is no reason
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)
        flags = {k: getattr(nvml, f"nvmlClocksThrottleReason{k}", 0) for k in _REASONS}
        return ", ".join(text for k, text in _REASONS.items() if bits & flags[k])

    kinds: dict[str, Callable[[Any], Any]] = {
        "energy": lambda card: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3,
        "temperature": lambda card: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
        "throttling": reasons,
    }
    nvml.nvmlInit()
    for i in range(nvml.nvmlDeviceGetCount()):
        card = nvml.nvmlDeviceGetHandleByIndex(i)
        for kind, read in kinds.items():
            try:
                read(card)
                getattr(sensors, kind)[f"GPU {i}"] = partial(read, card)
            except nvml.NVMLError as e:
                sensors.missing[f"GPU {i} {kind}"] = str(e)


_MAC = {"Apple silicon": _apple, "thermal pressure": _pressure}
_LINUX = {"RAPL": _rapl, "temperature": _zones, "NVML": _nvml}

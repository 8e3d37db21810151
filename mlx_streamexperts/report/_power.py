"""A machine's own readings of power and heat; nothing is guessed if there are none.

Sources: on Apple silicon `zeus_apple_silicon` (its counters need no rights) and macOS's thermal
pressure; on Linux RAPL (mostly readable by root only) and the kernel's temperature zones; on NVIDIA
cards NVML (`pynvml`). Libraries are optional; every missing source says why.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

POWERCAP = Path("/sys/class/powercap")
THERMAL = Path("/sys/class/thermal")
_APPLE_PARTS = {"cpu_total_mj": "CPU", "gpu_mj": "GPU", "dram_mj": "DRAM", "ane_mj": "ANE"}
_PRESSURES = {0: "", 1: "moderate", 2: "heavy", 3: "trapping", 4: "sleeping"}
_REASONS = {
    "SwPowerCap": "power cap",
    "SwThermalSlowdown": "heat",
    "HwSlowdown": "heat or power, by the hardware",
}


@dataclass
class Sensors:
    """The readings that this machine offers, each a function by name.

    Attributes:
        energy: joules since some moment, of one part of the machine.
        temperatures: degrees Celsius now.
        throttling: why a device's clocks are held down now; empty if they are not.
        missing: why a source that this system could have is not there.
    """

    energy: dict[str, Callable[[], float]] = field(default_factory=dict)
    temperatures: dict[str, Callable[[], float]] = field(default_factory=dict)
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
        return _working(self.temperatures)

    def throttled(self) -> list[str]:
        """Devices whose clocks are held down now, and why."""
        return [f"{name}: {why}" for name, why in _working(self.throttling).items() if why]


def _working(reads: dict[str, Callable[[], Any]]) -> dict[str, Any]:
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
    if sys.platform == "darwin":
        _add_apple(sensors)
    else:
        _add_rapl(sensors)
        _add_zones(sensors)
        _add_nvml(sensors)
    return sensors


def _add_apple(sensors: Sensors) -> None:
    sensors.missing["temperature"] = "macOS shows temperatures to privileged programs only"
    try:
        from zeus_apple_silicon import AppleEnergyMonitor

        monitor = AppleEnergyMonitor()
        for key, part in _APPLE_PARTS.items():
            if getattr(monitor.get_cumulative_energy(), key, None) is not None:  # a chip has it
                sensors.energy[f"Apple silicon {part}"] = lambda key=key: (  # type: ignore[misc]
                    getattr(monitor.get_cumulative_energy(), key) / 1e3
                )
    except ImportError:
        why = "zeus-apple-silicon is not installed: pip install 'mlx-streamexperts[power]'"
        sensors.missing["Apple silicon"] = why
    except RuntimeError as e:
        sensors.missing["Apple silicon"] = str(e)
    try:
        sensors.throttling["thermal pressure"] = _thermal_pressure(ctypes.CDLL(None))
    except (OSError, AttributeError) as e:
        sensors.missing["thermal pressure"] = str(e)


def _thermal_pressure(system: Any) -> Callable[[], str]:
    """macOS's own reading of heat, which needs no rights (OSThermalNotification.h).

    Args:
        system: the C library.

    Raises:
        OSError: macOS does not answer.
        AttributeError: this system has no such call.
    """
    token, level = ctypes.c_int(), ctypes.c_uint64()

    def read() -> str:
        if system.notify_get_state(token, ctypes.byref(level)):
            raise OSError("macOS does not say")
        return _PRESSURES.get(level.value, f"level {level.value}")

    name = b"com.apple.system.thermalpressurelevel"
    if system.notify_register_check(name, ctypes.byref(token)):
        raise OSError("macOS does not say")
    read()
    return read


def _unwrapped(read: Callable[[], float], wrap: float) -> Callable[[], float]:
    """A counter that starts over at `wrap`, as one that only rises."""
    last, turns = read(), 0

    def total() -> float:
        nonlocal last, turns
        now = read()
        turns += now < last
        last = now
        return now + turns * wrap

    return total


def _number(file: Path, scale: float) -> Callable[[], float]:
    return lambda: int(file.read_text()) * scale


def _add_rapl(sensors: Sensors) -> None:
    """Packages, and memory beside them; the cores are counted in their package."""
    why = "this machine shows no energy counters (usual in virtual machines)"
    for zone in sorted(POWERCAP.glob("*:*")):
        with suppress(OSError, ValueError):
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "psys", "dram")):
                continue
            wrap = _number(zone / "max_energy_range_uj", 1e-6)()
            try:
                joules = _unwrapped(_number(zone / "energy_uj", 1e-6), wrap)
                sensors.energy[f"RAPL {name}"] = joules
            except PermissionError:
                why = f"{POWERCAP} may be read by root only"
    if not sensors.energy:
        sensors.missing["RAPL"] = why


def _add_zones(sensors: Sensors) -> None:
    for zone in sorted(THERMAL.glob("thermal_zone*")):
        with suppress(OSError, ValueError):
            name, number = (zone / "type").read_text().strip(), zone.name[len("thermal_zone") :]
            degrees = _number(zone / "temp", 1e-3)
            degrees()
            sensors.temperatures[f"{name} ({number})"] = degrees
    if not sensors.temperatures:
        sensors.missing["temperature"] = "this machine shows no temperature zones"


def _add_nvml(sensors: Sensors) -> None:
    """NVIDIA cards, if their library is installed."""
    try:
        import pynvml as nvml
    except ImportError:
        sensors.missing["NVML"] = "nvidia-ml-py is not installed; only NVIDIA cards need it"
        return
    try:
        nvml.nvmlInit()
        cards = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as e:
        sensors.missing["NVML"] = str(e)
        return
    for i, card in enumerate(cards):
        _add_card(sensors, nvml, card, f"GPU {i}")


def _add_card(sensors: Sensors, nvml: Any, card: Any, name: str) -> None:
    """One card's readings: a card before Volta has a temperature, but counts no energy."""

    def joules() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(card)) / 1e3

    def degrees() -> float:
        return float(nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU))

    def reasons() -> str:  # idle is no reason
        bits = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(card)
        flags = {k: getattr(nvml, f"nvmlClocksThrottleReason{k}", 0) for k in _REASONS}
        return ", ".join(text for k, text in _REASONS.items() if bits & flags[k])

    def works(read: Callable[[], Any], kind: str) -> bool:
        try:
            read()
        except nvml.NVMLError as e:
            sensors.missing[f"{name} {kind}"] = str(e)
            return False
        return True

    if works(joules, "energy"):
        sensors.energy[name] = joules
    if works(degrees, "temperature"):
        sensors.temperatures[name] = degrees
    if works(reasons, "throttling"):
        sensors.throttling[name] = reasons

"""What a machine says of its own power and heat. Where it says nothing, nothing is made up.

Sources: on Apple silicon `zeus_apple_silicon` (its counters need no rights) and the system's
thermal pressure, on Linux RAPL's counters (mostly readable by root only), on NVIDIA cards NVML
(`pynvml`), and the kernel's temperature zones. Libraries are optional; every source that is
missing says why.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
THERMAL = Path("/sys/class/thermal")
_APPLE_PARTS = {"cpu_total_mj": "CPU", "gpu_mj": "GPU", "dram_mj": "DRAM", "ane_mj": "ANE"}

_PRESSURES = {0: "", 1: "moderate", 2: "heavy", 3: "trapping", 4: "sleeping"}


class Source(Protocol):
    """Energy of some part of the machine."""

    name: str

    def begin(self) -> None:
        """Start counting."""

    def look(self) -> None:
        """Read meanwhile: a counter that starts over may do so again before the end."""

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
        self._each(lambda source: source.begin())

    def look(self) -> None:
        """Read counters meanwhile, at least as often as they start over."""
        self._each(lambda source: source.look())

    def end(self) -> dict[str, float]:
        """Joules by part since `begin`; empty where nothing counts."""
        joules: dict[str, float] = {}

        def add(source: Source) -> None:
            for part, value in source.end().items():
                joules[f"{source.name} {part}".strip()] = value

        self._each(add)
        return joules

    def _each(self, do: Callable[[Source], None]) -> None:
        """A source that fails is out for good: what it would say later has a hole in it."""
        for source in list(self.energy):
            try:
                do(source)
            except Exception as e:  # a library's own, whichever it is
                self.energy.remove(source)
                self.missing[source.name] = f"failed while measuring: {type(e).__name__}"

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


def counted(parts: dict[str, float]) -> dict[str, float]:
    """The parts that add up: `psys` is the whole platform, with the packages in it."""
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


class _Counters:
    """Counters of joules that only rise, but for those that start over at `wrap` joules."""

    def __init__(self, name: str, read: Callable[[], float], wrap: float = 0.0) -> None:
        self.name, self._read, self._wrap = name, read, wrap
        self._last = self._used = 0.0

    def begin(self) -> None:
        self._last, self._used = self._read(), 0.0

    def look(self) -> None:
        now = self._read()
        self._used += now - self._last + (self._wrap if now < self._last else 0.0)
        self._last = now

    def end(self) -> dict[str, float]:
        self.look()
        return {"": self._used}


class _Apple:
    """Windows of `zeus_apple_silicon`, in millijoules; parts that a chip lacks are None."""

    name = "Apple silicon"

    def __init__(self, monitor: Any) -> None:
        self._monitor = monitor

    def begin(self) -> None:
        self._monitor.begin_window("report")

    def look(self) -> None:
        """Windows do not start over."""

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
    try:
        sensors.throttling["thermal pressure"] = _thermal_pressure(ctypes.CDLL(None))
    except (OSError, AttributeError) as e:
        sensors.missing["thermal pressure"] = str(e)


def _thermal_pressure(system: Any) -> Callable[[], str]:
    """macOS's own word on heat, which needs no rights (OSThermalNotification.h).

    Args:
        system: the C library.

    Raises:
        OSError: it says nothing.
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
        cards = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
    except nvml.NVMLError as e:
        sensors.missing["NVML"] = str(e)
        return
    for i, card in enumerate(cards):
        _add_card(sensors, nvml, card, f"GPU {i}")


def _add_card(sensors: Sensors, nvml: Any, card: Any, name: str) -> None:
    """What one card can tell: one before Volta has a temperature, but counts no energy."""

    def joules() -> float:
        return float(nvml.nvmlDeviceGetTotalEnergyConsumption(card)) / 1e3

    def degrees() -> float:
        return float(nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU))

    def reasons() -> str:
        return _reasons(nvml, card)

    def works(read: Callable[[], Any], what: str) -> bool:
        try:
            read()
        except nvml.NVMLError as e:
            sensors.missing[f"{name} {what}"] = str(e)
            return False
        return True

    if works(joules, "energy"):
        sensors.energy.append(_Counters(name, joules))
    if works(degrees, "temperature"):
        sensors.temperatures[name] = degrees
    if works(reasons, "throttling"):
        sensors.throttling[name] = reasons


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

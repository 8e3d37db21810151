"""What a machine could not answer: the end of a report, said plainly."""

from __future__ import annotations

from typing import Any

_BUSY = 0.2  # of the cores


def limits_of(found: dict[str, Any]) -> list[str]:
    """Of a report, or of as much of one as there is."""
    method = found["method"]
    machine, load, limits = method["machine"], method["load_average"], []
    if found["unfinished"]:
        limits.append(
            "All that comes after: the run ended before its end (it was at: "
            f"{found['unfinished']})."
        )
    if method["settings"]["kind"] == "quick":
        limits.append(
            "Small differences: this was a quick run, with few repeats of few tokens (--full)."
        )
    if load is not None and load > _BUSY * machine["cores"]:
        limits.append(
            f"An undisturbed machine: other work was going on before it began (load average "
            f"{load:.1f} on {machine['cores']} cores), so that timings are too slow and vary."
        )
    if not machine["system"].startswith("Darwin"):
        limits.append(
            f"Power, heat and drive of a Mac: this ran on {machine['system']}. Figures of named "
            "machines are predictions from their specifications."
        )
    if "cpu" in machine["mlx_device"]:
        limits.append(
            "How a GPU would do: MLX ran on the CPU, where computing takes longer and hides reads."
        )
    if not method["bypasses_page_cache"]:
        limits.append(
            "The drive by itself: reads went through the page cache, so that rates are partly "
            "those of memory."
        )
    limits += _of_power(found["power"]) if "power" in found else []
    if found.get("quality", {}).get("not_measured"):
        limits.append(found["quality"]["not_measured"])
    run = found["speed"].get("sustained")
    if run is not None and run["seconds"] < 600:
        limits.append(
            f"Ten minutes and more: decoding went on for {run['seconds']:.0f} s "
            "(--sustained MINUTES)."
        )
    return limits


def _of_power(power: dict[str, Any]) -> list[str]:
    limits = []
    if power["joules_per_token"] is None:
        limits.append("Joules per token: this machine shows no energy counter to this process.")
    if not power["celsius_after"]:
        limits.append("Temperature: no sensor can be read here.")
    if not power["tells_throttling"]:
        limits.append("Whether clocks were held down: nothing here tells.")
    limits += [f"{k}: {v}." for k, v in power["missing"].items() if v.startswith("failed")]
    return limits

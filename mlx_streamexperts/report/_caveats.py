"""Caveats: what a run could not measure, the last section of a report."""

from __future__ import annotations

from collections.abc import Iterator

from ._report import Power, Report

_BUSY = 0.2  # of the cores


def caveats(report: Report) -> Iterator[str]:
    """Caveats of a report, whole or not."""
    method, run, quality = report.method, report.speed.sustained, report.quality
    machine, load = method.machine, method.load_average or 0.0
    if report.unfinished:
        yield f"All that comes after: the run ended early (while at: {report.unfinished})."
    if method.settings.kind == "quick":
        yield "Small differences: this was a quick run, with few repeats of few tokens (--full)."
    if load > _BUSY * machine.cores:
        yield (
            f"An undisturbed machine: other work was going on before it began (load average "
            f"{load:.1f} on {machine.cores} cores), so timings are too slow and vary."
        )
    if not machine.system.startswith("Darwin"):
        yield (
            f"Power, heat and drive of a Mac: this ran on {machine.system}. Figures of named "
            "machines are predictions from their specifications."
        )
    if "cpu" in machine.mlx_device:
        yield "A GPU's speed: MLX ran on the CPU, where computing takes longer and hides reads."
    if not method.bypasses_page_cache:
        yield "The drive by itself: the page cache served reads, so rates are partly memory's."
    if report.power is not None:
        yield from _of_power(report.power)
    if quality is not None and quality.not_measured:
        yield quality.not_measured
    if run is not None and run.seconds < 600:
        yield f"Ten minutes and more: decoding lasted {run.seconds:.0f} s (--sustained MINUTES)."


def _of_power(power: Power) -> Iterator[str]:
    if power.joules_per_token is None:
        yield "Joules per token: this machine shows no energy counter to this process."
    if not power.celsius_after:
        yield "Temperature: no sensor can be read here."
    if not power.tells_throttling:
        yield "Whether clocks were held down: nothing here tells."
    yield from (f"{k}: {v}." for k, v in power.missing.items() if v.startswith("failed"))

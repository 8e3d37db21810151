"""What `doctor` prints of an examination: lines of plain text."""

from __future__ import annotations

from collections.abc import Iterator

from .._analysis.machines import report_lines
from .._analysis.predict import Range
from .._config import format_size
from .._memory.hardware import Machine
from ._examination import DoesNotFit, Examination, Measured, RanksExamination, Verdict


def lines(found: Examination | RanksExamination) -> Iterator[str]:
    """The report."""
    yield f"Model: {found.model}"
    if isinstance(found, RanksExamination):
        yield from report_lines(
            found.ranks, found.machines, found.link, found.prompt_tokens, found.hits
        )
        return
    if found.measured is not None:
        yield from _measured(found.measured, found.machines[0].machine)
        yield f"Free disk: {format_size(found.free_disk)}"
    for verdict in found.machines:
        yield ""
        yield f"{verdict.machine.name} ({format_size(verdict.machine.memory)})"
        if isinstance(verdict, DoesNotFit):
            yield f"  does not fit: {verdict.reason}"
        else:
            yield from _verdict(verdict)


def _measured(measured: Measured, machine: Machine) -> Iterator[str]:
    check = "passed" if measured.in_place else "FAILED: reads are copied, which is slow"
    yield f"Device: {measured.device}, check of in-place reads {check}"
    how = "past the page cache" if measured.page_cache_bypassed else "page cache warm"
    for r in measured.drive:
        yield (
            f"Drive (measured, {how}): {format_size(r.rate)}/s at {r.depth} reads of "
            f"{format_size(r.read_bytes)} in flight ({r.mean_depth:.1f} on average), "
            f"{1e3 * r.latency:.2f} ms each"
        )
    if not measured.drive:
        yield "Drive: not measured, the weights are not here; 5 GB/s assumed"
    yield (
        f"Memory (measured): {format_size(machine.memory_rate)}/s; asking the device for a "
        f"layer's experts: {1e6 * machine.sync_seconds:.0f} us (measured)"
    )


def _verdict(verdict: Verdict) -> Iterator[str]:
    plan, p = verdict.plan, verdict.prediction
    yield f"  plan: {plan}"
    yield (
        f"  smallest memory that works: {format_size(plan.minimum)}; disk needed: "
        f"{format_size(plan.disk)}; cold bytes per token: {format_size(plan.cold_bytes_per_token)}"
    )
    if plan.tables:
        yield (
            f"  {format_size(plan.tables)} of tables that are looked up by token stay on the "
            f"drive; a cache of {format_size(plan.row_cache)} (--row-cache) keeps the rows used "
            "last"
        )
    if plan.conversion:
        yield (
            "  has to be converted first (python -m mlx_streamexperts.convert), which takes "
            f"{format_size(plan.conversion)} of disk beside the original; all here is for the "
            "result"
        )
    yield f"  expected hit rate: {_range(p.hit_rate, '.0%')} ({verdict.hit_rate_from})"
    yield (
        f"  predicted decode: {_range(p.tokens_per_s, '.3g')} tokens/s; first token of "
        f"{p.prompt_tokens} after {_range(p.first_token, '.3g')} s"
    )
    yield (
        f"  a token, likely: compute {1e3 * p.compute_seconds:.1f} ms + sync and "
        f"launches {1e3 * p.sync_seconds:.1f} ms + reads {1e3 * p.read_seconds:.1f} ms; "
        f"limited by: {p.limit}"
    )
    for r in verdict.reported:
        off = p.tokens_per_s.likely / r.tokens_per_s
        yield (
            f"  reported: {r.tokens_per_s} tokens/s with {format_size(r.memory)} "
            f"({r.note}); the prediction above is {off:.2f} times that"
        )


def _range(value: Range, form: str) -> str:
    return f"{value.likely:{form}} ({value.low:{form}} to {value.high:{form}})"

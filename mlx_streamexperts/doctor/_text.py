"""What `doctor` prints of an examination: lines of plain text."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from .._analysis.catalogue import KNOWN_MODELS
from .._analysis.machines import report_lines
from .._analysis.predict import Range, predict
from .._config import format_size
from .._errors import BudgetError
from .._loading.lazy_load import MLX_VLM
from .._memory.hardware import Machine
from ._examination import (
    DoesNotFit,
    Examination,
    MachineExamination,
    Measured,
    RanksExamination,
    Verdict,
)


def _rate(value: float) -> str:
    """Two significant digits, and never an exponent above 1: "0.96", "5.3", "490"."""
    return f"{value:.2g}" if value < 99.5 else f"{float(f'{value:.2g}'):,.0f}"


def lines(found: Examination | RanksExamination) -> Iterator[str]:
    """The report: of each machine the verdict first."""
    if isinstance(found, RanksExamination):
        yield f"Model: {found.model}"
        yield from report_lines(
            found.ranks, found.machines, found.link, found.prompt_tokens, found.hits
        )
        return
    for i, verdict in enumerate(found.machines):
        if i:
            yield ""
        if isinstance(verdict, DoesNotFit):
            yield f"{found.model} on {verdict.machine.name}: does not fit. {verdict.reason}"
            continue
        yield headline(found.model, verdict, found.downloaded)
        yield f"  Type: {command(found, verdict)}"
        if found.tokenizer_code:
            yield (
                f"  Its tokenizer is Python code that comes with it, {found.tokenizer_code}: "
                "decide whether you trust that. It may need packages (Kimi's: pip install tiktoken)"
            )
        yield f"  {limit(verdict)}"
        yield f"  What would help most: {help_most(verdict)}"
        if found.measured is None:
            yield assumed(verdict.machine)
        yield from _verdict(verdict)
    if found.measured is not None:
        yield ""
        yield from _measured(found.measured, verdict.machine)
        yield f"Free disk: {format_size(found.free_disk)}"


_MBIT_100 = 12.5e6  # bytes/s


def headline(model: str, verdict: Verdict, downloaded: bool = False) -> str:
    """The verdict in one line."""
    p, plan = verdict.prediction, verdict.plan
    rate = p.tokens_per_s.likely
    how = next(
        words
        for least, words in ((10, "runs well"), (3, "runs"), (0.5, "runs, slowly"),
                             (0, "runs, very slowly"))
        if rate >= least
    )  # fmt: skip
    seconds = plan.disk / _MBIT_100
    time = f"{seconds / 3600:.0f} h" if seconds > 5400 else f"{max(1, seconds / 60):.0f} min"
    size = "" if downloaded else f", {format_size(plan.disk)} to download ({time} at 100 Mbit/s)"
    first = f"{p.first_token.likely:.3g} s"
    return (
        f"{model} on {verdict.machine.name}: {how}. About {_rate(rate)} tokens/s "
        f"({_rate(p.tokens_per_s.low)} to {_rate(p.tokens_per_s.high)}), first token of "
        f"{p.prompt_tokens} after {first}{size}."
    )


def command(found: Examination, verdict: Verdict) -> str:
    """What to type next: of a repository that is not here, the download first."""
    plan, quoted = verdict.plan, shlex.quote(found.model)
    here = found.downloaded or Path(found.model).exists()
    download = "" if here else f"hf download {quoted} && "
    if plan.conversion:
        return f"{download}streamexperts convert --model {quoted} --out converted"
    memory = "" if plan.memory is None else f" --memory {plan.memory // 10**6}MB"
    memory = memory.replace("000MB", "GB")
    if found.library == MLX_VLM:
        return f"{download}streamexperts run{memory} mlx_vlm.chat --model {quoted}"
    trust = " --trust-remote-code" if found.tokenizer_code else ""
    return f"{download}streamexperts chat --model {quoted}{memory}{trust}"


def limit(verdict: Verdict) -> str:
    """What limits the speed, in plain words."""
    plan, p = verdict.plan, verdict.prediction
    if p.limit == "drive" and not plan.experts:
        return "The drive limits it: each token waits for its rows of tables on the drive."
    if p.limit == "drive":
        missed = (1 - p.hit_rate.likely) * plan.cold_bytes_per_token
        return (
            f"The drive limits it: memory holds {plan.resident_share:.0%} of the experts, so a "
            f"token reads {format_size(missed)} from the drive."
        )
    if p.limit == "memory bandwidth":
        return (
            "Memory bandwidth limits it: each token reads "
            f"{format_size(plan.active_bytes_per_token)} of weights from memory."
        )
    if not plan.experts:
        return (
            "Waiting limits it: starting a layer's work on the device takes longer than the work."
        )
    return "Waiting limits it: each layer asks the device which experts it chose."


def help_most(verdict: Verdict) -> str:
    """The change that would raise the speed most, as far as arithmetic can tell."""
    plan, machine, p = verdict.plan, verdict.machine, verdict.prediction
    if p.limit == "memory bandwidth" or not plan.experts:
        return "a smaller model or fewer bits; a faster drive would not."
    if p.limit != "drive":
        return "a model with fewer layers; neither fewer bits nor a faster drive would."
    half = replace(
        plan,
        experts=plan.experts // 2,
        cache=min(plan.cache, plan.experts // 2),
        slots=tuple(min(2 * s, n) for s, n in zip(plan.slots, plan.layer_experts, strict=True)),
        active_bytes_per_token=plan.active_bytes_per_token - plan.cold_bytes_per_token // 2,
        cold_bytes_per_token=plan.cold_bytes_per_token // 2,
    )
    fast = replace(machine, drive_rate=2 * machine.drive_rate)
    ways = {
        "half the bits for experts": predict(half, machine).tokens_per_s.likely,
        "a drive twice as fast": predict(plan, fast).tokens_per_s.likely,
    }
    told = [f"{way}: about {_rate(rate)} tokens/s" for way, rate in ways.items()]
    for model in KNOWN_MODELS:  # largest first
        try:
            rate = predict(model.plan(plan.bound), machine).tokens_per_s.likely
        except BudgetError:
            continue
        if model.disk < plan.disk and rate > max(10.0, p.tokens_per_s.likely):
            told.append(f"another model, {model.name}: about {_rate(rate)}")
            break
    return "; ".join(told) + "."


def assumed(machine: Machine) -> str:
    """What a prediction for a machine that is not here rests on."""
    return (
        f"  Assumed, not measured: drive {machine.drive_text} (--drive states yours), memory "
        f"{format_size(machine.memory_rate)}/s by specification."
    )


def machine_lines(found: list[MachineExamination]) -> Iterator[str]:
    """Which models suit each machine."""
    for i, here in enumerate(found):
        if i:
            yield ""
        best = [s for s in here.suited if s.prediction.tokens_per_s.likely >= 3]
        count = len(here.suited) + len(here.too_large)
        yield (
            f"{here.machine.name}: {format_size(here.machine.memory)} of memory, of which a model "
            f"may have {format_size(here.budget)}; {len(best)} of {count} well-known models run "
            "at 3 tokens/s or more."
        )
        if here.measured is None:
            yield assumed(here.machine)
        else:
            yield from _measured(here.measured, here.machine)
        for s in here.suited:
            rate = _rate(s.prediction.tokens_per_s.likely)
            yield (
                f"  {s.name:27s} {rate:>6s} tokens/s (predicted), "
                f"{s.resident_share:4.0%} resident, {s.disk / 1e9:4.0f} GB to download"
            )
        if here.too_large:
            yield f"  too large: {', '.join(here.too_large)}"
        if best:
            there = "" if here.measured else f" --machine {shlex.quote(here.machine.name)}"
            yield f"  Next: streamexperts doctor --model {best[0].repo}{there}"


def _measured(measured: Measured, machine: Machine) -> Iterator[str]:
    check = "passed" if measured.in_place else "FAILED: reads are copied, which is slow"
    yield f"Device: {measured.device}, check of in-place reads {check}"
    how = "past the page cache" if measured.page_cache_bypassed else "page cache warm"
    for r in measured.drive:
        yield (
            f"Drive (measured, {how}): {format_size(r.rate)}/s at {r.depth} "
            f"{'read' if r.depth == 1 else 'reads'} of "
            f"{format_size(r.read_bytes)} in flight ({r.mean_depth:.1f} on average), "
            f"{1e3 * r.latency:.2f} ms each"
        )
        if len(r.by_second) > 1:
            yield (
                f"  over {len(r.by_second)} s: {format_size(r.by_second[0])}/s in the first "
                f"second, {format_size(r.by_second[-1])}/s in the last; predicted from the second "
                f"half, {format_size(r.sustained)}/s"
            )
    if (cached := measured.page_cache) is not None:
        yield (
            f"The same reads through the page cache (some may be in it): "
            f"{format_size(cached.rate)}/s at {cached.depth} in flight"
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
        f"{format_size(plan.disk)}"
        + (
            f"; cold bytes per token: {format_size(plan.cold_bytes_per_token)}"
            if plan.experts
            else "; no routed experts"
        )
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
    if plan.experts:
        yield f"  expected hit rate: {_range(p.hit_rate, '.0%')} ({verdict.hit_rate_from})"
    yield (
        f"  predicted decode: {p.tokens_per_s} tokens/s; first token of {p.prompt_tokens} after "
        f"{p.first_token} s"
    )
    yield (
        f"  a token, likely: compute {1e3 * p.compute_seconds:.1f} ms + sync and "
        f"launches {1e3 * p.sync_seconds:.1f} ms + reads {1e3 * p.read_seconds:.1f} ms; "
        f"limited by: {p.limit}"
    )
    yield (
        f"  a prompt of {p.prompt_tokens}, likely: reads {p.prompt_read_seconds:.3g} s + "
        f"arithmetic {p.prompt_arithmetic_seconds:.3g} s"
    )
    for r in verdict.reported:
        off = p.tokens_per_s.likely / r.tokens_per_s
        yield (
            f"  reported: {r.tokens_per_s} tokens/s with {format_size(r.memory)} "
            f"({r.note}); the prediction above is {off:.2f} times that"
        )


def _range(value: Range, form: str) -> str:
    return f"{value.likely:{form}} ({value.low:{form}} to {value.high:{form}})"

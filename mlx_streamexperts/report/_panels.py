"""The panels of a report's page: each is a question, its figure, and the sentence that answers it.

One function a panel: it draws onto matplotlib axes and returns the sentence. One that draws nothing
has nothing to show, and its sentence says why.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .._analysis.measure import DriveRate
from .._analysis.plots import pyplot
from .._analysis.replay import BEST
from .._config import format_size
from ._power import counted
from ._report import Exactness, Repeats, Report

# Stand-ins for colours, and the page's own (light or dark), which replace them.
TEXT, SOFT, LINE = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = ("#0a0c01", "#0a0c02", "#0a0c03", "#0a0c04", "#0a0c05", "#0a0c06")
COLOURS = {TEXT: "var(--text)", SOFT: "var(--soft)", LINE: "var(--line)"}
COLOURS |= {c: f"var(--{name})" for c, name in zip(SERIES, "abcdef", strict=True)}
STYLE = {
    "font.size": 8.5, "axes.titlesize": 9, "legend.fontsize": 7.5, "legend.frameon": False,
    "text.color": TEXT, "axes.labelcolor": SOFT, "axes.edgecolor": SOFT, "xtick.color": SOFT,
    "ytick.color": SOFT, "grid.color": LINE, "axes.spines.top": False, "axes.spines.right": False,
    "lines.markersize": 4, "axes.grid": True, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "svg.fonttype": "none", "text.parse_math": False,
}  # fmt: skip
_MARKERS = "os^DvP"
_POINTS: dict[str, Any] = {"label": "measured, throttled", "linestyle": "none"}
_ABOVE = {"loc": "lower right", "bbox_to_anchor": (1, 1)}  # a legend that hides no point
T = TypeVar("T")


class NotMeasured(Exception):  # noqa: N818
    """The run ended before this part."""


@dataclass(frozen=True)
class Panel:
    """One panel.

    Attributes:
        key: its name in the page's links.
        section: of the report: "speed", "ssd" and so on.
        question: its title.
        answer: draws onto axes and returns the sentence; raises `NotMeasured`.
        height: inches.
    """

    key: str
    section: str
    question: str
    answer: Callable[[Report, Any], str]
    height: float


PANELS: list[Panel] = []


def _panel(
    section: str, question: str, height: float = 2.7
) -> Callable[[Callable[[Report, Any], str]], None]:
    def add(answer: Callable[[Report, Any], str]) -> None:
        PANELS.append(Panel(answer.__name__[1:], section, question, answer, height))

    return add


def _need(part: T | None) -> T:
    if part is None:
        raise NotMeasured
    return part


def _share(x: float) -> str:
    return f"{100 * x:.0f} %"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2g}"


def _quarter(rows: Sequence[T]) -> T:
    """The row whose resident share is nearest to a quarter."""
    return min(rows, key=lambda r: abs(r.share - 0.25))  # type: ignore[attr-defined]


def _errors(rows: Sequence[Repeats]) -> list[list[float]]:
    return [[r.median - r.low for r in rows], [r.high - r.median for r in rows]]


def _medians(
    axes: Any, x: Sequence[float], rows: Sequence[Repeats], number: int = 0, **style: Any
) -> None:
    """Medians of repeats, with a bar from the lowest to the highest; the axis starts at 0."""
    style |= {"marker": _MARKERS[number], "color": SERIES[number], "capsize": 2}
    axes.errorbar(x, [r.median for r in rows], _errors(rows), **style)
    axes.set_ylim(0)


def _lines(
    axes: Any, x: Sequence[float], series: Mapping[str, Sequence[float]], xlabel: str, ylabel: str,
    **legend: Any,
) -> None:  # fmt: skip
    """One line with markers for each entry of `series`, and a legend."""
    for i, (label, y) in enumerate(series.items()):
        axes.plot(x, y, marker=_MARKERS[i], color=SERIES[i], label=label)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(**legend)


def _percent(values: Iterable[float]) -> list[float]:
    return [100 * x for x in values]


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], number: int) -> None:
    axes.barh(names, values, color=SERIES[number], height=0.6)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks at the measured values, written out."""
    axis.set_ticks(values, [f"{v:g}" for v in values])
    axis.set_ticks([], minor=True)


def _plain(axis: Any) -> None:
    """Plain numbers: powers of ten would be set as formulas, which are off because of names."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")


# Speed


@_panel("speed", "How fast, and how much does it vary by prompt?", 3.2)
def _by_prompt(r: Report, axes: Any) -> str:
    rows = sorted(_need(r.speed.by_prompt), key=lambda p: p.tokens_per_s.median)
    rates = [p.tokens_per_s for p in rows]
    axes.barh(
        [p.name for p in rows], [x.median for x in rates], xerr=_errors(rates), color=SERIES[0],
        ecolor=TEXT, capsize=2, height=0.7,
    )  # fmt: skip
    axes.set_xlabel("tokens/s: median, lowest, highest")
    axes.grid(axis="y", visible=False)
    found, slow, fast = _need(r.speed.tokens_per_s), rows[0], rows[-1]
    text = (
        f"{found.median:.3g} tokens/s at the median prompt with {_share(r.method.resident_share)} "
        f"of the experts resident; from {found.low:.3g} ({slow.name}, {_share(slow.hit_rate)} "
        f"hits) to {found.high:.3g} ({fast.name}, {_share(fast.hit_rate)} hits). "
    )
    if len(rates[0].values) == 1:
        return text + "Each was measured once: how much repeats differ is unknown."
    inner = statistics.median((x.high - x.low) / x.median for x in rates)
    return text + f"Repeats of one prompt differ by {_share(inner)}."


@_panel("speed", "Does it stay that fast?")
def _sustained(r: Report, axes: Any) -> str:
    run = _need(r.speed.sustained)
    rate = run.tokens_per_s
    axes.plot([w.at_s for w in run.windows], [w.tokens_per_s for w in run.windows], color=SERIES[0])
    axes.axhline(rate.median, color=SOFT, linewidth=0.8, label="median")
    axes.axhline(0.8 * rate.median, color=SERIES[2], linestyle=":", label="80 %: below is a dip")
    axes.set(ylim=(0, None), xlabel="seconds", ylabel=f"tokens/s in {run.window_s:g} s")
    axes.legend(ncols=2, **_ABOVE)
    drift = "too few windows to tell a drift"
    if run.drift is not None:
        drift = f"the last third runs {100 * run.drift:+.1f} % against the first"
    dips = f"{run.dips} of {len(run.windows)} windows are dips" if run.dips else "no dips"
    return (
        f"{rate.median:.3g} tokens/s over {run.seconds:.0f} s without a pause ({rate.low:.3g} to "
        f"{rate.high:.3g} in windows of {run.window_s:.2g} s): {drift}, {dips}. Prompts took "
        f"{_share(1 - run.decode_s / run.seconds)} of the time and are not in the rates."
        + (" It was interrupted." if run.interrupted else "")
    )


@_panel("speed", "How long until the first token?")
def _first_token(r: Report, axes: Any) -> str:
    rows, cold = _need(r.speed.by_prompt_length), r.speed.cold_start
    x = [p.prompt_tokens for p in rows]
    _medians(axes, x, [p.seconds for p in rows])
    axes.set(xscale="log", xlabel="tokens of the prompt", ylabel="seconds to the first token")
    _ticks(axes.xaxis, x)
    dropped = "the files as the page cache had them (this system cannot drop them)"
    if cold.page_cache_dropped:
        dropped = "the files dropped from the page cache before"
    on_cpu = "cpu" in r.method.machine.mlx_device
    return (
        f"{rows[0].seconds.median:.3g} s for {x[0]} tokens, {rows[-1].seconds.median:.3g} s for "
        f"{x[-1]}. From a cold start, with {dropped}: {cold.load_s:.3g} s to load and "
        f"{cold.first_token_s:.3g} s to the first token of {cold.prompt_tokens}, once"
        + ("." if on_cpu else ", with what the device has to compile for it.")
    )


@_panel("speed", "Does a longer context cost speed?")
def _context(r: Report, axes: Any) -> str:
    rows = _need(r.speed.by_prompt_length)
    x, rates = [p.prompt_tokens for p in rows], [p.tokens_per_s for p in rows]
    _medians(axes, x, rates, 1)
    axes.set(xscale="log", xlabel="tokens of context", ylabel="tokens/s")
    _ticks(axes.xaxis, x)
    change = rates[-1].median / rates[0].median - 1
    return (
        f"{rates[-1].median:.3g} tokens/s after {x[-1]} tokens, {100 * change:+.0f} % against "
        f"{x[0]}; other text, so other experts too."
    )


@_panel("speed", "What do several sequences at once reach?")
def _batch(r: Report, axes: Any) -> str:
    rows = _need(r.speed.by_batch)
    x = [b.batch for b in rows]
    _medians(axes, x, [b.tokens_per_s for b in rows], 2)
    axes.set(xlabel="sequences at once", ylabel="tokens/s of all together")
    _ticks(axes.xaxis, x)
    best = max(rows, key=lambda b: b.tokens_per_s.median)
    rate = best.tokens_per_s.median
    return (
        f"Most with {best.batch} at once: {rate:.3g} tokens/s, "
        f"{rate / rows[0].tokens_per_s.median:.2g} times one sequence; each then gets "
        f"{rate / best.batch:.3g}."
    )


# The drive


def _how(r: Report) -> str:
    return f"{'past' if _need(r.ssd).bypasses_page_cache else 'through'} the page cache"


def _by_size(
    r: Report, axes: Any, label: str, value: Callable[[DriveRate], float]
) -> list[DriveRate]:
    rows = _need(_need(r.ssd).rates)
    sizes = sorted({x.read_bytes / 1024 for x in rows})
    depths = sorted({x.depth for x in rows})
    series = {f"{n}": [value(x) for x in rows if x.depth == n] for n in depths}
    _lines(axes, sizes, series, "KiB of one read", label, title="reads in flight", ncols=3)
    ticks: list[int] = []
    for n in sizes:
        if not ticks or n > 1.5 * ticks[-1]:  # no two on one spot
            ticks.append(round(n))
    axes.set_xscale("log", base=2)
    _ticks(axes.xaxis, ticks)
    axes.tick_params("x", rotation=45)
    return rows


@_panel("ssd", "What does the drive give?")
def _bandwidth(r: Report, axes: Any) -> str:
    rows = _by_size(r, axes, "GB/s", lambda x: x.rate / 1e9)
    axes.set_ylim(0)
    best = max(rows, key=lambda x: x.rate)
    return (
        f"Up to {format_size(best.rate)}/s, with {best.depth} reads of {best.read_bytes >> 10} KiB "
        f"in flight, at random places of the model's own files, {_how(r)}."
    )


@_panel("ssd", "How long does a read take?")
def _latency(r: Report, axes: Any) -> str:
    rows = _by_size(r, axes, "median milliseconds", lambda x: 1e3 * x.latency)
    axes.set_yscale("log")
    _plain(axes.yaxis)
    alone = [x for x in rows if x.depth == 1]
    small, large = alone[0], alone[-1]
    return (
        f"{_ms(small.latency)} ms for {small.read_bytes >> 10} KiB and {_ms(large.latency)} ms for "
        f"{large.read_bytes >> 10} KiB one at a time, {_how(r)}; 99 of 100 within "
        f"{_ms(small.latency_p99)} and {_ms(large.latency_p99)} ms."
    )


@_panel("ssd", "What reads does generation make?")
def _reads(r: Report, axes: Any) -> str:
    found = _need(_need(r.ssd).in_generation)
    if not found.reads:
        return "Generation made no reads."
    at = {p.percentile: p for p in found.percentiles}
    times = [(1e3 * p.latency_s, 1e3 * p.queued_s) for p in found.percentiles]
    series = dict(zip(("read", "queued before"), zip(*times, strict=True), strict=True))
    _lines(axes, list(at), series, "percentile", "milliseconds")
    axes.set_yscale("symlog", linthresh=0.01)
    _plain(axes.yaxis)
    return (
        f"{found.reads} reads, of {format_size(at[50].bytes)} at the median and "
        f"{format_size(at[100].bytes)} at most, {at[50].depth:.0f} in flight "
        f"({at[99].depth:.0f} at the 99th percentile); each took {_ms(at[50].latency_s)} ms, one "
        f"in a hundred {_ms(at[99].latency_s)} ms or more. {_share(found.ahead / found.reads)} "
        "were prefetches."
    )


@_panel("ssd", "What would a slower or faster drive give?", 3.0)
def _by_rate(r: Report, axes: Any) -> str:
    found = _need(_need(r.ssd).sensitivity)
    x = [p.bytes_per_s / 1e9 for p in found.curve]
    axes.plot(x, [p.tokens_per_s for p in found.curve], color=SOFT, label="modelled")
    rows = [(p.bytes_per_s or 0.0, p.tokens_per_s) for p in found.by_rate]
    _medians(axes, [x / 1e9 for x, _ in rows], [y for _, y in rows], **_POINTS)
    label = "drives of named machines (predicted)"
    for i, m in enumerate(sorted(found.machines, key=lambda m: m.bytes_per_s)):
        above = i % 2  # neighbours are close
        place = m.bytes_per_s / 1e9, m.this_compute_tokens_per_s
        axes.plot(*place, "D", color=SERIES[2], label="" if i else label)
        axes.annotate(
            m.name.rsplit(" ", 2)[0],  # without its memory
            place, xytext=(0, 6 if above else -6), textcoords="offset points", rotation=90,
            fontsize=6.5, ha="center", va="bottom" if above else "top",
        )  # fmt: skip
    axes.set_xscale("log")
    _plain(axes.xaxis)
    axes.set(ylim=(0, 1.35 * axes.get_ylim()[1]), xlabel="drive, GB/s", ylabel="tokens/s")
    axes.legend(**_ABOVE)
    own, (rate, slow) = found.unthrottled, min(rows, key=lambda x: x[0])
    gain = m.this_compute_tokens_per_s / own.tokens_per_s.median - 1  # of the fastest drive
    return (
        f"{own.tokens_per_s.median:.3g} tokens/s unthrottled, one text again and again, "
        f"{_share(own.wait_s / own.token_s)} of the time waiting for reads; {slow.median:.3g} "
        f"behind {format_size(rate)}/s. Modelled as the measured time beside reads, plus read "
        f"bytes over rate: predicted for the drive of {m.name} ({format_size(m.bytes_per_s)}/s) "
        f"{100 * gain:+.0f} %, on this machine's processor."
    )


@_panel("ssd", "What does a read's latency cost?", 3.0)
def _by_latency(r: Report, axes: Any) -> str:
    found = _need(_need(r.ssd).sensitivity)
    rows = found.by_latency
    x = [1e3 * p.latency_s for p in rows]
    axes.plot(x, [p.modelled_tokens_per_s for p in rows], color=SOFT, label="modelled")
    _medians(axes, x, [p.tokens_per_s for p in rows], **_POINTS)
    axes.set(xscale="log", xlabel="milliseconds added to each read", ylabel="tokens/s")
    _ticks(axes.xaxis, [float(f"{v:.2g}") for v in x])
    axes.legend()
    middle, error = rows[len(rows) // 2], found.median_error_of_model or 0.0
    loss = 1 - middle.tokens_per_s.median / found.unthrottled.tokens_per_s.median
    return (
        f"{_ms(middle.latency_s)} ms more on each read cost {_share(loss)} of the speed. The "
        "model counts one latency for each layer with a miss, and more if its reads exceed those "
        f"in flight; it is off by {_share(error)} at the median of both series."
    )


# Locality


@_panel("locality", "How many experts must be resident?")
def _policies(r: Report, axes: Any) -> str:
    found = _need(r.locality).caches
    series: dict[str, list[float]] = {}
    for c in found.by_policy:
        name = f"{c.policy} (optimum)" if c.policy == BEST else c.policy
        series.setdefault(name, []).append(100 * c.hit_rate)
    x = _percent(found.shares)
    _lines(axes, x, series, "resident experts, %", "hit rate, %", loc="lower right")
    axes.set_ylim(0, 100)
    share = _quarter(found.by_policy).share
    at = {c.policy: _share(c.hit_rate) for c in found.by_policy if c.share == share}
    others = ", ".join(f"{p} {v}" for p, v in at.items() if p not in (found.policy, BEST))
    return (
        f"With {_share(share)} resident {found.policy} hits {at[found.policy]}"
        + (f" ({others})" if others else "")
        + f"; no policy could exceed {at[BEST]} (Belady's optimum). Replayed from "
        f"{_need(r.locality).tokens} recorded tokens, prompts one after another."
    )


@_panel("locality", "Which misses could a better cache save?")
def _misses(r: Report, axes: Any) -> str:
    found = _need(r.locality).caches
    rows = [c for c in found.by_policy if c.policy == found.policy]
    names = [f"{100 * c.share:g}" for c in rows]
    uses = [(c.hits + c.compulsory + c.capacity) / 100 for c in rows]
    first = [c.compulsory / n for c, n in zip(rows, uses, strict=True)]
    again = [c.capacity / n for c, n in zip(rows, uses, strict=True)]
    axes.bar(names, first, color=SERIES[1], label="compulsory: first uses")
    axes.bar(names, again, bottom=first, color=SERIES[2], label="capacity: evicted before")
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="resident experts, %", ylabel="misses, % of uses")
    axes.legend()
    row = _quarter(rows)
    return (
        f"With {_share(row.share)} resident, "
        f"{_share(row.compulsory / max(1, row.compulsory + row.capacity))} of all misses are first "
        "uses, which no cache saves (longer runs have relatively fewer); evictions cause the rest."
    )


@_panel("locality", "Are all layers alike?")
def _layers(r: Report, axes: Any) -> str:
    rows = _need(r.locality).caches.by_layer
    layers = range(len(rows[0].hit_rates))
    series = {f"{row.share:.1%}": _percent(row.hit_rates) for row in rows[: len(SERIES)]}
    _lines(axes, layers, series, "expert layer", "hit rate, %", title="resident", ncols=5, **_ABOVE)
    for line in axes.lines if len(layers) >= 20 else ():
        line.set_marker("")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(0, 100)
    row = _quarter(rows)
    low, high = (f(layers, key=row.hit_rates.__getitem__) for f in (min, max))
    return (
        f"With {_share(row.share)} resident, hits go from {_share(row.hit_rates[low])} in expert "
        f"layer {low} to {_share(row.hit_rates[high])} in layer {high}."
    )


@_panel("locality", "Does the hit rate depend on task and prompt?")
def _alone(r: Report, axes: Any) -> str:
    found, prompts = _need(r.locality), r.method.prompts
    rows = found.caches.by_prompt_alone
    tasks = list(dict.fromkeys(p.task for p in prompts))
    last = len(SERIES) - 1
    for i, task in enumerate(tasks[: last + 1]):
        mine = [x for x in rows if min(last, tasks.index(prompts[x.prompt].task)) == i]
        axes.plot(
            _percent(x.share for x in mine), _percent(x.hit_rate for x in mine), _MARKERS[i],
            color=SERIES[i], alpha=0.7, markersize=3.5,
            label=task + (" and others" if i == last and tasks[last + 1 :] else ""),
        )  # fmt: skip
    axes.set(ylim=(0, 100), xlabel="resident experts, %", ylabel="hit rate of one prompt, %")
    axes.legend(ncols=2, loc="lower right")
    share = _quarter(rows).share
    order = sorted((x for x in rows if x.share == share), key=lambda x: x.hit_rate)
    low, high = order[0], order[-1]
    return (
        f"Each prompt by itself from an empty cache, {_share(share)} resident: from "
        f"{_share(low.hit_rate)} ({prompts[low.prompt].name}) to {_share(high.hit_rate)} "
        f"({prompts[high.prompt].name}); standard deviation over prompts "
        f"{100 * found.by_kind.deviation:.1f} points."
    )


@_panel("locality", "How soon is an expert used again?")
def _reuse(r: Report, axes: Any) -> str:
    found = _need(r.locality).reuse
    axes.plot(_percent(found.shares), _percent(found.uses), color=SERIES[0])
    axes.axhline(100 * (1 - found.first_uses), color=SOFT, linestyle=":", label="all but first")
    axes.set(ylim=(0, 100), ylabel="uses, %")
    axes.set_xlabel("other experts used in between, % of the layer's")
    axes.legend(loc="lower right")
    quarter = found.uses[found.shares.index(0.25)]
    return (
        f"{_share(quarter)} of a token's expert uses come before a quarter of the layer's other "
        f"experts were used; {_share(found.first_uses)} are first uses."
    )


@_panel("locality", "Do neighbouring tokens share experts?")
def _tokens(r: Report, axes: Any) -> str:
    rows = _need(r.locality).token_overlap
    if not rows:
        return "Too few tokens were generated to tell."
    x = [o.lag for o in rows]
    axes.plot(x, _percent(o.shared for o in rows), "o-", color=SERIES[0], label="measured")
    axes.plot(x, _percent(o.by_chance for o in rows), ":", color=SOFT, label="by chance")
    axes.set_xscale("log", base=2)
    _ticks(axes.xaxis, x)
    axes.set(ylim=(0, None), xlabel="tokens apart", ylabel="experts in common, %")
    axes.legend()
    return (
        f"A token shares {_share(rows[0].shared)} of its experts with the one before and "
        f"{_share(rows[-1].shared)} with the one {x[-1]} before; by chance it would be "
        f"{_share(rows[0].by_chance)}."
    )


@_panel("locality", "Do requests share experts?", 3.6)
def _requests(r: Report, axes: Any) -> str:
    matrix, prompts = _need(r.locality).request_overlap, r.method.prompts
    square, count = pyplot().Rectangle, len(prompts)
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            colour = (SERIES[0], round(max(0.0, value), 2))
            axes.add_patch(square((j, i), 1, 1, facecolor=colour))
    axes.set(xlim=(0, count), ylim=(count, 0), aspect="equal")
    ticks = [i + 0.5 for i in range(count)]
    axes.set_yticks(ticks, [p.name for p in prompts], fontsize=7)
    axes.set_xticks(ticks, range(1, count + 1), fontsize=7)
    axes.grid(visible=False)
    means = []
    for same, kind in ((True, "one task"), (False, "different tasks")):
        values = [
            matrix[i][j]
            for i, j in itertools.combinations(range(count), 2)
            if (prompts[i].task == prompts[j].task) == same
        ]
        if values:
            means.append(f"{statistics.fmean(values):.2f} between requests of {kind}")
    if not means:
        return "One request alone has nothing to be compared with."
    return (
        f"Cosine of how often each expert is used: {', '.join(means)} (1: the same experts equally "
        "often; columns are in the order of rows)."
    )


# Power and heat


def _missing(r: Report, heat: bool) -> str:
    missing = _need(r.power).missing
    kinds = {k: v for k, v in missing.items() if k == "NVML" or heat == (k == "temperature")}
    return "; ".join(f"{name}: {why}" for name, why in kinds.items())


@_panel("power", "How much power does it take?")
def _watts(r: Report, axes: Any) -> str:
    found = _need(r.power)
    if found.joules_per_token is None:
        why = _missing(r, heat=False)
        return f"Not measured, and not guessed: no energy counter can be read here ({why})."
    for i, (watts, label) in enumerate(
        ((found.watts_at_rest, "at rest"), (found.watts, "decoding"))
    ):
        places = [j + 0.4 * i for j in range(len(found.sources))]
        values = [watts.get(name, 0.0) for name in found.sources]
        axes.barh(places, values, 0.38, color=SERIES[i], label=label)
    axes.set_yticks([j + 0.2 for j in range(len(found.sources))], found.sources)
    axes.set_xlabel("watts")
    axes.legend(ncols=2, **_ABOVE)
    total, rest = (sum(counted(watts).values()) for watts in (found.watts, found.watts_at_rest))
    return (
        f"{found.joules_per_token:.3g} J a token, prompts' energy included; {total:.3g} W while "
        f"decoding, {rest:.3g} W at rest, of {', '.join(sorted(counted(found.watts)))} and nothing "
        "else of the machine."
    )


@_panel("power", "How hot does it get?")
def _heat(r: Report, axes: Any) -> str:
    found, windows = _need(r.power), _need(r.speed.sustained).windows
    if not found.celsius_after:
        why = _missing(r, heat=True)
        return f"Not measured, and not guessed: no temperature can be read here ({why})."
    for i, name in enumerate(list(windows[0].celsius)[: len(SERIES)]):
        degrees = [w.celsius.get(name) for w in windows]
        axes.plot([w.at_s for w in windows], degrees, color=SERIES[i], label=name)
        axes.legend()
    axes.set(xlabel="seconds", ylabel="°C")
    before, after = found.celsius_before, found.celsius_after
    parts = [f"{k} {before[k]:.0f} to {v:.0f} °C" for k, v in after.items() if k in before]
    parts = parts or [f"{k} {v:.0f} °C at the end" for k, v in after.items()]
    throttled = f"clocks were held down in {found.throttled_windows} windows"
    if not found.tells_throttling:
        throttled = "nothing here tells whether clocks were held down"
    return f"{', '.join(parts)} over the sustained run; {throttled}."


# Quality


def _judged(r: Report, key: str) -> tuple[list[str], list[float]]:
    """Names and figures of streamed, then of the lossy what-ifs."""
    found = _need(r.quality)
    rows = [_need(found.streamed), *found.lossy]
    names = ["streamed", *(f"{x.name}*" for x in found.lossy)]
    return names, [getattr(x, key) for x in rows]


@_panel("quality", "Is streaming exact, and what do shortcuts change?")
def _kl(r: Report, axes: Any) -> str:
    found = _need(r.quality)
    if found.streamed is None:
        return found.not_measured
    _bars(axes, *_judged(r, "kl_nats"), 2)
    axes.set_xscale("symlog", linthresh=1e-3)
    _plain(axes.xaxis)
    axes.set_xlabel("nats of KL divergence from stock, a token")
    text = f"Streamed logits of {found.streamed.tokens} tokens, whole and one by one, are "
    if found.streamed.identical:
        text += "the same bits as stock."
    elif found.exactness is None:  # an older report
        text += f"off by {found.streamed.largest_difference:.3g} at most."
    else:
        text = _exact(found.exactness)
    if not found.lossy:
        return f"{text} No lossy what-if fits this model."
    least, most = (f(found.lossy, key=lambda x: x.kl_nats) for f in (min, max))
    return (
        f"{text} Lossy what-ifs (*), which the package does not offer, move the predictions by "
        f"{least.kl_nats:.2g} ({least.name}) to {most.kl_nats:.2g} nats ({most.name})."
    )


def _exact(seen: Exactness) -> str:
    apart, bound = seen.prompts_difference, seen.prompts_bound
    decoded = "the same bits as stock" if seen.decoded_identical else "NOT the same as stock"
    text = (
        f"Decoded one by one, streamed logits of {seen.decoded_tokens} tokens are {decoded}. Those "
        f"of whole prompts differ by at most {100 * apart:.2g} % of the largest logit: "
    )
    if apart <= bound:
        text += f"this device sums in another order there (allowed: {100 * bound:.2g} %)."
    else:
        text += (
            f"MORE than the {100 * bound:.2g} % that another order of sums explains, unless a "
            "router that wavered between two experts took the other."
        )
    return text if seen.decoded_identical and apart <= bound else f"{text} See doctor --selftest."


@_panel("quality", "How well is text predicted?")
def _perplexity(r: Report, axes: Any) -> str:
    found = _need(r.quality)
    if found.stock is None or found.streamed is None:
        return f"{found.streamed_perplexity:.4g} streamed; stock was not measured."
    stock = found.stock.perplexity
    _bars(axes, *_judged(r, "perplexity"), 0)
    axes.axvline(stock, color=TEXT, linestyle=":")
    axes.set_xlabel("perplexity (dotted: stock)")
    text = f"{found.streamed.perplexity:.4g} streamed, {stock:.4g} stock, on the prompts."
    changes = [f" {x.name}*: {100 * (x.perplexity / stock - 1):+.1f} %." for x in found.lossy]
    return text + "".join(changes)


@_panel("quality", "Are answers still right?")
def _score(r: Report, axes: Any) -> str:
    found = _need(r.quality)
    count = found.task_items
    wide = (found.task_score * count + 2) / (count + 4)  # Agresti and Coull: all right is not ± 0
    error = (wide * (1 - wide) / (count + 4)) ** 0.5
    text = (
        f"Of {count} two-way choices {_share(found.task_score)} right, streamed (standard error "
        f"{_share(error)}: only large losses show)."
    )
    if found.stock is None:
        return text
    names, scores = _judged(r, "task_score")
    _bars(axes, names, [100 * x for x in scores], 1)
    axes.axvline(50, color=SOFT, linestyle=":")
    axes.set(xlim=(0, 100), xlabel="right answers, % (dotted: by chance)")
    return f"{text} Stock: {_share(found.stock.task_score)}."

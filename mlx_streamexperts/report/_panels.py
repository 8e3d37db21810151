"""The panels of a report's page: each is a question, the part of the report that answers it, and a
figure of that part. The answering sentences are in data/report-answers.html.

One function a panel: it draws a part onto matplotlib axes, or nothing if there is nothing to show.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar

from .._analysis.measure import DriveRate
from .._analysis.plots import pyplot
from .._analysis.replay import BEST
from . import _report as report
from ._report import Quality, Repeats, Report

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
T = TypeVar("T")


@dataclass(frozen=True)
class Panel:
    key: str  # in the page's links, and the name of the sentence's macro
    path: str  # of the part in the report: "speed.by_prompt" and so on
    question: str
    draw: Callable[[Any, Any, Report], None]  # axes, the part, and the whole
    height: float  # inches

    @property
    def section(self) -> str:
        return self.path.partition(".")[0]

    def part(self, whole: Report) -> Any:
        """The part that it shows; None if the run ended before."""
        return reduce(lambda x, name: x and getattr(x, name), self.path.split("."), whole)


PANELS: list[Panel] = []


def _panel(path: str, question: str, height: float = 2.7) -> Callable[[Any], None]:
    return lambda f: PANELS.append(Panel(f.__name__[1:], path, question, f, height))


def quarter(rows: Sequence[T]) -> T:
    """The row whose resident share is nearest to a quarter."""
    return min(rows, key=lambda r: abs(r.share - 0.25))  # type: ignore[attr-defined]


def alike(whole: Report) -> dict[str, float]:
    """Mean cosine of the expert use of two requests, by whether they are of one task."""
    assert whole.locality is not None
    prompts, cosines = whole.method.prompts, dict[str, list[float]]()
    for i, j in itertools.combinations(range(len(prompts)), 2):
        kind = "one task" if prompts[i].task == prompts[j].task else "different tasks"
        cosines.setdefault(kind, []).append(whole.locality.request_overlap[i][j])
    return {kind: statistics.fmean(found) for kind, found in sorted(cosines.items(), reverse=True)}


def _percent(values: Iterable[float]) -> list[float]:
    return [100 * x for x in values]


def _errors(rows: Sequence[Repeats]) -> list[list[float]]:
    return [[r.median - r.low for r in rows], [r.high - r.median for r in rows]]


def _medians(
    axes: Any, x: Sequence[float], rows: Sequence[Repeats], number: int = 0, **style: Any
) -> None:
    """Medians of repeats, with a bar from the lowest to the highest; the axis starts at 0."""
    style |= {"marker": _MARKERS[number], "color": SERIES[number], "capsize": 2}
    axes.errorbar(x, [r.median for r in rows], _errors(rows), **style)
    axes.set_ylim(0)
    _ticks(axes.xaxis, x)


def _lines(axes: Any, x: Sequence[float], series: Mapping[str, Sequence[float]]) -> None:
    """One line with markers for each entry of `series`."""
    for i, (label, y) in enumerate(series.items()):
        axes.plot(x, y, marker=_MARKERS[i], color=SERIES[i], label=label)


def _bars(axes: Any, names: Sequence[str], values: Sequence[float], number: int, **k: Any) -> None:
    """Horizontal bars, the first at the top."""
    axes.barh(names, values, color=SERIES[number], **{"height": 0.6, **k})
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks at the measured values, written out."""
    axis.set_ticks(values, [f"{v:g}" for v in values])
    axis.set_ticks([], minor=True)


def _scale(axes: Any, axis: str, scale: str, **how: Any) -> None:
    """A scale with plain numbers: formulas are off because of names, so no powers of ten."""
    getattr(axes, f"set_{axis}scale")(scale, **how)
    getattr(axes, f"{axis}axis").set_major_formatter(lambda value, _: f"{value:g}")
    getattr(axes, f"{axis}axis").set_minor_formatter(lambda value, _: "")


@_panel("speed.by_prompt", "How fast, and how much does it vary by prompt?", 3.2)
def _by_prompt(axes: Any, found: list[report.PromptSpeed], _: Report) -> None:
    rows = sorted(found, key=lambda p: -p.tokens_per_s.median)
    rates = [p.tokens_per_s for p in rows]
    style = {"xerr": _errors(rates), "ecolor": TEXT, "capsize": 2, "height": 0.7}
    _bars(axes, [p.name for p in rows], [x.median for x in rates], 0, **style)
    axes.set_xlabel("tokens/s: median, lowest, highest")


@_panel("speed.sustained", "Does it stay that fast?")
def _sustained(axes: Any, run: report.Sustained, _: Report) -> None:
    middle = run.tokens_per_s.median
    axes.plot([w.at_s for w in run.windows], [w.tokens_per_s for w in run.windows], color=SERIES[0])
    axes.axhline(middle, color=SOFT, linewidth=0.8, label="median")
    axes.axhline(0.8 * middle, color=SERIES[2], linestyle=":", label="80 %: below is a dip")
    axes.set(ylim=(0, None), xlabel="seconds", ylabel=f"tokens/s in {run.window_s:g} s")


@_panel("speed.by_prompt_length", "How long until the first token?")
def _first_token(axes: Any, rows: list[report.LengthSpeed], _: Report) -> None:
    axes.set(xscale="log", xlabel="tokens of the prompt", ylabel="seconds to the first token")
    _medians(axes, [p.prompt_tokens for p in rows], [p.seconds for p in rows])


@_panel("speed.by_prompt_length", "Does a longer context cost speed?")
def _context(axes: Any, rows: list[report.LengthSpeed], _: Report) -> None:
    axes.set(xscale="log", xlabel="tokens of context", ylabel="tokens/s")
    _medians(axes, [p.prompt_tokens for p in rows], [p.tokens_per_s for p in rows], 1)


@_panel("speed.by_batch", "What do several sequences at once reach?")
def _batch(axes: Any, rows: list[report.BatchSpeed], _: Report) -> None:
    axes.set(xlabel="sequences at once", ylabel="tokens/s of all together")
    _medians(axes, [b.batch for b in rows], [b.tokens_per_s for b in rows], 2)


def _by_size(
    axes: Any, rows: list[DriveRate], label: str, value: Callable[[DriveRate], float]
) -> None:
    sizes = sorted({x.read_bytes / 1024 for x in rows})
    depths = sorted({x.depth for x in rows})
    _lines(
        axes, sizes, {f"{n} in flight": [value(x) for x in rows if x.depth == n] for n in depths}
    )
    axes.set(xlabel="KiB of one read", ylabel=label)
    axes.set_xscale("log", base=2)
    apart = (n for a, n in itertools.pairwise([0, *sizes]) if n > 1.5 * a)  # no two on one spot
    _ticks(axes.xaxis, [round(n) for n in apart])
    axes.tick_params("x", rotation=45)


@_panel("ssd.rates", "What does the drive give?")
def _bandwidth(axes: Any, rows: list[DriveRate], _: Report) -> None:
    _by_size(axes, rows, "GB/s", lambda x: x.rate / 1e9)
    axes.set_ylim(0)


@_panel("ssd.rates", "How long does a read take?")
def _latency(axes: Any, rows: list[DriveRate], _: Report) -> None:
    _by_size(axes, rows, "median milliseconds", lambda x: 1e3 * x.latency)
    _scale(axes, "y", "log")


@_panel("ssd.in_generation", "What reads does generation make?")
def _reads(axes: Any, found: report.Reads, _: Report) -> None:
    if rows := found.percentiles:
        series = {"read": [1e3 * p.latency_s for p in rows]}
        series["queued before"] = [1e3 * p.queued_s for p in rows]
        _lines(axes, [p.percentile for p in rows], series)
        axes.set(xlabel="percentile", ylabel="milliseconds")
        _scale(axes, "y", "symlog", linthresh=0.01)


@_panel("ssd.sensitivity", "What would a slower or faster drive give?", 3.0)
def _by_rate(axes: Any, found: report.Sensitivity, _: Report) -> None:
    x = [p.bytes_per_s / 1e9 for p in found.curve]
    axes.plot(x, [p.tokens_per_s for p in found.curve], color=SOFT, label="modelled")
    x = [(p.bytes_per_s or 0.0) / 1e9 for p in found.by_rate]
    _medians(axes, x, [p.tokens_per_s for p in found.by_rate], **_POINTS)
    label = "named machines (predicted)"
    for i, m in enumerate(sorted(found.machines, key=lambda m: m.bytes_per_s)):
        place = m.bytes_per_s / 1e9, m.this_compute_tokens_per_s
        axes.plot(*place, "D", color=SERIES[2], label="" if i else label)
        y, side = ((-6, "top"), (6, "bottom"))[i % 2]  # neighbours are close
        name = m.name.rsplit(" ", 2)[0]  # without its memory
        style = {"rotation": 90, "fontsize": 6.5, "ha": "center", "va": side}
        axes.annotate(name, place, xytext=(0, y), textcoords="offset points", **style)
    _scale(axes, "x", "log")
    axes.set(ylim=(0, 1.35 * axes.get_ylim()[1]), xlabel="drive, GB/s", ylabel="tokens/s")


@_panel("ssd.sensitivity", "What does a read's latency cost?", 3.0)
def _by_latency(axes: Any, found: report.Sensitivity, _: Report) -> None:
    rows = found.by_latency
    x = [float(f"{1e3 * p.latency_s:.2g}") for p in rows]
    axes.plot(x, [p.modelled_tokens_per_s for p in rows], color=SOFT, label="modelled")
    axes.set(xscale="log", xlabel="milliseconds added to each read", ylabel="tokens/s")
    _medians(axes, x, [p.tokens_per_s for p in rows], **_POINTS)


@_panel("locality.caches", "How many experts must be resident?")
def _policies(axes: Any, found: report.Caches, _: Report) -> None:
    series: dict[str, list[float]] = {}
    for c in found.by_policy:
        name = f"{c.policy} (optimum)" if c.policy == BEST else c.policy
        series.setdefault(name, []).append(100 * c.hit_rate)
    _lines(axes, _percent(found.shares), series)
    axes.set(ylim=(0, 100), xlabel="resident experts, %", ylabel="hit rate, %")


@_panel("locality.caches", "Which misses could a better cache save?")
def _misses(axes: Any, found: report.Caches, _: Report) -> None:
    rows = [c for c in found.by_policy if c.policy == found.policy]
    names = [f"{100 * c.share:g}" for c in rows]
    uses = [(c.hits + c.compulsory + c.capacity) / 100 for c in rows]
    first = [c.compulsory / n for c, n in zip(rows, uses, strict=True)]
    again = [c.capacity / n for c, n in zip(rows, uses, strict=True)]
    axes.bar(names, first, color=SERIES[1], label="compulsory: first uses")
    axes.bar(names, again, bottom=first, color=SERIES[2], label="capacity: evicted before")
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="resident experts, %", ylabel="misses, % of uses")


@_panel("locality.caches.by_layer", "Are all layers alike?")
def _layers(axes: Any, rows: list[report.LayerRow], _: Report) -> None:
    layers = range(len(rows[0].hit_rates))
    series = {f"{row.share:.1%} resident": _percent(row.hit_rates) for row in rows[: len(SERIES)]}
    _lines(axes, layers, series)
    for line in axes.lines if len(layers) >= 20 else ():
        line.set_marker("")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(ylim=(0, 100), xlabel="expert layer", ylabel="hit rate, %")


@_panel("locality.caches.by_prompt_alone", "Does the hit rate depend on task and prompt?")
def _alone(axes: Any, rows: list[report.PromptRow], whole: Report) -> None:
    prompts, last = whole.method.prompts, len(SERIES) - 1
    tasks = list(dict.fromkeys(p.task for p in prompts))
    for i, task in enumerate(tasks[: last + 1]):
        mine = [x for x in rows if min(last, tasks.index(prompts[x.prompt].task)) == i]
        x, y = _percent(x.share for x in mine), _percent(x.hit_rate for x in mine)
        label = task + (" and others" if i == last and tasks[last + 1 :] else "")
        style = {"color": SERIES[i], "alpha": 0.7, "markersize": 3.5}
        axes.plot(x, y, _MARKERS[i], label=label, **style)
    axes.set(ylim=(0, 100), xlabel="resident experts, %", ylabel="hit rate of one prompt, %")


@_panel("locality.reuse", "How soon is an expert used again?")
def _reuse(axes: Any, found: report.Reuse, _: Report) -> None:
    axes.plot(_percent(found.shares), _percent(found.uses), color=SERIES[0])
    axes.axhline(100 * (1 - found.first_uses), color=SOFT, linestyle=":", label="all but first")
    axes.set(ylim=(0, 100), ylabel="uses, %")
    axes.set_xlabel("other experts used in between, % of the layer's")


@_panel("locality.token_overlap", "Do neighbouring tokens share experts?")
def _tokens(axes: Any, rows: list[report.Overlap], _: Report) -> None:
    if rows:
        x = [o.lag for o in rows]
        axes.plot(x, _percent(o.shared for o in rows), "o-", color=SERIES[0], label="measured")
        axes.plot(x, _percent(o.by_chance for o in rows), ":", color=SOFT, label="by chance")
        axes.set_xscale("log", base=2)
        _ticks(axes.xaxis, x)
        axes.set(ylim=(0, None), xlabel="tokens apart", ylabel="experts in common, %")


@_panel("locality.request_overlap", "Do requests share experts?", 3.6)
def _requests(axes: Any, matrix: list[list[float]], whole: Report) -> None:
    square, count = pyplot().Rectangle, len(matrix)
    for i, j in itertools.product(range(count), repeat=2):
        colour = (SERIES[0], round(max(0.0, matrix[i][j]), 2))
        axes.add_patch(square((j, i), 1, 1, facecolor=colour))
    axes.set(xlim=(0, count), ylim=(count, 0), aspect="equal")
    ticks = [i + 0.5 for i in range(count)]
    axes.set_yticks(ticks, [p.name for p in whole.method.prompts], fontsize=7)
    axes.set_xticks(ticks, range(1, count + 1), fontsize=7)
    axes.grid(visible=False)


@_panel("power", "How much power does it take?")
def _watts(axes: Any, found: report.Power, _: Report) -> None:
    names, both = found.sources, {"at rest": found.watts_at_rest, "decoding": found.watts}
    for i, (label, watts) in enumerate(both.items() if names else ()):
        places, values = [j + 0.4 * i for j in range(len(names))], [watts.get(n, 0) for n in names]
        axes.barh(places, values, 0.38, color=SERIES[i], label=label)
    axes.set_yticks([j + 0.2 for j in range(len(names))], names)
    axes.set_xlabel("watts")


@_panel("power", "How hot does it get?")
def _heat(axes: Any, _: report.Power, whole: Report) -> None:
    windows = whole.speed.sustained.windows if whole.speed.sustained else []
    for i, name in enumerate([k for w in windows[:1] for k in w.celsius][: len(SERIES)]):
        degrees = [w.celsius.get(name) for w in windows]
        axes.plot([w.at_s for w in windows], degrees, color=SERIES[i], label=name)
        axes.set(xlabel="seconds", ylabel="°C")


def _judged(axes: Any, found: Quality, key: str, number: int, label: str, scale: int = 1) -> bool:
    """Draw streamed and the lossy what-ifs, if they were compared with stock."""
    if found.streamed is None:
        return False
    values = [scale * getattr(x, key) for x in (found.streamed, *found.lossy)]
    _bars(axes, ["streamed", *(f"{x.name}*" for x in found.lossy)], values, number)
    axes.set_xlabel(label)
    return True


@_panel("quality", "Is streaming exact, and what do shortcuts change?")
def _kl(axes: Any, found: Quality, _: Report) -> None:
    if _judged(axes, found, "kl_nats", 2, "nats of KL divergence from stock, a token"):
        _scale(axes, "x", "symlog", linthresh=1e-3)


@_panel("quality", "How well is text predicted?")
def _perplexity(axes: Any, found: Quality, _: Report) -> None:
    if _judged(axes, found, "perplexity", 0, "perplexity (dotted: stock)") and found.stock:
        axes.axvline(found.stock.perplexity, color=TEXT, linestyle=":")


@_panel("quality", "Are answers still right?")
def _score(axes: Any, found: Quality, _: Report) -> None:
    if _judged(axes, found, "task_score", 1, "right answers, % (dotted: by chance)", 100):
        axes.axvline(50, color=SOFT, linestyle=":")
        axes.set_xlim(0, 100)

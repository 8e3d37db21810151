"""The figures of a report, drawn from its JSON alone. Needs matplotlib.

Each is one panel, as wide as a phone, so that a page can lay them out in one column or two. Colours
are stand-ins that the page exchanges for its own, light or dark (`page.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .._analysis.plots import pyplot
from .._analysis.replay import BEST
from ._drawing import COLOURS, MARKERS, SERIES, SOFT, STYLE, TEXT, line, plain, whole

__all__ = ["COLOURS", "PANELS", "STYLE", "Panel", "drawable", "figure", "measured"]


@dataclass(frozen=True)
class Panel:
    """A figure of the page.

    Attributes:
        key: names it, and its sentence in `findings.py`.
        section: of the report.
        title: the question that it answers.
        draw: onto axes, from the report.
        height: inches.
    """

    key: str
    section: str
    title: str
    draw: Callable[[dict[str, Any], Any], None]
    height: float = 2.7


def figure(panel: Panel, report: dict[str, Any]) -> Any:
    """A matplotlib figure of one panel, to be closed by the caller."""
    plt = pyplot()
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(4.5, panel.height), layout="constrained")
        panel.draw(report, axes)
    return drawn


def _by_prompt(report: dict[str, Any], axes: Any) -> None:
    rows = sorted(report["speed"]["by_prompt"], key=lambda r: r["tokens_per_s"]["median"])
    middle = [r["tokens_per_s"]["median"] for r in rows]
    spread = [
        [m - r["tokens_per_s"]["low"] for m, r in zip(middle, rows, strict=True)],
        [r["tokens_per_s"]["high"] - m for m, r in zip(middle, rows, strict=True)],
    ]
    names = [f"{r['task']}, {r['language']}" for r in rows]
    axes.barh(names, middle, xerr=spread, color=SERIES[0], ecolor=TEXT, capsize=2, height=0.7)
    axes.set_xlabel("tokens/s: median, lowest, highest")
    axes.grid(axis="y", visible=False)


def _first_token(report: dict[str, Any], axes: Any) -> None:
    _by_length(report, axes, "seconds", 0)
    axes.set(xlabel="tokens of the prompt", ylabel="seconds to the first token")


def _context(report: dict[str, Any], axes: Any) -> None:
    _by_length(report, axes, "tokens_per_s", 1)
    axes.set(xlabel="tokens of context", ylabel="tokens/s")


def _by_length(report: dict[str, Any], axes: Any, key: str, number: int) -> None:
    rows = report["speed"]["by_prompt_length"]
    x = [r["prompt_tokens"] for r in rows]
    line(axes, x, [r[key] for r in rows], number, "")
    axes.set_xscale("log")
    whole(axes.xaxis, x)
    axes.set_ylim(0)


def _batch(report: dict[str, Any], axes: Any) -> None:
    rows = report["speed"]["by_batch"]
    x = [r["batch"] for r in rows]
    line(axes, x, [r["tokens_per_s"] for r in rows], 2, "")
    whole(axes.xaxis, x)
    axes.set(ylim=(0, None), xlabel="sequences at once", ylabel="tokens/s of all together")


def _sustained(report: dict[str, Any], axes: Any) -> None:
    found = report["speed"]["sustained"]
    windows, middle = found["windows"], found["tokens_per_s"]["median"]
    axes.plot([w["at_s"] for w in windows], [w["tokens_per_s"] for w in windows], color=SERIES[0])
    axes.axhline(middle, color=SOFT, linewidth=0.8, label="median")
    axes.axhline(0.8 * middle, color=SERIES[2], linestyle=":", label="80 %: below is a dip")
    axes.set_ylim(0)
    axes.set(xlabel="seconds", ylabel=f"tokens/s in {found['window_s']:g} s")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def _drive(report: dict[str, Any], axes: Any, key: str, scale: float, label: str) -> None:
    rows = report["ssd"]["rates"]
    for i, depth in enumerate(sorted({r["depth"] for r in rows})):
        mine = [r for r in rows if r["depth"] == depth]
        axes.plot(
            [r["read_bytes"] / 1024 for r in mine], [r[key] * scale for r in mine],
            marker=MARKERS[i], color=SERIES[i], label=f"{depth}",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    sizes: list[float] = []
    for size in sorted({round(r["read_bytes"] / 1024) for r in rows}):
        if not sizes or size > 1.5 * sizes[-1]:  # no two on one spot
            sizes.append(size)
    whole(axes.xaxis, sizes)
    axes.tick_params("x", rotation=45)
    axes.set(xlabel="KiB of one read", ylabel=label)
    axes.legend(title="reads in flight", ncols=3)


def _bandwidth(report: dict[str, Any], axes: Any) -> None:
    _drive(report, axes, "rate", 1e-9, "GB/s")
    axes.set_ylim(0)


def _latency(report: dict[str, Any], axes: Any) -> None:
    _drive(report, axes, "latency", 1e3, "median milliseconds")
    axes.set_yscale("log")
    plain(axes.yaxis)


def _reads(report: dict[str, Any], axes: Any) -> None:
    rows = report["ssd"]["in_generation"]["percentiles"]
    x = [r["percentile"] for r in rows]
    for i, (key, name) in enumerate((("latency_s", "read"), ("queued_s", "queued before"))):
        axes.plot(x, [1e3 * r[key] for r in rows], marker=MARKERS[i], color=SERIES[i], label=name)
    axes.set_yscale("symlog", linthresh=0.01)
    plain(axes.yaxis)
    axes.set(xlabel="percentile", ylabel="milliseconds")
    axes.legend()


def _by_rate(report: dict[str, Any], axes: Any) -> None:
    found = report["ssd"]["sensitivity"]
    curve, machines = found["curve"], found["machines"]
    axes.plot(
        [p["bytes_per_s"] / 1e9 for p in curve], [p["tokens_per_s"] for p in curve], color=SOFT,
        label="modelled",
    )  # fmt: skip
    rows = found["by_rate"]
    x = [r["bytes_per_s"] / 1e9 for r in rows]
    line(axes, x, [r["tokens_per_s"] for r in rows], 0, "measured, throttled", "none")
    axes.plot(
        [m["bytes_per_s"] / 1e9 for m in machines],
        [m["this_compute_tokens_per_s"] for m in machines],
        "D", color=SERIES[2], label="drives of named machines (predicted)",
    )  # fmt: skip
    for i, m in enumerate(sorted(machines, key=lambda m: m["bytes_per_s"])):
        above = i % 2  # neighbours are close
        axes.annotate(
            m["name"].rsplit(" ", 2)[0],  # without its memory
            (m["bytes_per_s"] / 1e9, m["this_compute_tokens_per_s"]),
            xytext=(0, 6 if above else -6), textcoords="offset points", rotation=90, fontsize=6.5,
            ha="center", va="bottom" if above else "top",
        )  # fmt: skip
    axes.set_xscale("log")
    plain(axes.xaxis)
    axes.set_ylim(0, 1.35 * axes.get_ylim()[1])
    axes.set(xlabel="drive, GB/s", ylabel="tokens/s")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1))  # above: hides no point


def _by_latency(report: dict[str, Any], axes: Any) -> None:
    rows = report["ssd"]["sensitivity"]["by_latency"]
    x = [1e3 * r["latency_s"] for r in rows]
    axes.plot(x, [r["modelled_tokens_per_s"] for r in rows], color=SOFT, label="modelled")
    line(axes, x, [r["tokens_per_s"] for r in rows], 0, "measured, throttled", "none")
    axes.set_xscale("log")
    axes.set_ylim(0)
    whole(axes.xaxis, [float(f"{v:.2g}") for v in x])
    axes.set(xlabel="milliseconds that each read takes more", ylabel="tokens/s")
    axes.legend()


def _policies(report: dict[str, Any], axes: Any) -> None:
    rows = report["locality"]["caches"]["by_policy"]
    for i, policy in enumerate(dict.fromkeys(r["policy"] for r in rows)):
        mine = [r for r in rows if r["policy"] == policy]
        name = f"{policy} (optimum)" if policy == BEST else policy
        axes.plot(
            [100 * r["share"] for r in mine], [100 * r["hit_rate"] for r in mine],
            marker=MARKERS[i], color=SERIES[i], label=name,
        )  # fmt: skip
    axes.set_ylim(0, 100)
    axes.set(xlabel="resident experts, %", ylabel="hit rate, %")
    axes.legend(loc="lower right")


def _layers(report: dict[str, Any], axes: Any) -> None:
    for i, row in enumerate(report["locality"]["caches"]["by_layer"][: len(SERIES)]):
        rates = [100 * x for x in row["hit_rates"]]
        axes.plot(
            range(len(rates)), rates, marker=MARKERS[i] if len(rates) < 20 else None,
            color=SERIES[i], label=f"{row['share']:.1%}",
        )  # fmt: skip
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylim(0, 100)
    axes.set(xlabel="expert layer", ylabel="hit rate, %")
    axes.legend(title="resident", ncols=5, loc="lower right", bbox_to_anchor=(1, 1))


def _misses(report: dict[str, Any], axes: Any) -> None:
    found = report["locality"]["caches"]
    rows = [r for r in found["by_policy"] if r["policy"] == found["policy"]]
    names = [f"{100 * r['share']:g}" for r in rows]
    needed = [r["hits"] + r["compulsory"] + r["capacity"] for r in rows]
    first = [100 * r["compulsory"] / n for r, n in zip(rows, needed, strict=True)]
    again = [100 * r["capacity"] / n for r, n in zip(rows, needed, strict=True)]
    axes.bar(names, first, color=SERIES[1], label="compulsory: first uses")
    axes.bar(names, again, bottom=first, color=SERIES[2], label="capacity: evicted before")
    axes.grid(axis="x", visible=False)
    axes.set(xlabel="resident experts, %", ylabel="misses, % of uses")
    axes.legend()


def _alone(report: dict[str, Any], axes: Any) -> None:
    prompts = report["method"]["prompts"]
    rows = report["locality"]["caches"]["by_prompt_alone"]
    tasks = list(dict.fromkeys(p["task"] for p in prompts))
    for row in rows:
        at = tasks.index(prompts[row["prompt"]]["task"])
        at = min(at, len(SERIES) - 1)
        axes.plot(
            100 * row["share"], 100 * row["hit_rate"], MARKERS[at], color=SERIES[at], alpha=0.7,
            markersize=3.5,
        )  # fmt: skip
    for i, task in enumerate(tasks[: len(SERIES)]):
        others = " and others" if tasks[len(SERIES) :] and i == len(SERIES) - 1 else ""
        axes.plot([], [], MARKERS[i], color=SERIES[i], label=task + others)
    axes.set_ylim(0, 100)
    axes.set(xlabel="resident experts, %", ylabel="hit rate of one prompt, %")
    axes.legend(ncols=2, loc="lower right")


def _reuse(report: dict[str, Any], axes: Any) -> None:
    found = report["locality"]["reuse"]
    axes.plot([100 * x for x in found["shares"]], [100 * x for x in found["uses"]], color=SERIES[0])
    axes.axhline(100 * (1 - found["first_uses"]), color=SOFT, linestyle=":", label="all but first")
    axes.set(
        ylim=(0, 100), xlabel="other experts used in between, % of the layer's", ylabel="uses, %"
    )
    axes.legend(loc="lower right")


def _tokens(report: dict[str, Any], axes: Any) -> None:
    rows = report["locality"]["token_overlap"]
    x = [r["lag"] for r in rows]
    axes.plot(x, [100 * r["shared"] for r in rows], "o-", color=SERIES[0], label="measured")
    axes.plot(x, [100 * r["by_chance"] for r in rows], ":", color=SOFT, label="by chance")
    axes.set_xscale("log", base=2)
    whole(axes.xaxis, x)
    axes.set(ylim=(0, None), xlabel="tokens apart", ylabel="experts in common, %")
    axes.legend()


def _requests(report: dict[str, Any], axes: Any) -> None:
    matrix = report["locality"]["request_overlap"]
    names = [f"{p['task']}, {p['language']}" for p in report["method"]["prompts"]]
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            axes.add_patch(
                pyplot().Rectangle((j, i), 1, 1, facecolor=(SERIES[0], round(max(0.0, value), 2)))
            )
    count = len(matrix)
    axes.set(xlim=(0, count), ylim=(count, 0), aspect="equal")
    ticks = [i + 0.5 for i in range(count)]
    axes.set_yticks(ticks, names, fontsize=7)
    axes.set_xticks(ticks, range(1, count + 1), fontsize=7)
    axes.grid(visible=False)


def _heat(report: dict[str, Any], axes: Any) -> None:
    windows = report["speed"]["sustained"]["windows"]
    for i, name in enumerate(list(windows[0]["celsius"])[: len(SERIES)]):
        axes.plot(
            [w["at_s"] for w in windows], [w["celsius"].get(name) for w in windows],
            color=SERIES[i], label=name,
        )  # fmt: skip
    axes.set(xlabel="seconds", ylabel="°C")
    axes.legend()


def _watts(report: dict[str, Any], axes: Any) -> None:
    found = report["power"]
    names = found["sources"]
    for i, (key, label) in enumerate((("watts_at_rest", "at rest"), ("watts", "decoding"))):
        places = [j + 0.4 * i for j in range(len(names))]
        axes.barh(
            places, [found[key].get(n, 0.0) for n in names], 0.38, color=SERIES[i], label=label
        )
    axes.set_yticks([j + 0.2 for j in range(len(names))], names)
    axes.set_xlabel("watts")
    axes.legend(ncols=2, loc="lower right", bbox_to_anchor=(1, 1))


def _kl(report: dict[str, Any], axes: Any) -> None:
    rows = _judged(report)
    axes.barh([n for n, _ in rows], [r["kl_nats"] for _, r in rows], color=SERIES[2], height=0.6)
    axes.set_xscale("symlog", linthresh=1e-3)
    plain(axes.xaxis)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("nats of KL divergence from stock, a token")


def _perplexity(report: dict[str, Any], axes: Any) -> None:
    rows = _judged(report)
    axes.barh([n for n, _ in rows], [r["perplexity"] for _, r in rows], color=SERIES[0], height=0.6)
    axes.axvline(report["quality"]["stock"]["perplexity"], color=TEXT, linestyle=":")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("perplexity (dotted: stock)")


def _score(report: dict[str, Any], axes: Any) -> None:
    rows = _judged(report)
    scores = [100 * r["task_score"] for _, r in rows]
    axes.barh([n for n, _ in rows], scores, color=SERIES[1], height=0.6)
    axes.axvline(50, color=SOFT, linestyle=":")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("right answers, % (dotted: by chance)")


def _judged(report: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Streamed, then the lossy what-ifs."""
    found = report["quality"]
    return [("streamed", found["streamed"]), *((f"{r['name']}*", r) for r in found["lossy"])]


PANELS = (
    Panel("by_prompt", "speed", "How fast, and how much does it vary by prompt?", _by_prompt, 3.2),
    Panel("sustained", "speed", "Does it stay that fast?", _sustained),
    Panel("first_token", "speed", "How long until the first token?", _first_token),
    Panel("context", "speed", "Does a longer context cost speed?", _context),
    Panel("batch", "speed", "What do several sequences at once reach?", _batch),
    Panel("bandwidth", "ssd", "What does the drive give?", _bandwidth),
    Panel("latency", "ssd", "How long does a read take?", _latency),
    Panel("reads", "ssd", "What reads does generation make?", _reads),
    Panel("by_rate", "ssd", "What would a slower or faster drive give?", _by_rate, 3.0),
    Panel("by_latency", "ssd", "What does a read's latency cost?", _by_latency, 3.0),
    Panel("policies", "locality", "How many experts must be resident?", _policies),
    Panel("misses", "locality", "Which misses could a better cache save?", _misses),
    Panel("layers", "locality", "Are all layers alike?", _layers),
    Panel("alone", "locality", "Does the hit rate depend on task and prompt?", _alone),
    Panel("reuse", "locality", "How soon is an expert used again?", _reuse),
    Panel("tokens", "locality", "Do neighbouring tokens share experts?", _tokens),
    Panel("requests", "locality", "Do requests share experts?", _requests, 3.6),
    Panel("watts", "power", "How much power does it take?", _watts),
    Panel("heat", "power", "How hot does it get?", _heat),
    Panel("kl", "quality", "Is streaming exact, and what do shortcuts change?", _kl),
    Panel("perplexity", "quality", "How well is text predicted?", _perplexity),
    Panel("score", "quality", "Are answers still right?", _score),
)


_OF = {
    "sustained": "sustained", "first_token": "by_prompt_length",
    "context": "by_prompt_length", "batch": "by_batch", "by_prompt": "by_prompt",
    "bandwidth": "rates", "latency": "rates", "reads": "in_generation", "by_rate": "sensitivity",
    "by_latency": "sensitivity",
}  # fmt: skip
"""What of its section a panel needs, where sections come in parts."""


def measured(panel: Panel, report: dict[str, Any]) -> bool:
    """Is it in the report of a run that ended before its end?"""
    section, part = report.get(panel.section), _OF.get(panel.key)
    return section is not None and (not part or part in section)


def drawable(panel: Panel, report: dict[str, Any]) -> bool:
    """Is there anything to draw? What no machine could tell has a sentence instead."""
    if panel.key == "watts":
        return bool(report["power"]["sources"])
    if panel.key == "heat":
        return bool(report["speed"]["sustained"]["windows"][0]["celsius"])
    if panel.key == "reads":
        return bool(report["ssd"]["in_generation"]["reads"])
    if panel.key == "tokens":
        return bool(report["locality"]["token_overlap"])
    return panel.section != "quality" or report["quality"]["stock"] is not None

"""What a report's figures have in common: colours, style, lines with their spread, plain ticks."""

from __future__ import annotations

from typing import Any

TEXT, SOFT, LINE = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = ("#0a0c01", "#0a0c02", "#0a0c03", "#0a0c04", "#0a0c05", "#0a0c06")
COLOURS = {
    TEXT: "var(--text)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    **{c: f"var(--{name})" for c, name in zip(SERIES, "abcdef", strict=True)},
}
"""Stand-ins, and what a page puts for them."""

MARKERS = "os^DvP"
STYLE = {
    "font.size": 8.5, "axes.titlesize": 9, "legend.fontsize": 7.5, "legend.frameon": False,
    "text.color": TEXT, "axes.labelcolor": SOFT, "axes.edgecolor": SOFT, "xtick.color": SOFT,
    "ytick.color": SOFT, "grid.color": LINE, "axes.spines.top": False, "axes.spines.right": False,
    "lines.markersize": 4, "axes.grid": True, "grid.linewidth": 0.6, "axes.axisbelow": True,
    "svg.fonttype": "none", "text.parse_math": False,
}  # fmt: skip


def line(
    axes: Any, x: list[float], rows: list[dict[str, Any]], number: int, label: str, line: str = "-"
) -> None:
    """Medians of repeats, with a bar from the lowest to the highest."""
    middle = [r["median"] for r in rows]
    spread = [
        [m - r["low"] for m, r in zip(middle, rows, strict=True)],
        [r["high"] - m for m, r in zip(middle, rows, strict=True)],
    ]
    axes.errorbar(
        x,
        middle,
        spread,
        marker=MARKERS[number],
        color=SERIES[number],
        capsize=2,
        label=label,
        linestyle=line,
    )


def whole(axis: Any, values: list[float]) -> None:
    """Ticks at the measured values, written out."""
    axis.set_ticks(values, [f"{v:g}" for v in values])
    axis.set_ticks([], minor=True)


def plain(axis: Any) -> None:
    """Numbers as they are: powers of ten would be set as a formula, which names are not to be."""
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(lambda value, _: "")

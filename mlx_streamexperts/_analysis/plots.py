"""Pictures of simulated caches and of lossy settings. Needs matplotlib: the `plots` extra."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import StreamError
from .replay import BEST
from .simulation import Row

if TYPE_CHECKING:
    from .quality import Price

_STYLES = ("-o", "-s", "-^", "-D", "-v", "-P", "-X")


def plot_rates(rows: Sequence[Row], file: Path) -> None:
    """Draw hit rate by resident share and policy, and by layer under one policy.

    Several traces are drawn as their sum.

    Raises:
        StreamError: matplotlib is missing, or does not know the kind of file.
    """
    plt = pyplot()
    name = rows[-1].trace  # all of them together, if there are several
    rows = [r for r in rows if r.trace == name and r.way == "even"]
    policies = list(dict.fromkeys(r.policy for r in rows))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for policy, style in zip(policies, _STYLES * len(policies), strict=False):
        mine = sorted((r.share, r.hit_rate) for r in rows if r.policy == policy)
        label, color = (f"{policy} (optimum)", "black") if policy == BEST else (policy, None)
        left.plot(
            [100 * s for s, _ in mine], [100 * h for _, h in mine], style, label=label, color=color,
            markersize=4,
        )  # fmt: skip
    first = rows[0]
    seen = first.hits + first.compulsory + first.capacity
    ceiling = 100 * (1 - first.compulsory / seen)
    left.axhline(ceiling, color="grey", linestyle=":", label="all but first uses")
    left.set_xlabel("resident experts, %")
    left.set_ylabel("hit rate, %")
    left.set_title("Hit rate by resident share")
    left.legend()
    left.grid(alpha=0.3)

    shown = next((p for p in ("lrfu", "lru") if p in policies), policies[0])
    for r in sorted((r for r in rows if r.policy == shown), key=lambda r: r.share):
        right.plot([100 * x for x in r.layer_hit_rates], "-o", markersize=4, label=f"{r.share:.1%}")
    right.set_xlabel("expert layer")
    right.set_ylabel("hit rate, %")
    right.set_title(f"By layer ({shown})")
    right.xaxis.get_major_locator().set_params(integer=True)
    right.legend(title="resident", loc="center left", bbox_to_anchor=(1, 0.5))  # hides no line
    right.grid(alpha=0.3)
    save_figure(figure, file)
    plt.close(figure)


def plot_frontier(found: Sequence[Price], file: Path, title: str = "") -> None:
    """Draw the price and the speed of lossy settings, and the frontier between them.

    Raises:
        StreamError: matplotlib is missing, or does not know the kind of file.
    """
    from .quality import frontier  # here: it imports mlx-lm, which takes a second

    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    best = frontier(found)
    axes.plot(*_points(best), "-", color="grey", linewidth=1, label="frontier")
    for x in found:
        change, speed = (values[0] for values in _points([x]))
        axes.errorbar(
            change, speed, xerr=100 * x.decoded.change_error, fmt="o", markersize=5,
            color="tab:blue" if x in best else "lightsteelblue", elinewidth=0.7,
        )  # fmt: skip
        name = f"level {x.setting}" if x.setting.isdigit() else x.setting
        axes.annotate(name, (change, speed), (5, 4), textcoords="offset points", fontsize=8)
    axes.set_xlabel("perplexity, % above exact (bars: standard error)")
    axes.set_ylabel("tokens/s, decoding")
    axes.set_title(title or "What lossy settings cost and bring")
    axes.legend()
    axes.grid(alpha=0.3)
    save_figure(figure, file)
    plt.close(figure)


def _points(found: Sequence[Price]) -> tuple[list[float], list[float]]:
    return (
        [100 * x.decoded.perplexity_change for x in found],
        [x.decoding.tokens_per_s for x in found],
    )


def save_figure(figure: Any, file: Path) -> None:
    """Write a figure, whole or not at all.

    Raises:
        StreamError: matplotlib does not know the kind of file, or it cannot be written.
    """
    partial = file.with_name(f"{file.stem}.partial{file.suffix}")
    try:
        # No date and a fixed salt: the same rows give the same file.
        figure.savefig(partial, dpi=110, metadata={"Date": None} if file.suffix == ".svg" else None)
    except (ValueError, OSError) as e:
        raise StreamError(f"{file}: cannot draw: {e}") from e
    partial.replace(file)


def pyplot() -> Any:
    """matplotlib.pyplot, set to draw into files.

    Raises:
        StreamError: it is missing.
    """
    try:
        import matplotlib
    except ImportError as e:
        raise StreamError("plots need matplotlib: pip install matplotlib") from e
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "mlx-streamexperts"
    import matplotlib.pyplot as plt

    return plt

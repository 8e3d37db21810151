"""How well does a pass that lacks experts predict which ones the exact pass will choose?

    python benchmarks/agreement.py --docs docs

Run-ahead decoding continues past a layer that lacks an expert, to learn what later layers choose.
Here the embedded model goes over its prompts of every topic and the completions recorded with
them, one token at a time. Each token is one batch: its first row is the exact pass, the others lack
the experts that a live cache of some size (LRFU, no prefetching) would not hold at that moment,
with one way each to fill their place. Afterwards every row takes the exact row's keys and values.
The next layers' routers are asked too, as _experts/prefetch.py asks them. Choices are compared for
the layers after the first that lacked an expert, once the caches are full. Nothing is random.

Writes tables between two marks of DOCS/agreement.md, and DOCS/agreement.svg. Needs `plots`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import StreamConfig, demo_model, patch, stream
from mlx_streamexperts._analysis.plots import pyplot, save_figure
from mlx_streamexperts._cache.expert_map import ExpertCache
from mlx_streamexperts._experts.layer import StreamedSwitch, probe

SHARES = (0.125, 0.25, 0.5, 0.75, 0.9)
NOTHING, SCALED, ANY, NEAREST = "nothing", "present rows scaled up", "slot 0", "nearest resident"
FILLINGS = (NOTHING, SCALED, ANY, NEAREST)
ONE, TWO, SAME = "router, 1 ahead", "router, 2 ahead", "router, from the first lacking layer"
PREDICTORS = (*FILLINGS, ONE, TWO, SAME)
# Of an event (a layer behind the first that lacked an expert): experts of the exact pass, named
# ones, and those in both; then the same of those that were not resident.
COUNTS = ("exact", "named", "both", "exact_out", "named_out", "both_out")
MARKS = "<!-- tables begin -->", "<!-- tables end -->"


def texts(folder: Path) -> list[tuple[str, list[int]]]:
    """Topic and tokens of each prompt with its completion."""
    tokenizer = mlx_lm.utils.load_tokenizer(folder)
    samples = json.loads((folder / "eval.json").read_text())["samples"]
    return [(s["topic"], tokenizer.encode(s["prompt"] + s["completion"])) for s in samples]


class Probe(nn.Module):
    """Stands before a layer's experts: notes what each row chooses, and fills missing places.

    Attributes:
        x: [1, D], what the exact row's router saw.
        chosen: int [rows, K].
        cache: as many as there are shares, with the live map's rules.
    """

    def __init__(self, inner: StreamedSwitch, gate: nn.Module, width: int) -> None:
        super().__init__()
        self._inner, self._gate = inner, gate
        experts = inner.layer.experts
        self.caches = [ExpertCache(experts, round(s * experts), "lrfu") for s in SHARES]
        rows = np.array(gate(mx.eye(width)).astype(mx.float32)).T  # [E, D], the router's weights
        rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
        self._alike = rows @ rows.T
        self.x, self.chosen = mx.zeros((1, width)), np.zeros((0, 0), int)

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """x [rows, 1, D], indices [rows, 1, K] -> [rows, 1, K, D]."""
        if probe.layer is not None:
            return self._inner(x, indices)
        scores = mx.take_along_axis(mx.softmax(self._gate(x), axis=-1, precise=True), indices, -1)
        weights = np.array(scores.astype(mx.float32))[:, 0]  # [rows, K]
        self.x, self.chosen = x[0], np.array(indices)[:, 0]
        used, factor = self.chosen.copy(), np.ones(self.chosen.shape, np.float32)
        for row, (share, filling) in enumerate(settings(), 1):
            slot_of = self.caches[share].slot_of
            here = slot_of[self.chosen[row]] >= 0  # [K]
            if filling == NOTHING or here.all() or not (slot_of >= 0).any():
                factor[row] = here
            elif filling == SCALED:
                part = weights[row][here].sum()
                factor[row] = here * (weights[row].sum() / part if part else 0)
            elif filling == ANY:
                used[row][~here] = int(np.argmin(np.where(slot_of >= 0, slot_of, len(slot_of))))
            else:
                alike = np.where(slot_of >= 0, self._alike[self.chosen[row][~here]], -np.inf)
                used[row][~here] = alike.argmax(-1)
        y = self._inner.layer.switch(x, mx.array(used[:, None].astype(np.uint32)))
        return y * mx.array(factor)[:, None, :, None].astype(y.dtype)


def settings() -> Iterator[tuple[int, str]]:
    """Number of the share, and filling, of each row but the first."""
    return ((share, filling) for share in range(len(SHARES)) for filling in FILLINGS)


def load_probed(folder: Path) -> tuple[nn.Module, list[Probe]]:
    """The model with every expert in the slot of its own index, and its probes."""
    config = StreamConfig(
        cache=1 << 60, progress=False, prefetch="on", prefetch_depth=99, run_ahead="off"
    )
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(folder)
    width = model.args.hidden_size
    probes = []
    for decoder in model.layers:
        decoder.mlp.switch_mlp.layer.resident = False  # those are not asked ahead of time
        probe = Probe(decoder.mlp.switch_mlp, decoder.mlp.gate, width)
        decoder.mlp.switch_mlp = probe
        probes.append(probe)
    return model, probes


def predicted(probes: list[Probe]) -> dict[tuple[int, int], set[int]]:
    """What routers name when asked of the exact pass: (asking layer, asked layer) -> experts."""
    layers = [p._inner.layer for p in probes]
    number = {x.name: i for i, x in enumerate(layers)}
    asked = []
    for i, (at, layer) in enumerate(zip(probes, layers, strict=True)):
        prediction = layer.prefetcher and layer.prefetcher.predict(at.x[None])
        for a in prediction.answers if prediction else ():
            asked.append((i, number[a.target.router.layer.name], a.indices))
    mx.eval([indices for *_, indices in asked])
    return {(i, j): set(np.array(indices).ravel().tolist()) for i, j, indices in asked}


def measure(folder: Path, longest: int) -> tuple[list[str], np.ndarray]:
    """Topics, and counts [topics, shares, predictors, depth, COUNTS]; depth 0 is unused."""
    model, probes = load_probed(folder)
    samples = texts(folder)
    topics = list(dict.fromkeys(topic for topic, _ in samples))
    rows = 1 + len(list(settings()))
    counts = np.zeros((len(topics), len(SHARES), len(PREDICTORS), len(probes), len(COUNTS)), int)
    for topic, tokens in samples:
        cache = make_prompt_cache(model)
        for token in tokens[:longest]:
            mx.eval(model.model(mx.full((rows, 1), token), cache=cache))  # no logits
            take_exact(cache)
            count_token(counts[topics.index(topic)], probes)
            for own in probes:
                for live in own.caches:
                    live.place(live.wanted(own.chosen[:1]))
    stream(model).close()
    return topics, counts


def take_exact(cache: list[Any]) -> None:
    """Let every row go on from the exact row's last keys and values."""
    for c in cache:
        at = slice(c.offset - 1, c.offset)
        for array in (c.keys, c.values):  # [rows, heads, tokens, D]
            array[:, :, at] = mx.broadcast_to(array[:1, :, at], array[:, :, at].shape)


def count_token(counts: np.ndarray, probes: list[Probe]) -> None:
    """Add one token to a topic's counts [shares, predictors, depth, COUNTS]."""
    exact = [set(p.chosen[0].tolist()) for p in probes]
    routers = predicted(probes)
    for share in range(len(SHARES)):
        inside = [set(p.caches[share].resident) for p in probes]
        full = all(len(r) == p.caches[share].slots for r, p in zip(inside, probes, strict=True))
        lacking = [i for i, e in enumerate(exact) if e - inside[i]]
        if not full or not lacking:
            continue
        first = lacking[0]
        for i in range(first + 1, len(probes)):
            named = [
                set(probes[i].chosen[1 + share * len(FILLINGS) + f].tolist())
                for f in range(len(FILLINGS))
            ]
            named += [routers.get((j, i), set()) for j in (i - 1, i - 2, first)]
            for predictor, names in enumerate(named):
                if not names:  # nobody two layers before
                    continue
                both, out = names & exact[i], inside[i]
                counts[share, predictor, i - first] += (
                    len(exact[i]), len(names), len(both),
                    len(exact[i] - out), len(names - out), len(both - out),
                )  # fmt: skip


def rate(counts: np.ndarray, part: str, whole: str) -> np.ndarray:
    """Shares of summed counts [..., COUNTS], in percent; NaN of nothing."""
    of = counts[..., COUNTS.index(whole)]
    return 100 * counts[..., COUNTS.index(part)] / np.where(of, of, np.nan)


def mean_and_error(each: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the topics, its standard error, and how many there are: of [topics, ...]."""
    seen = np.isfinite(each).sum(axis=0)
    return np.nanmean(each, axis=0), np.nanstd(each, axis=0, ddof=1) / seen**0.5, seen


def recall_out(counts: np.ndarray) -> np.ndarray:
    """Of the experts that had to be read, those that were named."""
    return rate(counts, "both_out", "exact_out")


def precision_out(counts: np.ndarray) -> np.ndarray:
    """Of the experts named that were not resident, those that were wanted."""
    return rate(counts, "both_out", "named_out")


def agreement(counts: np.ndarray) -> np.ndarray:
    """Of all experts: recall and precision are one number, since both passes choose as many."""
    return rate(counts, "both", "exact")


def tables(topics: list[str], counts: np.ndarray) -> str:
    """The Markdown tables."""
    pooled = counts.sum(axis=(0, 3))  # [shares, predictors, COUNTS]
    by_topic = counts.sum(axis=3)  # [topics, shares, predictors, COUNTS]
    head = "| " + " | ".join(f"{s:.3g}%" for s in 100 * np.array(SHARES)) + " |"
    line = "|---" * (len(SHARES) + 1) + "|"
    out = []
    for title, measured in (
        ("All experts: named and chosen, in % (recall and precision are the same)", agreement),
        ("Not resident: of the chosen ones, % that were named (recall)", recall_out),
        ("Not resident: of the named ones, % that were chosen (precision)", precision_out),
    ):
        out += [f"**{title}**, with the least and the greatest topic", ""]
        out += [f"| resident {head}", line]
        for p, name in enumerate(PREDICTORS):
            cells = []
            for s in range(len(SHARES)):
                each = measured(by_topic[:, s, p])
                cells.append(
                    f"{measured(pooled[s, p]):.1f} ({np.nanmin(each):.0f} to {np.nanmax(each):.0f})"
                )
            out.append(f"| {_label(name)} | " + " | ".join(cells) + " |")
        out.append("")
    out += [
        "**Fillings against *nothing***: differences in points, mean over the topics ± its "
        "standard error, and on how many of them better", "",
        f"| not resident, resident {head}", line,
    ]  # fmt: skip
    for title, measured in (("recall", recall_out), ("precision", precision_out)):
        for f, name in enumerate(FILLINGS[1:], 1):
            cells = []
            for s in range(len(SHARES)):
                d = measured(by_topic[:, s, f]) - measured(by_topic[:, s, 0])
                mean, error, topics_seen = mean_and_error(d)
                cells.append(f"{mean:+.2f} ± {error:.2f} ({(d > 0).sum()} of {topics_seen})")
            out.append(f"| {title}, {name} | " + " | ".join(cells) + " |")
    out += [
        "", "**By depth** (layers behind the first that lacked an expert), recall and precision of "
        "what was not resident, in %", "",
    ]  # fmt: skip
    depths = range(1, counts.shape[3])
    out += ["| resident | predictor | " + " | ".join(map(str, depths)) + " |"]
    out += ["|---" * (len(depths) + 2) + "|"]
    deep = counts.sum(axis=0)  # [shares, predictors, depth, COUNTS]
    for s, share in enumerate(SHARES):
        for name in (NOTHING, SCALED, ONE, TWO, SAME):
            c = deep[s, PREDICTORS.index(name)]
            cells = [
                f"{recall_out(c[d]):.0f}, {precision_out(c[d]):.0f}" if c[d].any() else ""
                for d in depths
            ]
            out.append(f"| {100 * share:.3g}% | {_label(name)} | " + " | ".join(cells) + " |")
    events = counts[:, :, 0, :, 0].sum(axis=(0, 2)) // 8
    at = [f"{n:,} at {100 * s:.3g} %" for n, s in zip(events, SHARES, strict=True)]
    out += ["", f"Layers compared: {', '.join(at)}."]
    return "\n".join(out)


def _label(name: str) -> str:
    return f"pass, {name}" if name in FILLINGS else name


def draw(counts: np.ndarray, file: Path) -> None:
    """By depth, by share, and the fillings' differences with the topics' spread."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(14, 5), layout="constrained")
    below: dict[str, Any] = {  # hides no line
        "loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "fontsize": 8, "frameon": False,
    }  # fmt: skip
    deep, pooled, by_topic = counts.sum(axis=0), counts.sum(axis=(0, 3)), counts.sum(axis=3)
    depths = np.arange(1, counts.shape[3])
    colours = [plt.get_cmap("viridis")(i) for i in np.linspace(0, 0.85, len(SHARES))]
    for s, colour in enumerate(colours):
        for name, style in ((NOTHING, "-o"), (SAME, ":")):
            c = deep[s, PREDICTORS.index(name), 1:]
            seen = c[:, 0] > 0
            axes[0].plot(
                depths[seen], agreement(c)[seen], style, color=colour, markersize=4,
                label=f"{SHARES[s]:.1%} resident" if name == NOTHING else None,
            )  # fmt: skip
    axes[0].plot([], [], ":", color="grey", label="router asked at the first")
    axes[0].set_title("All experts, pass without filling")
    axes[0].set_xlabel("layers behind the first that lacked an expert")
    axes[0].set_ylabel("named and chosen, %")
    axes[0].legend(**below, ncols=3)
    shares = 100 * np.array(SHARES)
    shown = ((NOTHING, "C0"), (ONE, "C1"), (TWO, "C2"), (SAME, "C3"))
    for name, colour in shown:
        c = pooled[:, PREDICTORS.index(name)]
        axes[1].plot(shares, recall_out(c), "-o", color=colour, markersize=4, label=_label(name))
        axes[1].plot(shares, precision_out(c), "--s", color=colour, markersize=4)
    axes[1].plot([], [], "--s", color="grey", markersize=4, label="dashed: precision")
    axes[1].set_title("Not resident: recall and precision")
    axes[1].set_xlabel("resident experts, %")
    axes[1].set_ylabel("%")
    axes[1].legend(**below, ncols=2)
    for f, name in enumerate(FILLINGS[1:], 1):
        for measured, style in ((recall_out, "-o"), (precision_out, "--s")):
            d = measured(by_topic[:, :, f]) - measured(by_topic[:, :, 0])  # [topics, shares]
            mean, error, _ = mean_and_error(d)
            axes[2].errorbar(
                shares + 0.7 * (f - 2), mean, error,
                fmt=style, color=f"C{f + 3}", markersize=4, capsize=2,
                label=name if measured is recall_out else None,
            )  # fmt: skip
    axes[2].axhline(0, color="grey", linewidth=0.8)
    axes[2].set_title("Fillings against nothing (not resident)")
    axes[2].set_xlabel("resident experts, %")
    axes[2].set_ylabel("points; bars: standard error over topics")
    axes[2].plot([], [], "--s", color="grey", markersize=4, label="dashed: precision")
    axes[2].legend(**below, ncols=2)
    for a in axes:
        a.grid(alpha=0.3)
    save_figure(figure, file)
    plt.close(figure)


def put_between_marks(file: Path, content: str) -> None:
    """Exchange what is between the marks of a page; a page that is not there gets them."""
    page = file.read_text() if file.exists() else "\n".join(MARKS) + "\n"
    before, rest = page.split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    file.write_text(f"{before}{MARKS[0]}\n\n{content}\n\n{MARKS[1]}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--docs", type=Path, required=True, help="folder of the page and picture")
    parser.add_argument(
        "--longest", type=int, default=56, help="tokens of a text at most (default: 56)"
    )
    args: Any = parser.parse_args()
    topics, counts = measure(demo_model(), args.longest)
    put_between_marks(args.docs / "agreement.md", tables(topics, counts))
    draw(counts, args.docs / "agreement.svg")


if __name__ == "__main__":
    main()

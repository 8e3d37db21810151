"""What leaving experts out costs and brings: the embedded model, by topic, share and drive.

    python benchmarks/lossy.py --share 0.125 --out docs/lossy.json     # and 0.25, 0.5
    python benchmarks/lossy.py --tables docs/lossy.json --docs docs

Texts are the model's own, one of each topic, sampled at temperature 0.8. Each runs from an empty
expert cache: its topic's beginning as a prompt, then token after token. An expert of the embedded
model is 90 times smaller than one of Qwen3.5-397B, so a played drive is that much slower than its
name: a miss takes as long as a miss of that model on such a drive. `--timed` measures tokens/s
behind played drives, which needs a machine that does nothing else. Without, the tables have
predictions: the bytes measured over the drive's rate, and a token's time with everything resident.
`--tables` rewrites the tables between the marks of docs/lossy.md, and its picture.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.sample_utils import make_sampler

from mlx_streamexperts import StreamConfig, demo_model, load, stream
from mlx_streamexperts._analysis.plots import pyplot, save_figure
from mlx_streamexperts._analysis.quality import prices
from mlx_streamexperts._analysis.throttle import slowed

SETTINGS = (
    "skip=0.03", "skip=0.05", "skip=0.08", "skip=0.1", "prefer=0.03", "prefer=0.06", "prefer=0.12",
    "top=7", "top=6",
)  # fmt: skip
DRIVES = {"2 GB/s": 2e9, "7 GB/s": 7e9, "14 GB/s": 14e9}
EXPERT_BYTES = 6.75e6  # of Qwen3.5-397B in 4 bits
LATENCY = 80e-6
RESIDENT_SECONDS = 1 / 58.5  # of a token with everything resident (benchmarks/README.md)
PROMPT, TIMED_TOPICS, TIMED_TOKENS = 24, 2, 16


def texts(model: nn.Module, tokenizer: Any, tokens: int) -> dict[str, list[int]]:
    """A text of each topic: the beginning of its prompt, and what the exact model makes of it."""
    found = {}
    mx.random.seed(0)
    for p in json.loads((demo_model() / "prompts.json").read_text()):
        begin = tokenizer.encode(p["prompt"])[:PROMPT]
        sampler = make_sampler(0.8, 0.95)
        replies = mlx_lm.stream_generate(
            model, tokenizer, begin, max_tokens=tokens + PROMPT - len(begin), sampler=sampler
        )
        found[p["topic"]] = [*begin, *(r.token for r in replies)]
    return found


def measure(share: float, tokens: int, timed: bool) -> dict[str, Any]:
    """Prices by topic with a share of the experts resident, and speeds by drive if `timed`."""
    config = StreamConfig(progress=False, lossy="prefer=0.1", bypass_page_cache="off")
    model, tokenizer = load(str(demo_model()), cache=1 << 40, config=config)[:2]
    with stream(model) as s:
        assert s.lossy is not None
        with s.lossy.using(None):
            found = texts(model, tokenizer, tokens)
        s.resize(int(share * sum(n.experts * n.expert_bytes for n in s.needs())))
        topics = {}
        for topic, text in found.items():
            topics[topic] = [p.as_dict() for p in prices(model, [text], SETTINGS, PROMPT)]
            print(topic, file=sys.stderr, flush=True)
        data: dict[str, Any] = {"expert_bytes": s.layers[0].expert_bytes, "topics": topics}
        some = [t[: PROMPT + TIMED_TOKENS] for t in list(found.values())[:TIMED_TOPICS]]
        scale = s.layers[0].expert_bytes / EXPERT_BYTES
        for name, rate in DRIVES.items() if timed else ():
            with slowed(rate * scale, LATENCY):
                drive = [p.as_dict() for p in prices(model, some, SETTINGS, PROMPT)]
            data.setdefault("drives", {})[name] = drive
            print(name, file=sys.stderr, flush=True)
    return data


def speed(found: dict[str, Any], i: int, drive: str) -> float:
    """Tokens/s of decoding with a setting, measured if the drives were, else predicted."""
    if "drives" in found:
        return float(found["drives"][drive][i]["decoding"]["tokens_per_s"])
    rate = DRIVES[drive] * found["expert_bytes"] / EXPERT_BYTES
    return 1 / (RESIDENT_SECONDS + summed(found["topics"], i)["bytes"] / rate)


def summed(topics: dict[str, list[dict[str, Any]]], i: int) -> dict[str, float]:
    """A setting's figures over all topics, whose texts are equally long."""
    rows = [t[i] for t in topics.values()]

    def mean(*path: str) -> float:
        total = 0.0
        for row in rows:
            value: Any = row
            for name in path:
                value = value[name]
            total += value
        return total / len(rows)

    logs = [math.log1p(r["decoded"]["perplexity_change"]) for r in rows]
    errors = [r["decoded"]["change_error"] for r in rows]
    return {
        "change": math.expm1(sum(logs) / len(logs)),
        "error": math.sqrt(sum(e * e for e in errors)) / len(errors),
        "lowest": math.expm1(min(logs)),
        "highest": math.expm1(max(logs)),
        "kl": mean("decoded", "kl_nats"),
        "same": mean("decoded", "same_first"),
        "bytes": mean("decoding", "bytes_per_token"),
        "left_out": mean("share_left_out"),
        "mass": mean("mass_left_out"),
        "prompt_kl": mean("prompts", "kl_nats"),
        "prompt_bytes": mean("prefill", "bytes_per_token"),
    }


def tables(data: dict[str, Any]) -> str:
    """Markdown of all figures."""
    lines = []
    for share, found in data.items():
        how = "measured" if "drives" in found else "predicted"
        lines += [
            f"**{float(share):.1%} resident, decoding** (tokens/s {how})",
            "",
            "| setting | perplexity (topics) | KL, nats | same first | left out | mass | read | "
            + " | ".join(f"tokens/s, {d}" for d in DRIVES) + " |",
            "|---" * (7 + len(DRIVES)) + "|",
        ]  # fmt: skip
        exact = summed(found["topics"], 0)
        for i, name in enumerate(("exact", *SETTINGS)):
            x, speeds = summed(found["topics"], i), []
            for d in DRIVES:
                rate, base = speed(found, i, d), speed(found, 0, d)
                speeds.append(f"{rate:.1f}" + (f" ({rate / base:.2f}x)" if i else ""))
            price = (
                f"{x['change']:+.1%} ± {x['error']:.1%} ({x['lowest']:+.1%} to {x['highest']:+.1%})"
            )
            cells = (
                f"`{name}`" if i else "exact", price if i else "", f"{x['kl']:.4f}",
                f"{x['same']:.0%}", f"{x['left_out']:.0%}", f"{x['mass']:.1%}",
                f"{x['bytes'] / exact['bytes']:.0%}" if i else f"{x['bytes'] / 1e6:.2f} MB a token",
                *speeds,
            )  # fmt: skip
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        f"**Prompts of {PROMPT} tokens**: KL in nats, and bytes read of the exact run's",
        "",
        "| setting | " + " | ".join(f"{float(s):.1%} resident" for s in data) + " |",
        "|---" * (1 + len(data)) + "|",
    ]
    for i, name in enumerate(SETTINGS, 1):
        cells = []
        for found in data.values():
            x, exact = summed(found["topics"], i), summed(found["topics"], 0)
            cells.append(f"{x['prompt_kl']:.4f}, {x['prompt_bytes'] / exact['prompt_bytes']:.0%}")
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(data: dict[str, Any], file: Path) -> None:
    """Price and speed of each setting at the middle drive, a panel for each share."""
    plt = pyplot()
    figure, panels = plt.subplots(1, len(data), figsize=(5 * len(data), 4.2), layout="constrained")
    for axes, (share, found) in zip(
        [panels] if len(data) == 1 else panels, data.items(), strict=True
    ):
        names = ["exact", *SETTINGS]
        base = speed(found, 0, "7 GB/s")
        for way, mark in (("exact", "k*"), ("skip", "o"), ("prefer", "s"), ("top", "^")):
            mine = [i for i, name in enumerate(names) if name.startswith(way)]
            x = [100 * summed(found["topics"], i)["change"] for i in mine]
            y = [speed(found, i, "7 GB/s") / base for i in mine]
            axes.plot(x, y, mark + ("" if way == "exact" else "-"), label=way, markersize=5)
            for i, *at in zip(mine, x, y, strict=True):
                name = names[i].partition("=")[2]
                axes.annotate(name, at, (4, 4), textcoords="offset points", fontsize=7)
        axes.axvline(1, color="grey", linestyle=":")
        axes.axhline(1.5, color="grey", linestyle=":")
        axes.set_title(f"{float(share):.1%} resident")
        axes.set_xlabel("perplexity, % above exact")
        axes.set_ylabel("tokens/s, of exact (drive of 7 GB/s)")
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, file)


def main() -> int:
    """Measure one share into a file, or write tables and picture from it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float)
    parser.add_argument("--tokens", type=int, default=48, help="decoded, of each topic")
    parser.add_argument("--timed", action="store_true", help="measure tokens/s: see above")
    parser.add_argument("--out", type=Path, default=Path("lossy.json"))
    parser.add_argument("--tables", type=Path)
    parser.add_argument("--docs", type=Path)
    args = parser.parse_args()
    if args.share is not None:
        data = json.loads(args.out.read_text()) if args.out.exists() else {}
        data[str(args.share)] = measure(args.share, args.tokens, args.timed)
        args.out.write_text(json.dumps(dict(sorted(data.items())), indent=1) + "\n")
    if args.tables is not None:
        data = json.loads(args.tables.read_text())
        text = tables(data)
        print(text)
        if args.docs is not None:
            page = args.docs / "lossy.md"
            begin, end = "<!-- figures -->\n", "<!-- end of figures -->"
            marked = re.escape(begin) + ".*" + re.escape(end)
            new = re.sub(
                marked, lambda _: f"{begin}\n{text}\n\n{end}", page.read_text(), flags=re.S
            )
            page.write_text(new)
            draw(data, args.docs / "lossy.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())

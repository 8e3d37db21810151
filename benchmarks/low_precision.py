"""Would 2- or 3-bit stand-ins for missing experts pay? A simulation on the embedded model.

    python benchmarks/low_precision.py --bound                          # every expert in few bits
    python benchmarks/low_precision.py --share 0.125 --out low.json     # and 0.25, 0.5
    python benchmarks/low_precision.py --tables low.json

The package has no such way; this shows why. All experts are in memory here, each in 4 bits and in
few. An `ExpertCache` of the live kind says which ones would be resident, and by that each layer
chooses, token by token, what an expert is computed from. So logits, KL divergence and perplexity
are real, and bytes are counted: those that a drive would have to deliver, without prefetches. A
2-bit copy has 2.5 bits a weight where the full one has 4.5 (groups of 64, 16-bit scales and
biases). Tokens/s are predicted as in lossy.py, with the same texts.

A setting is the package's own `skip=SHARE`, or where stand-ins come from, with some of these:

    bits=N      of a stand-in: 2 or 3; 4 is the full expert, to see what a rule brings by itself
    limit=X     a missing expert with less than this share of its token's router mass is computed
                from its stand-in; 1: every missing one
    skip=X      one with less than this share is left out
    room=X      share of the cache's bytes that is taken from slots, for stand-ins alone

`kept`: stand-ins are read from the drive in place of the full experts, into slots of the full size
or into `room`. A later use above the limit reads what is lacking: the lower bits, or from `room`
the full expert. `once`: they are read too, and forgotten after their use, so that the slots keep
stronger experts. `memory`: an expert that leaves its slot leaves its stand-in behind in `room`,
made on the host, and nothing is read for it while it is there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from lossy import DRIVES, EXPERT_BYTES, PROMPT, RESIDENT_SECONDS, texts
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import demo_model
from mlx_streamexperts._analysis.quality import difference
from mlx_streamexperts._cache.expert_map import ExpertCache

FULL, GROUP, OVERHEAD = 4, 64, 0.5  # bits of a code; codes of a group; bits of its scale and bias
BITS = (3, 2)
EXACT = "exact"
SETTINGS = (
    *(f"skip={x}" for x in (0.03, 0.04, 0.05, 0.08)),
    *(f"once bits=3,limit={x}" for x in (0.125, 1)),
    *(f"once bits=2,limit={x}" for x in (0.08, 0.1, 1)),
    "once bits=4,limit=0.125",
    *(f"kept bits={b},limit={x}" for b, x in ((3, 0.125), (3, 1), (2, 0.08), (2, 0.1), (2, 1))),
    *(f"kept bits={b},limit=1,room=0.5" for b in (3, 2)),
    *(f"memory bits={b},limit={x},room=0.25" for b, x in ((3, 0.125), (3, 1), (2, 0.1), (2, 1))),
    *(f"once bits=3,limit=0.125,skip={x}" for x in (0.04, 0.05)),
    "once bits=2,limit=0.08,skip=0.04",
)  # fmt: skip


# -- stand-ins: few-bit codes, written as 4-bit ones so that one table holds all ------------------


def unpack(packed: np.ndarray) -> np.ndarray:
    """4-bit codes uint32 [..., N / 8] -> uint8 [..., N]."""
    nibbles = packed[..., None] >> np.arange(0, 32, FULL, dtype=np.uint32)
    return (nibbles & 15).astype(np.uint8).reshape(*packed.shape[:-1], -1)


def pack(codes: np.ndarray) -> np.ndarray:
    """The inverse of `unpack`."""
    nibbles = codes.reshape(*codes.shape[:-1], -1, 8).astype(np.uint32)
    return (nibbles << np.arange(0, 32, FULL, dtype=np.uint32)).sum(-1, dtype=np.uint32)


Table = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Codes uint8 [experts, rows, groups, 64], scales and biases float32 [experts, rows, groups, 1]."""


def value(table: Table) -> np.ndarray:
    """Weights of a table."""
    codes, scales, biases = table
    return codes * scales + biases


def requantized(full: Table, bits: int) -> Table:
    """As `mx.quantize` makes them of the 4-bit weights."""
    weights = value(full)
    flat = mx.array(weights.reshape(*weights.shape[:2], -1))
    few = mx.quantize(flat, GROUP, bits)
    scales, biases = (np.array(a)[..., None] for a in few[1:])
    back = np.array(mx.dequantize(*few, GROUP, bits)).reshape(weights.shape)
    codes = np.rint((back - biases) / np.where(scales, scales, 1))
    return codes.astype(np.uint8), scales, biases


def truncated(full: Table, bits: int) -> Table:
    """The upper bits of the 4-bit codes: a full expert then needs only the others besides."""
    codes, scales, biases = full
    lost = FULL - bits
    return codes >> lost << lost, scales, biases + scales * ((1 << lost) - 1) / 2


def fitted(full: Table, bits: int, rounds: int = 12) -> Table:
    """Least squares: codes and grid take turns."""
    weights = value(full)
    codes, scales, biases = requantized(full, bits)
    for _ in range(rounds):
        c = codes.astype(np.float32)
        mean_c, mean_w = c.mean(-1, keepdims=True), weights.mean(-1, keepdims=True)
        spread = ((c - mean_c) ** 2).mean(-1, keepdims=True)
        both = ((c - mean_c) * (weights - mean_w)).mean(-1, keepdims=True)
        scales = both / np.where(spread, spread, 1)
        biases = mean_w - scales * mean_c
        nearest = np.rint((weights - biases) / np.where(scales, scales, 1))
        codes = np.clip(nearest, 0, (1 << bits) - 1).astype(np.uint8)
    return codes, scales, biases


MAKERS: dict[str, Callable[[Table, int], Table]] = {
    "mx.quantize": requantized,
    "upper bits": truncated,
    "least squares": fitted,
}


def widen(switch: nn.Module, make: Callable[[Table, int], Table]) -> float:
    """Put stand-ins behind a module's experts: 3 bits from `experts` on, 2 bits from twice that.

    Returns:
        The 2-bit weights' error, of the weights' own size.
    """
    errors = []
    for name in ("gate_proj", "up_proj", "down_proj"):
        linear = switch[name]
        codes = unpack(np.array(linear["weight"]))
        scales, biases = (np.array(linear[k])[..., None] for k in ("scales", "biases"))
        full = codes.reshape(*scales.shape[:-1], GROUP), scales, biases
        tables = [full, *(make(full, bits) for bits in BITS)]
        linear["weight"] = mx.array(
            pack(np.concatenate([t[0] for t in tables]).reshape(-1, *codes.shape[1:]))
        )
        for i, key in ((1, "scales"), (2, "biases")):
            linear[key] = mx.array(np.concatenate([t[i] for t in tables])[..., 0])
        mx.eval(linear.parameters())
        w = value(full)
        errors.append(float(((value(tables[-1]) - w) ** 2).mean() / (w**2).mean()))
    return math.sqrt(sum(errors) / len(errors))


# -- what a layer does with a call -----------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One way to run; see the module's docstring."""

    kind: str = EXACT
    bits: int = 2
    limit: float = 0.0
    skip: float = 0.0
    room: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Setting:
        """A setting of the module's docstring."""
        kind, _, options = text.rpartition(" ")
        if text == EXACT:
            return cls()
        values: dict[str, Any] = {}
        for part in options.split(","):
            name, _, number = part.partition("=")
            values[name] = int(number) if name == "bits" else float(number)
        return cls(kind, **values)


class Layer:
    """One layer's residence, and the choice of what each expert is computed from.

    Args:
        experts: of the layer.
        slots: that the whole budget would give to full experts.
        setting: how it runs.

    Attributes:
        read: full experts' bytes read since the last `clear`, 1 for an expert of 4 bits.
        counts: experts chosen, computed from stand-ins, left out; router mass of these two.
    """

    def __init__(self, experts: int, slots: int, setting: Setting) -> None:
        self.setting, self.experts = setting, experts
        self.size = (setting.bits + OVERHEAD) / (FULL + OVERHEAD)
        self.rest = 1 - self.size  # the lower bits; the upper ones are there
        room = setting.room * slots
        self.full = ExpertCache(experts, max(1, round(slots - room)), "lrfu")
        self.low = ExpertCache(experts, round(room / self.size), "lrfu") if room else None
        self.coarse = np.zeros(experts, bool)  # the slot of the full size holds a stand-in
        self.read, self.counts = 0.0, np.zeros(5)

    def prompt(self, experts: np.ndarray) -> None:
        """Run a call of several tokens exactly, int [T, K]."""
        needed = self.full.wanted(experts)
        uses = np.bincount(experts.ravel(), minlength=self.experts)
        waves = [(needed, [])]
        if len(needed) > self.full.slots:
            waves = self.full.waves(sorted(needed), uses)
        for wave, keep in waves:
            self._place(wave, keep)

    def decode(self, experts: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Choose for one token.

        Args:
            experts: int [K].
            weights: float32 [K], the router's.

        Returns:
            Rows of the widened tables, int [K], and new weights, float32 [K].
        """
        setting, share = self.setting, weights / weights.sum()
        slot_of = self.full.slot_of
        whole = (slot_of[experts] >= 0) & ~self.coarse[experts]
        out = ~whole & (share < setting.skip) & (share < share.max())
        if self.low is not None:
            out &= self.low.slot_of[experts] < 0
        few = ~whole & ~out & (share < setting.limit)
        if setting.kind == "memory":
            assert self.low is not None
            few &= self.low.slot_of[experts] >= 0
            self.low.place(experts[few].tolist())
            self._place(experts[~few & ~out].tolist())
        elif setting.kind == "once":
            self.read += self.size * few.sum()
            self._place(experts[~few & ~out].tolist())
        elif self.low is not None:
            chosen = experts[few].tolist()
            for begin in range(0, len(chosen), self.low.slots):
                self.read += self.size * len(self.low.place(chosen[begin : begin + self.low.slots]))
            self._place(experts[~few & ~out].tolist())
        else:
            # A stand-in that is used above the limit is read in full, into the slot that it has.
            upgrades = experts[~few & ~out & ~whole & (slot_of[experts] >= 0)]
            absent = experts[few & (slot_of[experts] < 0)]
            self.read += len(upgrades) * self.rest + (self.size - 1) * len(absent)
            self.coarse[upgrades] = False
            self._place(experts[~out].tolist())
            self.coarse[absent] = True
        self.counts += (len(experts), few.sum(), out.sum(), share[few].sum(), share[out].sum())
        behind = 0 if setting.bits == FULL else self.experts * (1 + BITS.index(setting.bits))
        rows = experts + np.where(few, behind, 0)
        kept = np.where(out, 0, weights)
        return np.where(out, experts[share.argmax()], rows), kept * weights.sum() / kept.sum()

    def _place(self, needed: Sequence[int], keep: Sequence[int] = ()) -> None:
        """Read what is missing; the stand-ins of those that leave stay, if they have room."""
        for begin in range(0, len(needed), self.full.slots):  # fewer slots than top-k: waves
            part = needed[begin : begin + self.full.slots]
            before = np.flatnonzero(self.full.slot_of >= 0)
            missed = self.full.place(part, keep)
            self.read += len(missed)
            self.coarse[missed] = False
            if self.setting.kind == "memory" and self.low is not None:
                for expert in missed:
                    if self.low.slot_of[expert] >= 0:
                        self.low.drop(expert)
                for expert in before[self.full.slot_of[before] < 0].tolist():
                    self.low.place([expert])


class Block(nn.Module):
    """mlx-lm's Qwen3 MoE block with the choice in its middle."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gate, self.switch_mlp, self.top_k = block.gate, block.switch_mlp, block.top_k
        self.layer: list[Layer] = []  # a list: no module of the tree
        self.rows = 0  # added to every expert's number

    def __call__(self, x: mx.array) -> mx.array:
        """x [B, T, D] -> the same shape."""
        gates = mx.softmax(self.gate(x), axis=-1, precise=True)
        chosen = mx.argpartition(gates, kth=-self.top_k, axis=-1)[..., -self.top_k :]
        weights = mx.take_along_axis(gates, chosen, axis=-1)
        weights = weights / weights.sum(-1, keepdims=True)  # [B, T, K]
        if self.layer:
            mx.eval(chosen, weights)
            experts = np.array(chosen).astype(int).reshape(-1, self.top_k)
            if len(experts) > 1:
                self.layer[0].prompt(experts)
            else:
                rows, new = self.layer[0].decode(experts[0], np.array(weights).ravel())
                chosen = mx.array(rows.astype(np.uint32)).reshape(chosen.shape)
                weights = mx.array(new.astype(np.float32)).reshape(weights.shape)
        y = self.switch_mlp(x, chosen + self.rows)
        return (y * weights[..., None]).sum(-2)


# -- measurements ----------------------------------------------------------------------------------


def widened(make: Callable[[Table, int], Table]) -> tuple[nn.Module, Any, list[Block], float]:
    """The embedded model with stand-ins; its tokenizer, its blocks, the 2-bit weights' error."""
    model, tokenizer = mlx_lm.load(str(demo_model()))[:2]
    blocks, errors = [], []
    for layer in model.layers:
        errors.append(widen(layer.mlp.switch_mlp, make))
        layer.mlp = Block(layer.mlp)
        blocks.append(layer.mlp)
    return model, tokenizer, blocks, sum(errors) / len(errors)


def run(
    model: nn.Module, blocks: Sequence[Block], text: Sequence[int], new: Callable[[], Layer] | None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Logits [T, V] of what is decoded after a prompt, and counts, from an empty cache."""
    for block in blocks:
        block.layer = [new()] if new else []
    cache, rows = make_prompt_cache(model), []
    model(mx.array([text[:PROMPT]]), cache=cache)
    mx.eval([c.state for c in cache])
    layers = [block.layer[0] for block in blocks if block.layer]
    for layer in layers:
        layer.read = 0.0
    for token in text[PROMPT:]:
        rows.append(np.array(model(mx.array([[token]]), cache=cache)[0].astype(mx.float32)))
    counts = sum((x.counts for x in layers), np.zeros(5))
    return np.concatenate(rows), {"read": sum(x.read for x in layers), "counts": counts.tolist()}


def priced(
    model: nn.Module, blocks: Sequence[Block], found: dict[str, list[int]],
    settings: Sequence[str], share: float,
) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """Each setting's price, over all texts."""
    experts = len(blocks[0].switch_mlp.up_proj["scales"]) // (1 + len(BITS))
    exact = [run(model, blocks, text, None)[0] for text in found.values()]
    after = [text[PROMPT + 1 :] for text in found.values()]
    for name in settings:
        setting = Setting.parse(name)

        def new(setting: Setting = setting) -> Layer:
            return Layer(experts, round(share * experts), setting)

        ran = [run(model, blocks, text, new) for text in found.values()]
        tokens = sum(len(text) - PROMPT for text in found.values())
        counts = np.sum([x["counts"] for _, x in ran], axis=0)
        each = [difference([a], [b], [c]) for a, (b, _), c in zip(exact, ran, after, strict=True)]
        whole = difference(exact, [x for x, _ in ran], after)
        yield (
            name,
            {
                "kl": whole.kl_nats,
                "change": whole.perplexity_change,
                "error": whole.change_error,
                "same": whole.same_first,
                "topics_kl": [d.kl_nats for d in each],
                "read": sum(x["read"] for _, x in ran) / tokens,
                "low": counts[1] / counts[0],
                "left_out": counts[2] / counts[0],
                "low_mass": counts[3] / (tokens * len(blocks)),
                "mass": counts[4] / (tokens * len(blocks)),
            },
        )


def bound(tokens: int) -> None:
    """Print what a model whose experts are all stand-ins costs, for each way to make them."""
    print("| made by | bits | error of weights | KL, nats | perplexity | same first |")
    print("|---|---|---|---|---|---|")
    for name, make in MAKERS.items():
        model, tokenizer, blocks, error = widened(make)
        found = texts(model, tokenizer, tokens)
        experts = len(blocks[0].switch_mlp.up_proj["scales"]) // (1 + len(BITS))
        exact = [run(model, blocks, text, None)[0] for text in found.values()]
        for i, bits in enumerate(BITS, 1):
            for block in blocks:
                block.rows = i * experts
            few = [run(model, blocks, text, None)[0] for text in found.values()]
            d = difference(exact, few, [text[PROMPT + 1 :] for text in found.values()])
            print(
                f"| {name} | {bits} | {f'{error:.0%}' if bits == 2 else ''} | {d.kl_nats:.4f} "
                f"| {d.perplexity_change:+.1%} ± {d.change_error:.1%} | {d.same_first:.0%} |",
                flush=True,
            )


def speed(read: float, drive: str) -> float:
    """Tokens/s predicted: `read` full experts a token from a drive, and the rest of a token."""
    return 1 / (RESIDENT_SECONDS + read * EXPERT_BYTES / DRIVES[drive])


def tables(data: dict[str, Any]) -> str:
    """Markdown of the settings that all shares have: price and reads, and speeds by drive."""
    heads = [f"{float(share):.1%} resident | times the tokens/s" for share in data]
    lines = ["| setting | " + " | ".join(heads) + " |", "|---" * (1 + 2 * len(data)) + "|"]
    common = [name for name in (EXACT, *SETTINGS) if all(name in x for x in data.values())]
    for name in common:
        cells = [f"`{name}`" if name != EXACT else EXACT]
        for found in data.values():
            base, x = found[EXACT]["read"], found[name]
            if name == EXACT:
                cells += [f"{base:.1f} experts a token"]
                cells += [" / ".join(f"{speed(base, d):.1f}" for d in DRIVES) + " tokens/s"]
            else:
                cells += [f"{x['kl']:.4f}, {x['read'] / base:.0%}"]
                cells += [" / ".join(f"{speed(x['read'], d) / speed(base, d):.2f}" for d in DRIVES)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    """Measure the bound or one share, or print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bound", action="store_true", help="every expert in few bits")
    parser.add_argument("--share", type=float, help="of the experts that are resident")
    parser.add_argument("--tokens", type=int, default=48, help="decoded, of each topic")
    parser.add_argument("--made-by", choices=MAKERS, default="upper bits")
    parser.add_argument("--settings", nargs="+", default=SETTINGS)
    parser.add_argument("--out", type=Path, default=Path("low.json"))
    parser.add_argument("--tables", type=Path)
    args = parser.parse_args()
    if args.bound:
        bound(args.tokens)
    if args.share is not None:
        data = json.loads(args.out.read_text()) if args.out.exists() else {}
        model, tokenizer, blocks, _ = widened(MAKERS[args.made_by])
        found = texts(model, tokenizer, args.tokens)
        mine = data.setdefault(str(args.share), {})
        for name, x in priced(model, blocks, found, (EXACT, *args.settings), args.share):
            mine[name] = x
            args.out.write_text(json.dumps(data, indent=1) + "\n")
            print(name, f"{x['kl']:.4f} {x['read']:.1f}", file=sys.stderr, flush=True)
    if args.tables is not None:
        print(tables(json.loads(args.tables.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())

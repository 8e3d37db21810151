"""Replacement policies judged on recorded routing of the embedded model.

    python benchmarks/policies.py TRACES --docs docs

Records the embedded model's routing into the folder TRACES, where it is not there yet (7 minutes on
two cores): each topic for itself, topics in turn, chats that keep their context, and long prompts;
each once to fit what can be fitted, and once, with other prompts and seeds, to judge. Then replays
the latter under every policy and writes a page of tables and a picture into the folder DOCS.
Text is sampled (temperature 0.8, top-p 0.95) with fixed seeds; the replay has no chance in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler

from mlx_streamexperts import StreamConfig, demo_model, load, stream
from mlx_streamexperts._analysis.plots import plot_rates
from mlx_streamexperts._analysis.replay import BEST
from mlx_streamexperts._analysis.simulation import (
    CANDIDATES,
    Report,
    Row,
    simulate,
    with_expert_bytes,
)
from mlx_streamexperts._cache.expert_map import ExpertCache
from mlx_streamexperts._cache.policies import LRFU
from mlx_streamexperts._experts.trace import Routing, read_trace
from mlx_streamexperts._memory.hardware import NAMED_MACHINES

# Besides the two a topic that come with the model.
PROMPTS = {
    "scripture": (
        "And it came to pass in the days of the king, that",
        "Blessed is the man that walketh not in the counsel of",
    ),
    "prose": (
        "Free software is a matter of liberty, not price, and",
        "The history of the labour movement shows that",
    ),
    "dictionary": (
        "Lantern, n. [F. lanterne, L. lanterna.]\n   1.",
        "protocol\n\n   <networking> A set of rules",
    ),
    "manual": (
        "NAME\n       tar - an archiving utility\n\nSYNOPSIS\n",
        "OPTIONS\n       -v, --verbose\n              ",
    ),
    "python": (
        "import unittest\n\n\nclass TestParser(unittest.TestCase):\n",
        'def read_config(path, default=None):\n    """Read',
    ),
    "c": (
        "/*\n * Allocate a buffer and return a pointer to it.\n */\n",
        "#include <linux/module.h>\n#include <linux/kernel.h>\n\n",
    ),
    "rust": (
        "use std::collections::HashMap;\n\npub struct Registry {\n",
        "fn main() -> Result<(), Box<dyn Error>> {\n",
    ),
    "docs": (
        "Installing the package\n======================\n\nTo install",
        "The SELECT statement is used to query",
    ),
}
SHARES = (0.125, 0.1875, 0.25, 0.375, 0.5, 0.75)
POLICIES = ("lru", "s3fifo", "lfu", "lfu-da", "lrfu-once", "lrfu-1", "lrfu", "lrfu-4", BEST)
EXPERT_BYTES = 6_750_000  # one expert of Qwen3.5-397B in 4 bits
MACHINE = replace(NAMED_MACHINES["M4 Max 128 GB"], drive_share=(1.0, 1.0))


class LFUDA:
    """LFU with dynamic ageing: an expert's priority is its uses while resident, plus an age that
    rises to the priority of whatever was evicted last (Arlitt et al., 2000)."""

    def __init__(self, experts: int, slots: int) -> None:
        self._uses: dict[int, int] = {}
        self._priority: dict[int, int] = {}  # least recently used first
        self._age = 0

    def prompt(self, chosen: np.ndarray) -> None:
        pass

    def touch(self, expert: int) -> None:
        self._uses[expert] += 1
        self._priority.pop(expert, None)
        self._priority[expert] = self._uses[expert] + self._age

    def insert(self, expert: int) -> None:
        self._uses[expert] = 0
        self.touch(expert)

    def evict(self, keep: Collection[int]) -> int:
        victim = min((e for e in self._priority if e not in keep), key=lambda e: self._priority[e])
        self._age = self._priority[victim]
        self.remove(victim)
        return victim

    def remove(self, expert: int) -> None:
        del self._uses[expert], self._priority[expert]


class OncePerPrompt(LRFU):
    """LRFU in which a prompt uses each of its experts once, however many tokens chose it."""

    def prompt(self, chosen: np.ndarray) -> None:
        pass


class Successors(LRFU):
    """LRFU, and a memory of which experts follow which from one token to the next.

    What speaks for keeping an expert is the logarithm of its LRFU count, plus the mean, over the
    token's experts, of how much more often than usual it followed each. Learned while running.
    """

    PULL = 0.5  # weight of the second part; 0.4 to 1 were much the same
    PRIOR = 20  # tokens that the usual frequency counts for

    def __init__(self, experts: int, slots: int) -> None:
        super().__init__(experts, slots)
        self._followed = np.zeros((experts, experts), np.float32)
        self._tokens = np.zeros(experts, np.float32)
        self._before: np.ndarray | None = None
        self._inside: set[int] = set()
        self._pull: np.ndarray | None = None

    def begin(self, rows: np.ndarray) -> None:
        """A call, [T, K], is about to use experts."""
        for token in rows:
            if self._before is not None:
                self._followed[np.ix_(self._before, token)] += 1
                self._tokens[self._before] += 1
            self._before = token
        self._pull = None

    def insert(self, expert: int) -> None:
        self.touch(expert)
        self._inside.add(expert)

    def evict(self, keep: Collection[int]) -> int:
        if self._pull is None:
            usual = (self._followed.sum(0) + 1) / (self._tokens.sum() + 8)
            known = self._followed[self._before] + self.PRIOR * usual  # [K, experts]
            known /= self._tokens[self._before][:, None] + self.PRIOR
            self._pull = np.log(known / usual).mean(0)
        free = [e for e in self._inside if e not in keep]
        uses = np.array([self._count[e] for e in free]) / self._weight
        victim = free[int(np.argmin(np.log1p(uses) + self.PULL * self._pull[free]))]
        self._inside.remove(victim)
        return victim

    def remove(self, expert: int) -> None:
        self._inside.remove(expert)


def successors(routing: Routing, slots: Sequence[int]) -> int:
    """Capacity misses of `Successors`."""
    misses = 0
    for calls, experts, count in zip(routing.layers, routing.experts, slots, strict=True):
        policy = Successors(experts, count)
        cache = ExpertCache(experts, count, lambda _e, _s, policy=policy: policy)
        for rows in calls:
            policy.begin(rows)
            needed, before = cache.wanted(rows), []
            for wave in cache.waves(sorted(needed)) if len(needed) > cache.slots else [needed]:
                cache.place(wave, before)
                before = wave
        misses += cache.stats.capacity
    return misses


def record(folder: Path) -> None:
    """Record what is not there yet."""
    model, tokenizer = load(str(demo_model()), config=StreamConfig(cache=1 << 40, progress=False))
    folder.mkdir(parents=True, exist_ok=True)
    shipped = json.loads((demo_model() / "prompts.json").read_text())
    for part, name in enumerate(("fit", "judge")):
        prompts = {
            topic: ([p["prompt"] for p in shipped if p["topic"] == topic][part], mine[part])
            for topic, mine in PROMPTS.items()
        }
        seed = 10_000 * part
        jobs = {topic: one_topic(model, tokenizer, prompts[topic], seed) for topic in prompts}
        jobs["mixture"] = mixture(model, tokenizer, prompts, seed + 2000)
        jobs["chat"] = chat(model, tokenizer, [*prompts["python"], *prompts["docs"]], seed + 4000)
        every = [texts[i] for i in (0, 1) for texts in prompts.values()]
        jobs["mixed-chat"] = chat(model, tokenizer, every, seed + 5000)
        texts = [texts[0] for texts in prompts.values()]
        jobs["long-prompts"] = long_prompts(model, tokenizer, texts, seed + 6000)
        for kind, job in jobs.items():
            file = folder / f"{name}-{kind}.jsonl"
            if not file.exists():
                next(job)  # what comes before the recording
                with stream(model).trace(file):
                    tokens = sum(job)
                print(f"{file}: {tokens} tokens", flush=True)
    stream(model).close()


def one_topic(
    model: nn.Module, tokenizer: object, prompts: Sequence[str], seed: int
) -> Iterator[int]:
    """600 tokens in requests of up to 200."""
    yield 0
    done = i = 0
    while done < 600:
        count = say(model, tokenizer, prompts[i % 2], min(200, 600 - done), seed + i)
        done, i = done + count, i + 1
        yield count


def mixture(
    model: nn.Module, tokenizer: object, prompts: dict[str, tuple[str, str]], seed: int
) -> Iterator[int]:
    """16 requests of 75 tokens, each of another topic than the one before."""
    yield 0
    topics = list(prompts)
    for i in range(16):
        yield say(model, tokenizer, prompts[topics[5 * i % 8]][i // 8], 75, seed + i)


def chat(model: nn.Module, tokenizer: object, prompts: Sequence[str], seed: int) -> Iterator[int]:
    """One context of 850 tokens: prompts in turn, 75 tokens of answer to each."""
    yield 0
    cache, i = make_prompt_cache(model), 0
    while cache[0].offset < 850:
        text = ("\n\n" if i else "") + prompts[i % len(prompts)]
        yield say(model, tokenizer, text, 75, seed + i, cache)
        i += 1


def long_prompts(
    model: nn.Module, tokenizer: object, texts: Sequence[str], seed: int
) -> Iterator[int]:
    """Prompts of 400 tokens, which the model has written before, each continued by 100."""
    written = []
    for i, text in enumerate(texts):
        tokens = tokenizer.encode(text)
        say(model, tokenizer, text, 400, seed + i, keep=tokens)
        written.append(tokens)
    yield 0
    for i in range(8):
        yield say(model, tokenizer, written[3 * i % 8], 100, seed + 100 + i)


def say(
    model: nn.Module, tokenizer: object, prompt: str | list[int], count: int, seed: int,
    cache: object = None, keep: list[int] | None = None,
) -> int:  # fmt: skip
    """Generate up to `count` tokens; returns how many it were."""
    mx.random.seed(seed)
    done = 0
    for r in mlx_lm.stream_generate(
        model, tokenizer, prompt, max_tokens=count, sampler=make_sampler(0.8, 0.95),
        prompt_cache=cache,
    ):  # fmt: skip
        done += 1
        if keep is not None:
            keep.append(r.token)
    return done


def relative(report: Report, traces: Sequence[Routing], share: float) -> list[str]:
    """A table: capacity misses of each trace in parts of LRU's."""
    even = [r for r in report.rows if r.way == "even" and r.share == share]
    found = {(r.trace, r.policy): r for r in even}
    columns = [*POLICIES[1:-1], "successors", BEST]
    head = ["LRU's capacity misses", *columns[:-1], "optimum"]
    lines = [f"\n**{share:.2%} resident** ({even[0].slots[0]} slots a layer)\n".replace(".00", "")]
    lines += [f"| trace | {' | '.join(head)} |", f"|---{'|---' * len(head)}|"]
    learned = {t.name: successors(t, even[0].slots) for t in traces}
    learned["all"] = sum(learned.values())
    for name in [*(t.name for t in traces), "all"]:
        base = found[name, "lru"].capacity
        values = [
            (learned[name] if c == "successors" else found[name, c].capacity) / max(1, base)
            for c in columns
        ]
        shown = " | ".join(f"{v:.3f}" for v in values)
        lines.append(f"| {name.removeprefix('judge-')} | {base:,} | {shown} |")
    return lines


def absolute(report: Report) -> list[str]:
    """A table: everything about all traces together."""
    lines = [
        "| resident | policy | hits | compulsory | capacity | decode hits | missed a token | "
        "tokens/s, predicted |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in report.rows:
        if r.trace == "all" and r.way == "even" and r.policy in ("lru", "s3fifo", "lrfu", BEST):
            lines.append(
                f"| {r.share:.2%} | {r.policy} | {r.hit_rate:.1%} | {r.compulsory:,} | "
                f"{r.capacity:,} | {r.decode_hit_rate:.1%} | {r.missed_per_token:.1f} | "
                f"{r.tokens_per_s:.1f} |"
            )
    return lines


def shared(report: Report, traces: Sequence[Routing]) -> list[str]:
    """A table: other divisions of the budget against the even one, under LRFU."""
    lines = [
        "| resident | division | slots | missed a token | of even | best and worst trace | "
        "tokens/s, predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    found = {(r.trace, r.share, r.way): r for r in report.rows if r.policy == "lrfu"}
    for (name, share, way), r in found.items():
        if name != "all":
            continue
        ratios = [
            found[t.name, share, way].missed_per_token
            / max(1e-9, found[t.name, share, "even"].missed_per_token)
            for t in traces
        ]
        ratio = r.missed_per_token / max(1e-9, found["all", share, "even"].missed_per_token)
        lines.append(
            f"| {share:.2%} | {way} | {' '.join(map(str, r.slots))} | {r.missed_per_token:.2f} | "
            f"{ratio:.3f} | {min(ratios):.3f}, {max(ratios):.3f} | {r.tokens_per_s:.1f} |"
        )
    return lines


def warmed(report: Report) -> list[str]:
    """A table: what a hot set saves, over all traces."""
    lines = [
        "| resident | experts read beforehand | misses of the first prompt, cold | hot | "
        "of the first 100 calls a layer, cold | hot | saved per expert read |",
        "|---|---|---|---|---|---|---|",
    ]
    for share in dict.fromkeys(w.share for w in report.warmth):
        mine = [w for w in report.warmth if w.share == share]
        read, cold, hot, cold_calls, hot_calls = (
            sum(getattr(w, k) for w in mine) / len(mine)
            for k in ("read", "cold", "hot", "cold_calls", "hot_calls")
        )
        lines.append(
            f"| {share:.2%} | {read:.0f} | {cold:.0f} | {hot:.0f} | {cold_calls:.0f} | "
            f"{hot_calls:.0f} | {(cold_calls - hot_calls) / read:.2f} |"
        )
    return lines


def host_time() -> list[str]:
    """A table, measured: what a token costs the host in one layer, top-10 of 512 experts."""
    lines = [
        "| policy | resident | hit rate | median, us | 90th percentile, us |",
        "|---|---|---|---|---|",
    ]
    weights = 1 / np.arange(1, 513) ** 0.7
    for policy in ("lru", "s3fifo", "lrfu"):
        for slots in (64, 128, 256, 511):
            rng = np.random.default_rng(0)
            cache, times = ExpertCache(512, slots, policy), []
            for i in range(4000):
                rows = rng.choice(512, (1, 10), replace=False, p=weights / weights.sum())
                start = time.perf_counter()
                cache.place(cache.wanted(rows))
                if i >= 1000:  # it is full
                    times.append(1e6 * (time.perf_counter() - start))
            lines.append(
                f"| {policy} | {slots / 512:.1%} | {cache.stats.hit_rate:.0%} | "
                f"{np.median(times):.1f} | {np.percentile(times, 90):.1f} |"
            )
    return lines


def all_of(rows: Sequence[Row]) -> list[Row]:
    """What the picture shows."""
    shown = ("lru", "s3fifo", "lfu", "lrfu", BEST)
    return [r for r in rows if r.trace == "all" and r.policy in shown]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("traces", type=Path)
    parser.add_argument("--docs", type=Path, help="write policies-tables.md and policies.svg there")
    args = parser.parse_args()
    record(args.traces)
    CANDIDATES.update({"lfu-da": LFUDA, "lrfu-once": OncePerPrompt})
    parts = (sorted(args.traces.glob(f"{part}-*.jsonl")) for part in ("fit", "judge"))
    fit, judge = ([with_expert_bytes(read_trace(f), EXPERT_BYTES) for f in p] for p in parts)
    report = simulate(judge, SHARES, POLICIES, MACHINE, fit)
    calls = sum(len(calls) for t in judge for calls in t.layers)
    tokens = sum(len(rows) for t in judge for rows in t.layers[0])
    lines = [
        "# Policies on recorded routing: the tables",
        "",
        "Written by `python benchmarks/policies.py TRACES --docs docs`; "
        "[policies.md](policies.md) draws the conclusions. The embedded model (8 layers, 64 "
        f"experts, top-8), {len(judge)} traces of {tokens:,} tokens in {calls:,} calls of layers. "
        "Everything is judged on traces whose prompts and seeds were used for nothing else. "
        f"Divisions and hot sets were fitted on {len(fit)} others. Predicted tokens/s are for "
        f"{MACHINE.name}, as if an expert had {EXPERT_BYTES / 1e6:.2f} MB "
        "(`_analysis/predict.py`; not measured).",
        "",
        "![hit rates](policies.svg)",
        "",
        "## Every policy, all traces together",
        "",
        *absolute(report),
        "",
        "## Capacity misses in parts of LRU's, by trace",
    ]
    for share in (0.125, 0.25, 0.5, 0.75):
        lines += relative(report, judge, share)
    lines += ["", "## Dividing the budget unevenly (LRFU)", "", *shared(report, judge)]
    lines += ["", "## Starting with a hot set (LRFU, mean of the traces)", "", *warmed(report)]
    lines += ["", "## Host time of one layer's bookkeeping, measured", "", *host_time()]
    text = "\n".join(lines) + "\n"
    print(text)
    if args.docs:
        (args.docs / "policies-tables.md").write_text(text)
        plot_rates(all_of(report.rows), args.docs / "policies.svg")


if __name__ == "__main__":
    main()

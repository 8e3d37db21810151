"""The lines that a command prints at its end: what streaming cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from .._config import format_size, parse_size
from .._experts.lossy import last_line
from .._experts.rows import RowStats
from .._experts.store_gain import WORTH, how_to_pack, store_gain
from .._experts.stream import ExpertStream
from .._memory.budget import Plan
from .terminal import Row, bar


@dataclass
class Timing:
    """The times of one generation, or the sums over several.

    Attributes:
        generations: number of generations that reached a first token.
        first_token: seconds from the start to the first token; None if there was none.
        total: seconds to the last token.
        prompt_tokens: tokens of the prompts.
        chunks: forward passes that the prompts took.
        prompt_bytes: bytes read before the first tokens.
        tokens: tokens generated.
        drafted: tokens that a draft model had proposed.
        later_experts, later_bytes: experts and bytes read after the first tokens.
        phases: seconds by phase, if a timeline was recorded.
    """

    generations: int = 0
    first_token: float | None = None
    total: float = 0.0
    prompt_tokens: int = 0
    chunks: int = 0
    prompt_bytes: int = 0
    tokens: int = 0
    drafted: int = 0
    later_experts: int = 0
    later_bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)


def experts_read(expert_stream: ExpertStream) -> int:
    """Experts read since the last reset, on demand or as prefetches."""
    stats = expert_stream.stats()
    return stats.cache.misses + stats.prefetch.issued - stats.prefetch.cancelled


def rows(streams: Sequence[ExpertStream], timing: Timing, layers: bool = False) -> list[Row]:
    """The lines about one run.

    Args:
        streams: the model's stream, then those of models loaded beside it.
        timing: how long it took; all zero for a program that was not timed.
        layers: add each layer's hit rate.
    """
    first, *others = streams
    lines = [*_prompt(timing), *_experts(first, timing)]
    if timing.drafted:
        later = max(1, timing.tokens - timing.generations)
        lines.append(
            (
                "Drafts",
                f"{timing.drafted} of {timing.tokens} tokens were drafted and accepted; "
                f"{timing.later_experts / later:.1f} experts, "
                f"{format_size(timing.later_bytes / later)} read per token after the first",
            )
        )
    for other in others:
        lines += [(f"{label} (second model)", text) for label, text in _experts(other, Timing())]
    if timing.phases:
        elapsed = timing.phases["elapsed"]
        parts = ", ".join(
            f"{name} {seconds / elapsed:.1%}"
            for name, seconds in timing.phases.items()
            if name != "elapsed"
        )
        lines.append(("Timeline", f"{elapsed:.3f} s: {parts}"))
    if layers:
        lines += [(name, bar(rate)) for name, rate in first.stats().layer_hit_rates.items()]
    plan = first.plan
    lines.append(
        (
            "Memory",
            f"peak {format_size(mx.get_peak_memory())}"
            + ("" if plan.memory is None else f" of {format_size(plan.memory)}")
            + f" (trunk {format_size(plan.trunk)}"
            + (f", expert cache {format_size(plan.cache)})" if plan.experts else ")"),
        )
    )
    return [*lines, *_lossy(first)]


def _lossy(expert_stream: ExpertStream) -> list[Row]:
    """The last line of a lossy run."""
    if expert_stream.lossy is None:
        return []
    return [("Lossy", last_line(expert_stream.lossy))]


def of_all_ranks(expert_stream: ExpertStream, lines: list[Row]) -> list[Row]:
    """The lines of every rank if several machines share the model, else those given."""
    if (ranks := expert_stream.ranks) is None:
        return lines
    everybody = ranks.exchange([str(expert_stream.stage).partition(", ")[2], lines])
    return [
        row
        for (stage, theirs), name in zip(everybody, ranks.names, strict=True)
        for row in [(name, stage), *((f"  {label}", text) for label, text in theirs)]
    ]


def _prompt(timing: Timing) -> list[Row]:
    """The line about the time to the first token, if there was one."""
    if timing.first_token is None:
        return []
    many = timing.generations > 1
    mean = f" on average of {timing.generations}" if many else ""
    return [
        (
            "Time to first token",
            f"{timing.first_token / timing.generations:.3f} s{mean}, {timing.prompt_tokens} tokens "
            f"in {timing.chunks} chunk{'s' if timing.chunks > 1 else ''}, "
            f"{format_size(timing.prompt_bytes)} read",
        )
    ]


def _experts(expert_stream: ExpertStream, timing: Timing) -> list[Row]:
    """The lines about one model's cache and reads."""
    plan = expert_stream.plan
    return [*_of_experts(expert_stream, timing), *_rows(expert_stream.stats().rows, plan)]


def _rows(stats: RowStats, plan: Plan) -> list[Row]:
    """The line about tables that are looked up by token, if any are streamed."""
    looked_up = stats.hits + stats.early + stats.misses
    if not plan.tables:
        return []
    return [
        (
            "Rows",
            f"{looked_up} looked up in {format_size(plan.tables)} of tables on the drive: "
            f"{stats.hits} in the cache ({format_size(plan.row_cache)}), {stats.early} read early, "
            f"{stats.misses} waited for; {format_size(stats.bytes)} read",
        )
    ]


def _store(expert_stream: ExpertStream, timing: Timing) -> list[Row]:
    """The line about a packed store, if it would have helped."""
    folder, stats = expert_stream.folder, expert_stream.stats()
    if folder is None or not expert_stream.bypasses_page_cache or not timing.total:
        return []
    streamed = [x for x in expert_stream.layers if not x.resident]
    estimate = store_gain(streamed, parse_size(expert_stream.config.read_size))
    # 1.37 and 1.16 for the two models of benchmarks/README.md; measured: 1.40 and 1.14.
    waited = min(stats.read.wait_seconds, 0.9 * timing.total)
    saved = waited * estimate.saved / estimate.seconds
    gain = timing.total / (timing.total - saved) - 1
    if gain <= WORTH:
        return []
    return [("Store", f"would be about {gain:.0%} faster: {how_to_pack(folder)}")]


def _of_experts(expert_stream: ExpertStream, timing: Timing) -> list[Row]:
    stats, plan = expert_stream.stats(), expert_stream.plan
    if not expert_stream.layers:
        return []
    share = f", {stats.read.wait_seconds / timing.total:.0%} of the time" if timing.total else ""
    lines = stats.lines(f" with {plan.resident_share:.1%} resident", share)
    return [*lines, *_store(expert_stream, timing)]

"""A model on several machines: each one's layers, files and budget, and the predicted speed.

Works from headers alone, on one machine, before anything is copied to the others. It divides layers
as `_distributed.pipeline` does at load; the rank with the least room limits a prompt's chunks, as
`_loading.on_ranks` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .._config import StreamConfig, format_size
from .._distributed.pipeline import Part, Stage, parse_split
from .._errors import BudgetError
from .._io.checkpoint import is_shard, read_checkpoint
from .._io.hub import headers_only
from .._loading.discover import discover
from .._loading.on_ranks import in_chunks
from .._memory.budget import Plan, text_config
from .._memory.hardware import Machine
from .predict import Prediction, Range, predict


@dataclass(frozen=True)
class Link:
    """The network between neighbouring ranks.

    Attributes:
        rate: bytes/s.
        latency: seconds of one small message.
    """

    rate: float = 1.0e9
    latency: float = 300e-6


@dataclass(frozen=True)
class RankPlan:
    """One rank's share of a model.

    Attributes:
        stage: its decoder layers.
        plan: its own trunk, cache and so on; `plan.minimum` is the smallest memory that works.
        files: the shards that it needs.
        hidden_bytes: sent from rank to rank for one token.
    """

    stage: Stage
    plan: Plan
    files: tuple[str, ...]
    hidden_bytes: int

    def __str__(self) -> str:
        return f"{self.stage}, {len(self.files)} shards: {self.plan}"


def plan_ranks(
    path_or_hf_repo: str,
    ranks: int,
    config: StreamConfig | None = None,
    trust_remote_code: bool = False,
    memories: Sequence[int] = (),
) -> tuple[RankPlan, ...]:
    """Plan loading with `pipeline=True` on `ranks` machines; one plan for each, in rank order.

    Args:
        path_or_hf_repo: as for `plan`; of a Hub repository only headers are fetched.
        ranks: number of machines.
        trust_remote_code: run the checkpoint's own model code, if it has any.
        config: `memory` and `cache` are one value for all ranks, or one for each ("96GB,64GB").
        memories: each rank's memory in bytes, if `config` states no budget.

    Raises:
        BudgetError: too small on a rank; names the rank and the smallest budget that works.
        StreamError: as for `plan`; or the model cannot be divided like this.
    """
    config = config or StreamConfig()
    split = parse_split(config.split, ranks)
    own = [config.for_rank(rank, ranks) for rank in range(ranks)]
    if memories and config.memory is None and config.cache is None:
        own = [replace(c, memory=m) for c, m in zip(own, memories, strict=True)]
    with headers_only(path_or_hf_repo) as (folder, _):
        trust = {"trust_remote_code": trust_remote_code}
        located = [
            discover(folder, c, trust, as_converted=True, part=Part(rank, ranks, split))
            for rank, c in enumerate(own)
        ]
        checkpoint = read_checkpoint(folder)
        shards = {name: entry.file.name for name, entry in checkpoint.tensors.items()}
        shards |= {name: file for name, file in checkpoint.absent.items() if is_shard(file)}
        plans = []
        for rank, (there, c) in enumerate(zip(located, own, strict=True)):
            try:
                plans.append(there.plan(c))
            except BudgetError as e:
                raise BudgetError(f"rank {rank}: {e}", e.needed_bytes) from e
        chunk, work = (min(getattr(p, n) for p in plans) for n in ("prefill_tokens", "work"))
        found = []
        for there, plan in zip(located, plans, strict=True):
            assert there.stage is not None  # it was located as a part
            hidden = text_config(there.model_config).get("hidden_size") or 0
            found.append(
                RankPlan(
                    there.stage,
                    in_chunks(plan, chunk, work),
                    there.stage.files(shards),
                    hidden * there.item_bytes,
                )
            )
        return tuple(found)


def predict_ranks(
    ranks: Sequence[RankPlan],
    machines: Sequence[Machine],
    link: Link = Link(),
    prompt_tokens: int = 1000,
    hit_rate: Range | None = None,
) -> tuple[Range, Range, list[Prediction]]:
    """Predict the speed of several machines together: arithmetic, not a measurement.

    A token goes from rank to rank, so the ranks' times add up:

        token = sum over ranks of (1 / tokens/s of its layers alone, see `predict`)
                + messages x (link latency + hidden state / link rate)
        messages = 2 (ranks - 1): down the ranks, and the result back to all of them

    Memory adds up too: each rank's cache holds a larger share of fewer experts. In decoding the
    drives work one after the other. All ranks work on a prompt's chunks at once:

        first token = one chunk on every rank + (chunks - 1) x one chunk on the slowest + messages

    All ranks compute the output matrix at the same time, but each is charged for it: the result is
    a little too slow.

    Returns:
        tokens/s, seconds to the first token of `prompt_tokens`, and each rank's own prediction.
    """
    alone = [
        predict(r.plan, m, prompt_tokens, hit_rate) for r, m in zip(ranks, machines, strict=True)
    ]
    hops = 2 * (len(ranks) - 1)
    message = hops * (link.latency + ranks[0].hidden_bytes / link.rate)
    chunks = -(-prompt_tokens // ranks[0].plan.prefill_tokens)
    prompt = hops * (chunks * link.latency + prompt_tokens * ranks[0].hidden_bytes / link.rate)

    def rate(end: str) -> float:
        return 1 / (sum(1 / getattr(p.tokens_per_s, end) for p in alone) + message)

    def first(end: str) -> float:
        each = [getattr(p.first_token, end) / chunks for p in alone]
        return float(sum(each) + (chunks - 1) * max(each) + prompt)

    ends = ("low", "likely", "high")
    return Range(*map(rate, ends)), Range(*map(first, ends)), alone


def report_lines(
    ranks: Sequence[RankPlan], machines: Sequence[Machine], link: Link, prompt_tokens: int,
    hit_rate: Range | None,
) -> list[str]:  # fmt: skip
    """The division for people."""
    tokens, first, alone = predict_ranks(ranks, machines, link, prompt_tokens, hit_rate)
    lines = []
    for r, machine, p in zip(ranks, machines, alone, strict=True):
        lines += [
            f"rank {r.stage.rank} on {machine.name}: layers {r.stage.start} to {r.stage.end - 1} "
            f"of {r.stage.layers}, {len(r.files)} shards, {format_size(r.plan.disk)} of them used",
            f"  plan: {r.plan}",
            f"  smallest memory that works: {format_size(r.plan.minimum)}; cold bytes per token: "
            f"{format_size(r.plan.cold_bytes_per_token)}; expected hit rate: "
            f"{p.hit_rate.likely:.0%}; {1 / p.tokens_per_s.likely:.3g} s a token, likely",
        ]
    cached, held = sum(r.plan.cache for r in ranks), sum(r.plan.experts for r in ranks)
    return [
        *lines,
        f"together: {format_size(cached)} of {format_size(held)} of experts resident "
        f"({cached / held:.0%})",
        f"  predicted decode: {tokens} tokens/s = 1 / (the ranks' times + "
        f"{2 * (len(ranks) - 1)} messages of {format_size(ranks[0].hidden_bytes)} over "
        f"{format_size(link.rate)}/s with {1e6 * link.latency:.0f} us); first token of "
        f"{prompt_tokens} after {first} s",
    ]


def other_files(folder: Path) -> list[str]:
    """Files that every rank needs beside shards: configuration, tokenizer, code."""
    return sorted(
        f.name for f in folder.iterdir() if f.is_file() and not f.name.endswith(".safetensors")
    )

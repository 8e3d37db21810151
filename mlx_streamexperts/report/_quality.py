"""Quality: streamed against stock, and the cost of lossy shortcuts.

The package offers no lossy option. Fewer active experts and experts of fewer bits are tried here on
the stock model, for the report only, so that others' figures can be weighed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .._analysis.exactness import prefill_bound, relative_difference, same
from .._config import format_size
from .._loading.lazy_load import original_load_model
from .._osinfo import available_memory_bytes, device_memory_bytes
from ._prompts import Choice, Prompt
from ._report import Difference, Exactness, Judged, Lossy, Model, Quality

_MOST_NATS = 700.0  # whose exponential is still a number: a shortcut may be that bad
_TOP_K = ("top_k", "num_experts_per_tok")
_EXPERT_TABLES = (SwitchLinear, QuantizedSwitchLinear)


def logits(model: nn.Module, tokens: Sequence[int], alone: int) -> np.ndarray:
    """Logits after each token, float32 [T, V]: the last `alone` tokens decoded one by one."""
    cache = make_prompt_cache(model)
    split = max(1, len(tokens) - alone)
    rows = []
    for part in (tokens[:split], *([t] for t in tokens[split:])):
        out = model(mx.array([part]), cache=cache)[0].astype(mx.float32)  # [T, V]
        mx.eval(out)
        rows.append(np.array(out))
    return np.concatenate(rows)


def log_probabilities(x: np.ndarray) -> np.ndarray:
    """Of logits [T, V], in float64."""
    wide = x.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def compare(
    reference: Sequence[np.ndarray], other: Sequence[np.ndarray], prompts: Sequence[Prompt]
) -> Difference:
    """How another model's logits of some prompts, [T, V] each, differ from the reference's."""
    kl, first, losses, largest, identical = [], [], [], 0.0, True
    for a, b, prompt in zip(reference, other, prompts, strict=True):
        identical = identical and bool(np.array_equal(a, b))
        largest = max(largest, float(np.abs(a - b).max()))
        p, q = log_probabilities(a), log_probabilities(b)
        kl.append(np.maximum(0.0, (np.exp(p) * (p - q)).sum(-1)))
        first.append(a.argmax(-1) == b.argmax(-1))
        losses.append(-q[np.arange(len(prompt.tokens) - 1), prompt.tokens[1:]])
    return Difference(
        identical=identical,
        largest_difference=largest,
        kl_nats=float(np.concatenate(kl).mean()),
        same_first=float(np.concatenate(first).mean()),
        perplexity=math.exp(min(_MOST_NATS, float(np.concatenate(losses).mean()))),
        tokens=sum(len(p.tokens) for p in prompts),
    )


def score(model: nn.Module, items: Sequence[Choice]) -> float:
    """Share of items whose right choice has the higher mean log-probability of its tokens."""
    right = 0
    for item in items:
        means = []
        for choice in item.choices:
            found = log_probabilities(logits(model, item.context + choice, 0))
            at = np.arange(len(item.context) - 1, len(item.context) + len(choice) - 1)
            means.append(found[at, choice].mean())
        right += int(np.argmax(means)) == item.right
    return right / len(items)


@dataclass(frozen=True)
class Answers:
    """A model's logits of some prompts, and its score in the task.

    Attributes:
        whole: of each prompt, [T, V], with the last few tokens decoded one by one.
        decoded: of the first few tokens of each, decoded one by one from the start.
        score: share of the task's items that are right.
    """

    whole: list[np.ndarray]
    decoded: list[np.ndarray]
    score: float

    @classmethod
    def of(
        cls, model: nn.Module, prompts: Sequence[Prompt], items: Sequence[Choice], alone: int
    ) -> Answers:
        """Ask a model. `alone` tokens are decoded one by one, at either end."""
        return cls(
            [logits(model, p.tokens, alone) for p in prompts],
            [logits(model, p.tokens[:alone], alone) for p in prompts],
            score(model, items),
        )


def exact(stock: Answers, streamed: Answers, dtype: mx.Dtype) -> Exactness:
    """The exactness that was seen beside the promised one; `dtype` is of the model's logits."""
    return Exactness(
        decoded_tokens=sum(map(len, streamed.decoded)),
        decoded_identical=same(stock.decoded, streamed.decoded),
        prompts_difference=max(map(relative_difference, stock.whole, streamed.whole)),
        prompts_bound=prefill_bound(dtype),
    )


def quality(
    folder: Path, model: Model, own: Answers, prompts: Sequence[Prompt], items: Sequence[Choice],
    alone: int, bits: Sequence[int],
) -> Quality:  # fmt: skip
    """Streamed answers against the stock model's, if that fits, and the cost of shortcuts.

    Args:
        own: the streamed model's answers.
        alone: tokens of each prompt that are decoded one by one.
        bits: of experts in the lossy what-ifs.
    """
    mine = compare(own.whole, own.whole, prompts)
    result = Quality(False, mine.perplexity, mine.tokens, own.score, len(items), None, None, [], "")
    needed = model.bytes + model.experts_bytes + (1 << 30)  # and the experts a second time
    have = min(available_memory_bytes(), device_memory_bytes())
    if needed > have:
        result.not_measured = (
            f"The stock model and a second copy of its experts need {format_size(needed)} of "
            f"memory, {format_size(have)} are free: streamed and stock were not compared here."
        )
        return result
    stock, _ = original_load_model(folder)  # mlx-lm's own, even inside `patch`
    reference = Answers.of(stock, prompts, items, alone)
    result.stock = judged(reference, reference, prompts, items)
    result.streamed = judged(reference, own, prompts, items)
    dtype = stock(mx.array([[0]])).dtype  # of a pass that is built, not run
    result.exactness = exact(reference, own, dtype)
    result.lossy = shortcuts(stock, reference, prompts, items, alone, bits)
    return result


def judged(
    reference: Answers, other: Answers, prompts: Sequence[Prompt], items: Sequence[Choice]
) -> Judged:
    """Another model's answers against the reference's, with its score."""
    difference = compare(reference.whole, other.whole, prompts)
    return Judged(**vars(difference), task_score=other.score, task_items=len(items))


def shortcuts(
    stock: nn.Module, reference: Answers, prompts: Sequence[Prompt], items: Sequence[Choice],
    alone: int, bits: Sequence[int],
) -> list[Lossy]:  # fmt: skip
    """Lossy what-ifs on the stock model, which is unchanged afterwards.

    Args:
        bits: of experts that are quantized again, for this measurement, in memory.
    """
    rows: list[Lossy] = []

    def judge(kind: Any, name: str, value: int) -> None:
        whole = [logits(stock, p.tokens, alone) for p in prompts]
        found = judged(reference, Answers(whole, [], score(stock, items)), prompts, items)
        rows.append(Lossy(**vars(found), kind=kind, name=name, value=value))

    routers = _routers(stock)
    top_k = max((k for *_, k in routers), default=0)
    for k in sorted({top_k - 1, top_k * 3 // 4, top_k // 2, top_k // 4}, reverse=True):
        if 1 <= k < top_k:
            with _fewer(routers, k):
                judge("fewer experts", f"{k} of {top_k} experts", k)
    for b in bits:
        with _requantized(stock, b) as changed:
            if changed:
                judge("fewer bits", f"experts in {b} bits", b)
    return rows


def _routers(model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Module, attribute and value of each block's number of active experts.

    Found beside the expert module, or in the gate beside it; families may have it elsewhere.
    """
    found = []
    for _, block in model.named_modules():
        children = [c for c in block.values() if isinstance(c, nn.Module)]
        if any(isinstance(x, _EXPERT_TABLES) for c in children for x in c.values()):
            for module in (block, *children):
                for name in _TOP_K:
                    if isinstance(value := getattr(module, name, None), int):
                        found.append((module, name, value))
    return found


@contextmanager
def _fewer(routers: Sequence[tuple[nn.Module, str, int]], k: int) -> Iterator[None]:
    try:
        for module, name, value in routers:
            setattr(module, name, min(k, value))
        yield
    finally:
        for module, name, value in routers:
            setattr(module, name, value)


@contextmanager
def _requantized(model: nn.Module, bits: int) -> Iterator[bool]:
    """Every expert table in `bits` bits, affine, groups of 64; False if that makes none smaller."""
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for holder in [m for _, m in model.named_modules()]:
            for name, table in list(holder.items()):
                if (
                    isinstance(table, _EXPERT_TABLES)
                    and (small := _smaller(table, bits)) is not None
                ):
                    replaced.append((holder, name, table))
                    holder[name] = small
        yield bool(replaced)
    finally:
        for holder, name, table in replaced:
            holder[name] = table
        mx.clear_cache()


def _smaller(table: nn.Module, bits: int) -> nn.Module | None:
    """A table in fewer bits; a quantized one is dequantized first, so that its losses add up."""
    whole = table.weight  # [E, out, in]
    if isinstance(table, QuantizedSwitchLinear):
        if table.bits <= bits or table.mode != "affine":
            return None
        whole = mx.dequantize(whole, table.scales, table.biases, table.group_size, table.bits)
    if whole.shape[-1] % 64:
        return None
    small = QuantizedSwitchLinear(64, 64, 1, False, 64, bits)
    small.weight, small.scales, small.biases = mx.quantize(whole, 64, bits)
    if "bias" in table:
        small.bias = table.bias
    mx.eval(small.parameters())
    return small

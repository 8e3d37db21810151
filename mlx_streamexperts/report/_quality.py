"""Quality: streamed against stock, and the cost of lossy shortcuts.

A report is about exact results; `mlx_streamexperts.quality` measures the package's own lossy
settings. Fewer active experts and experts of fewer bits are tried here on the stock model, so that
others' figures can be weighed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .._analysis.exactness import prefill_bound, relative_difference, same
from .._analysis.quality import Choice, difference, logits, task_score
from .._config import format_size
from .._loading.lazy_load import original_load_model
from .._osinfo import available_memory_bytes, device_memory_bytes
from ._method import Prompt
from ._report import Exactness, Judged, Lossy, Model, Quality

_TOP_K = ("top_k", "num_experts_per_tok")
_EXPERT_TABLES = (SwitchLinear, QuantizedSwitchLinear)


@dataclass(frozen=True)
class Answers:
    """A model's answers to an exam. Logits are [T, V] of each prompt."""

    whole: list[np.ndarray]  # with the last few tokens decoded one by one
    decoded: list[np.ndarray]  # of the first few tokens, decoded one by one from the start
    score: float  # share of the task's items that are right


@dataclass(frozen=True)
class Exam:
    """Questions to a model; `alone` tokens of a prompt are decoded one by one, at either end."""

    prompts: Sequence[Prompt]
    items: Sequence[Choice]
    alone: int

    def ask(self, model: nn.Module, decode: bool = True) -> Answers:
        """Answers of a model; `decode=False` leaves out `Answers.decoded`."""
        texts = [p.tokens for p in self.prompts]
        whole = [logits(model, t, self.alone) for t in texts]
        decoded = [logits(model, t[: self.alone], self.alone) for t in texts if decode]
        return Answers(whole, decoded, task_score(model, self.items))

    def judge(self, reference: Answers, other: Answers) -> Judged:
        """How another model's answers differ from the reference's."""
        pairs = list(zip(reference.whole, other.whole, strict=True))
        following = [p.tokens[1:] for p in self.prompts]
        found = difference(reference.whole, other.whole, following)
        return Judged(
            identical=all(np.array_equal(a, b) for a, b in pairs),
            largest_difference=max(float(np.abs(a - b).max()) for a, b in pairs),
            kl_nats=found.kl_nats,
            same_first=found.same_first,
            perplexity=found.perplexity,
            tokens=sum(len(p.tokens) for p in self.prompts),
            task_score=other.score,
            task_items=len(self.items),
        )


def exact(stock: Answers, streamed: Answers, dtype: mx.Dtype) -> Exactness:
    """The exactness that was seen beside the promised one; `dtype` is of the model's logits."""
    return Exactness(
        decoded_tokens=sum(map(len, streamed.decoded)),
        decoded_identical=same(stock.decoded, streamed.decoded),
        prompts_difference=max(map(relative_difference, stock.whole, streamed.whole)),
        prompts_bound=prefill_bound(dtype),
    )


def quality(folder: Path, model: Model, own: Answers, exam: Exam, bits: Sequence[int]) -> Quality:
    """The streamed model's answers against the stock model's, if that fits; see `shortcuts`."""
    mine = exam.judge(own, own)
    result = Quality(
        True, mine.perplexity, mine.tokens, own.score, mine.task_items, None, None, [], ""
    )
    needed = model.bytes + model.experts_bytes + (1 << 30)  # and the experts a second time
    have = min(available_memory_bytes(), device_memory_bytes())
    if needed > have:
        result.not_measured = (
            f"The stock model and a second copy of its experts need {format_size(needed)} of "
            f"memory, {format_size(have)} are free: streamed and stock were not compared here."
        )
        return result
    stock, _ = original_load_model(folder)  # mlx-lm's own, even inside `patch`
    reference = exam.ask(stock)
    result.stock, result.streamed = exam.judge(reference, reference), exam.judge(reference, own)
    dtype = stock(mx.array([[0]])).dtype  # of a pass that is built, not run
    result.exactness = exact(reference, own, dtype)
    result.lossy = shortcuts(stock, reference, exam, bits)
    return result


def shortcuts(stock: nn.Module, reference: Answers, exam: Exam, bits: Sequence[int]) -> list[Lossy]:
    """Lossy what-ifs on the stock model, which is unchanged afterwards.

    Args:
        bits: of experts that are quantized again, for this measurement, in memory.
    """
    rows: list[Lossy] = []

    def judge(kind: Any, name: str, value: int) -> None:
        found = exam.judge(reference, exam.ask(stock, decode=False))
        rows.append(Lossy(**vars(found), kind=kind, name=name, value=value))

    routers = _routers(stock)
    top_k = max((k for *_, k in routers), default=0)
    for k in sorted({top_k - 1, top_k * 3 // 4, top_k // 2, top_k // 4}, reverse=True):
        if 1 <= k < top_k:
            with _changed([(m, name, min(k, value)) for m, name, value in routers]):
                judge("fewer experts", f"{k} of {top_k} experts", k)
    for b in bits:
        if smaller := _requantized(stock, b):
            with _changed(smaller):
                judge("fewer bits", f"experts in {b} bits", b)
        del smaller
        mx.clear_cache()
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
def _changed(changes: Sequence[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Other values of modules' attributes meanwhile."""
    before = [(module, name, getattr(module, name)) for module, name, _ in changes]
    try:
        for change in changes:
            setattr(*change)
        yield
    finally:
        for change in before:
            setattr(*change)


def _requantized(model: nn.Module, bits: int) -> list[tuple[nn.Module, str, nn.Module]]:
    """Holder, name and smaller copy of each expert table that `bits` bits make smaller."""
    return [
        (holder, name, small)
        for _, holder in model.named_modules()
        for name, table in holder.items()
        if isinstance(table, _EXPERT_TABLES) and (small := _smaller(table, bits)) is not None
    ]


def _smaller(table: nn.Module, bits: int) -> nn.Module | None:
    """A table in fewer bits, affine, groups of 64; a quantized one is dequantized first."""
    whole = table
    if isinstance(table, QuantizedSwitchLinear):
        if table.bits <= bits or table.mode != "affine":
            return None
        whole = SwitchLinear(1, 1, 1, bias=False)
        packed = table.weight, table.scales, table.biases
        whole.weight = mx.dequantize(*packed, table.group_size, table.bits)  # [E, out, in]
        if "bias" in table:
            whole.bias = table.bias
    if whole.weight.shape[-1] % 64:
        return None
    small = whole.to_quantized(64, bits)
    mx.eval(small.parameters())
    return small

"""What a report says of quality: streamed against stock, and what lossy shortcuts would cost.

The package offers no lossy option. Fewer active experts and experts of fewer bits are tried here on
the stock model, for the report only, so that others' figures can be weighed; nothing of it can be
switched on elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from .._analysis.exactness import prefill_bound, relative_difference, same
from ._prompts import Choice, Prompt

_MOST_NATS = 700.0  # whose exponential is a number still: a shortcut may be that bad
_TOP_K = ("top_k", "num_experts_per_tok")


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
    reference: Sequence[np.ndarray], other: Sequence[np.ndarray], texts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """How another model's logits of some texts differ from the reference's.

    Returns:
        `identical`; `largest_difference` of a logit; `kl_nats`: mean of KL(reference || other) a
        token; `same_first`: share of tokens with the same likeliest successor; `perplexity` of the
        other, over every token but each text's first; `tokens`.
    """
    kl, same, losses, largest, identical = [], [], [], 0.0, True
    for a, b, text in zip(reference, other, texts, strict=True):
        identical = identical and bool(np.array_equal(a, b))
        largest = max(largest, float(np.abs(a - b).max()))
        p, q = log_probabilities(a), log_probabilities(b)
        kl.append(np.maximum(0.0, (np.exp(p) * (p - q)).sum(-1)))
        same.append(a.argmax(-1) == b.argmax(-1))
        losses.append(-q[np.arange(len(text) - 1), text[1:]])
    return {
        "identical": identical,
        "largest_difference": largest,
        "kl_nats": float(np.concatenate(kl).mean()),
        "same_first": float(np.concatenate(same).mean()),
        "perplexity": math.exp(min(_MOST_NATS, float(np.concatenate(losses).mean()))),
        "tokens": sum(map(len, texts)),
    }


@dataclass(frozen=True)
class Logits:
    """What a model says to some prompts.

    Attributes:
        whole: of each, [T, V], with the last few tokens decoded one by one.
        decoded: of the first few tokens of each, decoded one by one from the start.
    """

    whole: list[np.ndarray]
    decoded: list[np.ndarray]

    @classmethod
    def of(cls, model: nn.Module, prompts: Sequence[Prompt], alone: int) -> Logits:
        """Ask a model. `alone` tokens are decoded one by one, of each kind."""
        return cls(
            [logits(model, p.tokens, alone) for p in prompts],
            [logits(model, p.tokens[:alone], alone) for p in prompts],
        )


def exact(stock: Logits, streamed: Logits, dtype: mx.Dtype) -> dict[str, Any]:
    """What is promised of exactness, and what was seen.

    Args:
        dtype: of the model's logits.

    Returns:
        `decoded_tokens`; `decoded_identical`; `prompts_difference`: the largest of a prompt's
        logits, relative to its largest; `prompts_bound`: see `exactness.prefill_bound`.
    """
    return {
        "decoded_tokens": sum(map(len, streamed.decoded)),
        "decoded_identical": same(stock.decoded, streamed.decoded),
        "prompts_difference": max(map(relative_difference, stock.whole, streamed.whole)),
        "prompts_bound": prefill_bound(dtype),
    }


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


def judge(
    model: nn.Module, reference: Sequence[np.ndarray], prompts: Sequence[Prompt],
    items: Sequence[Choice], alone: int,
) -> dict[str, Any]:  # fmt: skip
    """What `compare` and `score` say of a model.

    Args:
        reference: logits of the prompts to compare with.
        alone: tokens of each prompt that are decoded one by one.
    """
    own = [logits(model, p.tokens, alone) for p in prompts]
    found = compare(reference, own, [p.tokens for p in prompts])
    return {**found, "task_score": score(model, items), "task_items": len(items)}


def shortcuts(
    stock: nn.Module, reference: Sequence[np.ndarray], prompts: Sequence[Prompt],
    items: Sequence[Choice], alone: int, bits: Sequence[int],
) -> list[dict[str, Any]]:  # fmt: skip
    """Lossy what-ifs on the stock model, which is as it was afterwards.

    Args:
        bits: of experts that are quantized again, for this measurement, in memory.
    """
    rows = []
    blocks = _routers(stock)
    top_k = max((k for *_, k in blocks), default=0)
    for k in sorted({top_k - 1, top_k * 3 // 4, top_k // 2, top_k // 4} - {0, top_k}, reverse=True):
        if k < 1:
            continue
        with _fewer(blocks, k):
            found = judge(stock, reference, prompts, items, alone)
        rows.append(
            {"kind": "fewer experts", "name": f"{k} of {top_k} experts", "value": k} | found
        )
    for b in bits:
        with _requantized(stock, b) as changed:
            if not changed:
                continue
            found = judge(stock, reference, prompts, items, alone)
        rows.append({"kind": "fewer bits", "name": f"experts in {b} bits", "value": b} | found)
    return rows


def _routers(model: nn.Module) -> list[tuple[nn.Module, str, int]]:
    """Where a family keeps how many experts a token gets: module, attribute, value.

    Beside the expert module, or in the gate beside it; none where a family has it elsewhere.
    """
    found = []
    for block in (m for _, m in model.named_modules()):
        children = [c for c in block.values() if isinstance(c, nn.Module)]
        if not any(_projections(c) for c in children):
            continue
        for module in (block, *children):
            for name in _TOP_K:
                if isinstance(value := getattr(module, name, None), int):
                    found.append((module, name, value))
    return found


@contextmanager
def _fewer(blocks: Sequence[tuple[nn.Module, str, int]], k: int) -> Iterator[None]:
    try:
        for module, name, value in blocks:
            setattr(module, name, min(k, value))
        yield
    finally:
        for module, name, value in blocks:
            setattr(module, name, value)


def _projections(module: nn.Module) -> list[nn.Module]:
    """The expert tables of an expert module."""
    return [
        c
        for c in (module.values() if isinstance(module, nn.Module) else ())
        if isinstance(c, (SwitchLinear, QuantizedSwitchLinear))
    ]


@contextmanager
def _requantized(model: nn.Module, bits: int) -> Iterator[bool]:
    """Every expert table in `bits` bits, affine, groups of 64; False where that makes none smaller.

    A table that is quantized already is first made whole again: its losses add up.
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for holder in [m for _, m in model.named_modules()]:
            for name, table in list(holder.items()):
                if not isinstance(table, (SwitchLinear, QuantizedSwitchLinear)):
                    continue
                if isinstance(table, QuantizedSwitchLinear):
                    if table.bits <= bits or table.mode != "affine":
                        continue
                    whole = mx.dequantize(
                        table.weight, table.scales, table.biases, table.group_size, table.bits
                    )
                else:
                    whole = table.weight  # [E, out, in]
                if whole.shape[-1] % 64:
                    continue
                small = QuantizedSwitchLinear(64, 64, 1, False, 64, bits)
                small.weight, small.scales, small.biases = mx.quantize(whole, 64, bits)
                if "bias" in table:
                    small.bias = table.bias
                mx.eval(small.parameters())
                replaced.append((holder, name, table))
                holder[name] = small
        yield bool(replaced)
    finally:
        for holder, name, table in replaced:
            holder[name] = table
        mx.clear_cache()

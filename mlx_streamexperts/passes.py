"""Runs a model's forward passes within the memory that was promised.

A pass that is longer than planned is taken in parts, as mlx-lm's own loop over a prompt takes it:
the same bits as mlx-lm with those steps, whoever calls. What the plan did not foresee, a longer
context or a batch, takes its memory from the expert cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as stock

from .footprint import allocated, leaves, tokens_in
from .intercept import Check, Pass, intercept, intercept_passes

if TYPE_CHECKING:
    from .stream import ExpertStream


class Passes:
    """Runs one model's passes.

    Args:
        expert_stream: the model's.
        run: runs a pass that fits; None to call the model.
    """

    def __init__(
        self,
        expert_stream: ExpertStream,
        run: Callable[[Callable[[], Any], int, Any], Any] | None = None,
    ) -> None:
        self._stream, self._run = expert_stream, run
        self._dividing: int | None = None  # the thread whose pass is taken in parts

    def install(self, model: nn.Module, check: Check) -> None:
        """Let the model's passes come here.

        Args:
            check: looks at each as it was called.
        """
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == "lm_head":
                self._settle_input(module, "__call__")
            elif isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
                self._settle_input(module, "as_linear")
        intercept_passes(model, self.step, check)

    def _settle_input(self, module: nn.Module, method: str) -> None:
        """Compute what a part's logits are made of, [B, L, D].

        They are left to the caller, who may not want them. Not computed, what they are made of
        would be the last layer's experts, [B, L, K, D], of all parts together.
        """
        original = getattr(type(module), method)

        def call(self: nn.Module, x: mx.array) -> mx.array:
            if passes._dividing == threading.get_ident():
                mx.eval(x)
            return original(self, x)

        passes = self
        intercept(module, call, method)

    def step(self, whole: Pass) -> Any:
        """Run a pass, in as many parts as it takes.

        Raises:
            BudgetError: it does not fit beside the fewest experts that the model works with.
        """
        past = context(whole.caches)
        if whole.tokens == 1 or not whole.divisible:
            return self._one(whole, past)
        plan, quantized = self._stream.plan, is_quantized(whole.caches)
        if plan.next_pass(whole.tokens, past, whole.sequences, quantized) >= whole.tokens:
            return self._one(whole, past)
        results: list[mx.array] = []
        begin = 0
        self._dividing = threading.get_ident()
        try:
            while begin < whole.tokens:
                left = whole.tokens - begin
                count = plan.next_pass(left, past + begin, whole.sequences, quantized)
                # mlx-lm takes a pass of one token for the first after the prompt.
                count = max(2, count - 1 if left - count == 1 else count) if left > 3 else left
                results.append(self._one(whole.part(begin, begin + count), past + begin))
                begin += count
                if begin < whole.tokens:  # as mlx-lm does between its steps
                    mx.eval([c.state for c in whole.caches])
                    mx.clear_cache()
        finally:
            self._dividing = None
        return mx.concatenate(results, axis=1)

    def _one(self, part: Pass, past: int) -> Any:
        needed = self._stream.plan.pass_bytes_of(
            part.tokens,
            past,
            part.sequences,
            is_quantized(part.caches),
            allocated(part.caches, part.tokens) if part.caches else 0,
        )
        if self._stream.plan.lacks(mx.get_active_memory() + needed) > 0:
            mx.eval([c.state for c in part.caches or ()])  # what is still computing frees some
            self._stream.make_room(needed, past + part.tokens, part.sequences)
        if self._run is None:
            return part()
        return self._run(part, part.sequences * part.tokens, part.caches)


def context(caches: Sequence[Any] | None) -> int:
    """Tokens that a model's caches hold, of the longest of them."""
    return max((tokens_in(c) for c in leaves(caches or ())), default=0)


def is_quantized(caches: Sequence[Any] | None) -> bool:
    """Are keys and values quantized? Then attention has no fused kernel in mlx-lm."""
    return any(isinstance(c, stock.QuantizedKVCache) for c in leaves(caches or ()))

"""Runs a model's forward passes within the memory that was promised.

A pass that is longer than planned is taken in parts, as mlx-lm's own loop over a prompt takes it:
the same bits as mlx-lm with those steps, whoever calls. What the plan did not foresee, a longer
context or a batch, takes its memory from the expert cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import cache as stock

from .._hooks import Check, Pass, intercept, intercept_passes
from .footprint import allocated, leaves, tokens_in
from .process_memory import Holder, bytes_over_bound


class Passes:
    """Runs one model's passes.

    Args:
        holder: the model's.
        run: runs a pass that fits; None to call the model.
    """

    def __init__(
        self,
        holder: Holder,
        run: Callable[[Callable[[], Any], int, Any], Any] | None = None,
    ) -> None:
        self._stream, self._run = holder, run
        self._local = threading.local()  # .dividing: this thread's pass is taken in parts

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
            if getattr(passes._local, "dividing", False):
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
        added = allocated(whole.caches, whole.tokens)
        grown = whole.sequences * (plan.footprint.grown(added) if plan.footprint else 0)
        free = -bytes_over_bound(mx.get_active_memory()) - grown

        def next_pass(tokens: int, past: int) -> int:
            return plan.next_pass(tokens, past, whole.sequences, quantized, free)

        if next_pass(whole.tokens, past) >= whole.tokens:
            return self._one(whole, past)
        # Before the first part: a pass that is refused has changed no cache.
        end = past + whole.tokens
        self._fit(whole, next_pass(whole.tokens, end), end, added)
        results: list[mx.array] = []
        begin = 0
        self._local.dividing = True
        try:
            while begin < whole.tokens:
                left = whole.tokens - begin
                count = next_pass(left, past + begin)
                # mlx-lm takes a pass of one token for the first after the prompt.
                count = max(2, count - 1 if left - count == 1 else count) if left > 3 else left
                results.append(self._one(whole.part(begin, begin + count), past + begin))
                begin += count
                if begin < whole.tokens:  # as mlx-lm does between its steps
                    mx.eval([c.state for c in whole.caches])
                    mx.clear_cache()
        finally:
            self._local.dividing = False
        return mx.concatenate(results, axis=1)

    def _one(self, part: Pass, past: int) -> Any:
        added = allocated(part.caches, part.tokens) if part.caches else 0
        self._fit(part, part.tokens, past + part.tokens, added)
        if self._run is None:
            return part()
        return self._run(part, part.sequences * part.tokens, part.caches)

    def _fit(self, part: Pass, tokens: int, end: int, added: int) -> None:
        """See to it that a pass fits.

        Args:
            part: whose sequences and caches it has.
            tokens: of each sequence.
            end: tokens of the context after it.
            added: tokens that caches allocate for it.
        """
        quantized = is_quantized(part.caches)
        past = end - tokens
        needed = self._stream.plan.pass_bytes_of(tokens, past, part.sequences, quantized, added)
        if bytes_over_bound(mx.get_active_memory() + needed) > 0:
            mx.eval([c.state for c in part.caches or ()])  # what is still computing frees some
            self._stream.make_room(needed, end, part.sequences)


def context(caches: Sequence[Any] | None) -> int:
    """Tokens that a model's caches hold, of the longest of them."""
    return max((tokens_in(c) for c in leaves(caches or ())), default=0)


def is_quantized(caches: Sequence[Any] | None) -> bool:
    """Are keys and values quantized? Then attention has no fused kernel in mlx-lm."""
    return any(isinstance(c, stock.QuantizedKVCache) for c in leaves(caches or ()))

"""Runs a model's forward passes within the memory that was promised.

A pass longer than planned runs in chunks, as mlx-lm's own prompt loop would run it: the result has
the same bits as mlx-lm with those steps, whoever calls. If a pass needs more than the plan foresaw
(a longer context, a batch), the expert cache gives up slots for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from .._errors import PassStoppedError
from .._hooks import Check, Pass, intercept, intercept_passes, logits_of
from .._listeners import Listeners
from .footprint import allocated, cache_bytes, leaves, tokens_in, windows_full
from .process_memory import Holder, bytes_over_bound
from .rewind import Rewind


class PassListener(Protocol):
    """Hears of a model's passes."""

    def begin_pass(self, tokens: int, rewind: Rewind) -> None:
        """A pass, or a chunk of one, begins.

        Args:
            tokens: of all its sequences together.
            rewind: tells whether the pass may be ended by an exception (`possible`).
        """

    def end_pass(self) -> None:
        """It has ended, and its result is used."""


class Passes:
    """Runs one model's passes.

    Args:
        holder: Holds the model's memory.
        run: Runs a pass that fits; None calls the model.
        listeners: Hear of passes. While there are any, an exception leaves the KV caches as they
            were before the pass, if that is possible.
    """

    def __init__(
        self,
        holder: Holder,
        run: Callable[[Callable[[], Any], int, Any], Any] | None = None,
        listeners: Listeners[PassListener] | None = None,
    ) -> None:
        self._holder, self._run = holder, run
        self._listeners = Listeners[PassListener]() if listeners is None else listeners
        # .dividing: this thread is inside a divided pass; .rewind: how its pass can be taken back
        self._local = threading.local()

    def install(self, model: nn.Module, check: Check) -> None:
        """Route the model's passes through `step`.

        Args:
            model: Its class is replaced, as `intercept_passes` does it.
            check: Looks at each pass as it was called, before it is divided.
        """
        for name, module in model.named_modules():
            if name.rpartition(".")[2] == "lm_head":
                self._evaluate_input(module, "__call__")
            elif isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
                self._evaluate_input(module, "as_linear")
        intercept_passes(model, self.step, check)

    def _evaluate_input(self, module: nn.Module, method: str) -> None:
        """Evaluate the input of the output matrix, [B, L, D], in divided passes.

        The logits stay lazy, because the caller may not want them. If their input stayed lazy too,
        it would keep the last layer's expert outputs, [B, L, K, D], of all chunks alive.
        """
        original = getattr(type(module), method)

        def call(self: nn.Module, x: mx.array) -> mx.array:
            if getattr(passes._local, "dividing", False):
                mx.eval(x)
            return original(self, x)

        passes = self
        intercept(module, call, method)

    def step(self, whole: Pass) -> Any:
        """Run a pass, in as many chunks as it takes.

        Raises:
            BudgetError: it does not fit beside the fewest experts that the model works with.
            PassStoppedError: a listener has ended it.
        """
        if not self._listeners.now:
            return self._in_chunks(whole)
        rewind = self._local.rewind = Rewind(whole.caches, whole.tokens)
        try:
            return self._in_chunks(whole)
        except BaseException as e:
            rewind.undo()
            if isinstance(e, PassStoppedError):
                rewind.settle()
            raise
        finally:
            self._local.rewind = None

    def _in_chunks(self, whole: Pass) -> Any:
        caches = whole.caches
        past, quantized = context(caches), is_quantized(caches)
        added = allocated(caches, whole.tokens) if caches else 0
        if whole.tokens == 1 or not whole.divisible:
            return self._run_one(whole, past, quantized, added)
        plan = self._holder.plan
        grown = whole.sequences * (plan.footprint.grown(added) if plan.footprint else 0)
        free = -bytes_over_bound(mx.get_active_memory()) - grown

        def next_pass(tokens: int, past: int) -> int:
            return plan.next_pass(tokens, past, whole.sequences, quantized, free)

        if next_pass(whole.tokens, past) >= whole.tokens:
            return self._run_one(whole, past, quantized, added)
        # Before the first chunk: a pass that is refused has changed no cache.
        end = past + whole.tokens
        self._make_room(whole, next_pass(whole.tokens, end), end, quantized, added)
        results: list[Any] = []
        begin = 0
        self._local.dividing = True
        try:
            while begin < whole.tokens:
                left = whole.tokens - begin
                count = next_pass(left, past + begin)
                # mlx-lm takes a pass of one token for the first after the prompt.
                count = max(2, count - 1 if left - count == 1 else count) if left > 3 else left
                chunk, added = whole.part(begin, begin + count), allocated(caches, count)
                results.append(self._run_one(chunk, past + begin, quantized, added))
                begin += count
                if begin < whole.tokens:  # as mlx-lm does between its steps
                    mx.eval([c.state for c in caches])
                    mx.clear_cache()
        finally:
            self._local.dividing = False
        return _joined(results)

    def _run_one(self, one: Pass, past: int, quantized: bool, added: int) -> Any:
        """Run a pass undivided; the arguments are those of `_make_room`."""
        self._make_room(one, one.tokens, past + one.tokens, quantized, added)
        tokens = one.sequences * one.tokens
        rewind: Any = getattr(self._local, "rewind", None)
        listeners = self._listeners.now if rewind is not None else ()
        for listener in listeners:
            listener.begin_pass(tokens, rewind)
        result = one() if self._run is None else self._run(one, tokens, one.caches)
        for listener in listeners:
            listener.end_pass()
        return result

    def _make_room(self, one: Pass, tokens: int, end: int, quantized: bool, added: int) -> None:
        """Let the expert cache give up slots until a pass fits.

        Args:
            one: The pass whose sequences and caches count.
            tokens: Tokens of each sequence.
            end: Tokens of the context after the pass.
            quantized: Keys and values are quantized.
            added: Tokens that the caches allocate for the pass.
        """
        plan, past = self._holder.plan, end - tokens
        full = windows_full(one.caches or (), tokens)
        needed = plan.pass_bytes_of(tokens, past, one.sequences, quantized, added, full)
        if one.sequences > 1 and self._holder.batches_copied_whole:
            needed += cache_bytes(one.caches or ())
        rewind: Any = getattr(self._local, "rewind", None)
        kept = rewind.kept_bytes if rewind is not None else 0
        if kept and bytes_over_bound(mx.get_active_memory() + needed + kept) > 0:
            rewind.drop()  # what was promised counts for more than a pass that can be ended
        if bytes_over_bound(mx.get_active_memory() + needed) > 0:
            mx.eval([c.state for c in one.caches or ()])  # pending work frees memory as it ends
            what = f"a forward pass for {one.sequences} x {end:,} tokens of context"
            self._holder.make_room(needed, what, "shorten the context or the batch")


def _joined(results: Sequence[Any]) -> Any:
    """The result of a pass from those of its chunks: logits [B, L, V], or mlx-vlm's object."""
    logits = mx.concatenate([logits_of(r) for r in results], axis=1)
    return logits if isinstance(results[-1], mx.array) else replace(results[-1], logits=logits)


def context(caches: Sequence[Any] | None) -> int:
    """Tokens in the longest of a model's caches."""
    return max((tokens_in(c) for c in leaves(caches or ())), default=0)


def is_quantized(caches: Sequence[Any] | None) -> bool:
    """Are keys and values quantized? Then attention has no fused kernel.

    By name: mlx-vlm has several such classes of its own.
    """
    return any("Quant" in type(c).__name__ for c in leaves(caches or ()))

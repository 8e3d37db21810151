"""Prompt passes whose result is thrown away: the last layer's experts need not be read for them.

mlx-lm runs a prompt, all but its last token, for the sake of the KV caches, and drops the logits.
MLX is lazy, so that a model in memory never computes what only they would need: the experts of the
last layer. A streamed layer asks for its indices, reads and runs them: one layer of 60 for nothing,
or of 8. Here such passes are recognized, and the last layer stands aside.
"""

from __future__ import annotations

import dis
import functools
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .intercept import Step
from .rewind import remember

if TYPE_CHECKING:
    from .layer import ExpertLayer


class PromptPasses:
    """Runs one model's passes; those whose result is dropped without the last layer's experts.

    That nothing else depends on these is tried once: the first such pass has NaN in their place,
    and is run again as it stands if any of it is found in a cache.

    Args:
        last: the model's last expert layer.
        step: what runs the other passes, as `intercept_passes` calls it; None to call the model.
    """

    def __init__(self, last: ExpertLayer, step: Step | None) -> None:
        self._last, self._step = last, step
        self._usable, self._tried = True, False

    def step(self, call: Callable[[], Any], rows: int, caches: Any) -> Any:
        """Run a pass; see `intercept_passes`, from whose call alone this may be called.

        Args:
            call: the model's own forward pass.
            rows: tokens of the call.
            caches: the caches that it changes, or None.
        """
        if self._last.aside == threading.get_ident():
            self._last.aside = None  # Ctrl-C came before a pass could say that it was over
        if self._usable and caches and rows > 1 and is_dropped(sys._getframe(2)):
            if self._tried:
                return self._without_last(call)
            if (undo := remember(caches)) is not None:
                before = self._last.stats.left_out
                result = self._without_last(call)
                stood_aside = self._last.stats.left_out > before
                if not (stood_aside and _has_nan(caches)):
                    self._tried = stood_aside
                    return result
                self._usable = False
                undo()
        return call() if self._step is None else self._step(call, rows, caches)

    def _without_last(self, call: Callable[[], Any]) -> Any:
        try:
            self._last.aside = threading.get_ident()
            return call()
        finally:
            self._last.aside = None


def is_dropped(frame: FrameType | None) -> bool:
    """Does mlx-lm drop what the call under way in this frame returns?

    Only where its own code is seen to do so: the next instruction drops it, or returns it to a
    frame of which the same is true. What other programs do with it is not judged.
    """
    while frame is not None and frame.f_globals.get("__name__", "").startswith("mlx_lm."):
        follows = _follows(frame.f_code, frame.f_lasti)
        if follows == "POP_TOP":
            return True
        if follows != "RETURN_VALUE":
            return False
        frame = frame.f_back
    return False


@functools.lru_cache(maxsize=64)
def _follows(code: CodeType, offset: int) -> str:
    """The name of the instruction after this place; `offset` may be within a call's own caches."""
    return next((i.opname for i in dis.get_instructions(code) if i.offset > offset), "")


def _has_nan(caches: Any) -> bool:
    states: Any = tree_flatten([getattr(c, "state", None) for c in caches])
    return any(
        mx.isnan(a).any().item()
        for _, a in states
        if isinstance(a, mx.array) and mx.issubdtype(a.dtype, mx.inexact)
    )

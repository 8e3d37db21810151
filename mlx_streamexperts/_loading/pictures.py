"""Makes room for what a prompt's pictures, films and sounds take before the language model runs.

mlx-vlm's towers turn them into embeddings in one go, and what that takes depends on their size: a
plan made before the prompt cannot know it. The tower's own graph tells, as the language model's
does for a plan. The expert cache gives what is lacking, or the prompt is refused. Nothing of a
graph is evaluated here that the model would not evaluate itself.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from .._experts.rows import rehearsal
from .._experts.stream import ExpertStream
from .._hooks import intercept
from .._memory.model_graph import work_of

_METHODS = ("get_input_embeddings", "encode_image")
_WHAT = "the work on this prompt's pictures or sound"
_INSTEAD = "give smaller or fewer ones"
_log = logging.getLogger(__name__)


def planning_pictures(model: nn.Module, expert_stream: ExpertStream) -> None:
    """Let a model of mlx-vlm make room before it looks at pictures or listens.

    Args:
        model: the whole model, with its towers.
        expert_stream: its stream, whose bound holds.
    """
    busy = _Busy()
    for name in _METHODS:
        if hasattr(type(model), name):
            _plan_method(model, name, expert_stream, busy)


class _Busy(threading.local):
    """True in a thread while a call of one method is planned, or runs, within another."""

    now = False

    @contextmanager
    def while_inside(self) -> Iterator[None]:
        self.now = True
        try:
            yield
        finally:
            self.now = False


def _plan_method(model: nn.Module, name: str, expert_stream: ExpertStream, busy: _Busy) -> None:
    original = getattr(type(model), name)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        given = {"args": list(args), "kwargs": kwargs}
        if busy.now or not any(_is_seen(a) for _, a in _flat(given)):
            return original(self, *args, **kwargs)
        with busy.while_inside():
            needed = _needed(lambda x: original(self, *x["args"], **x["kwargs"]), given)
            if needed is not None:
                footprint = expert_stream.plan.footprint
                work, total = needed
                held = footprint.unfinished if footprint is not None else 0
                work += max(0, min(held, total - work))
                expert_stream.make_room(work, _WHAT, _INSTEAD)
            result = original(self, *args, **kwargs)
            # Now, so that it does not run within a pass, whose work space is planned apart.
            mx.eval([a for _, a in _flat(_fields(result)) if isinstance(a, mx.array)])
        return result

    intercept(model, call, name)


def _needed(run: Callable[[Any], Any], given: dict[str, Any]) -> tuple[int, int] | None:
    """See `work_of`; None, with a warning, if the graph cannot be built without its numbers."""
    seen = {path: a for path, a in _flat(given) if _is_seen(a)}

    def graph(arrays: dict[str, mx.array]) -> list[mx.array]:
        filled = tree_map_with_path(lambda path, a: arrays.get(path, a), given)
        return [a for _, a in _flat(_fields(run(filled))) if isinstance(a, mx.array)]

    try:
        with rehearsal():
            return work_of(graph, seen)
    except Exception as e:
        _log.warning(
            f"{_WHAT} is not planned, since its graph cannot be traced "
            f"({type(e).__name__}: {e}): leave room for it with a reserve"
        )
        return None


def _is_seen(value: Any) -> bool:
    """Is this part of a picture, a film or a sound? Everything else consists of integers."""
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)


def _flat(tree: Any) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = tree_flatten(tree)  # type: ignore[assignment]
    return found


def _fields(result: Any) -> Any:
    """A result's arrays: mlx-vlm returns an object that holds them, or arrays."""
    return result.to_dict() if hasattr(result, "to_dict") else result

"""What the streamed models of this process hold together: one memory promise covers them all.

Kept here because no single stream knows of the others: the sum that a new model's budget starts
from, and MLX's limit of freed buffers, which is one for the process.
"""

from __future__ import annotations

import gc
import threading
from typing import TYPE_CHECKING

import mlx.core as mx

from .config import format_size
from .errors import StreamError
from .platform import address_space_left

if TYPE_CHECKING:
    from .planner import Plan
    from .stream import ExpertStream

# Measured from here to the end of a generation, the plan's own left out: 730 MB with 8 threads.
_MAPPED_BYTES, _MAPPED_BY_THREAD = 256 << 20, 64 << 20

_living: dict[int, ExpertStream] = {}  # of models that have not been collected
_limits: dict[int, int] = {}  # bytes of freed buffers that each open stream allows
_before = 0  # the limit while none is open
_lock = threading.RLock()  # a collected model may close its stream in the middle of anything


def enter(expert_stream: ExpertStream) -> None:
    """Its model lives from now on."""
    _living[id(expert_stream)] = expert_stream


def leave(expert_stream: ExpertStream) -> None:
    """Its model has been collected."""
    _living.pop(id(expert_stream), None)


def alive(expert_stream: ExpertStream) -> bool:
    """Is its model still in memory?"""
    return id(expert_stream) in _living


def held() -> int:
    """Bytes that streamed models hold, those that nobody uses any more included."""
    if _living:
        gc.collect()  # a model that nobody can reach may be waiting for it
    return sum(s.held_bytes() for s in list(_living.values()))


def check_address_space(plan: Plan, threads: int) -> None:
    """Refuse what a limit of this process's address space has no room for.

    MLX's own threads end the process where memory cannot be mapped.

    Args:
        plan: what will be taken, nothing of it yet.
        threads: that read.

    Raises:
        StreamError: there is no room; says how much there must be.
    """
    left = address_space_left()
    needed = plan.trunk + plan.cache + plan.kv + plan.work
    needed += _MAPPED_BYTES + threads * _MAPPED_BY_THREAD
    if left is not None and left < needed:
        raise StreamError(
            f"this process may map {format_size(max(0, left))} more, and {format_size(needed)} are "
            "needed for the plan and for threads: raise the limit of its address space (ulimit -v) "
            "by the difference, or state a smaller memory"
        )


def limit_freed(expert_stream: ExpertStream, nbytes: int) -> None:
    """Let MLX keep no more freed buffers than that, or than another open stream allows."""
    global _before
    with _lock:
        first = not _limits
        _limits[id(expert_stream)] = nbytes
        old = mx.set_cache_limit(max(_limits.values()))
        if first:
            _before = old


def unlimit_freed(expert_stream: ExpertStream) -> None:
    """Undo `limit_freed`."""
    with _lock:
        if _limits.pop(id(expert_stream), None) is not None:
            mx.set_cache_limit(max(_limits.values(), default=_before))

"""Memory that all streamed models of this process hold together, and MLX's limits for it.

One memory promise covers the whole process, but no stream knows the others. So this module keeps
the sum that a new model's budget starts from, and alone sets MLX's process-wide limits.
"""

from __future__ import annotations

import gc
import threading
from typing import Protocol

import mlx.core as mx

from .._config import format_size
from .._errors import StreamError
from .._osinfo import address_space_left, on_metal, working_set_bytes
from .budget import Plan

# Mapped from load to the end of a generation, without the plan's own: 730 MB with 8 threads.
_MAPPED_BYTES, _MAPPED_BY_THREAD = 256 << 20, 64 << 20


class Holder(Protocol):
    """Holds a model's memory: its `ExpertStream`.

    Attributes:
        plan: how it is divided.
        batches_copied_whole: mlx-lm copies the KV cache of a batch whenever a sequence joins or
            leaves it, of all layers at once. The server does it layer by layer.
    """

    plan: Plan
    batches_copied_whole: bool

    def held_bytes(self) -> int:
        """Bytes that the model holds, and may yet take by its plan."""

    def make_room(self, needed: int, what: str, instead: str) -> None:
        """Give up slots until `needed` bytes are free.

        Args:
            needed: bytes.
            what, instead: for messages: what needs them, and what would need less.
        """


_registered: dict[int, Holder] = {}  # by id, until their models are collected
# Each open stream's wish for one of MLX's limits, in bytes, by the stream's id:
_limits: dict[int, int] = {}  # cache of freed buffers
_wired: dict[int, int] = {}  # wired memory
_unfinished: dict[int, int] = {}  # memory above which MLX waits for operations to end
_before: dict[str, int] = {}  # limits before the first stream, by the function that sets them
_KEPT_BYTES = 16 << 20
_SMALL_BYTES = 1 << 20  # token ids, random states; work space has 8 MB for them
_lock = threading.RLock()  # reentrant: a collected model may close its stream at any point


def register(holder: Holder) -> None:
    """Count a holder's memory from now on."""
    _registered[id(holder)] = holder


def unregister(holder: Holder) -> None:
    """Stop counting a holder, whose model has been collected."""
    _registered.pop(id(holder), None)


def is_registered(holder: Holder) -> bool:
    """Is the holder's model still in memory?"""
    return id(holder) in _registered


def held_bytes() -> int:
    """Bytes that all streamed models hold, used or not."""
    if _registered:
        gc.collect()  # frees unreachable models, which are cyclic
    return sum(s.held_bytes() for s in list(_registered.values()))


def check_address_space(plan: Plan, threads: int) -> None:
    """Refuse a plan that exceeds this process's address-space limit (`ulimit -v`).

    If mapping memory fails, MLX's own threads end the process.

    Args:
        plan: the plan, nothing of it allocated yet.
        threads: number of reader threads.

    Raises:
        StreamError: the limit is too small; the message states both sizes.
    """
    left = address_space_left()
    needed = plan.trunk + plan.cache + plan.row_cache + plan.kv + plan.work
    needed += _MAPPED_BYTES + threads * _MAPPED_BY_THREAD
    if left is not None and left < needed:
        raise StreamError(
            f"this process may map {format_size(max(0, left))} more, but the plan and its threads "
            f"need {format_size(needed)}: raise the limit of its address space (ulimit -v) by the "
            "difference, or state a smaller memory"
        )


def bytes_over_bound(active: int) -> int:
    """Bytes by which MLX's memory exceeds the bound of this process; negative below the bound.

    The bound is the largest of its streamed models', since each plan includes the models before it.

    Args:
        active: MLX's memory in bytes, as `mx.get_active_memory` returns it.
    """
    plans = [s.plan for s in list(_registered.values())]
    bound = max((p.mlx_bound + p.others for p in plans), default=active)
    return active - bound - _SMALL_BYTES


def hold_limits(holder: Holder, plan: Plan, wired: bool = True) -> None:
    """Set MLX's process-wide limits for a stream that opens or changes its size.

    Cache limit: freed buffers that MLX keeps for reuse count as work space. Off Metal only a
    sixteenth of it may be kept, because a prompt's buffers differ in size from call to call and are
    rarely reused (keeping all of it: 0.29 instead of 0.20 GB resident after 512 tokens of the
    embedded model, at the same speed). On Metal each new buffer changes the residency set, so all
    of the work space may be kept.

    Memory limit: running operations hold their results. Above the limit MLX lets some end before it
    starts others (`eval_impl` in transforms.cpp). Without it, a prompt's pass took up to 1.6 times
    the memory that its operations need one after the other.

    Wired limit: on Metal the whole plan stays wired until `release_limits`. mlx-lm wires memory
    only within a generation: between two, macOS may swap or compress slots, and each generation
    wires and unwires all of them. mlx-lm restores the limit that it finds, which is this one. A
    larger limit that is already set (as by mlx-lm's server) stays.

    Args:
        holder: the stream.
        plan: division of the stream's memory.
        wired: set the wired limit, if the device has one.
    """
    metal = on_metal()
    kept = plan.work if metal else plan.work // 16
    with _lock:
        _want("set_cache_limit", _limits, holder, max(_KEPT_BYTES, kept))
        _want(
            "set_memory_limit",
            _unfinished,
            holder,
            plan.mlx_bound + plan.others - (plan.work + plan.spare) // 2,
        )
        if metal and wired:
            total = plan.trunk + plan.cache + plan.kv + plan.work
            _want("set_wired_limit", _wired, holder, min(total, working_set_bytes()))


def release_limits(holder: Holder) -> None:
    """Undo `hold_limits`; the last stream to close restores the limits that the first one found."""
    with _lock:
        for name, limits in (
            ("set_cache_limit", _limits),
            ("set_memory_limit", _unfinished),
            ("set_wired_limit", _wired),
        ):
            if limits.pop(id(holder), None) is not None:
                _set(name, limits)


def _want(name: str, limits: dict[int, int], holder: Holder, nbytes: int) -> None:
    if not limits:  # MLX returns a limit only when another is set
        _before[name] = getattr(mx, name)(nbytes)
    limits[id(holder)] = nbytes
    _set(name, limits)


def _set(name: str, limits: dict[int, int]) -> None:
    before = _before[name]
    wanted = max(limits.values(), default=before)
    getattr(mx, name)(max(wanted, before) if limits is _wired else wanted)

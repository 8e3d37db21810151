"""What the streamed models of this process hold together: one memory promise covers them all.

Kept here because no single stream knows of the others: the sum that a new model's budget starts
from, and MLX's limits, which are for the process.
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

# Measured from here to the end of a generation, the plan's own left out: 730 MB with 8 threads.
_MAPPED_BYTES, _MAPPED_BY_THREAD = 256 << 20, 64 << 20


class Holder(Protocol):
    """What holds a model's memory: its `ExpertStream`."""

    plan: Plan

    def held_bytes(self) -> int:
        """Bytes that it holds now."""

    def make_room(self, needed: int, context: int, sequences: int) -> None:
        """Give slots back until a pass has `needed` bytes."""


_registered: dict[int, Holder] = {}  # of models that have not been collected
_limits: dict[int, int] = {}  # bytes of freed buffers that each open stream allows
_wired: dict[int, int] = {}  # bytes that each wants to be kept wired
_unfinished: dict[int, int] = {}  # bytes above which nothing is begun before something ends
_before: dict[str, int] = {}  # each limit while none is open, by the function that sets it
_KEPT_BYTES = 16 << 20
_SMALL_BYTES = 1 << 20  # token ids, random states: work space has 8 MB for them
_lock = threading.RLock()  # a collected model may close its stream in the middle of anything


def register(holder: Holder) -> None:
    """Its model lives from now on."""
    _registered[id(holder)] = holder


def unregister(holder: Holder) -> None:
    """Its model has been collected."""
    _registered.pop(id(holder), None)


def is_registered(holder: Holder) -> bool:
    """Is its model still in memory?"""
    return id(holder) in _registered


def held_bytes() -> int:
    """Bytes that streamed models hold, those that nobody uses any more included."""
    if _registered:
        gc.collect()  # a model that nobody can reach may be waiting for it
    return sum(s.held_bytes() for s in list(_registered.values()))


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


def bytes_over_bound(active: int) -> int:
    """Bytes by which MLX's memory would be over the bound of this process; negative below it.

    The bound is the largest of its streamed models': each was given what the ones before it left.

    Args:
        active: bytes of MLX's memory (`mx.get_active_memory`).
    """
    plans = [s.plan for s in list(_registered.values())]
    bound = max((p.mlx_bound + p.others for p in plans), default=active)
    return active - bound - _SMALL_BYTES


def hold_limits(holder: Holder, plan: Plan, wired: bool = True) -> None:
    """Set MLX's limits for a stream that opens or changes its size, for the whole process.

    Freed buffers that MLX keeps for reuse are memory too, inside the work space. Elsewhere than on
    Metal little of it is allowed: a prompt's buffers differ in size from call to call and are
    seldom of use again (were all of the work space allowed: 0.29 instead of 0.20 GB resident after
    512 tokens of the embedded model, at the same speed). On Metal each new buffer costs a change of
    what is kept resident: there all of the work space may be kept.

    Operations under way hold their results. Above MLX's memory limit it lets some end before it
    begins others (`eval_impl` in transforms.cpp); without one a prompt's pass was seen to take 1.6
    times the memory that its operations need one after the other.

    On Metal all that is planned stays wired from here to `release_limits`. mlx-lm wires within a
    generation alone, so that macOS may swap or compress slots between two, and each one wires and
    unwires all of them. It restores the limit that it finds, which is this one. A larger limit that
    is set already (mlx-lm's server sets one) is left.

    Args:
        plan: how the stream's memory is divided.
        wired: hold the wired limit, where the device has one.
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
    """Undo `hold_limits`; the last stream that closes leaves what the first one found."""
    with _lock:
        for name, limits in (
            ("set_cache_limit", _limits),
            ("set_memory_limit", _unfinished),
            ("set_wired_limit", _wired),
        ):
            if limits.pop(id(holder), None) is not None:
                _set(name, limits)


def _want(name: str, limits: dict[int, int], holder: Holder, nbytes: int) -> None:
    if not limits:  # MLX tells a limit only to whom sets another
        _before[name] = getattr(mx, name)(nbytes)
    limits[id(holder)] = nbytes
    _set(name, limits)


def _set(name: str, limits: dict[int, int]) -> None:
    before = _before[name]
    wanted = max(limits.values(), default=before)
    getattr(mx, name)(max(wanted, before) if limits is _wired else wanted)

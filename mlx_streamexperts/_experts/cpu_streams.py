"""A call's (token, expert) rows, computed on several processor cores at once.

MLX's CPU backend runs a stream's operations one after another in one thread, so that a model keeps
one core busy. It computes the rows of an expert layer one by one, whichever others are in the call:
shared out over several streams they come out with the same bits. A GPU shares them out itself, and
chooses its kernels by their number: there a call stays one.
"""

from __future__ import annotations

import threading
import time

import mlx.core as mx
import mlx.nn as nn

from .._osinfo import usable_cores

_MOST = 16  # MLX never ends the threads of a stream: each thread that calls a model has its own
_IDLE_SECONDS = 1.0

# Another part costs about 60 us of building and waking up, as long as this much takes to compute.
_LEAST_BYTES = 128 << 10

_streams: list[mx.ThreadLocalStream] = []  # of the process, made as they are needed


class Lanes:
    """Runs one model's calls in several streams of the CPU.

    Args:
        cores: how many calls may keep busy; None for all that this process may use.

    Attributes:
        count: into how many parts a call is divided at most; 1 on a GPU.
    """

    def __init__(self, cores: int | None = None) -> None:
        on_cpu = mx.default_device() == mx.cpu
        self.count = min(cores or usable_cores(), _MOST) if on_cpu else 1
        while len(_streams) < self.count - 1:
            _streams.append(mx.new_thread_local_stream(mx.cpu))
        self._owner: int | None = None
        self._seen = 0.0

    def run(self, switch: nn.Module, x: mx.array, slots: mx.array, expert_bytes: int) -> mx.array:
        """`switch(x, slots)`, in parts along its longest dimension.

        Args:
            switch: mlx-lm's module.
            x: [..., D] tokens.
            slots: [..., K] where the experts of each are.
            expert_bytes: size of one of them.

        Returns:
            [..., K, D]
        """
        axis = max(range(slots.ndim), key=lambda i: slots.shape[i])
        if x.shape[:-1] != slots.shape[:-1]:
            axis = slots.ndim - 1
        size = slots.shape[axis]
        count = min(self.count, size, slots.size * expert_bytes // _LEAST_BYTES)
        if count < 2 or not self._ours():
            return switch(x, slots)
        bounds = [size * i // count for i in range(1, count)]
        many_slots = mx.split(slots, bounds, axis)
        many_x = [x] * count if axis == slots.ndim - 1 else mx.split(x, bounds, axis)
        parts = [switch(many_x[0], many_slots[0])]
        for stream, some_x, some_slots in zip(_streams, many_x[1:], many_slots[1:], strict=False):
            with mx.stream(stream):
                parts.append(switch(some_x, some_slots))
        return mx.concatenate(parts, axis)  # of [..., K, D], which has one dimension more behind

    def _ours(self) -> bool:
        """Do the cores belong to this thread? Not while another one computes with this model."""
        now, me = time.perf_counter(), threading.get_ident()
        if self._owner != me and now - self._seen < _IDLE_SECONDS:
            return False
        self._owner, self._seen = me, now
        return True

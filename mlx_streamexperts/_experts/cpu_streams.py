"""Runs the (token, expert) rows of a call on several processor cores at once.

MLX's CPU backend runs a stream's operations one after another in one thread, so a model keeps one
core busy. It computes the rows of an expert layer one by one, whatever other rows are in the call:
divided over several streams they give the same bits. A GPU divides them itself, and chooses its
kernels by their number: there a call must stay one.
"""

from __future__ import annotations

import threading
import time

import mlx.core as mx
import mlx.nn as nn

from .._osinfo import usable_cores

_MOST = 16  # MLX never ends a stream's threads, and each thread that calls a model has its own
_IDLE_SECONDS = 1.0

# Another part costs about 60 us to build and wake up, which is as long as this much takes to run.
_LEAST_BYTES = 128 << 10

_streams: list[mx.ThreadLocalStream] = []  # of the process, made when they are needed


def called(switch: nn.Module, x: mx.array, slots: mx.array, weights: mx.array | None) -> mx.array:
    """Call an expert module with the arguments that it takes: x [..., D], the others [..., K]."""
    return switch(x, slots) if weights is None else switch(x, slots, weights)


class CpuStreams:
    """Runs one model's calls in several streams of the CPU.

    Args:
        cores: how many cores a call may use; None for all that this process may use.

    Attributes:
        count: the most parts that a call is divided into; 1 on a GPU.
    """

    def __init__(self, cores: int | None = None) -> None:
        on_cpu = mx.default_device() == mx.cpu
        self.count = min(cores or usable_cores(), _MOST) if on_cpu else 1
        while len(_streams) < self.count - 1:
            _streams.append(mx.new_thread_local_stream(mx.cpu))
        self._owner: int | None = None
        self._seen = 0.0

    def run(
        self,
        switch: nn.Module,
        x: mx.array,
        slots: mx.array,
        expert_bytes: int,
        weights: mx.array | None = None,
    ) -> mx.array:
        """Compute `switch(x, slots)`, in parts along its longest dimension.

        Args:
            switch: mlx-lm's module.
            x: [..., D] tokens.
            slots: [..., K], the slots of each token's experts.
            expert_bytes: size of one expert.
            weights: [..., K], a third argument of the module; None if it takes none.

        Returns:
            [..., K, D]
        """
        shape = slots.shape
        axis = shape.index(max(shape)) if x.shape[:-1] == shape[:-1] else len(shape) - 1
        size = shape[axis]
        count = min(self.count, size, slots.size * expert_bytes // _LEAST_BYTES)
        if count < 2 or not self._is_owner():
            return called(switch, x, slots, weights)
        bounds = [size * i // count for i in range(1, count)]
        many_slots = mx.split(slots, bounds, axis)
        many_x = [x] * count if axis == len(shape) - 1 else mx.split(x, bounds, axis)
        many_weights = [None] * count if weights is None else mx.split(weights, bounds, axis)
        calls = list(zip(many_x, many_slots, many_weights, strict=True))
        parts = [called(switch, *calls[0])]
        for stream, call in zip(_streams, calls[1:], strict=False):
            with mx.stream(stream):
                parts.append(called(switch, *call))
        return mx.concatenate(parts, axis)  # [..., K, D]: axis counts from the front, D is last

    def _is_owner(self) -> bool:
        """May this thread use the other cores? Not while another thread computes with the model."""
        now, me = time.perf_counter(), threading.get_ident()
        if self._owner != me and now - self._seen < _IDLE_SECONDS:
            return False
        self._owner, self._seen = me, now
        return True

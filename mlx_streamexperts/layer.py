"""The streamed expert layer: drop-in for mlx-lm's `SwitchGLU` and `SwitchMLP`.

It computes what the module it stands in for computes, by calling that module itself: its expert
tables are exchanged for a bank of slots, and expert indices for slot indices. Each (token, expert)
row is computed on its own, so relocating experts changes no bit. It must never overwrite a slot
that an unevaluated matmul will still read (`Bank.settle`), nor return before every expert that it
used was read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .bank import Bank, SlotTensor, total_bytes
from .cache import ExpertCache
from .checkpoint import ExpertTable
from .errors import ExpertReadError, StreamError
from .reader import ByteRange, ExpertReader, Ticket

# Splitting a call into hits and misses costs a second set of kernel calls; below this expected
# read time it loses (measured on small experts by every engine that tried).
_OVERLAP_SECONDS = 200e-6

# mlx-lm sorts a call's rows by expert from this many on.
_SORTED_ROWS = 64


@dataclass(frozen=True, slots=True)
class ExpertTensor:
    """One tensor of a layer's experts: where its slots are used and where its bytes are stored."""

    slot: SlotTensor
    stored: ExpertTable


@dataclass(slots=True)
class LayerStats:
    """Counters of one layer.

    Attributes:
        calls: forward calls that had to ask which experts are wanted.
        waves: extra passes of calls that needed more experts than there are slots.
        overlapped: calls that ran resident experts while missing ones were read.
        sync_seconds: time spent waiting for the router's indices.
    """

    calls: int = 0
    waves: int = 0
    overlapped: int = 0
    sync_seconds: float = 0.0


class StreamedSwitch(nn.Module):
    """Stands in for one `SwitchGLU` or `SwitchMLP`: `y[..., k, :] = expert[indices[..., k]](x)`.

    Bank memory is kept out of the module tree: it is no parameter, and nothing that walks the model
    (adapters, quantizers, savers) may take a slot for an expert. What else a model hangs on its
    experts (a norm, say) stays visible.
    """

    def __init__(self, layer: ExpertLayer) -> None:
        super().__init__()
        self.layer = layer
        holders = {id(t.slot.module) for t in layer.tensors.values()}
        for key, value in layer.switch.items():
            if id(value) not in holders:
                self[key] = value

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """See `ExpertLayer.__call__`."""
        return self.layer(x, indices)


class ExpertLayer:
    """One layer's experts: slots, the map to them, and the passes that fill them.

    Args:
        name: module path in the model.
        switch: the module stood in for; its expert tables are never evaluated.
        tensors: every expert tensor of the module, by name within it.
        experts: routed experts in the layer.

    Attributes:
        cache: the expert -> slot map and its statistics.
        stats: further counters.
        resident: all experts are in the slot of their own index, nothing is asked or mapped.
        record: called with each call's experts [..., K] while a trace is taken.
        as_packed: asked after each read whether an expert's parts are right; None trusts reads.
    """

    def __init__(
        self, name: str, switch: nn.Module, tensors: dict[str, ExpertTensor], experts: int
    ) -> None:
        self.name, self.switch, self.tensors, self.experts = name, switch, tensors, experts
        self.expert_bytes = total_bytes([t.slot for t in tensors.values()])
        self.stats = LayerStats()
        self.resident = False
        self.record: Callable[[np.ndarray], None] | None = None
        self.as_packed: Callable[[int, Sequence[memoryview]], bool] | None = None
        self.cache = ExpertCache(experts, 0)
        self.closed = True
        self._bank = Bank({}, 0, in_place=True)
        self._reader: ExpertReader  # set by open
        self._overlap = "auto"
        # A GPU backend may choose its kernel by the number of rows (MLX's CUDA backend does at 8),
        # and another kernel sums in another order. The CPU backend computes row by row.
        self._keep_row_count = mx.default_device() != mx.cpu
        self._read_seconds = 0.0  # moving average of the time one missing expert takes
        self._lock = threading.RLock()
        self._thread: int | None = None
        self._shared = False

    def open(
        self, slots: int, reader: ExpertReader, policy: str, overlap: str, in_place: bool
    ) -> None:
        """Allocate `slots` slots, all empty, and be ready for calls."""
        with self._lock:
            self._bank.settle()
            self.closed = self.resident = False
            self._reader = reader
            self._overlap = overlap
            self._bank.free()  # before the new one is allocated: the budget holds throughout
            self.cache = ExpertCache(self.experts, slots, policy)
            slot_tensors = {name: t.slot for name, t in self.tensors.items()}
            self._bank = Bank(slot_tensors, self.cache.slots, in_place)

    def load_all(self) -> Iterator[int]:
        """Read every expert into the slot of its own index; yields bytes read as it goes.

        Afterwards the layer maps nothing and asks the device nothing. Needs as many slots as
        experts.
        """
        step = max(1, (64 << 20) // self.expert_bytes)
        for first in range(0, self.experts, step):
            chunk = range(first, min(self.experts, first + step))
            missing, ticket = self._begin(list(chunk))
            self._finish(missing, ticket)
            yield len(chunk) * self.expert_bytes
        if not np.array_equal(self.cache.slot_of, np.arange(self.experts)):
            raise StreamError(f"{self.name}: loading out of order")  # an empty cache fills in order
        self.cache.stats = type(self.cache.stats)()  # loading is not a miss
        self.resident = True

    def close(self) -> None:
        """Free the slots; later calls raise `StreamError`."""
        with self._lock:
            self.closed, self.resident = True, False
            self._bank.settle()
            self._bank.free()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Run the chosen experts.

        Args:
            x: [..., D] tokens.
            indices: [..., K] the experts that each token's router chose.

        Returns:
            [..., K, D], each chosen expert's output.

        Raises:
            ExpertReadError: an expert's bytes could not be read.
        """
        if self.resident:
            if self.record is not None:
                self.record(np.array(indices))
            return self.switch(x, indices)
        if self.closed:
            raise StreamError(f"{self.name}: this model's expert stream is closed")
        start = time.perf_counter()
        experts = np.array(indices)  # [..., K], the call's only host sync
        self.stats.sync_seconds += time.perf_counter() - start
        if self.record is not None:
            self.record(experts)
        with self._lock:
            self.stats.calls += 1
            self._note_thread()
            needed = list(dict.fromkeys(experts.ravel().tolist()))
            if len(needed) > self.cache.slots:
                y = self._in_waves(x, experts, sorted(needed))
            else:
                y = self._at_once(x, experts, needed)
            return self._bank.reading(y, eager=self._shared)

    def _at_once(self, x: mx.array, experts: np.ndarray, needed: list[int]) -> mx.array:
        """All needed experts fit into the slots together: the decode path."""
        hits = len(needed)
        missing, ticket = self._begin(needed)
        if ticket is None:
            return self.switch(x, self._slots(experts))
        hits -= len(missing)
        if not hits or not self._worth_overlapping(len(missing)):
            self._finish(missing, ticket)
            return self.switch(x, self._slots(experts))
        self.stats.overlapped += 1
        late = np.isin(experts.ravel(), missing)  # [T*K]
        rows = [np.flatnonzero(~late), np.flatnonzero(late)]
        try:
            early = self._rows(x, experts, rows[0])
            mx.async_eval(early)
        except BaseException:
            self._abandon(missing, ticket)
            raise
        self._finish(missing, ticket)
        return self._join([early, self._rows(x, experts, rows[1])], rows, experts.shape)

    def _in_waves(self, x: mx.array, experts: np.ndarray, needed: list[int]) -> mx.array:
        """More experts than slots: they pass through, each read once.

        Resident ones go first, then the others in file order. While a wave computes, the next one
        is read into the slots of the wave before.
        """
        slots = self.cache.slots
        waves = self.cache.waves(needed)
        self.stats.waves += len(waves) - 1
        wave_of = np.empty(self.experts, np.int32)
        for i, wave in enumerate(waves):
            wave_of[wave] = i
        row_wave = wave_of[experts.ravel()]  # [T*K]
        order_rows = np.argsort(row_wave, kind="stable")
        rows = np.split(order_rows, np.searchsorted(row_wave[order_rows], range(1, len(waves))))
        outputs: list[mx.array] = []
        missing, ticket = self._begin(waves[0])
        for i, wave in enumerate(waves):
            self._finish(missing, ticket)
            y = self._rows(x, experts, rows[i])
            mx.async_eval(y)
            if i + 1 < len(waves):
                # The next wave overwrites slots of waves before this one: they must have run.
                mx.eval(outputs[-1:] if slots > 1 else y)
                missing, ticket = self._begin(waves[i + 1], wave if slots > 1 else ())
            outputs.append(y)
        return self._join(outputs, rows, experts.shape)

    def _begin(
        self, needed: Sequence[int], keep: Sequence[int] = ()
    ) -> tuple[list[int], Ticket | None]:
        """Give the needed experts slots and start reading those that are missing."""
        missing = self.cache.place(needed, keep)
        if not missing:
            return missing, None
        try:
            self._bank.settle()
            return missing, self._reader.submit(list(self._ranges(missing)))
        except BaseException:
            for expert in missing:
                self.cache.drop(expert)
            raise

    def _finish(self, missing: list[int], ticket: Ticket | None) -> None:
        """Wait until the missing experts are in their slots."""
        if ticket is None:
            return
        try:
            ticket.wait()
            if self.as_packed is not None:
                self._check(missing, ticket)
            self._bank.commit()
        except BaseException as e:
            self._abandon(missing, ticket, only_failed=isinstance(e, ExpertReadError))
            raise
        seconds = ticket.seconds / len(missing)
        self._read_seconds += 0.1 * (seconds - self._read_seconds)

    def _check(self, missing: list[int], ticket: Ticket) -> None:
        """Compare what was read with what was packed; experts that differ have failed."""
        assert self.as_packed is not None
        wrong = []
        for expert in missing:
            slot = int(self.cache.slot_of[expert])
            parts = [self._bank.delivered(name, slot) for name in self.tensors]
            if not self.as_packed(expert, parts):
                wrong.append(expert)
        if wrong:
            ticket.failed.update((self.name, expert) for expert in wrong)
            first, stored = wrong[0], next(iter(self.tensors.values())).stored
            raise ExpertReadError(
                self.name, first, stored.names[first], Path(stored.files[first]),
                stored.offsets[first], None, "its checksum is not that of the bytes packed",
            )  # fmt: skip

    def _abandon(self, missing: list[int], ticket: Ticket, only_failed: bool = False) -> None:
        """Leave no slot that claims an expert whose bytes are not all there."""
        self._reader.cancel(ticket)
        for expert in missing:
            if not only_failed or (self.name, expert) in ticket.failed:
                self.cache.drop(expert)
        self._bank.commit()

    def _ranges(self, experts: list[int]) -> Iterator[ByteRange]:
        for name, t in self.tensors.items():
            files, offsets, names = t.stored.files, t.stored.offsets, t.stored.names
            for expert in experts:
                into = self._bank.destination(name, int(self.cache.slot_of[expert]))
                yield ByteRange(
                    files[expert], offsets[expert], into, self.name, expert, names[expert]
                )

    def _rows(self, x: mx.array, experts: np.ndarray, rows: np.ndarray) -> mx.array:
        """Some of the call's (token, expert) rows; their experts must be resident.

        Returns:
            [R, D]; or, where the number of rows is kept, [..., K, D] of which only these count.
        """
        if self._keeps(experts.size):
            flat = np.full(experts.size, experts.ravel()[rows[0]])  # the others stand in
            flat[rows] = experts.ravel()[rows]
            return self.switch(x, self._slots(flat.reshape(experts.shape)))
        top_k = experts.shape[-1]
        tokens = experts.size // top_k
        slots = self._slots(experts.ravel()[rows])  # [R]
        if tokens == 1:  # decode: like stock, one token broadcast over its experts
            return self.switch(x.reshape(1, -1), slots[None])[0]  # [R, D]
        if x.size // x.shape[-1] != tokens:
            x = mx.broadcast_to(x, (*experts.shape[:-1], x.shape[-1]))
        x = x.reshape(tokens, -1)[mx.array((rows // top_k).astype(np.uint32))]  # [R, D]
        return self.switch(x, slots[:, None])[:, 0]  # [R, D]

    def _join(
        self, outputs: list[mx.array], rows: list[np.ndarray], shape: tuple[int, ...]
    ) -> mx.array:
        """Put the results of `_rows` for all of a call's rows in the call's order: [..., K, D]."""
        size = int(np.prod(shape))
        if self._keeps(size):
            y = outputs[0]
            for more, mine in zip(outputs[1:], rows[1:], strict=True):
                chosen = np.zeros(size, bool)
                chosen[mine] = True
                y = mx.where(mx.array(chosen.reshape(*shape, 1)), more, y)
            return y
        inverse = np.empty(size, np.uint32)
        inverse[np.concatenate(rows)] = np.arange(size, dtype=np.uint32)
        y = mx.concatenate(outputs)[mx.array(inverse)]  # [T*K, D]
        return y.reshape(*shape, -1)

    def _keeps(self, rows: int) -> bool:
        """Must each kernel call of a call with this many rows have as many?"""
        return self._keep_row_count and rows < _SORTED_ROWS

    def _slots(self, experts: np.ndarray) -> mx.array:
        return mx.array(self.cache.slot_of[experts].astype(np.uint32))

    def _worth_overlapping(self, misses: int) -> bool:
        if self._overlap == "auto":
            return misses * self._read_seconds > _OVERLAP_SECONDS
        return self._overlap == "on"

    def _note_thread(self) -> None:
        """One thread cannot evaluate another's graph: with several, leave nothing unevaluated."""
        thread = threading.get_ident()
        if self._thread not in (None, thread):
            self._shared = True
        self._thread = thread

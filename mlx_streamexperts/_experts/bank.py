"""Slot memory: MLX arrays `[slots, ...]`, and byte views over the same memory.

The bank owns the memory that expert bytes are read into. An evaluated MLX array exposes its memory
through Python's buffer protocol, so a read can go straight into it, without a copy or an MLX
operation. `in_place_works` checks at run time that the default device's kernels see such writes. If
they do not, a bank stages the bytes and copies them with an MLX update.

Writing in place has one hazard: MLX is lazy, and a matmul that was built but has not run reads
whatever the slot holds when it runs. The bank therefore tracks the outputs that read it, and
`flush_readers` must be called before any slot is overwritten.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .._errors import OtherThreadError, StreamError

# A larger output is evaluated at once instead of being kept alive until the next write: in prefill
# one layer's output is hundreds of megabytes.
_KEEP_OUTPUT_BYTES = 1 << 20
_KEEP_OUTPUTS = 4

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@dataclass(frozen=True, slots=True)
class SlotTensor:
    """One of the tensors that make up an expert.

    Attributes:
        module: the projection that holds it, or the switch itself.
        attribute: the tensor's name there, for example `weight`.
        shape: shape of one expert's part (without the expert dimension).
        dtype: MLX element type.
    """

    module: nn.Module
    attribute: str
    shape: tuple[int, ...]
    dtype: mx.Dtype


class Bank:
    """The slots of one expert layer.

    Args:
        tensors: the tensors of one expert, by a name unique in the layer.
        slots: how many experts fit.
        in_place: read straight into the arrays (see `in_place_works`).

    Attributes:
        spoiled: a commit failed, and the arrays may hold anything.

    Creating a bank allocates its memory and puts the arrays into their modules.

    Raises:
        StreamError: there is not enough memory.
    """

    def __init__(self, tensors: dict[str, SlotTensor], slots: int, in_place: bool) -> None:
        self.slots, self.in_place = slots, in_place
        self._tensors = tensors
        self._row_bytes = [total_bytes([t]) for t in tensors.values()]
        self._views: list[memoryview] = []  # [slots * row_bytes] of each tensor
        self._staged: dict[int, list[np.ndarray]] = {}  # by slot: bytes of each tensor
        self._readers: list[mx.array] = []
        self._builder: threading.Thread | None = None  # of the readers
        self._earlier: list[mx.array] = []  # readers of banks before this one, of the same builder
        self.spoiled = False
        for t in tensors.values():
            try:
                array = mx.zeros((slots, *t.shape), t.dtype)  # [slots, ...]
                mx.eval(array)
            except (MemoryError, RuntimeError) as e:
                if not _lacks_memory(e):
                    raise
                needed = slots * sum(self._row_bytes)
                raise StreamError(
                    f"no memory for {needed:,} bytes of expert slots ({e}): give the cache less, "
                    "or close what else uses memory; then resize the cache, or load again"
                ) from e
            setattr(t.module, t.attribute, array)
            if in_place:
                self._views.append(byte_view(array))

    def destinations(self, slot: int) -> list[memoryview]:
        """Writable memory for an expert in this slot: the bytes of each tensor, in their order."""
        if self.in_place:
            sizes = zip(self._views, self._row_bytes, strict=True)
            return [view[slot * size : (slot + 1) * size] for view, size in sizes]
        staged = self._staged[slot] = [np.empty(size, np.uint8) for size in self._row_bytes]
        return [part.data for part in staged]

    def delivered(self, slot: int) -> list[memoryview]:
        """The bytes of each tensor that were read for this slot. To be called before `commit`."""
        if self.in_place:
            return self.destinations(slot)
        return [part.data for part in self._staged[slot]]

    def commit(self) -> None:
        """Make staged bytes visible. Does nothing if reads go straight into the arrays.

        After an error every slot's content is lost, until `discard`: an update may write to the
        array that it updates, and it returns all slots.
        """
        if not self._staged or self.spoiled:
            return
        self.spoiled = True
        for slot, staged in self._staged.items():
            for t, part in zip(self._tensors.values(), staged, strict=True):
                array = getattr(t.module, t.attribute)
                array[slot] = mx.array(part).view(t.dtype).reshape(t.shape)
        mx.eval([getattr(t.module, t.attribute) for t in self._tensors.values()])
        self._staged.clear()
        self.spoiled = False

    def discard(self) -> None:
        """Forget staged bytes. After a failed `commit`, replace the arrays by new ones."""
        self._staged.clear()
        if self.spoiled:
            for t in self._tensors.values():
                setattr(t.module, t.attribute, mx.zeros((self.slots, *t.shape), t.dtype))
            mx.eval([getattr(t.module, t.attribute) for t in self._tensors.values()])
            self.spoiled = False

    def flush_readers(self) -> None:
        """Run every reader that has not been evaluated, so that slots can be overwritten.

        In the thread that built them this includes the readers of banks before this one, because
        they may read run-ahead's tables, which outlive a bank.

        Raises:
            OtherThreadError: only another thread can run them.
            Exception: MLX's own. Readers have not run, or hold garbage: a device reports a failed
                command only once, to the first that waits for it, so nothing that was built before
                may be used.
        """
        if self._earlier and self._builder is threading.current_thread():
            self._readers += self._earlier
            self._earlier.clear()
        if not self._readers:
            return
        try:
            mx.eval(self._readers)
        except RuntimeError as e:
            if not _of_another_thread(e):
                raise
            if self._builder is None or self._builder.is_alive():
                raise OtherThreadError(
                    "another thread has built a forward pass through this model and not evaluated "
                    "it; evaluate it there first, or give each thread its own model"
                ) from e
        self._readers.clear()  # if the builder is dead, no thread can evaluate them any more

    def track_reader(self, output: mx.array, eager: bool = False) -> mx.array:
        """Remember that `output`, which is not evaluated yet, reads this bank; returns it.

        Args:
            output: any array that was built from the bank's arrays.
            eager: evaluate it now, because several threads share the layer and none of them can
                evaluate another's graph.
        """
        if eager or output.nbytes > _KEEP_OUTPUT_BYTES:
            mx.eval(output)
            return output
        if len(self._readers) >= _KEEP_OUTPUTS:
            # These are steps old. They were evaluated long ago (0.4 us to find out), unless the
            # caller hoards graphs.
            self.flush_readers()
        self._readers.append(output)
        self._builder = threading.current_thread()
        return output

    def forget(self, output: mx.array) -> None:
        """Stop tracking `output`, which nothing uses: it need not run before a slot changes."""
        self._readers = [r for r in self._readers if r is not output]

    def inherit_readers(self, other: Bank) -> None:
        """Track the readers of the bank before this one that may not have run."""
        self._earlier, self._builder = [*other._earlier, *other._readers], other._builder

    def free(self) -> None:
        """Give the memory back. The modules keep empty arrays.

        Graphs that another thread has built and not evaluated keep the memory until they run. That
        is safe, because nothing is written there any more, and necessary, because two threads must
        not evaluate one graph.
        """
        try:
            if self._builder is threading.current_thread():
                self.flush_readers()
        except Exception:
            self._readers.clear()  # otherwise the next change would fail as well
            self._earlier.clear()
            raise
        finally:
            self._views.clear()
            self._staged.clear()
            for t in self._tensors.values():
                setattr(t.module, t.attribute, mx.zeros((0, *t.shape), t.dtype))


def _of_another_thread(error: RuntimeError) -> bool:
    """Is this MLX's refusal to evaluate another thread's graph, and not a device's error?"""
    return str(error).startswith("There is no Stream(")


def _lacks_memory(error: Exception) -> bool:
    """Is this a failed allocation, and not a device's error?"""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "alloc" in said or "memory" in said


def numbers(array: mx.array) -> np.ndarray:
    """Evaluate an array and copy its content to NumPy.

    `np.array` alone is not enough: it drops the error that the evaluation raised and asks the array
    again. A device that reports its failure only once then answers with garbage.
    """
    mx.eval(array)
    return np.array(array)


def byte_view(array: mx.array) -> memoryview:
    """Writable bytes of an evaluated, contiguous array; they share its memory."""
    # NumPy knows no buffer format for bfloat16. A view as unsigned integers shares the memory.
    bits = array.view(_UNSIGNED[array.dtype.size])
    mx.eval(bits)
    return memoryview(cast(Any, bits)).cast("B")


_verdicts: dict[str, bool] = {}
_verdict_lock = threading.Lock()


def in_place_works() -> bool:
    """Do kernels on the default device see bytes that are written into arrays' memory?

    `in_place_fault` finds out, once per device.
    """
    device = str(mx.default_device())
    with _verdict_lock:
        if device not in _verdicts:
            _verdicts[device] = in_place_fault() is None
        return _verdicts[device]


def in_place_fault(rounds: int = 3) -> str | None:
    """Describe why arrays' memory cannot be written on the default device; None if it can.

    Another thread writes, as the reader does, and kernels read, repeatedly, so that a stale copy on
    the device shows. It writes arrays of the element types in use, from one page to a quarter of a
    megabyte; slices of an array, through the whole array's memory (as run-ahead's tables are
    written); one part of an array while kernels read another part; and, with a second thread,
    neighbouring rows of 4 bytes while kernels read the rows between them.

    Args:
        rounds: how often each of these is written.
    """
    for dtype in (mx.uint32, mx.bfloat16, mx.float32, mx.uint8):
        for rows in (2, 128):
            if not _survives(_check_in_place, dtype, rows, rounds):
                return f"kernels do not see bytes written into an array of {rows} rows of {dtype}"
    if not _survives(_check_slices, rounds):
        return "slices of an array do not see bytes written into the array"
    if not _survives(_check_beside, rounds):
        return "writing into an array while kernels read another part of it goes wrong"
    if not _survives(_check_neighbours, rounds):
        return "two threads that write neighbouring rows of 4 bytes disturb each other or a kernel"
    return None


def _survives(check: Callable[..., bool], *args: Any) -> bool:
    try:
        return check(*args)
    except (BufferError, TypeError, ValueError, RuntimeError):
        return False


def _check_in_place(dtype: mx.Dtype, rows: int, rounds: int) -> bool:
    array = mx.zeros((rows, 512), dtype)
    mx.eval(array)
    view = byte_view(array)
    if view.readonly or view.nbytes != array.nbytes:
        return False
    order = mx.arange(rows - 1, -1, -1)
    for seed in range(rounds):
        # Bytes below 64 keep every floating-point pattern finite.
        pattern = np.random.default_rng(seed).integers(0, 64, view.nbytes, dtype=np.uint8)
        _write_elsewhere(view, pattern).join()
        expected = mx.array(pattern).view(dtype).reshape(array.shape)
        if not mx.array_equal(array[order], expected[order]).item():
            return False
    return True


def _check_slices(rounds: int) -> bool:
    array = mx.zeros((3, 2, 512), mx.uint32)
    mx.eval(array)
    view = byte_view(array)
    slices = [array[i, j] for i in range(3) for j in range(2)]  # [512] each
    mx.eval(slices)
    order = mx.arange(511, -1, -1)
    for seed in range(rounds):
        numbers = np.random.default_rng(seed).integers(0, 1 << 32, array.shape, dtype=np.uint32)
        _write_elsewhere(view, numbers.view(np.uint8).ravel()).join()
        for mine, expected in zip(slices, numbers.reshape(6, 512), strict=True):
            if not np.array_equal(np.array(mine[order]), expected[::-1]):
                return False
    return True


def _check_beside(rounds: int) -> bool:
    """Follow pointers through one half of a table while the other half is written."""
    size, hops = 4096, 60
    table = mx.zeros((2, size), mx.uint32)
    mx.eval(table)
    view = byte_view(table)
    halves = [view[: view.nbytes // 2], view[view.nbytes // 2 :]]
    chance = np.random.default_rng(0)
    pointers = chance.permutation(size).astype(np.uint32)
    _write_elsewhere(halves[0], pointers.view(np.uint8)).join()
    for i in range(2 * rounds):
        at, expected = mx.arange(size), np.arange(size, dtype=np.uint32)
        for _ in range(hops):
            at, expected = table[i % 2][at], pointers[expected]
        mx.async_eval(at)
        pointers = chance.permutation(size).astype(np.uint32)
        writer = _write_elsewhere(halves[1 - i % 2], pointers.view(np.uint8))
        seen = np.array(at)
        writer.join()
        if not np.array_equal(seen, expected):
            return False
    return True


def _check_neighbours(rounds: int) -> bool:
    """Kernels read every third row of 4 bytes while two threads write the other rows."""
    rows, hops = 3 * 1024, 60
    table = mx.zeros((rows, 1), mx.uint32)
    mx.eval(table)
    memory = np.frombuffer(byte_view(table), np.uint32)  # [rows]
    chance = np.random.default_rng(0)
    expected = 3 * chance.permutation(rows // 3).astype(np.uint32)  # pointers among them
    memory[::3] = expected
    for _ in range(2 * rounds):
        at, wanted = 3 * mx.arange(rows // 3), np.arange(rows // 3, dtype=np.uint32)
        for _ in range(hops):
            at, wanted = table[at, 0], expected[wanted] // 3
        mx.async_eval(at)
        halves = [chance.integers(0, 1 << 32, rows // 3, dtype=np.uint32) for _ in range(2)]
        writers = [
            threading.Thread(target=_write_rows, args=(memory[i + 1 :: 3], half))
            for i, half in enumerate(halves)
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        seen = np.array(table[:, 0] + mx.zeros(rows, mx.uint32)).reshape(-1, 3)
        if not np.array_equal(np.array(at), 3 * wanted):
            return False
        if not np.array_equal(seen, np.stack([expected, *halves], axis=1)):
            return False
    return True


def _write_rows(rows: np.ndarray, values: np.ndarray) -> None:
    """Write row after row, as tables are written."""
    for i, value in enumerate(values.tolist()):
        rows[i] = value


def _write_elsewhere(view: memoryview, pattern: np.ndarray) -> threading.Thread:
    """Start a thread that writes, and return it."""
    writer = threading.Thread(target=_write, args=(view, pattern))
    writer.start()
    return writer


def _write(view: memoryview, pattern: np.ndarray) -> None:
    view[:] = pattern.data


def total_bytes(tensors: Sequence[SlotTensor]) -> int:
    """Bytes of one expert made of these tensors."""
    return sum(int(np.prod(t.shape, dtype=np.int64)) * t.dtype.size for t in tensors)

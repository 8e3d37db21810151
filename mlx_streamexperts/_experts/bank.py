"""Slot memory: MLX arrays `[slots, ...]`, and byte views over the same memory.

The bank owns the memory that expert bytes are read into. An evaluated MLX array exposes its memory
through Python's buffer protocol, so a read can go straight into it, with no copy and no MLX
operation. `in_place_works` checks at run time that the default device's kernels see such writes;
where they do not, a bank stages the bytes and copies them with an MLX update.

Writing in place has one hazard: MLX is lazy, and a matmul that was built but has not run reads
whatever the slot holds when it runs. The bank therefore remembers the outputs that read it, and
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

# An output above this size is evaluated at once rather than kept alive until the next write: in
# prefill one layer's output is hundreds of megabytes.
_KEEP_OUTPUT_BYTES = 1 << 20
_KEEP_OUTPUTS = 4

_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


@dataclass(frozen=True, slots=True)
class SlotTensor:
    """One of the tensors that make up an expert.

    Attributes:
        module: the projection that holds it, or the switch itself.
        attribute: its name there, for example `weight`.
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

    Creating a bank allocates its memory and hangs the arrays into their modules.
    """

    def __init__(self, tensors: dict[str, SlotTensor], slots: int, in_place: bool) -> None:
        self.slots, self.in_place = slots, in_place
        self._tensors = tensors
        self._bytes: dict[str, memoryview] = {}
        self._staged: dict[tuple[str, int], np.ndarray] = {}
        self._readers: list[mx.array] = []
        self._builder: threading.Thread | None = None  # who built them
        self._earlier: list[mx.array] = []  # of banks before this one, the same builder's
        self.spoiled = False  # a commit failed: the arrays may hold anything
        for name, t in tensors.items():
            try:
                array = mx.zeros((slots, *t.shape), t.dtype)  # [slots, ...]
                mx.eval(array)
            except (MemoryError, RuntimeError) as e:
                if not _lacks_memory(e):
                    raise
                needed = slots * total_bytes(list(tensors.values()))
                raise StreamError(
                    f"no memory for {needed:,} bytes of expert slots ({e}): give the cache less, "
                    "or close what else uses memory; then resize the cache, or load again"
                ) from e
            setattr(t.module, t.attribute, array)
            if in_place:
                self._bytes[name] = byte_view(array)

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(getattr(t.module, t.attribute).nbytes for t in self._tensors.values())

    def destination(self, name: str, slot: int) -> memoryview:
        """Writable bytes of one tensor of one slot."""
        if self.in_place:
            view = self._bytes[name]
            row = len(view) // self.slots
            return view[slot * row : (slot + 1) * row]
        t = self._tensors[name]
        count = int(np.prod(t.shape, dtype=np.int64)) * t.dtype.size
        staged = self._staged[name, slot] = np.empty(count, np.uint8)
        return staged.data

    def delivered(self, name: str, slot: int) -> memoryview:
        """The bytes that were read into one tensor of one slot; before `commit`."""
        return self.destination(name, slot) if self.in_place else self._staged[name, slot].data

    def commit(self) -> None:
        """Make staged bytes visible; nothing to do where reads go straight into the arrays.

        After an error no slot holds what it held, until `discard`: an update may write the array
        that it updates, and what it returns is all slots.
        """
        if not self._staged or self.spoiled:
            return
        self.spoiled = True
        for (name, slot), staged in self._staged.items():
            t = self._tensors[name]
            array = getattr(t.module, t.attribute)
            array[slot] = mx.array(staged).view(t.dtype).reshape(t.shape)
        mx.eval([getattr(t.module, t.attribute) for t in self._tensors.values()])
        self._staged.clear()
        self.spoiled = False

    def discard(self) -> None:
        """Forget staged bytes; after a failed `commit`, have new arrays in place of the old."""
        self._staged.clear()
        if self.spoiled:
            for t in self._tensors.values():
                setattr(t.module, t.attribute, mx.zeros((self.slots, *t.shape), t.dtype))
            mx.eval([getattr(t.module, t.attribute) for t in self._tensors.values()])
            self.spoiled = False

    def flush_readers(self) -> None:
        """Run every unevaluated reader, so that slots can be overwritten.

        In the thread that built them those of banks before this one too: run-ahead's tables stay.

        Raises:
            OtherThreadError: only another thread can run them.
            Exception: MLX's own; they have not run, or hold garbage. A device reports a failed
                command once, to whoever waits for it first: nothing that was built before may be
                used, by anyone.
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
        self._readers.clear()  # nobody can evaluate what a thread built that is no more

    def track_reader(self, output: mx.array, eager: bool = False) -> mx.array:
        """Note that `output`, not yet evaluated, reads this bank; returns it.

        Args:
            eager: evaluate it now; asked for when several threads share the layer, because one
                thread cannot evaluate another's graph.
        """
        if eager or output.nbytes > _KEEP_OUTPUT_BYTES:
            mx.eval(output)
            return output
        if len(self._readers) >= _KEEP_OUTPUTS:
            # Steps ago; evaluated long since (0.4 us to find out) unless the caller hoards graphs.
            self.flush_readers()
        self._readers.append(output)
        self._builder = threading.current_thread()
        return output

    def forget(self, output: mx.array) -> None:
        """Nobody will look at `output`: it need not be run before a slot changes."""
        self._readers = [r for r in self._readers if r is not output]

    def inherit_readers(self, other: Bank) -> None:
        """Know of what was built with the bank before, and is not known to have run."""
        self._earlier, self._builder = [*other._earlier, *other._readers], other._builder

    def free(self) -> None:
        """Give the memory back; the modules keep empty arrays.

        What another thread has built and not evaluated keeps it until then: nobody writes there any
        more, and two threads must not evaluate one graph.
        """
        try:
            if self._builder is threading.current_thread():
                self.flush_readers()
        except Exception:
            self._readers.clear()  # or the next change would fail as well
            self._earlier.clear()
            raise
        finally:
            self._bytes.clear()
            self._staged.clear()
            for t in self._tensors.values():
                setattr(t.module, t.attribute, mx.zeros((0, *t.shape), t.dtype))


def _of_another_thread(error: RuntimeError) -> bool:
    """Is it MLX's refusal of what another thread has built, and not a device's error?"""
    return str(error).startswith("There is no Stream(")


def _lacks_memory(error: Exception) -> bool:
    """Is it an allocation that failed, and not a device's error?"""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "alloc" in said or "memory" in said


def numbers(array: mx.array) -> np.ndarray:
    """An array's content as NumPy's, evaluated first.

    `np.array` does not do: it drops the error that evaluating raised and asks the array again,
    which a device that reports its failure once then answers with garbage.
    """
    mx.eval(array)
    return np.array(array)


def byte_view(array: mx.array) -> memoryview:
    """Writable bytes of an evaluated, contiguous array, over the same memory."""
    # bfloat16 has no buffer format that NumPy knows; a view as unsigned integers shares the memory.
    bits = array.view(_UNSIGNED[array.dtype.size])
    mx.eval(bits)
    return memoryview(cast(Any, bits)).cast("B")


_verdicts: dict[str, bool] = {}
_verdict_lock = threading.Lock()


def in_place_works() -> bool:
    """Do kernels on the default device see what is written into arrays' memory?

    What `in_place_fault` found; kept per device.
    """
    device = str(mx.default_device())
    with _verdict_lock:
        if device not in _verdicts:
            _verdicts[device] = in_place_fault() is None
        return _verdicts[device]


def in_place_fault(rounds: int = 3) -> str | None:
    """What is wrong with writing into arrays' memory on the default device; None if nothing is.

    Another thread writes, as the reader does, and kernels read, again and again, so that a stale
    copy on the device is noticed: arrays of the element types in use, from one page to a quarter of
    a megabyte; slices of an array, written through the whole array's memory (as run-ahead's tables
    are); one part of an array while kernels that read another part run; neighbouring rows of 4
    bytes by two threads at once, while kernels read those between.

    Args:
        rounds: how often each of them is written.
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
    """Of rows of 4 bytes every third is read by kernels, while two threads write the others."""
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
    """One after another, as tables are written."""
    for i, value in enumerate(values.tolist()):
        rows[i] = value


def _write_elsewhere(view: memoryview, pattern: np.ndarray) -> threading.Thread:
    """Write in another thread, which is returned."""
    writer = threading.Thread(target=_write, args=(view, pattern))
    writer.start()
    return writer


def _write(view: memoryview, pattern: np.ndarray) -> None:
    view[:] = pattern.data


def total_bytes(tensors: Sequence[SlotTensor]) -> int:
    """Bytes of one expert made of these tensors."""
    return sum(int(np.prod(t.shape, dtype=np.int64)) * t.dtype.size for t in tensors)

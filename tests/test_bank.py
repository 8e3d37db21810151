"""Bytes written into a bank's memory are what kernels see, and never too early.

The second half is the hazard of writing in place. MLX is lazy, so each test of `flush_readers` has
a twin that leaves the call out and gets the wrong answer: the danger is real here.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import until_memory_is

from mlx_streamexperts._errors import StreamError
from mlx_streamexperts._experts import bank as bank_module
from mlx_streamexperts._experts.bank import Bank, SlotTensor, byte_view, in_place_works, total_bytes


def test_a_bank_by_example() -> None:
    module = nn.Module()
    tensors = {"weight": SlotTensor(module, "weight", (2,), mx.uint8)}
    bank = Bank(tensors, slots=3, in_place=True)
    (row,) = bank.destinations(1)  # writable memory of slot 1, one view for each tensor
    row[:] = bytes([7, 9])
    assert module.weight.tolist() == [[0, 0], [7, 9], [0, 0]]
    lazy = bank.track_reader(module.weight[1] + 1)  # built, not run
    bank.flush_readers()  # before the slot changes
    row[:] = bytes([0, 0])
    assert lazy.tolist() == [8, 10]
    bank.free()
    assert module.weight.size == 0


SLOTS = 5
DTYPES = [mx.uint32, mx.bfloat16, mx.float16, mx.float32, mx.uint8, mx.int8, mx.int64, mx.bool_]
SHAPES = [(8, 4), (3,), (), (1, 1, 7), (64, 32)]
both_ways = pytest.mark.parametrize("in_place", [True, False], ids=["in place", "copying"])


def pattern(nbytes: int, seed: int) -> np.ndarray:
    """Bytes 0 and 1, the first of them 1: an ordinary number in every element type."""
    content = np.random.default_rng(seed).integers(0, 2, nbytes, dtype=np.uint8)
    content[0] = 1
    return content


def row_bytes(shape: tuple[int, ...], dtype: mx.Dtype) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.size


def new_bank(
    in_place: bool, shape: tuple[int, ...] = (8, 4), dtype: mx.Dtype = mx.float32
) -> tuple[Bank, nn.Module]:
    """A bank of one tensor, and the module that uses it as `weight`."""
    module = nn.Module()
    return Bank({"weight": SlotTensor(module, "weight", shape, dtype)}, SLOTS, in_place), module


def write(bank: Bank, slot: int, content: np.ndarray, tensor: int = 0) -> None:
    """Write one tensor of a slot, as the reader and the layer do."""
    bank.destinations(slot)[tensor][:] = content.data
    bank.commit()


def fill(bank: Bank, slot: int, value: float, shape: tuple[int, ...] = (8, 4)) -> None:
    write(bank, slot, np.frombuffer(np.full(shape, value, np.float32).tobytes(), np.uint8))


def seen_by_kernel(array: mx.array, slot: int) -> np.ndarray:
    """The slot's bytes as a kernel sees them that gathers rows."""
    other = (slot + 1) % array.shape[0]
    rows = mx.take(array, mx.array([other, slot], mx.uint32), axis=0)
    one = mx.contiguous(rows[1]).reshape(-1)
    return np.array(one.view(mx.uint8))


# What is written is what is seen.


@both_ways
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_see_written_bytes(dtype: mx.Dtype, shape: tuple[int, ...], in_place: bool) -> None:
    """In any slot and repeatedly; the other slots stay as they were."""
    bank, module = new_bank(in_place, shape, dtype)
    assert (module.weight.shape, module.weight.dtype) == ((SLOTS, *shape), dtype)
    n = row_bytes(shape, dtype)
    held = [np.zeros(n, np.uint8) for _ in range(SLOTS)]
    for seed, slot in enumerate([2, 0, 4, 2, 3, 2]):
        (view,) = bank.destinations(slot)
        assert (view.nbytes, view.readonly, view.format) == (n, False, "B")
        held[slot] = pattern(n, seed)
        write(bank, slot, held[slot])
        for s in range(SLOTS):
            assert np.array_equal(seen_by_kernel(module.weight, s), held[s]), f"slot {s}"


@both_ways
def test_arithmetic_sees_written_values(in_place: bool) -> None:
    """Not only a copy sees them: so does a matmul over rows by index, which the experts run."""
    bank, module = new_bank(in_place, (8, 4))
    values = np.random.default_rng(0).normal(size=(SLOTS, 8, 4)).astype(np.float32)
    x = mx.array(np.ones((SLOTS, 1, 4), np.float32))
    for slot in range(SLOTS):
        write(bank, slot, np.frombuffer(values[slot].tobytes(), np.uint8))
        order = mx.array([slot, 0], mx.uint32)
        y = mx.gather_mm(x[:2], module.weight.swapaxes(-1, -2), rhs_indices=order)
        assert np.allclose(np.array(y[0, 0]), values[slot].sum(-1), atol=1e-5)


def test_both_ways_give_the_same_arrays() -> None:
    modules = []
    for in_place in (True, False):
        module = nn.Module()
        tensors = {
            f"{dtype} {shape}": SlotTensor(module, f"t{i}", shape, dtype)
            for i, (dtype, shape) in enumerate((d, s) for d in DTYPES for s in SHAPES)
        }
        bank = Bank(tensors, SLOTS, in_place)
        for slot in (1, 3, 1):
            parts = zip(tensors.values(), bank.destinations(slot), strict=True)
            for seed, (t, into) in enumerate(parts):
                into[:] = pattern(row_bytes(t.shape, t.dtype), seed + slot).data
        bank.commit()  # once for all of them
        modules.append(module)
    for name, a in modules[0].items():
        assert a.dtype == modules[1][name].dtype
        assert mx.array_equal(a, modules[1][name]), name
        assert a.any().item(), name


def test_several_tensors_do_not_share_memory() -> None:
    gate, up = nn.Module(), nn.Module()
    tensors = {
        "gate.weight": SlotTensor(gate, "weight", (8, 4), mx.uint32),
        "gate.scales": SlotTensor(gate, "scales", (8,), mx.bfloat16),
        "up.weight": SlotTensor(up, "weight", (8, 4), mx.uint32),
    }
    bank = Bank(tensors, SLOTS, in_place=True)
    assert total_bytes(list(tensors.values())) == 128 + 16 + 128
    assert gate.weight.nbytes + gate.scales.nbytes + up.weight.nbytes == SLOTS * (128 + 16 + 128)
    write(bank, 3, pattern(16, 1), tensor=1)
    assert np.array_equal(seen_by_kernel(gate.scales, 3), pattern(16, 1))
    assert not gate.weight.any().item() and not up.weight.any().item()


def test_a_new_bank_is_zero() -> None:
    """Unused slots do not hold another bank's bytes."""
    for _ in range(3):
        bank, module = new_bank(True, (64, 64))
        assert not module.weight.any().item()
        fill(bank, 2, 7.0, (64, 64))
        assert module.weight.any().item()
        bank.free()


def test_copies_are_seen_after_commit_only() -> None:
    """Arrays that were built before see the old bytes whenever they run."""
    bank, module = new_bank(in_place=False)
    lazy = module.weight[1] + 0
    bank.destinations(1)[0][:] = np.ones((8, 4), np.float32).tobytes()
    assert not module.weight.any().item()
    bank.commit()
    assert module.weight[1].sum().item() == 32
    assert lazy.sum().item() == 0
    before = module.weight
    bank.commit()  # nothing is staged any more
    assert module.weight is before and module.weight[1].sum().item() == 32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_byte_view_is_the_array(dtype: mx.Dtype) -> None:
    array = mx.zeros((4, 6), dtype)
    mx.eval(array)
    view = byte_view(array)
    assert (view.nbytes, view.readonly, view.contiguous) == (array.nbytes, False, True)
    view[:] = pattern(array.nbytes, 5).data
    assert np.array_equal(np.array((array.reshape(-1)).view(mx.uint8)), pattern(array.nbytes, 5))


# The hazard of writing in place.


def expected_rows(value: float) -> np.ndarray:
    return np.full((8, 4), value * 2, np.float32)


def test_without_a_flush_a_lazy_reader_gets_the_wrong_bytes() -> None:
    """The hazard is real on this device; otherwise the tests of `flush_readers` show nothing."""
    bank, module = new_bank(in_place=True)
    fill(bank, 1, 3.0)
    lazy = module.weight[mx.array([1])][0] * 2
    fill(bank, 1, 5.0)
    assert np.array_equal(np.array(lazy), expected_rows(5.0))


@both_ways
def test_a_flush_runs_readers_before_their_slot_is_overwritten(in_place: bool) -> None:
    bank, module = new_bank(in_place)
    fill(bank, 1, 3.0)
    lazy = bank.track_reader(module.weight[mx.array([1])][0] * 2)
    bank.flush_readers()
    fill(bank, 1, 5.0)
    assert np.array_equal(np.array(lazy), expected_rows(3.0))
    assert np.array_equal(np.array(module.weight[1] * 2), expected_rows(5.0))


def test_a_flush_protects_what_is_built_on_a_reader() -> None:
    bank, module = new_bank(in_place=True)
    fill(bank, 1, 3.0)
    noted = bank.track_reader(module.weight[mx.array([1])][0] * 2)
    lazy = mx.concatenate([noted, noted]).sum()
    bank.flush_readers()
    fill(bank, 1, 5.0)
    assert lazy.item() == 2 * 32 * 6.0


def test_a_flush_protects_every_reader_of_a_caller_who_hoards_them() -> None:
    """More outputs than the bank tracks at once; it must evaluate one before it forgets it."""
    bank, module = new_bank(in_place=True)
    lazy = []
    for i in range(23):
        slot = i % SLOTS
        bank.flush_readers() if i % 7 == 0 else None
        lazy.append(bank.track_reader(module.weight[mx.array([slot])][0] + 0))
    bank.flush_readers()
    for slot in range(SLOTS):
        fill(bank, slot, 9.0)
    assert not any(y.any().item() for y in lazy)


def test_flushed_readers_are_let_go() -> None:
    """The bank keeps no outputs alive, and tracks few at a time."""
    bank, module = new_bank(in_place=True, shape=(128, 128))
    bank.flush_readers()
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    for i in range(40):
        mx.eval(bank.track_reader(module.weight[mx.array([i % SLOTS])] * 2))  # 64 KiB each
        mx.synchronize()  # a GPU gives memory back when its stream has run
        assert mx.get_active_memory() - before < 16 * 65536
    bank.flush_readers()
    mx.synchronize()
    assert mx.get_active_memory() - before < 65536


def test_track_reader_returns_the_output_itself() -> None:
    bank, module = new_bank(in_place=True)
    small, large = module.weight[1] * 2, mx.zeros((1 << 19,)) + module.weight[0, 0, 0]
    assert bank.track_reader(small) is small
    assert bank.track_reader(large) is large


def evaluated_by_tracking(build: Callable[[mx.array], mx.array], eager: bool) -> bool:
    """Did `track_reader` alone run the output? Overwriting its slot shows it."""
    bank, module = new_bank(in_place=True)
    fill(bank, 0, 3.0)
    y = bank.track_reader(build(module.weight[mx.array([0])][0, 0, 0] * 1), eager)
    fill(bank, 0, 5.0)
    return {3.0: True, 5.0: False}[y.max().item()]


def test_large_and_eager_outputs_are_evaluated_at_once() -> None:
    """Large outputs are not kept alive; eager ones must not wait for another thread."""
    assert not evaluated_by_tracking(lambda v: v + mx.zeros((8, 4)), eager=False)
    assert evaluated_by_tracking(lambda v: v + mx.zeros((8, 4)), eager=True)
    assert evaluated_by_tracking(lambda v: v + mx.zeros((1024, 512)), eager=False)  # 2 MiB


def test_another_threads_graph_is_an_error_that_says_so() -> None:
    """One thread cannot evaluate another's graph, so the bank refuses to overwrite its slots."""
    bank, module = new_bank(in_place=True)
    fill(bank, 1, 3.0)
    built: list[mx.array] = []

    ready, over = threading.Event(), threading.Event()

    def build() -> None:
        with mx.stream(mx.new_stream(mx.default_device())):
            built.append(bank.track_reader(module.weight[mx.array([1])][0] * 2))
        ready.set()
        over.wait()

    thread = threading.Thread(target=build)
    thread.start()
    ready.wait()
    refused = False
    try:
        bank.flush_readers()
    except StreamError as e:
        refused = True
        assert "thread" in str(e)
        with pytest.raises(StreamError):  # and again: it was not forgotten
            bank.flush_readers()
    finally:
        over.set()
        thread.join()
    if refused:
        bank.flush_readers()  # its builder is no more: nobody can evaluate it
        with pytest.raises(RuntimeError):
            mx.eval(built)
    else:  # this MLX can: then it has run
        fill(bank, 1, 5.0)
        assert np.array_equal(np.array(built[0]), expected_rows(3.0))


def test_freed_memory_stays_until_its_thread_has_evaluated() -> None:
    """A new bank tracks the readers of the one before it, and only their builder runs them."""
    first, module = new_bank(in_place=True)
    fill(first, 1, 3.0)
    output = first.track_reader(module.weight[mx.array([1])][0] * 2)

    def change() -> None:
        first.free()
        banks.append(new_bank(in_place=True)[0])
        banks[0].inherit_readers(first)
        banks[0].flush_readers()  # has readers of its own only
        fill(banks[0], 1, 5.0)

    banks: list[Bank] = []
    thread = threading.Thread(target=change)
    thread.start()
    thread.join()
    assert len(banks) == 1
    banks[0].flush_readers()
    assert not banks[0]._earlier
    assert np.array_equal(np.array(output), expected_rows(3.0))


# Memory.


@both_ways
def test_free_gives_the_memory_back(in_place: bool) -> None:
    gc.collect()
    before = mx.get_active_memory()
    module = nn.Module()
    tensors = {
        "a": SlotTensor(module, "a", (256, 256), mx.bfloat16),
        "b": SlotTensor(module, "b", (1024,), mx.uint32),
    }
    bank = Bank(tensors, 8, in_place)
    n = module.a.nbytes + module.b.nbytes
    assert n == 8 * (256 * 256 * 2 + 4096)
    assert mx.get_active_memory() - before >= n
    bank.destinations(3)[0][:] = bytes(256 * 256 * 2)
    bank.track_reader(module.a[mx.array([3])] * 2)
    bank.commit()
    bank.free()
    mx.eval(module.parameters())
    until_memory_is(before + n // 100)
    assert (module.a.shape, module.a.dtype) == ((0, 256, 256), mx.bfloat16)
    assert module.b.shape == (0, 1024)


# The start-up check.


@pytest.fixture
def no_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check runs again, and its result is forgotten afterwards."""
    monkeypatch.setattr(bank_module, "_verdicts", {})


def test_in_place_works_here(no_verdicts: None) -> None:
    """It always works on the CPU; on a GPU the package relies on it."""
    assert in_place_works()


def test_the_verdict_is_found_once(no_verdicts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert in_place_works()
    monkeypatch.setattr(bank_module, "byte_view", fails_with(AssertionError("checked again")))
    assert in_place_works()


def a_copy(array: mx.array) -> memoryview:
    """What a device with separate memory would expose."""
    return memoryview(bytearray(byte_view(array)))


def half_the_bytes(array: mx.array) -> memoryview:
    return byte_view(array)[: array.nbytes // 2]


def read_only(array: mx.array) -> memoryview:
    return byte_view(array).toreadonly()


def fails_with(error: Exception) -> Callable[[mx.array], memoryview]:
    def view(array: mx.array) -> memoryview:
        raise error

    return view


@pytest.mark.parametrize(
    "broken",
    [
        a_copy,
        half_the_bytes,
        read_only,
        *(fails_with(kind("no")) for kind in (BufferError, TypeError, ValueError, RuntimeError)),
    ],
)
def test_a_device_on_which_it_does_not_work_is_found_out(
    broken: Callable[[mx.array], memoryview],
    no_verdicts: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bank_module, "byte_view", broken)
    assert not in_place_works()
    assert not in_place_works()  # remembered


@pytest.mark.parametrize("writes_seen", [0, 1, 2])
def test_a_device_that_sees_only_the_first_write_is_found_out(
    writes_seen: int, no_verdicts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stale copy on the device shows only at the second write to the same memory."""
    real, written = bank_module._write, [0]

    def lossy(view: memoryview, content: np.ndarray) -> None:
        written[0] += 1
        if written[0] <= writes_seen:
            real(view, content)

    monkeypatch.setattr(bank_module, "_write", lossy)
    assert not in_place_works()


@pytest.mark.parametrize("bad", [mx.uint32, mx.bfloat16, mx.float32, mx.uint8], ids=str)
def test_one_element_type_that_does_not_work_is_enough(
    bad: mx.Dtype, no_verdicts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        bank_module, "byte_view", lambda a: a_copy(a) if a.dtype == bad else byte_view(a)
    )
    assert not in_place_works()


def test_slices_that_are_copies_are_found_out(
    no_verdicts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run-ahead's tables are slices of one array, which is written through its memory."""
    monkeypatch.setattr(
        bank_module, "byte_view", lambda a: a_copy(a) if a.ndim == 3 else byte_view(a)
    )
    assert "slices" in (bank_module.in_place_fault() or "")
    assert not in_place_works()


def test_writing_that_disturbs_its_neighbour_is_found_out(
    no_verdicts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the device wrote a stale page back while kernels read another part of the array."""
    real = bank_module._write

    def torn(view: memoryview, content: np.ndarray) -> None:
        real(view, content if len(view) != 4096 * 4 else np.zeros_like(content))

    monkeypatch.setattr(bank_module, "_write", torn)
    assert "another part" in (bank_module.in_place_fault() or "")
    assert not in_place_works()

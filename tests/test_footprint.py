"""The memory of a pass is predicted before it runs, and compared with MLX's own measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx_lm.utils
import pytest
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlx_streamexperts._loading.discover import expert_modules
from mlx_streamexperts._memory import footprint
from mlx_streamexperts._memory.footprint import Footprint, LayerCache
from mlx_streamexperts._memory.model_graph import measure
from mlx_streamexperts._memory.peak import evaluation_order, peak_bytes

SMALL = Footprint(
    layers=((LayerCache(100), LayerCache(10, kept=512)), (LayerCache(0, 7),)),
    chunks=(2, 512),
    contexts=(512, 1 << 15),
    peaks=((0, 0), (510_000, 51_000_000)),
    totals=((0, 0), (10**9, 10**9)),
    logits=0,
)


def test_a_footprint_predicts_any_pass_from_the_graph_alone(
    checkpoint: Callable[..., Path],
) -> None:
    model, config = mlx_lm.utils.load_model(checkpoint("qwen3_moe"), lazy=True)
    measured = measure(model, expert_modules(model), config)
    assert measured.kv(context=2000) > measured.kv(context=1000) > 1000 * measured.token
    assert measured.work(chunk=64, context=1000) > measured.work(chunk=1, context=1000)
    room = measured.work(chunk=256, context=256)
    assert measured.longest_chunk(room, past=0, longest=4096) == 256
    assert measured.longest_chunk(room, past=4096, longest=4096) < 256  # keys need room too


def test_kv_grows_with_the_context_but_for_windows_and_states() -> None:
    steps = footprint.STEP - 1
    assert SMALL.kv(300) == (300 + steps) * 110 + 7 + 0
    assert SMALL.kv(2000) == (2000 + steps) * 100 + (512 + steps) * 10 + 7
    assert SMALL.kv(2000, chunk=64) - SMALL.kv(2000) == 64 * 10
    assert SMALL.of_layers(1, 2).kv(2000) == 7
    assert (SMALL.token, SMALL.state) == (110, 7)


def test_chunks_get_shorter_as_the_context_grows() -> None:
    room = SMALL.work(2048, 2048)
    lengths = [SMALL.longest_chunk(room, past, 4096) for past in (0, 512, 4096, 16384)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > 2 * lengths[-1] > 0
    for past, n in zip((0, 512, 4096, 16384), lengths, strict=True):
        assert SMALL.work(n, past + n) <= room < SMALL.work(n + 1, past + n + 1)
    assert SMALL.longest_chunk(0, 0, 4096) == 1  # one always runs
    assert SMALL.longest_chunk(room, 0, 4096, sequences=4) < lengths[0] // 2 + 64


def trace(run: Callable[..., Any], *inputs: mx.array) -> tuple[list[dict[str, Any]], list[str]]:
    nodes, outputs = [], []

    def note(found: dict[str, Any]) -> None:
        if found["type"] == "primitive":
            nodes.append(found)
        elif found["type"] == "outputs":
            outputs.extend(n for n, _, _ in found["outputs"])

    mx.export_function(note, run, *inputs)
    return nodes, outputs


@pytest.mark.parametrize(
    ("run", "peak"),
    [
        (lambda a: (a + 1) * 2, 1),  # the second result takes the first one's memory
        (lambda a: a @ a, 1),
        (lambda a: (a @ a) @ a, 2),  # a matmul cannot write over what it reads
        (lambda a: [a @ a, a + 1], 2),
        (lambda a: a.T.reshape(-1), 1),  # a copy
        (lambda a: a.reshape(-1), 0),
        (lambda a: mx.softmax(a @ a, axis=-1) @ a, 2),
    ],
)
def test_the_peak_of_small_graphs(run: Callable[..., Any], peak: int) -> None:
    a = mx.zeros((64, 64))
    nodes, outputs = trace(run, a)
    assert peak_bytes(evaluation_order(nodes, outputs), outputs, ()) // a.nbytes == peak


def test_what_is_held_is_freed_after_its_last_use() -> None:
    a = mx.zeros((64, 64))
    nodes, outputs = trace(lambda x: (x @ x) @ mx.ones((64, 64)), a)
    mine = nodes[0]["inputs"][0][0]
    alone = peak_bytes(evaluation_order(nodes, outputs), outputs, ())
    assert peak_bytes(evaluation_order(nodes, outputs), outputs, [mine]) == alone - a.nbytes


@pytest.fixture
def one_after_the_other() -> Iterator[None]:
    """MLX begins no operation before the one before has ended."""
    before = mx.set_memory_limit(1)
    yield
    mx.set_memory_limit(before)


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family_takes_what_was_foreseen(
    family: str, checkpoint: Callable[..., Path], one_after_the_other: None
) -> None:
    """Stock's own passes, each operation after the other, at the end of a context."""
    folder = checkpoint(family)
    lazy, _ = mlx_lm.utils.load_model(folder, lazy=True)
    foreseen = measure(lazy, expert_modules(lazy), {})
    model, _ = mlx_lm.utils.load_model(folder)
    caches = make_prompt_cache(model)
    try:
        mx.eval(model(mx.zeros((1, 8), mx.int32), cache=caches))
    except RuntimeError as e:
        assert "Metal" in str(e)
        assert foreseen.work(64, 512) > 0  # an estimate: this family needs a Mac
        return
    caches = make_prompt_cache(model)
    for chunk in (384, 128):
        mx.eval([c.state for c in caches])
        mx.clear_cache()
        before, kept = mx.get_active_memory(), sum(c.nbytes for c in caches)
        mx.reset_peak_memory()
        model(mx.zeros((1, chunk), mx.int32), cache=caches)
        mx.eval([c.state for c in caches])
        grown = sum(c.nbytes for c in caches) - kept
        assert mx.get_peak_memory() - before - grown <= foreseen.work(chunk, 512)
    assert sum(c.nbytes for c in caches) <= foreseen.kv(512, 384)


def test_a_model_that_cannot_be_traced_is_estimated(
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, config = mlx_lm.utils.load_model(checkpoint("qwen3_moe"), lazy=True)
    traced = measure(model, expert_modules(model), config)

    def fail(*_: Any) -> None:
        raise ValueError("[export_function] Unable to get state for primitive New")

    monkeypatch.setattr(mx, "export_function", fail)
    estimated = measure(model, expert_modules(model), config)
    assert "Unable to get state for primitive New" in caplog.text
    assert estimated.kv(1000) >= traced.kv(1000)
    for chunk, context in ((1, 4096), (64, 512), (512, 4096)):
        assert estimated.work(chunk, context) >= traced.work(chunk, context)


def test_tracing_leaves_the_model_as_it_was(checkpoint: Callable[..., Path]) -> None:
    """Nothing is computed, and nothing of it is found in the model afterwards."""
    model, _ = mlx_lm.utils.load_model(checkpoint("kimi_k3"), lazy=True)
    kinds = [type(m) for m in model.modules()]
    operations = {name: getattr(mx, name) for name in ("contiguous", "to_fp8", "from_fp8")}
    before = mx.get_active_memory()
    measure(model, expert_modules(model), {})
    assert mx.get_active_memory() - before < 1 << 20
    assert [type(m) for m in model.modules()] == kinds
    assert {name: getattr(mx, name) for name in operations} == operations
    mx.eval(model(mx.array([[1, 2, 3]])))


def test_room_in_caches() -> None:
    full, window = KVCache(), RotatingKVCache(8)
    assert footprint.allocated([window, full], 1) == 256  # nothing is there yet
    full.update_and_fetch(mx.zeros((1, 1, 250, 4)), mx.zeros((1, 1, 250, 4)))
    assert footprint.allocated([window, full], 6) == 0
    assert footprint.allocated([window, full], 7) == 256
    assert footprint.tokens_in(full) == 250
    layers = ((LayerCache(100, kept=8),), (LayerCache(10),))
    small = replace(SMALL, layers=layers)
    assert not footprint.windows_full([window, full], 4)
    assert small.grown(256, 4) == 100 * 12 + 10 * 256
    window.update_and_fetch(mx.zeros((1, 1, 11, 4)), mx.zeros((1, 1, 11, 4)))
    assert footprint.windows_full([window, full], 4)  # 7 of the window and 4 new ones
    assert not footprint.windows_full([window, full], 5)
    assert small.grown(256, 4, windows_full=True) == 10 * 256


def test_a_gpu_holds_what_it_has_not_finished() -> None:
    """As much as a group of operations has, but no more than the whole pass."""
    gpu = replace(SMALL, unfinished=10**6)
    assert gpu.work(512, 512) - SMALL.work(512, 512) == 10**6
    small = replace(gpu, totals=((0, 0), (600_000, 600_000)))
    assert small.work(512, 512) - SMALL.work(512, 512) == 600_000 - 510_000

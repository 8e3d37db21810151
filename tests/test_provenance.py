"""Which stored bytes a table consists of, found by tracing what `sanitize` does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import originals
import pytest
from families import run, token_stream
from mlx_lm.models import qwen3_moe

from mlx_streamexperts import UnsupportedModelError, load, stream
from mlx_streamexperts._loading.provenance import Weights, trace


def test_rows_cut_out_of_a_fused_table_are_found() -> None:
    """Three experts; the first two of four rows of width 5 are the gate, the others go up."""
    weights = {"gate_up": mx.zeros((3, 4, 5))}

    def sanitize(weights: Weights) -> Weights:
        gate, up = mx.split(weights["gate_up"], 2, axis=-2)
        return {"gate": mx.contiguous(gate), "up": up, "twice": 2 * up}

    found = trace(sanitize, weights)
    assert found.keys() == {"gate", "up"}  # what is computed lies nowhere
    assert found["gate"].ranges == tuple(("gate_up", at, 40) for at in (0, 80, 160))  # bytes
    assert found["up"].rows() == [(("gate_up", at, 40),) for at in (40, 120, 200)]
    assert found["up"].shape == (3, 2, 5)


WAYS: dict[str, Callable[[Weights], mx.array]] = {
    "the table itself": lambda w: w["a"],
    "first rows": lambda w: w["a"][..., :3, :],
    "last rows": lambda w: w["a"][:, 3:, :],
    "some experts": lambda w: w["a"][1:3],
    "some experts, some rows": lambda w: w["a"][1:3, 2:5],
    "stacked": lambda w: mx.stack([w["b"], w["c"]]),
    "stacked and split": lambda w: mx.split(mx.stack([w["b"], w["c"]]), 2, axis=1)[1],
    "split and stacked": lambda w: mx.stack([w["b"][3:], w["c"][3:]]),
    "other type over the same bytes": lambda w: w["a"].view(mx.uint8)[:, 3:],
    "joined last axes": lambda w: w["a"].reshape(4, 3, 14)[:, 1:],
    "two tables one after the other": lambda w: mx.concatenate([w["a"], w["a"]]),
    "copied": lambda w: mx.array(w["a"]),
    "joined along rows": lambda w: mx.concatenate([w["a"], w["a"][:, 1:3]], axis=1),
    "joined, and one more": lambda w: mx.concatenate(
        [
            mx.concatenate([w["a"][:, :4], w["a"][:, :2]], axis=1),
            mx.expand_dims(mx.concatenate([w["b"][:3], w["c"][:3]]), 0),
        ]
    ),
    "experts divided otherwise": lambda w: w["a"][:, :3].reshape(2, 6, 7),
}
UNKNOWN: dict[str, Callable[[Weights], mx.array]] = {
    "an expert by its number": lambda w: w["a"][1],  # a gather, whose index is a value
    "every second row": lambda w: w["a"][:, ::2],
    "columns": lambda w: w["a"][..., :2],
    "transposed": lambda w: w["a"].swapaxes(-1, -2),
    "of another type": lambda w: w["a"].astype(mx.float16),
    "joined along columns": lambda w: mx.concatenate([w["a"], w["a"]], axis=2),
    "computed": lambda w: w["a"] + 1,
}


def arrays() -> Weights:
    chance = np.random.default_rng(0)
    return {
        "a": mx.array(chance.normal(size=(4, 6, 7)).astype(np.float32)),
        "b": mx.array(chance.normal(size=(6, 7)).astype(np.float32)),
        "c": mx.array(chance.normal(size=(6, 7)).astype(np.float32)),
    }


@pytest.mark.parametrize("way", WAYS)
def test_ranges_hold_the_bytes_of_the_result(way: str) -> None:
    weights = arrays()
    stored = trace(lambda w: {"y": WAYS[way](w)}, weights)["y"]
    expected = WAYS[way](weights)
    assert stored.shape == tuple(expected.shape)
    assert stored.item_bytes == expected.dtype.size
    files = {name: np.array(a).tobytes() for name, a in weights.items()}
    rows = [
        b"".join(files[name][offset : offset + nbytes] for name, offset, nbytes in row)
        for row in stored.rows()
    ]
    assert rows == [np.array(row).tobytes() for row in expected]


@pytest.mark.parametrize("way", UNKNOWN)
def test_what_is_not_a_range_of_bytes_is_unknown(way: str) -> None:
    assert trace(lambda w: {"y": UNKNOWN[way](w)}, arrays()) == {}


def test_a_function_that_looks_at_values_tells_nothing() -> None:
    def sanitize(weights: Weights) -> Weights:
        return {"y": weights["a"][:, :3]} if weights["a"].sum().item() > 0 else {}

    assert trace(sanitize, arrays()) == {}


def test_a_trace_takes_no_random_numbers() -> None:
    """Some `sanitize` builds a model; the caller may have set the seed before loading."""
    drawn = []
    for traced in (False, True):
        mx.random.seed(2**40 + 5)
        mx.random.uniform()
        if traced:
            trace(lambda w: {"a": w["a"] + mx.random.normal(w["a"].shape)}, {"a": mx.zeros((3,))})
        drawn.append(mx.random.uniform(shape=(4,)).tolist())
    assert drawn[0] == drawn[1]


def test_mlx_is_left_as_it_was() -> None:
    before = mx.contiguous
    trace(lambda w: {"y": mx.contiguous(w["a"])}, arrays())
    assert mx.contiguous is before


def test_a_published_checkpoint_with_fused_tables_streams_as_it_is(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    built = checkpoint("qwen3_5_moe", dtype=mx.float32, quantize=None)
    folder = originals.write(built, tmp_path / "published", originals.fused)
    stock, _ = mlx_lm.utils.load_model(folder)
    size = 2 * 4 * 49_152  # four experts of each of two layers
    model, _ = load(str(folder), cache=size)
    tokens = token_stream(64, 40, seed=1)
    for got, expected in zip(run(model, tokens, 12), run(stock, tokens, 12), strict=True):
        assert np.array_equal(got, expected)
    assert stream(model).stats().cache.misses > 0


def test_a_table_that_is_changed_in_place_is_no_stored_one(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`a *= 2` leaves the object that was loaded, with other values."""

    def sanitize(self: object, weights: Weights) -> Weights:
        for name, array in weights.items():
            if "down_proj.scales" in name:
                array *= 2
        return weights

    folder = checkpoint("qwen3_moe")
    monkeypatch.setattr(qwen3_moe.Model, "sanitize", sanitize)
    with pytest.raises(UnsupportedModelError, match=r"down_proj\.scales"):
        load(str(folder), cache="100MB")

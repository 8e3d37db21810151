"""The path of a token: router indices -> slots -> bytes -> matmul."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from conftest import load_streamed, smallest_cache

from mlx_streamexperts import ExpertStream, StreamError, stream
from mlx_streamexperts._experts.layer import PHASES, ExpertLayer, StopForward, probe

X = mx.random.normal((1, 1, families.HIDDEN), key=mx.random.key(0))  # one token


def test_a_layer_reads_the_experts_that_it_misses(two: tuple[ExpertLayer, Any]) -> None:
    layer, stock = two
    indices = mx.array([[[0, 2, 4, 6]]])  # [1, 1, K]
    assert mx.array_equal(layer(X, indices), stock(X, indices))  # [1, 1, K, D]
    assert layer.cache.stats.misses == 4
    assert {0, 2, 4, 6} <= set(layer.cache.resident)
    assert mx.array_equal(layer(X, indices), stock(X, indices))
    assert (layer.cache.stats.misses, layer.cache.stats.hits) == (4, 4)


@pytest.fixture
def two(checkpoint: Callable[..., Path]) -> Any:
    """A layer with the fewest slots, and stock mlx-lm's module for it."""
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        layer = expert_stream.layers[0]
        layer.reset()
        yield layer, stock.layers[1].mlp.switch_mlp


def test_the_synced_forward_returns_its_experts_and_whether_one_was_missing(
    two: tuple[ExpertLayer, Any],
) -> None:
    layer, stock = two
    indices = mx.array([[[3, 1, 3, 5]]])
    for missed in (True, False):
        result = layer.forward_synced(X, indices)
        assert mx.array_equal(result.output, stock(X, indices))
        assert result.needed == [3, 1, 5]  # distinct, in the order of the indices
        assert result.missed == missed


def test_more_experts_than_slots_pass_through_in_waves(two: tuple[ExpertLayer, Any]) -> None:
    layer, stock = two
    x = mx.random.normal((1, 30, families.HIDDEN), key=mx.random.key(1))
    indices = mx.array(np.arange(120).reshape(1, 30, 4) % layer.experts)
    assert layer.experts > layer.cache.slots
    assert mx.array_equal(layer(x, indices), stock(x, indices))
    assert layer.stats.waves > 0
    assert layer.cache.stats.misses == layer.experts  # each read once


def test_its_phases_are_counted_and_reported(two: tuple[ExpertLayer, Any]) -> None:
    layer, _ = two
    phases: list[str] = []
    layer.on_phase.add(lambda phase, name, begin, end: phases.append(phase))
    mx.eval(layer(X, mx.array([[[0, 1, 2, 3]]])))
    assert (phases[:2], phases[-2:]) == (["sync", "map"], ["wait", "build"])
    assert set(layer.stats.seconds) == set(PHASES)
    assert all(seconds > 0 for seconds in layer.stats.seconds.values())


def test_a_probed_layer_stops_at_its_experts(
    streamed: tuple[nn.Module, ExpertStream],
) -> None:
    model, expert_stream = streamed
    layer, switch = expert_stream.layers[0], model.layers[1].mlp.switch_mlp
    calls, indices = layer.stats.calls, mx.array([[[0, 1]]])
    probe.layer = layer
    try:
        with pytest.raises(StopForward) as stopped:
            switch(X, indices)
    finally:
        probe.layer = None
    assert stopped.value.indices is indices
    assert layer.stats.calls == calls


def test_a_closed_layer_says_so(two: tuple[ExpertLayer, Any]) -> None:
    layer, _ = two
    layer.close()
    with pytest.raises(StreamError, match="expert stream is closed"):
        layer(X, mx.array([[[0, 1]]]))

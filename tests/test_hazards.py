"""Forward passes that are built but not yet evaluated survive the reuse of their slots.

MLX is lazy and slots are written in place: a matmul reads what its slot holds when it runs. Each
test builds graphs that stock mlx-lm would evaluate correctly in any order.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from pathlib import Path

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from conftest import load_streamed, smallest_cache
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import ExpertStream, stream


@pytest.fixture
def pair(checkpoint: Callable[..., Path]) -> tuple[nn.Module, nn.Module]:
    """Stock and streamed model; the latter with the fewest slots that decode can do with."""
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40)
    expert_stream = stream(model)
    expert_stream.resize(smallest_cache(expert_stream))
    return stock, model


def token(seed: int) -> mx.array:
    return mx.array(families.token_stream(families.VOCAB, 1, seed))[None]


def test_passes_built_before_any_is_evaluated(pair: tuple[nn.Module, nn.Module]) -> None:
    stock, model = pair
    built = [model(token(s)) for s in range(12)]  # lazy: each overwrites the slots of the last
    for s in reversed(range(12)):
        assert mx.array_equal(built[s], stock(token(s))), f"pass {s}"


def test_last_layer_output_is_not_overwritten(pair: tuple[nn.Module, nn.Module]) -> None:
    """The last layer is the dangerous one: nothing after it forces its evaluation."""
    stock, model = pair
    layer, reference = model.layers[-1].mlp.switch_mlp, stock.layers[-1].mlp.switch_mlp
    x = mx.random.normal((1, 1, families.HIDDEN))
    k, experts = 4, layer.layer.experts
    picks = [mx.array([[[(i + j) % experts for j in range(k)]]]) for i in range(0, experts, k)]
    lazy = [layer(x, p) for p in picks]  # nothing evaluated between them
    for p, y in zip(picks, lazy, strict=True):
        assert mx.array_equal(y, reference(x, p))


def test_interleaved_sequences(pair: tuple[nn.Module, nn.Module]) -> None:
    """Sequences advance in random order; their logits are looked at only at the end."""
    stock, model = pair
    order = random.Random(7)
    caches = [[make_prompt_cache(m) for m in (stock, model)] for _ in range(3)]
    expected, lazy = [], []
    for step in range(40):
        which = order.randrange(3)
        t = token(1000 + step)
        expected.append(np.array(stock(t, cache=caches[which][0])))
        lazy.append(model(t, cache=caches[which][1]))
        if order.random() < 0.2:
            mx.async_eval(lazy[-1])
    for step, (a, b) in enumerate(zip(expected, lazy, strict=True)):
        assert np.array_equal(a, np.array(b)), f"step {step}"


def test_abandoned_passes(pair: tuple[nn.Module, nn.Module]) -> None:
    stock, model = pair
    for s in range(20):
        model(token(500 + s))  # dropped, never evaluated
        if s % 3 == 0:
            assert mx.array_equal(model(token(s)), stock(token(s)))


def test_long_prefill_beside_lazy_decode(pair: tuple[nn.Module, nn.Module]) -> None:
    stock, model = pair
    lazy = model(token(1))
    prompt = mx.array(families.token_stream(families.VOCAB, 120, 2))[None]
    after = model(prompt)  # waves: every slot is overwritten several times
    assert mx.array_equal(lazy, stock(token(1)))
    assert mx.array_equal(after, stock(prompt))


def test_several_threads_with_evaluated_results(pair: tuple[nn.Module, nn.Module]) -> None:
    """Threads that evaluate what they build share one streamed model."""
    stock, model = pair
    expected = {s: np.array(stock(token(s))) for s in range(16)}
    mx.eval(model(token(99)))
    wrong: list[int] = []

    def work(seeds: range) -> None:
        for s in seeds:
            if not np.array_equal(np.array(model(token(s))), expected[s]):
                wrong.append(s)

    first = threading.Thread(target=work, args=(range(8),))
    first.start()
    first.join()
    second = threading.Thread(target=work, args=(range(8, 16),))
    second.start()
    second.join()
    assert not wrong


def test_resize_keeps_lazy_results(pair: tuple[nn.Module, nn.Module]) -> None:
    stock, model = pair
    expert_stream: ExpertStream = stream(model)
    lazy = model(token(4))
    expert_stream.resize(2 * smallest_cache(expert_stream))
    assert mx.array_equal(lazy, stock(token(4)))
    assert mx.array_equal(model(token(5)), stock(token(5)))

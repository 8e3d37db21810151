"""A call divided over processor cores: which parts, in which streams, and when not."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_streamexperts import StreamConfig, StreamError
from mlx_streamexperts._experts import cpu_streams
from mlx_streamexperts._experts.cpu_streams import CpuStreams

pytestmark = pytest.mark.skipif(
    mx.default_device() != mx.cpu, reason="a GPU divides its rows itself"
)
LARGE = 1 << 20  # bytes of an expert


class Spy(nn.Module):
    """A `SwitchGLU` that notes the shapes of its calls and the streams that they run in."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = SwitchGLU(32, 16, 6)
        self.calls: list[tuple[tuple[int, ...], mx.Stream]] = []

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        self.calls.append((indices.shape, mx.default_stream(mx.cpu)))
        return self.switch(x, indices)


def test_a_call_in_parts_gives_the_bits_of_the_whole() -> None:
    """Two cores: two tokens each, computed in two streams, joined in order."""
    switch = SwitchGLU(32, 16, 6)
    x, chosen = mx.random.normal((4, 32)), mx.array([[0, 5], [1, 4], [2, 3], [3, 2]])
    y = CpuStreams(cores=2).run(switch, x, chosen, expert_bytes=LARGE)
    assert mx.array_equal(y, switch(x, chosen))


@pytest.mark.parametrize(
    ("tokens", "top_k", "parts"),
    [
        ((1, 1), 4, [(1, 1, 1), (1, 1, 1), (1, 1, 2)]),
        ((1, 50), 4, [(1, 16, 4), (1, 17, 4), (1, 17, 4)]),
        ((5, 1), 4, [(1, 1, 4), (2, 1, 4), (2, 1, 4)]),
        ((200,), 1, [(66, 1), (67, 1), (67, 1)]),
        ((1, 1), 2, [(1, 1, 1), (1, 1, 1)]),
        ((1, 1), 1, [(1, 1, 1)]),
    ],
)
def test_a_call_is_divided_along_its_longest_dimension(
    tokens: tuple[int, ...], top_k: int, parts: list[tuple[int, ...]]
) -> None:
    spy = Spy()
    x = mx.random.normal((*tokens, 32))
    chosen = mx.random.randint(0, 6, (*tokens, top_k))
    expected = spy.switch(x, chosen)
    got = CpuStreams(3).run(spy, x, chosen, LARGE)
    assert mx.array_equal(expected, got)
    assert [shape for shape, _ in spy.calls] == parts
    assert len({str(stream) for _, stream in spy.calls}) == len(parts)
    assert mx.default_stream(mx.cpu) == spy.calls[0][1]  # as before


def test_tokens_that_all_experts_share_are_not_divided() -> None:
    spy = Spy()
    x = mx.random.normal((1, 32))  # for all of five calls
    chosen = mx.random.randint(0, 6, (5, 4))
    assert mx.array_equal(spy.switch(x, chosen), CpuStreams(2).run(spy, x, chosen, LARGE))
    assert [shape for shape, _ in spy.calls] == [(5, 2), (5, 2)]


def test_small_calls_stay_whole() -> None:
    spy = Spy()
    x, chosen = mx.random.normal((1, 1, 32)), mx.array([[[0, 1, 2, 3]]])
    CpuStreams(3).run(spy, x, chosen, 1000)
    CpuStreams(3).run(spy, x, chosen, cpu_streams._LEAST_BYTES // 2)
    assert [shape for shape, _ in spy.calls] == [(1, 1, 4), (1, 1, 2), (1, 1, 2)]


def test_one_core_or_a_gpu_has_calls_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CpuStreams(1).count == 1
    monkeypatch.setattr(cpu_streams, "usable_cores", lambda: 1000)
    assert CpuStreams().count == cpu_streams._MOST
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    assert CpuStreams().count == CpuStreams(8).count == 1
    with pytest.raises(StreamError, match="cores must be at least 1"):
        StreamConfig(cores=0)


def test_a_second_thread_leaves_the_cores_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    shared, spy = CpuStreams(2), Spy()
    x, chosen = mx.random.normal((1, 1, 32)), mx.array([[[0, 1, 2, 3]]])
    expected = spy.switch(x, chosen)
    mx.eval(expected, x)

    def call() -> None:
        assert mx.array_equal(expected, shared.run(spy, x, chosen, LARGE))

    call()
    with ThreadPoolExecutor(1) as another:
        another.submit(call).result()
    assert [shape[-1] for shape, _ in spy.calls] == [2, 2, 4]
    monkeypatch.setattr(cpu_streams, "_IDLE_SECONDS", 0.0)  # the first has not called for that long
    with ThreadPoolExecutor(1) as another:
        another.submit(call).result()
    assert [shape[-1] for shape, _ in spy.calls] == [2, 2, 4, 2, 2]

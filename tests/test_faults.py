"""A failed read raises from the forward pass, names what failed, and spoils no later call."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from conftest import load_streamed, smallest_cache

from mlx_streamexperts import ExpertReadError, stream
from mlx_streamexperts import _osinfo as platform

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


def fail_with(number: int, after: int) -> Callable[[int, Sequence[memoryview], int], int]:
    """A `read_into` that works `after` times, then raises."""
    real, calls = platform.read_into, [0]

    def read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(number, os.strerror(number))
        return real(fd, buffers, offset)

    return read


@pytest.mark.parametrize("after", [0, 1, 5, 40])
def test_io_error_leaves_the_model_usable(
    after: int, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        with monkeypatch.context() as m:
            m.setattr(platform, "read_into", fail_with(errno.EIO, after))
            with pytest.raises(ExpertReadError) as e:
                mx.eval(model(TOKENS))
        assert e.value.errno == errno.EIO
        assert e.value.layer.startswith("model.layers.")
        assert e.value.tensor.startswith(e.value.layer)
        assert e.value.file.parent == folder
        assert 0 <= e.value.expert < expert_stream.layers[0].experts
        for _ in range(2):
            assert np.array_equal(np.array(model(TOKENS)), np.array(stock(TOKENS)))


def test_a_shard_that_shrinks_is_an_end_of_file(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = np.array(stock(TOKENS))
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        shards = {p: p.read_bytes() for p in folder.glob("*.safetensors")}
        for shard in shards:
            os.truncate(shard, 1000)
        with pytest.raises(ExpertReadError, match="end of file") as e:
            mx.eval(model(TOKENS))
        assert e.value.errno is None
        for shard, content in shards.items():
            with shard.open("r+b") as f:
                f.write(content)
        assert np.array_equal(np.array(model(TOKENS)), expected)


def test_interrupt_leaves_no_slot_with_wrong_bytes(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("qwen3_moe")
    stock, _ = mlx_lm.utils.load_model(folder)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        from mlx_streamexperts._io import reader

        with monkeypatch.context() as m:
            m.setattr(reader.Ticket, "wait_for_any", interrupted)
            with pytest.raises(KeyboardInterrupt):
                mx.eval(model(TOKENS))
        assert np.array_equal(np.array(model(TOKENS)), np.array(stock(TOKENS)))


def interrupted(ticket: object, experts: object) -> None:
    raise KeyboardInterrupt

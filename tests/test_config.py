"""Options: sizes are numbers of bytes or strings, and what was stated is not taken for a default.

>>> parse_size("96GB"), parse_size("24GiB"), parse_size(96e9)
(96000000000, 25769803776, 96000000000)
"""

from __future__ import annotations

import argparse
import math

import numpy as np
import pytest

from mlx_streamexperts import StreamConfig, StreamError
from mlx_streamexperts._cli.options import following_stock_options
from mlx_streamexperts._config import add_arguments, from_arguments, parse_size


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (1, 1),
        (np.int64(5), 5),
        (np.float32(8), 8),
        (96e9, 96 * 10**9),
        ("96GB", 96 * 10**9),
        ("1.5g", 1_500_000_000),
        ("2KiB", 2048),
    ],
)  # fmt: skip
def test_sizes(size: float | str, nbytes: int) -> None:
    assert parse_size(size) == nbytes
    assert isinstance(parse_size(size), int)
    assert StreamConfig(memory=size).memory == size


@pytest.mark.parametrize("size", [0, -1, 0.3, math.nan, math.inf, True, "many", "", "-1GB", [1]])
def test_what_is_no_size(size: object) -> None:
    with pytest.raises(StreamError, match="size"):
        StreamConfig(memory=size)  # type: ignore[arg-type]


@pytest.mark.parametrize("option", ["threads", "context_tokens", "prefill_tokens", "cores"])
def test_counts_are_whole_numbers(option: str) -> None:
    for wrong in (0, -1, 1.5, "64", math.nan, True):
        with pytest.raises(StreamError, match=f"{option} must be"):
            StreamConfig(**{option: wrong})
    assert type(getattr(StreamConfig(**{option: np.int64(7)}), option)) is int


def parsed(*argv: str) -> StreamConfig:
    """What a command line with mlx-lm's `--max-kv-size` comes to."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-kv-size", type=int)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return following_stock_options(from_arguments(args), args)


def test_a_context_that_is_stated_is_kept_beside_max_kv_size() -> None:
    assert parsed().context_tokens is None
    assert parsed("--max-kv-size", "32768").context_tokens == 32768
    for stated in (4096, 100):  # the first is what nobody states comes to
        argv = ("--context-tokens", str(stated), "--max-kv-size", "32768")
        assert parsed(*argv).context_tokens == stated


def test_force_is_short_for_oversubscribe() -> None:
    assert [parsed(*argv).oversubscribe for argv in ((), ("--force",), ("--oversubscribe",))] == [
        False, True, True,
    ]  # fmt: skip

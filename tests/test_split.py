"""Calls in parts: the rows of every part, and each row's own factor."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.switch_layers import SwitchGLU

from mlx_streamexperts._experts.cpu_streams import CpuStreams, called
from mlx_streamexperts._experts.split import RowRule, SplitCall

EXPERTS = 6
SLOT_OF = np.arange(EXPERTS)[::-1].astype(np.int32)


class Weighted(nn.Module):
    """Experts that take a factor for each row, as DeepSeek V4.1's do."""

    def __init__(self) -> None:
        super().__init__()
        self.switch = SwitchGLU(32, 16, EXPERTS)

    def __call__(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        return self.switch(x, indices) * weights[..., None]


@pytest.mark.parametrize(
    "rule", [RowRule(), RowRule(count=True, padded=True)], ids=["rows alone", "padded"]
)
@pytest.mark.parametrize("tokens", [(1, 1), (1, 5), (2, 40)])
def test_each_rows_factor_goes_with_it(rule: RowRule, tokens: tuple[int, int]) -> None:
    module = Weighted()
    rng = np.random.default_rng(0)
    x = mx.random.normal((*tokens, 32), key=mx.random.key(0))
    experts = rng.integers(0, EXPERTS, (*tokens, 4))
    weights = mx.random.normal((*tokens, 4), key=mx.random.key(1))

    def run(x: mx.array, slots: mx.array, weights: mx.array | None) -> mx.array:
        return CpuStreams(3).run(module, x, slots, 1 << 20, weights)

    split = SplitCall(run, x, experts, weights, SLOT_OF, EXPERTS, rule)
    for part in ([5, 0], [1, 2], [3, 4]):
        split.run(split.rows_of(part))
    whole = called(module, x, mx.array(SLOT_OF[experts].astype(np.uint32)), weights)
    assert mx.array_equal(split.joined(), whole)

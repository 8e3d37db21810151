"""mlx-vlm's families stream with the bits of its own loader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import families as lm
import mlx.core as mx
import numpy as np
import pytest
from vlm_families import FAMILIES, METAL_FAMILIES, TEXT, make_vlm_checkpoint, run

from mlx_streamexperts import StreamConfig, UnsupportedModelError, patch, stream

utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")

# Families whose experts cannot be streamed yet, and what the refusal names.
REFUSED = {
    "deepseek_v41": "DeepseekV41SwitchGLU",  # takes a value for each row
    "deepseek_v41_engram": "DeepseekV41SwitchGLU",
    "inkling": "InklingSwitchGLU",  # scales indexed by expert
    "minicpmv4_7": "mlx_streamexperts.convert",  # copies every weight while loading
    "moondream3": "MoEMLP",
    "openai_privacy_filter": "Experts",
    "zaya1_vl": "ZayaSwitchMLP",
}
TOKENS = lm.token_stream(TEXT, 24, 0)


@pytest.fixture(autouse=True)
def not_compiled() -> Iterator[None]:
    """Compiling for a CPU takes longer than everything else here."""
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in METAL_FAMILIES])
@pytest.mark.parametrize("bits", [None, 4])
def test_a_family_streams_with_misses_bit_by_bit(
    family: str, bits: int | None, tmp_path: Path
) -> None:
    folder = make_vlm_checkpoint(tmp_path / family, family, bits=bits)
    stock = utils.load_model(folder)
    config = StreamConfig(progress=False)
    with patch(cache="100MB", config=config) as patched:
        try:
            whole = utils.load_model(folder)
        except UnsupportedModelError as e:
            assert family in REFUSED
            assert REFUSED[family] in str(e)
            return
    assert family not in REFUSED
    layers = patched.streams[0].layers
    least = sum(2 * x.expert_bytes for x in layers)
    patched.streams[0].close()
    del whole
    with patch(cache=2 * least, config=config):
        model = utils.load_model(folder)
    for got, expected in zip(run(model, TOKENS, 12), run(stock, TOKENS, 12), strict=True):
        assert np.array_equal(got, expected)
    assert stream(model).stats().cache.misses > 0

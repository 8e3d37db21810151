"""Vision towers, which the headline models are published with, are neither charged nor loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import families
import mlx.core as mx
import mlx_lm.utils
import originals
import pytest
from conftest import QUIET, all_experts, assert_same, load_streamed
from mlx_lm.convert import convert as stock_convert
from test_convert import FORMS, FOUR_BITS, assert_same_model, tensors

from mlx_streamexperts import UnsupportedModelError, plan, stream
from mlx_streamexperts._experts.stream import flatten
from mlx_streamexperts._io.checkpoint import read_checkpoint
from mlx_streamexperts.convert._command import main

Build = Callable[..., Path]
VISION = {"vision_config": {"depth": 2, "hidden_size": 64}}


def assert_streams(folder: Path, expected: list, tokens: object) -> None:
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        expert_stream.resize(all_experts(expert_stream) // 2)
        expert_stream.reset()
        assert_same(expected, families.run(model, tokens, 12), folder.name)  # type: ignore[arg-type]
        assert expert_stream.stats().cache.misses > 0
        assert not [n for n, _ in flatten(model) if "vis" in n or "mm_" in n or "mtp" in n]


@pytest.mark.parametrize("family", ["kimi_k25", "qwen3_5_moe"])
def test_a_stacked_checkpoint_streams_without_its_vision_tower(
    family: str, checkpoint: Build, tmp_path: Path
) -> None:
    built = checkpoint(family, quantize=families.NATIVE.get(family, families.FOUR_BITS))
    form = originals.seeing(originals.stacked)
    folder = originals.write(built, tmp_path / "seeing", form, **VISION)
    blind = originals.write(built, tmp_path / "blind", originals.stacked, **VISION)
    seeing, expected = plan(folder, "400MB", config=QUIET), plan(blind, "400MB", config=QUIET)
    assert replace(seeing, disk=expected.disk) == expected
    assert seeing.disk == read_checkpoint(folder).nbytes > expected.disk
    tokens = families.token_stream(families.VOCAB, 24, 0)
    assert_streams(folder, families.run(mlx_lm.utils.load_model(blind)[0], tokens, 12), tokens)


@pytest.mark.parametrize("options", [[], FOUR_BITS], ids=["plain", "4bit"])
@pytest.mark.parametrize("family", ["kimi_k25", "qwen3_5_moe"])
def test_an_original_is_converted_as_mlx_lm_does_it(
    family: str, options: list[str], checkpoint: Build, tmp_path: Path
) -> None:
    built, form = checkpoint(family, quantize=None), originals.seeing(FORMS[family])
    source = originals.write(built, tmp_path / "source", form, **VISION)
    assert any("vis" in n for n in read_checkpoint(source).tensors)
    if family == "kimi_k25":  # the others stream as they are, by rows of their tables
        with pytest.raises(UnsupportedModelError, match=r"mlx_streamexperts\.convert"):
            load_streamed(source, 1 << 40)
    planned = plan(source, "400MB", config=QUIET)
    out, expected = tmp_path / "out", tmp_path / "expected"
    assert main(["--model", str(source), "--out", str(out), "--no-progress", *options]) == 0
    if not options:
        converted = plan(out, "400MB", config=QUIET)
        to_write = converted.disk if family == "kimi_k25" else 0
        assert (planned.conversion, converted.conversion) == (to_write, 0)
        assert replace(planned, disk=converted.disk, conversion=0) == converted
    stock = {"quantize": True, "q_bits": 4, "q_group_size": 64} if options else {}
    stock_convert(str(source), str(expected), **stock)
    assert_same_model(out, expected)
    assert not [n for n in tensors(out) if "vis" in n or "mm_" in n or "mtp" in n]
    tokens = families.token_stream(families.VOCAB, 24, 0)
    assert_streams(out, families.run(mlx_lm.utils.load_model(expected)[0], tokens, 12), tokens)


EXPORTS = {
    "qwen3_vl_moe": "vision_tower", "kimi_vl": "vision_tower", "llama4": "vision_model",
    "gemma4": "vision_tower", "minimax_m3_vl": "vision_tower", "mistral3": "vision_tower",
}  # fmt: skip


@pytest.mark.parametrize("family", EXPORTS)
def test_an_export_of_mlx_vlm_streams_as_mlx_lm_loads_it(
    family: str, checkpoint: Build, tmp_path: Path
) -> None:
    """The language model under a prefix, a quantized tower beside it, settings for both."""
    built = checkpoint(family, quantize=families.FOUR_BITS)
    tower = f"{EXPORTS[family]}.blocks.0.mlp.experts"

    def with_tower(weights: originals.Weights) -> originals.Weights:
        out = dict(weights)
        for name in (tower, "multi_modal_projector.linear_1"):
            if family == "qwen3_vl_moe" and not name.startswith(tower):
                continue
            table = mx.random.normal((8, 64, 64), key=mx.random.key(5))
            for part, array in zip(("weight", "scales", "biases"), mx.quantize(table), strict=True):
                out[f"{name}.{part}"] = array
        assert any(n.startswith("language_model.") for n in weights)
        return out

    config = json.loads((built / "config.json").read_text())
    quantization = {**config["quantization"], tower: {"group_size": 64, "bits": 8}}
    folder = originals.write(
        built, tmp_path / "export", with_tower, quantization=quantization, **VISION
    )
    tokens = families.token_stream(families.VOCAB, 24, 0)
    expected = families.run(mlx_lm.utils.load_model(folder)[0], tokens, 12)
    seen = plan(folder, "400MB", config=QUIET)
    assert seen.trunk + seen.experts < seen.disk == read_checkpoint(folder).nbytes
    assert_streams(folder, expected, tokens)

"""What mlx-lm's strict load finds whole is loaded and converted, whatever the index says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import originals
import pytest
from conftest import assert_same, load_streamed

from mlx_streamexperts import CheckpointError, stream
from mlx_streamexperts._io.checkpoint import INDEX
from mlx_streamexperts.convert._command import convert

Build = Callable[..., Path]


def logits(model: Any) -> list[np.ndarray]:
    return families.run(model, families.token_stream(families.VOCAB, 9, seed=1), 7)


def assert_as_stock(folder: Path) -> None:
    """Both load it, and compute the same."""
    expected = logits(mlx_lm.utils.load_model(folder)[0])
    model = load_streamed(folder, 1 << 40)
    with stream(model):
        assert_same(expected, logits(model), folder.name)


def mtp_head(folder: Path, index: dict[str, str]) -> None:
    """The file is there, and mlx-lm does not read it."""
    index["mtp.fc.weight"] = "mtp.safetensors"
    mx.save_safetensors(str(folder / "mtp.safetensors"), {"mtp.fc.weight": mx.zeros((8, 8))})


def mtp_head_left_behind(folder: Path, index: dict[str, str]) -> None:
    """The file is not there: mlx-lm's download takes model*.safetensors only."""
    index["mtp.fc.weight"] = "mtp.safetensors"


def stripped(folder: Path, index: dict[str, str]) -> None:
    """The index names tensors that a conversion dropped, one in a shard that is not there."""
    index["model.layers.0.self_attn.rotary_emb.inv_freq"] = next(iter(index.values()))
    index["model.layers.9.eh_proj.weight"] = "model-00003-of-00003.safetensors"


def another_conversions(folder: Path, index: dict[str, str]) -> None:
    """All shards have other names."""
    for name, shard in index.items():
        index[name] = shard.replace("-of-", "-of-9")


def nothing(folder: Path, index: dict[str, str]) -> None:
    index.clear()


FOREIGN = (mtp_head, mtp_head_left_behind, stripped, another_conversions, nothing)


def edit_index(folder: Path, change: Callable[[Path, dict[str, str]], None]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(folder, content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


@pytest.fixture
def folder(checkpoint: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


@pytest.mark.parametrize("change", FOREIGN)
def test_an_index_does_not_stop_a_load(
    change: Callable[[Path, dict[str, str]], None], folder: Path
) -> None:
    edit_index(folder, change)
    assert_as_stock(folder)


@pytest.mark.parametrize("change", FOREIGN)
def test_an_index_does_not_stop_a_conversion(
    change: Callable[[Path, dict[str, str]], None], checkpoint: Build, tmp_path: Path
) -> None:
    built = checkpoint("qwen3_moe", quantize=None)
    source = originals.write(built, tmp_path / "source", originals.single)
    shards = [f.name for f in source.glob("model*.safetensors")]
    index = {n: f for f in shards for n in mx.load(str(source / f))}  # type: ignore[union-attr]
    (source / INDEX).write_text(json.dumps({"weight_map": index}))
    edit_index(source, change)
    convert(source, tmp_path / "out")
    assert_as_stock(tmp_path / "out")


def refusal(folder: Path) -> str:
    """Neither loads it; what ours says."""
    with pytest.raises((ValueError, KeyError)):
        mlx_lm.utils.load_model(folder)
    with pytest.raises(CheckpointError) as e:
        load_streamed(folder, 1 << 40)
    return str(e.value)


def test_a_lost_shard_is_named(folder: Path) -> None:
    lost = folder / "model-00002-of-00002.safetensors"
    lost.unlink()
    assert f"{lost} is missing (1 of 2 shards named in {INDEX} are)" in refusal(folder)


def test_a_lost_shard_of_single_experts_is_named(checkpoint: Build, tmp_path: Path) -> None:
    built = checkpoint("qwen3_moe", quantize=None, shards=1)
    source = originals.write(built, tmp_path / "source", originals.single)
    shard = next(source.glob("model*.safetensors"))
    weights = dict(mx.load(str(shard)))  # type: ignore[arg-type]
    name = next(n for n in weights if "experts.1." in n)
    del weights[name]
    mx.eval(weights)
    mx.save_safetensors(str(shard), weights)
    index = {**dict.fromkeys(weights, shard.name), name: "model-9.safetensors"}
    (source / INDEX).write_text(json.dumps({"weight_map": index}))
    assert f"{source / 'model-9.safetensors'} is missing" in refusal(source)


def test_a_tensor_that_its_shard_lacks_is_named(folder: Path) -> None:
    """ "Missing" is said of no file that is there."""
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    shard = folder / index["model.norm.weight"]
    weights = dict(mx.load(str(shard)))  # type: ignore[arg-type]
    del weights["model.norm.weight"]
    mx.eval(weights)
    mx.save_safetensors(str(shard), weights)
    said = refusal(folder)
    assert f"tensor model.norm.weight should be in {shard} according to" in said
    assert "is missing" not in said


def test_an_index_is_not_blamed_for_another_fault(folder: Path) -> None:
    edit_index(folder, another_conversions)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "no_such_model"}))
    assert "is missing" not in refusal(folder)


# Names.


@pytest.mark.parametrize("name", ["a*", "a?", "*", "a["])
def test_a_folder_whose_name_is_a_pattern_of_itself(folder: Path, name: str) -> None:
    assert_as_stock(Path(shutil.copytree(folder, folder.parent / "models" / name)))


def test_a_folder_whose_name_is_a_pattern_of_others(folder: Path) -> None:
    patterned = folder.rename(folder.parent / "a[1]")
    with pytest.raises(FileNotFoundError):
        mlx_lm.utils.load_model(patterned)
    with pytest.raises(CheckpointError, match="rename the folder") as e:
        load_streamed(patterned, 1 << 40)
    assert "missing" not in str(e.value)


def test_a_folder_whose_name_is_a_pattern_of_a_sibling(checkpoint: Build, folder: Path) -> None:
    """mlx-lm takes the configuration of the one and the weights of the other."""
    patterned = folder.rename(folder.parent / "a[1]")
    shutil.copytree(checkpoint("qwen3_moe", seed=5), folder.parent / "a1")
    assert_as_stock(patterned)
    expected = logits(mlx_lm.utils.load_model(folder.parent / "a1")[0])
    assert_same(expected, logits(mlx_lm.utils.load_model(patterned)[0]), "the sibling's weights")


def test_a_folder_whose_name_is_a_pattern_of_two(folder: Path) -> None:
    """Whose weights mlx-lm takes is left to the order of a directory."""
    patterned = folder.rename(folder.parent / "a*")
    shutil.copytree(patterned, folder.parent / "ab")
    with pytest.raises(CheckpointError, match=r"is in both .* rename the folder"):
        load_streamed(patterned, 1 << 40)


def test_what_a_configuration_says_twice(folder: Path) -> None:
    """The last counts."""
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"num_experts_per_tok": 1, ' + text.lstrip()[1:])
    assert_as_stock(folder)
    again = text.rstrip().removesuffix("}") + ', "num_experts_per_tok": 1}'
    (folder / "config.json").write_text(again)
    assert_as_stock(folder)
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        assert expert_stream.plan.top_k == 1

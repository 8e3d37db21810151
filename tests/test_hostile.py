"""Files from strangers: every one ends in one of our errors, soon, with little memory, and runs no
code. Headers and indexes byte by byte are in test_checkpoint.py, manifests in test_store.py.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import QUIET
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_streamexperts import CheckpointError, StreamConfig, StreamError, load, plan
from mlx_streamexperts._experts.trace import read_trace
from mlx_streamexperts._io.checkpoint import INDEX, read_checkpoint, read_header
from mlx_streamexperts._loading.discover import discover
from mlx_streamexperts.convert import _command as convert
from mlx_streamexperts.doctor import _command as doctor

HERE = Path(__file__).parent


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def planned(folder: Path) -> None:
    settings = StreamConfig(memory="2GB")
    discover(folder, settings, {}).plan(settings)


# config.json


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe{}",
        b"[]",
        b"null",
        b'{"a":' * 20_000,
        b'{"model_type": "qwen3_moe"}',
        b'{"model_type": null}',
        b'{"model_type": "../../evil"}',
        b'{"model_type": "cache"}',
        b'{"model_type": "qwen3_moe", "model_type": "llama"}',
        b'{"model_type": "qwen3_moe", "hidden_size": ' + b"9" * 5000 + b"}",
    ],
)
def test_a_config_that_is_none(content: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(StreamError, match=str(folder)):
        planned(folder)


@pytest.mark.parametrize(
    "value", [0, -1, 1, 7, 10**9, 2**63, 2**70, 10**400, 0.5, "x", None, [], {}, float("nan")]
)
@pytest.mark.parametrize(
    "key",
    [
        "num_experts", "num_experts_per_tok", "num_hidden_layers", "hidden_size",
        "moe_intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "vocab_size", "quantization", "text_config",
    ],
)  # fmt: skip
def test_a_number_that_cannot_be(key: str, value: Any, folder: Path) -> None:
    """It loads as it did, or is refused: nothing else, and no billion layers are built first."""
    change(folder / "config.json", **{key: value})
    try:
        planned(folder)
    except StreamError as e:
        assert str(e)


@pytest.mark.parametrize("value", [0, -64, 0.5, 10**30, "x", None])
@pytest.mark.parametrize("key", ["bits", "group_size"])
def test_a_quantization_that_cannot_be(key: str, value: Any, folder: Path) -> None:
    """A group size of 0 would end the process: MLX divides by it. (What mlx-lm can work out from
    the tables it does not take from here.)"""
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    change(folder / "config.json", quantization={**quantization, key: value})
    refused = isinstance(value, int | float) and value < 1
    with pytest.raises(CheckpointError, match=key) if refused else suppress(StreamError):
        planned(folder)


def test_another_number_of_experts_than_there_are(folder: Path) -> None:
    for count in (1, 4, 1000):
        change(folder / "config.json", num_experts=count)
        with pytest.raises(CheckpointError, match="mlx-lm"):
            planned(folder)


# Duplicates, links, size.


def test_a_tensor_named_twice_in_a_header(tmp_path: Path) -> None:
    one = '"w": {"dtype": "U8", "shape": [4], "data_offsets": [%d, %d]}'
    text = ("{" + one % (0, 4) + "," + one % (4, 8) + "}").encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match="'w' is there twice"):
        read_header(file)


def test_a_tensor_named_twice_in_an_index(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"w": "model.safetensors", "w": "../x"}}')
    found = read_checkpoint(folder)  # the last counts, and leads outside
    assert found.absent == {}
    planned(folder)


def test_a_shard_that_links_to_a_strangers_file_shows_nothing_of_it(tmp_path: Path) -> None:
    """Links may leave the folder (the Hub's cache is made of them) but must lead to safetensors."""
    secret = tmp_path / "secret"
    secret.write_text("the password is swordfish" * 100)
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(secret)
    with pytest.raises(CheckpointError, match="not a safetensors file") as e:
        read_checkpoint(folder)
    assert "swordfish" not in str(e.value)


@pytest.mark.parametrize("claimed", [2 << 30, 1 << 62])
def test_a_header_of_gigabytes_takes_no_memory(claimed: int, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as f:
        f.write(claimed.to_bytes(8, "little"))
        f.truncate(3 << 30)  # sparse
    assert_little(lambda: read_header(file))


def test_json_of_gigabytes_takes_no_memory(folder: Path) -> None:
    os.truncate(folder / INDEX, 3 << 30)
    assert_little(lambda: planned(folder), refused=False)  # mlx-lm does without it
    os.truncate(folder / "config.json", 3 << 30)
    assert_little(lambda: planned(folder))


def assert_little(read: Callable[[], object], refused: bool = True) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) if refused else nullcontext():
            read()
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()


# Traces.


@pytest.mark.parametrize(
    "content",
    [
        b"\xff",
        b'{"experts": [1e999]}',
        b'{"experts": [4]}\n{"layer": -1, "experts": [[1]]}',
        b'{"experts": [4]}\n{"layer": true, "experts": [[1]]}',
        b'{"experts": [4]}\n{"layer": 0, "experts": [[9]]}',
        b'{"experts": [4]}\n{"layer": 0, "experts": [[36893488147419103232]]}',
        b'{"experts": [4]}\n{"layer": 0, "experts": [[1], [2, 3]]}',
        b'{"experts": [4]}\n\xff',
    ],
)
def test_a_trace_that_is_none(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_bytes(content)
    with pytest.raises(StreamError, match=str(file)):
        read_trace(file)


# Code.


def test_no_code_of_a_checkpoint_runs_unless_it_is_trusted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`model_file` names a Python module that mlx-lm would import."""
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom mlx_lm.models.qwen3_moe import Model, ModelArgs\n"
    (folder / "evil.py").write_text(code)
    change(folder / "config.json", model_file="evil.py")
    name = str(folder)
    with pytest.raises(StreamError, match="trust_remote_code"):
        plan(name, memory="1GB")
    with pytest.raises(StreamError, match="trust_remote_code"):
        load(name, memory="1GB", config=QUIET)
    assert doctor.main(["--model", name]) != 0
    assert convert.main(["--model", name, "--out", str(tmp_path / "out"), "--no-progress"]) != 0
    capsys.readouterr()
    assert not ran.exists()
    plan(name, memory="1GB", trust_remote_code=True)
    assert ran.exists()


# Every parser, mutated blindly; benchmarks/fuzz.py does the same guided by coverage.


def fuzzing() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz", HERE.parent / "benchmarks" / "fuzz.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("atheris", None)  # type: ignore[arg-type]
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["atheris"]
    return module


fuzz = fuzzing()


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in fuzz.TARGETS.items()}


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_mutated_files(name: str, targets: dict[str, Any]) -> None:
    run, seeds = targets[name]

    @settings(
        max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
    )
    @given(number=st.integers(0, 2**32))
    def once(number: int) -> None:
        data = fuzz.mutated(seeds[0], random.Random(number))
        try:
            run(data)
        except StreamError as e:
            assert str(e)

    run(seeds[0])  # the sound one is accepted
    once()


def test_numbers_that_only_sound_like_layers(folder: Path) -> None:
    """Gemma has vocab_size_per_layer_input of 262144."""
    change(
        folder / "config.json", vocab_size_per_layer_input=262_144, hidden_size_per_layer_input=2048
    )
    planned(folder)
    change(folder / "config.json", num_hidden_layers=10**6)
    with pytest.raises(CheckpointError, match="num_hidden_layers is 1000000"):
        planned(folder)

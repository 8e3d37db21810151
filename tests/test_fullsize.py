"""The full-size stand-ins: true layout, true sizes, and bytes beyond 4 GiB in the right slot."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import QUIET, leftovers
from mlx.utils import tree_flatten

from mlx_streamexperts import CheckpointError, load, patch, plan, stream
from mlx_streamexperts._experts.stream import expert_files
from mlx_streamexperts._io.checkpoint import read_checkpoint
from mlx_streamexperts._loading import discover
from mlx_streamexperts._memory import model_graph
from mlx_streamexperts.convert import _command as convert
from mlx_streamexperts.convert import _shards as shards
from mlx_streamexperts.convert._rewrite import Options

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "fullsize"))
import check
import check_convert
import predict
import vlm
import write
import write_original


@pytest.fixture(scope="module", params=write.MODELS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in of all layers without a trunk: hundreds of gigabytes that take no disk."""
    folder = tmp_path_factory.mktemp("whole") / request.param
    write.write(request.param, folder, trunk=False)
    return folder


def test_size_on_disk_and_in_name(whole: Path) -> None:
    files = [f.stat() for f in whole.glob("*.safetensors")]
    apparent = {"kimi-k2.5": 641e9, "qwen3.5-397b": 223e9}[whole.name]
    assert sum(f.st_size for f in files) == pytest.approx(apparent, rel=0.02)
    assert sum(f.st_blocks * 512 for f in files) < 500e6
    assert len(files) == {"kimi-k2.5": write.KIMI_SHARDS, "qwen3.5-397b": 46}[whole.name]


def test_what_is_there_is_not_mixed_with(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(whole.iterdir())
    assert write.main([whole.name, str(whole), "--trunk", "holes", "--layers", "2"]) == 1
    assert "holds a checkpoint already" in capsys.readouterr().err
    assert sorted(whole.iterdir()) == before


def test_a_model_without_expert_layers_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write.main(["kimi-k2.5", str(tmp_path / "kimi"), "--layers", "1"]) == 1
    assert "experts from 2 layers on" in capsys.readouterr().err


def test_a_changed_byte_of_a_filled_expert_is_found(tmp_path: Path) -> None:
    write.write("qwen3.5-397b", tmp_path, trunk=False, layers=1)
    entry = json.loads((tmp_path / "filled.json").read_text())[0]
    stored = read_checkpoint(tmp_path).tensors[entry["tensor"]]
    with stored.file.open("r+b") as f:
        f.seek(stored.offset + 7)
        f.write(b"\xaa")
    model, _ = load(str(tmp_path), cache="100MB", config=QUIET)
    with stream(model) as expert_stream, pytest.raises(CheckpointError, match="not the bytes"):
        check.check_experts(expert_stream, tmp_path)


def test_qwen_experts_lie_where_the_published_checkpoint_has_them(whole: Path) -> None:
    if whole.name != "qwen3.5-397b":
        pytest.skip("no layout of it is published")
    published = json.loads((write.HERE / "qwen3.5-397b.experts.json").read_text())
    tensors = read_checkpoint(whole).tensors
    for layer, parts in published["layers"].items():
        for part, (file, offset, shape) in parts.items():
            entry = tensors[published["tensor_name"].format(layer=layer, part=part)]
            assert (entry.file.name, entry.offset, list(entry.shape)) == (file, offset, shape)


def test_the_plan_fits_a_96_gb_machine(whole: Path) -> None:
    p = plan(whole, memory="96GB", config=replace(QUIET, oversubscribe=True))
    trunk = {"kimi-k2.5": 7.55e9, "qwen3.5-397b": 5.58e9}[whole.name]
    assert p.trunk == pytest.approx(trunk, rel=0.01)
    assert len(p.slots) == 60
    assert min(p.slots) >= p.top_k
    assert p.trunk + p.cache + p.kv + p.work <= 96e9


@pytest.mark.parametrize("name", write.MODELS)
def test_filled_experts_arrive_and_compute(name: str, tmp_path: Path) -> None:
    """First and last expert of the first and last layer, of tables of up to 5.6e9 elements."""
    write.write(name, tmp_path / name, trunk=False, layers=4 if name == "qwen3.5-397b" else 3)
    before = leftovers()
    model, _ = load(str(tmp_path / name), cache="700MB", config=QUIET)
    with stream(model) as expert_stream:
        last = expert_stream.layers[-1]
        codes = next(iter(last.tensors.values())).stored
        assert codes.experts * codes.row_bytes * 2 >= 2**31  # four-bit numbers in one table
        if name == "qwen3.5-397b":  # the first layer's last gate is 4.7 GB into its shard
            places = [t.stored for t in expert_stream.layers[0].tensors.values()]
            assert max(p.offsets[-1] for p in places) > 2**32
        assert check.check_experts(expert_stream, tmp_path / name) == 4
        shards = expert_files(expert_stream.layers)
        files = [name for name in leftovers() - before if name.startswith("descriptor")]
        assert len(files) <= len(shards) + 5


@pytest.mark.parametrize("name", vlm.MODELS)
def test_stand_ins_of_mlx_vlm_have_the_published_numbers_of_parameters(
    name: str, tmp_path: Path
) -> None:
    """GLM-5.3-Flash's 321 billion include 7.4 of a layer that predicts further tokens."""
    quant_utils = pytest.importorskip("mlx_vlm.quant_utils", reason="the extra `vlm`")
    write.write(name, tmp_path, trunk=False)
    model, _ = write.build(name)
    count = quant_utils.get_total_parameters(model)
    tables = {n: a for n, a in tree_flatten(model.parameters()) if write.TABLES in n}
    rows = sum(a.shape[0] for n, a in tables.items() if n.endswith(".weight"))
    expected = {
        "deepseek-v4-flash": (284.3e9, 155e9, 0),
        "glm-5.3-flash": (313.9e9, 178e9, 0),
        "qwen3.8-flash-next": (177.4e9, 104e9, 320_001_536),
    }[name]
    files = [f.stat() for f in tmp_path.glob("*.safetensors")]
    assert count == pytest.approx(expected[0], rel=0.001)
    assert sum(f.st_size for f in files) == pytest.approx(expected[1], rel=0.01)
    assert rows == expected[2]
    assert sum(f.st_blocks * 512 for f in files) < 200e6


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "glm-5.3-flash"])
def test_filled_experts_arrive_through_mlx_vlm(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """First and last expert of the only layer: 4-bit floats of DeepSeek V4, integers of GLM.

    DeepSeek V4 evaluates the tokens of short passes itself, which cannot be traced; GLM's caches of
    pooled keys are filled to two million tokens without two million steps.
    """
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")
    layers = 1 if name == "deepseek-v4-flash" else 4
    write.write(name, tmp_path, trunk=False, layers=layers)
    with patch(cache="150MB", config=QUIET):
        model = utils.load_model(tmp_path, lazy=True)
    assert "estimated" not in caplog.text
    with stream(model) as expert_stream:
        assert check.check_experts(expert_stream, tmp_path) == 2


def test_the_table_of_macs_is_what_doctor_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KV cache and work space are estimated here, and traced in the README (14 s of a core)."""
    pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")
    monkeypatch.setattr(discover, "measure", lambda _, *given: model_graph._estimate(*given))
    name = "qwen3.8-flash-next"
    write.write(name, tmp_path, trunk=False)
    mine = [line.split("|") for line in predict.rows(tmp_path, name)]
    written = [
        x.split("|") for x in predict.README.read_text().splitlines() if f"| {name} | M" in x
    ]
    assert [x[2:5] for x in mine] == [x[2:5] for x in written]  # Mac, budget and trunk
    assert len(written) == len(predict.MACS)
    for one, other in zip(mine, written, strict=True):
        shares = [float(x[5].strip(" %")) for x in (one, other)]
        rates = [float(x[6].split()[0]) for x in (one, other)]
        assert shares[0] == pytest.approx(shares[1], abs=3)
        assert rates[0] == pytest.approx(rates[1], rel=0.1)


@pytest.mark.parametrize("failing", ["open", "truncate", "fsync"])
def test_nothing_is_left_of_files_that_cannot_be_made(
    failing: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Whether the second file fails to open, to grow, or to reach the disk."""
    folder = tmp_path / "qwen"
    arguments = ["qwen3.5-397b", str(folder), "--trunk", "holes", "--layers", "4"]
    before, stock, calls = leftovers(), getattr(os, failing), []

    def second_fails(path: int | Path, *rest: int) -> int | None:
        if failing != "open" or str(path).endswith(".partial"):
            calls.append(path)
            if len(calls) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return stock(path, *rest)

    with monkeypatch.context() as m:
        m.setattr(write.os, failing, second_fails)
        assert write.main(arguments) == 1
    assert "No space left" in capsys.readouterr().err
    assert not list(folder.iterdir())
    assert not leftovers() - before
    assert write.main(arguments) == 0


@pytest.fixture
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `check_convert.examine` replaces in the package is put back afterwards."""
    monkeypatch.setattr(shards, "write_at", shards.write_at)
    monkeypatch.setattr(convert, "_check_room", convert._check_room)


SMALL = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 128,
    "n_routed_experts": 8, "num_experts": 8, "num_attention_heads": 4, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
}  # fmt: skip


@pytest.mark.parametrize("quantize", [False, True], ids=["plain", "4bit"])
@pytest.mark.parametrize("form", write_original.FORMS)
def test_filled_experts_of_every_original_form_arrive_in_the_conversion(
    form: str, quantize: bool, tmp_path: Path, as_it_was: None
) -> None:
    source = tmp_path / "source"
    write_original.write(form, source, layers=3, changes=SMALL)
    r = check_convert.examine(source, tmp_path / "out", Options(quantize=quantize))
    assert r["experts_checked"] == 4
    made = read_checkpoint(tmp_path / "out").tensors
    entry = next(t for n, t in made.items() if "switch_mlp.up_proj" in n)
    with entry.file.open("r+b") as f:
        f.seek(entry.offset)
        f.write(b"\xaa\xaa")
    with pytest.raises(CheckpointError, match="not what the original holds"):
        check_convert.check_experts(source, tmp_path / "out")


@pytest.mark.full  # 15 s of reading zeros
def test_tables_of_more_than_2_31_elements_are_converted(tmp_path: Path, as_it_was: None) -> None:
    """4.4 GB that take no disk: the last expert's bytes come from and go to beyond 4 GiB."""
    size = {**SMALL, "hidden_size": 4096, "moe_intermediate_size": 528, "num_experts": 512}
    source, out = tmp_path / "source", tmp_path / "out"
    write_original.write("qwen3.5-397b-bf16", source, layers=1, changes=size)
    tables = read_checkpoint(source).tensors.values()
    assert max(math.prod(t.shape) for t in tables if "mtp" not in t.name) > 2**31
    r = check_convert.examine(source, out, Options())
    assert r["experts_checked"] == 2
    assert r["disk_bytes"] < 200e6
    assert min(t.nbytes for n, t in read_checkpoint(out).tensors.items() if "switch" in n) > 2**31


@pytest.mark.parametrize("layers", [6, pytest.param(60, marks=pytest.mark.full)])
def test_an_original_of_800_gb_is_planned_from_its_headers(layers: int, tmp_path: Path) -> None:
    write_original.write("qwen3.5-397b-bf16", tmp_path, layers=layers)
    p = plan(tmp_path, memory="96GB", config=replace(QUIET, oversubscribe=True))
    assert p.experts == pytest.approx(773e9 * layers / 60, rel=0.01)
    assert p.conversion == 0  # fused tables stream from where they lie
    assert p.trunk + p.experts < p.disk
    assert min(p.slots) >= p.top_k


def test_no_room_for_the_trunk_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        write.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1 << 30})()
    )
    assert write.main(["kimi-k2.5", str(tmp_path / "kimi"), "--layers", "2"]) == 1
    assert "not free" in capsys.readouterr().err
    assert not list((tmp_path / "kimi").glob("*"))

"""Conversion of original checkpoints: mlx-lm's result bit for bit, in flat memory, resumable."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import families
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import originals
import pytest
from conftest import all_experts, assert_same, load_streamed, until
from mlx.utils import tree_flatten
from mlx_lm.convert import convert as stock_convert

from mlx_streamexperts import CheckpointError, StreamError, UnsupportedModelError, stream
from mlx_streamexperts.convert import _rewrite as rewrite
from mlx_streamexperts.convert import _shards as shards
from mlx_streamexperts.convert._command import convert, main
from mlx_streamexperts.convert._rewrite import Options

Build = Callable[..., Path]
FORMS = {
    "qwen3_moe": originals.single,
    "mixtral": originals.single,
    "qwen3_5_moe": originals.fused,
    "deepseek_v3": originals.fp8,
    "kimi_k25": originals.int4,
    "gpt_oss": originals.gpt_oss,
}
FOUR_BITS = ["--quantize", "--q-bits", "4", "--q-group-size", "64"]


@pytest.fixture(autouse=True)
def three_experts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tables would be done in one step: three of them a step, which divides no table.

    And tiny embeddings whole: here they go a few rows at a time, as long ones do.
    """
    monkeypatch.setattr(rewrite, "_LONG_BYTES", families.VOCAB * families.HIDDEN // 2)
    monkeypatch.setattr(rewrite, "_STEP_BYTES", 3 * 3 * families.HIDDEN * families.EXPERT * 2)


def original(checkpoint: Build, family: str, folder: Path, dtype: mx.Dtype = mx.bfloat16) -> Path:
    form = FORMS[family]
    quantize = families.NATIVE["gpt_oss"] if family == "gpt_oss" else None
    return originals.write(checkpoint(family, dtype=dtype, quantize=quantize), folder, form)


def tensors(folder: Path) -> dict[str, tuple[mx.Dtype, tuple[int, ...], bytes]]:
    found = {}
    for file in folder.glob("model*.safetensors"):
        for name, array in mx.load(str(file)).items():  # type: ignore[union-attr]
            assert name not in found
            found[name] = described(array)
    return found


def described(array: mx.array) -> tuple[mx.Dtype, tuple[int, ...], bytes]:
    return array.dtype, tuple(array.shape), bytes(np.array(array.reshape(-1).view(mx.uint8)))


def assert_same_model(ours: Path, theirs: Path) -> None:
    """Every tensor's bits, the configuration, and the index."""
    mine, stock = tensors(ours), tensors(theirs)
    assert mine.keys() == stock.keys()
    for name in stock:
        assert mine[name][:2] == stock[name][:2], name
        assert mine[name] == stock[name], name
    for file in ("config.json", "generation_config.json"):
        assert json.loads((ours / file).read_text()) == json.loads((theirs / file).read_text())
    index, stock_index = (
        json.loads((f / "model.safetensors.index.json").read_text()) for f in (ours, theirs)
    )
    assert index["metadata"] == stock_index["metadata"]
    assert index["weight_map"].keys() == stock_index["weight_map"].keys()
    for name, file in index["weight_map"].items():
        assert name in mx.load(str(ours / file)), name


@pytest.mark.parametrize("options", [[], FOUR_BITS], ids=["plain", "4bit"])
@pytest.mark.parametrize("family", FORMS)
def test_the_result_is_what_mlx_lm_makes(
    family: str, options: list[str], checkpoint: Build, tmp_path: Path
) -> None:
    source = original(checkpoint, family, tmp_path / "source")
    out, expected = tmp_path / "out", tmp_path / "expected"
    command = ["--model", str(source), "--out", str(out), "--shard-size", "200kB", "--no-progress"]
    assert main([*command, *options]) == 0
    stock = {"quantize": True, "q_bits": 4, "q_group_size": 64} if options else {}
    stock_convert(str(source), str(expected), **stock)
    assert_same_model(out, expected)
    assert len(list(out.glob("model*.safetensors"))) > 1
    assert not list(out.glob("*.partial"))
    # mlx-lm loads it unmodified, tokenizer included.
    _, tokenizer = mlx_lm.load(str(out))
    assert tokenizer.encode("In the beginning") == mlx_lm.utils.load_tokenizer(source).encode(
        "In the beginning"
    )


@pytest.mark.parametrize("form", [originals.stacked, originals.single])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_that_mlx_lm_loads(
    family: str,
    form: Callable[[originals.Weights], originals.Weights],
    checkpoint: Build,
    tmp_path: Path,
) -> None:
    built = checkpoint(family, dtype=mx.bfloat16, quantize=families.NATIVE.get(family))
    source = originals.write(built, tmp_path / "source", form)
    try:
        model, _ = mlx_lm.utils.load_model(source)
    except (ValueError, KeyError) as e:
        assert form is originals.single
        pytest.skip(f"mlx-lm does not load this family's experts one by one: {str(e)[:60]}")
    convert(source, tmp_path / "out")
    expected = dict(tree_flatten(model.parameters()))
    got = tensors(tmp_path / "out")
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert got[name] == described(array), name


@pytest.mark.parametrize(
    "options",
    [
        ["--q-mode", "mxfp4"],
        ["--q-mode", "nvfp4"],
        ["--q-bits", "8", "--q-group-size", "32", "--dtype", "float16"],
        ["--quant-predicate", "mixed_3_6", "--q-group-size", "64"],
    ],
    ids=lambda o: o[1],
)
def test_other_ways_to_quantize(options: list[str], checkpoint: Build, tmp_path: Path) -> None:
    source = original(checkpoint, "qwen3_moe", tmp_path / "source")
    out, expected = tmp_path / "out", tmp_path / "expected"
    assert main(["--model", str(source), "--out", str(out), "--no-progress", "-q", *options]) == 0
    keys = [o.removeprefix("--").replace("-", "_") for o in options[::2]]
    values = [int(v) if v.isdigit() else v for v in options[1::2]]
    stock_convert(str(source), str(expected), quantize=True, **dict(zip(keys, values, strict=True)))
    assert_same_model(out, expected)


@pytest.mark.parametrize(
    "quantize",
    [None, families.FOUR_BITS, families.GLOBAL_SCALE],
    ids=["plain", "4bit", "a scale for each expert"],
)
def test_a_stacked_checkpoint_is_copied_or_quantized(
    quantize: families.Quantize | None, checkpoint: Build, tmp_path: Path
) -> None:
    if quantize is not None and quantize.global_scale and not families.HAS_GLOBAL_SCALE:
        pytest.skip("this mlx-lm has none")
    built = checkpoint("qwen3_moe", quantize=quantize, dtype=mx.bfloat16)
    source = originals.write(built, tmp_path / "source", originals.stacked)
    convert(source, tmp_path / "copy")
    stock_convert(str(source), str(tmp_path / "stock copy"))
    assert_same_model(tmp_path / "copy", tmp_path / "stock copy")
    if quantize is None:
        convert(source, tmp_path / "q", Options(quantize=True))
        stock_convert(str(source), str(tmp_path / "stock q"), quantize=True)
        assert_same_model(tmp_path / "q", tmp_path / "stock q")


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe", "kimi_k25", "mixtral"])
def test_the_result_streams_with_the_same_logits(
    family: str, checkpoint: Build, tmp_path: Path
) -> None:
    source = original(checkpoint, family, tmp_path / "source", mx.float32)
    convert(source, tmp_path / "out")
    tokens = families.token_stream(families.VOCAB, 24, 0)
    expected = families.run(mlx_lm.utils.load_model(source)[0], tokens, 12)
    model = load_streamed(tmp_path / "out", 1 << 40)
    stream(model).resize(all_experts(stream(model)) // 2)
    assert_same(expected, families.run(model, tokens, 12), family)
    stream(model).close()


def test_streaming_an_original_says_how_to_convert_it(checkpoint: Build, tmp_path: Path) -> None:
    source = original(checkpoint, "gpt_oss", tmp_path / "source")  # interleaved rows
    with pytest.raises(UnsupportedModelError, match=r"mlx_streamexperts\.convert --model"):
        load_streamed(source, 1 << 30)


@pytest.mark.parametrize(
    ("form", "method"), [(originals.awq, "awq"), (originals.gptq, "gptq"), (originals.fp8, "fp8")]
)
def test_a_quantization_that_mlx_lm_cannot_load_is_refused_by_name(
    form: Callable[[originals.Weights], originals.Weights],
    method: str,
    checkpoint: Build,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    built = checkpoint("qwen3_moe", quantize=None, dtype=mx.float16)
    settings = {"quant_method": method, "bits": 4, "group_size": 64}
    source = originals.write(built, tmp_path / "source", form, quantization_config=settings)
    with pytest.raises((ValueError, KeyError)):
        mlx_lm.utils.load_model(source)
    with pytest.raises(UnsupportedModelError, match=f"quantized with {method}.*mlx-community"):
        load_streamed(source, 1 << 30)
    assert main(["--model", str(source), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f"quantized with {method}" in error and len(error) < 600
    assert not (tmp_path / "out").exists()


def test_an_error_of_mlx_lm_does_not_list_every_tensor(checkpoint: Build, tmp_path: Path) -> None:
    source = original(checkpoint, "qwen3_moe", tmp_path / "source")

    def rename(weights: originals.Weights) -> None:
        for name in [n for n in weights if "q_proj" in n or "k_proj" in n or ".input_" in n]:
            weights[name + "_other"] = weights.pop(name)

    originals.edit(source, rename)
    with pytest.raises(CheckpointError, match=r"Received 9 .*\(and 6 more\)$"):
        convert(source, tmp_path / "out")


class Interruption(BaseException):
    pass


def test_an_interrupted_run_goes_on(
    checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = original(checkpoint, "deepseek_v3", tmp_path / "source")
    convert(source, tmp_path / "whole", shard_size="200kB")
    out, write_at = tmp_path / "out", shards.write_at
    calls = [0]

    def failing(fd: int, data: memoryview, offset: int) -> None:
        calls[0] += 1
        if calls[0] in (5, 30, 55):
            write_at(fd, data[: len(data) // 2], offset)
            raise Interruption
        write_at(fd, data, offset)

    monkeypatch.setattr(shards, "write_at", failing)
    interruptions, kept = 0, {}
    while True:
        try:
            convert(source, out, shard_size="200kB")
            break
        except Interruption:
            interruptions += 1
            assert not (out / "config.json").exists()
            now = {f: f.stat().st_mtime_ns for f in out.glob("model*.safetensors")}
            assert kept.items() <= now.items(), "a finished shard was written again"
            kept = now
    assert interruptions == 3 and kept
    assert_same_model(out, tmp_path / "whole")
    before = {f: f.stat().st_mtime_ns for f in out.glob("model*.safetensors")}
    convert(source, out, shard_size="200kB")
    assert before == {f: f.stat().st_mtime_ns for f in out.glob("model*.safetensors")}


# Stops in the middle of its second file, or a later one, until it is killed.
_STUCK = """
import pathlib, sys, time
from mlx_streamexperts.convert import _shards as shards, main
out, write_at = pathlib.Path(sys.argv[1]), shards.write_at
def write(*arguments):
    if list(out.glob("model*.safetensors")) and list(out.glob("model*.partial")):
        time.sleep(600)
    write_at(*arguments)
shards.write_at = write
sys.exit(main(sys.argv[2:]))
"""


def test_a_killed_run_goes_on(checkpoint: Build, tmp_path: Path) -> None:
    source = original(checkpoint, "qwen3_moe", tmp_path / "source")
    out = tmp_path / "out"
    command = ["--model", str(source), "--out", str(out), "--shard-size", "200kB", "--no-progress"]
    process = subprocess.Popen([sys.executable, "-c", _STUCK, str(out), *command])

    def in_the_middle() -> bool:
        assert process.poll() is None, "it finished before it could be killed"
        return any(out.glob("model*.safetensors")) and any(out.glob("model*.partial"))

    until(in_the_middle)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / "config.json").exists()
    assert main(command) == 0
    convert(source, tmp_path / "whole")
    assert tensors(out) == tensors(tmp_path / "whole")


def test_files_that_are_read_only_become_writable_copies(checkpoint: Build, tmp_path: Path) -> None:
    """Else a run that goes on could not write them again."""
    source = original(checkpoint, "qwen3_moe", tmp_path / "source")
    (source / "notes.json").write_text("{}")
    (source / "notes.json").chmod(0o444)
    convert(source, tmp_path / "out")
    assert (tmp_path / "out" / "notes.json").stat().st_mode & 0o200


def test_another_source_or_other_options_are_refused(
    checkpoint: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = original(checkpoint, "qwen3_moe", tmp_path / "source")
    out = tmp_path / "out"
    convert(source, out)
    command = ["--model", str(source), "--out", str(out), "--no-progress"]
    assert main([*command, "-q"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "--overwrite" in error and "quantize" in error
    assert main([*command, "-q", "--overwrite"]) == 0
    convert(source, tmp_path / "fresh", Options(quantize=True))
    assert_same_model(out, tmp_path / "fresh")

    def double(weights: originals.Weights) -> None:
        for name in weights:
            weights[name] = weights[name] * 2

    originals.edit(source, double)
    with pytest.raises(StreamError, match="other files"):
        convert(source, out, Options(quantize=True))


def test_foreign_folders_and_the_source_itself_are_safe(checkpoint: Build, tmp_path: Path) -> None:
    source = original(checkpoint, "qwen3_moe", tmp_path / "source")
    before = tensors(source)
    with pytest.raises(StreamError, match="never changed"):
        convert(source, source, overwrite=True)
    other = shutil.copytree(source, tmp_path / "other")
    with pytest.raises(StreamError, match="no conversion wrote"):
        convert(source, other, overwrite=True)
    assert tensors(source) == before == tensors(other)


def test_too_little_room(
    checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = original(checkpoint, "qwen3_moe", tmp_path / "source")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1000))
    with pytest.raises(StreamError, match=r"needs .* and 1 kB are free; nothing was written"):
        convert(source, tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_a_full_disk_is_named_and_can_be_gone_on_from(
    checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = original(checkpoint, "qwen3_moe", tmp_path / "source")

    def full(fd: int, data: memoryview, offset: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_at", full)
        with pytest.raises(StreamError, match=r"model\.safetensors: .*No space left.*again"):
            convert(source, tmp_path / "out")
    convert(source, tmp_path / "out")


def test_a_missing_expert_is_named(checkpoint: Build, tmp_path: Path) -> None:
    source = original(checkpoint, "qwen3_moe", tmp_path / "source")
    name = "model.layers.1.mlp.experts.3.up_proj.weight"

    def drop(weights: originals.Weights) -> None:
        weights.pop(name, None)

    originals.edit(source, drop)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.") + " is missing"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_expert_of_another_shape_is_named(checkpoint: Build, tmp_path: Path) -> None:
    source = original(checkpoint, "qwen3_moe", tmp_path / "source")
    name = "model.layers.2.mlp.experts.5.down_proj.weight"

    def cut(weights: originals.Weights) -> None:
        if name in weights:
            weights[name] = weights[name][:-1]

    originals.edit(source, cut)
    with pytest.raises(CheckpointError, match=r"experts\.5\.down_proj.*expert 5 of model.layers.2"):
        convert(source, tmp_path / "out")


def test_the_last_experts_missing_everywhere(checkpoint: Build, tmp_path: Path) -> None:
    """Only config.json knows that there should be more."""
    source = original(checkpoint, "qwen3_moe", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_experts": 17}))
    with pytest.raises(CheckpointError, match=r"experts\.16"):
        convert(source, tmp_path / "out")


def test_experts_that_depend_on_each_other_are_refused(
    checkpoint: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family that this package has never seen must not be converted wrongly."""
    from mlx_lm.models import qwen3_5_moe

    source = original(checkpoint, "qwen3_5_moe", tmp_path / "source")
    stock = qwen3_5_moe.Model.sanitize

    def mixing(self: object, weights: originals.Weights) -> originals.Weights:
        made = stock(self, weights)  # type: ignore[arg-type]
        return {n: w - mx.mean(w, 0) if "switch_mlp" in n else w for n, w in made.items()}

    monkeypatch.setattr(qwen3_5_moe.Model, "sanitize", mixing)
    with pytest.raises(UnsupportedModelError, match="independently"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


_MEASURE = """
import sys
import mlx.core as mx
from mlx_streamexperts.convert import main
assert main(sys.argv[1:]) == 0
print("peak", mx.get_peak_memory())
"""


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("qwen3_moe", [], marks=pytest.mark.full),
        ("qwen3_moe", FOUR_BITS),
        ("qwen3_5_moe", []),  # fused experts are cut in two
        pytest.param("qwen3_5_moe", FOUR_BITS, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_memory_is_flat(
    family: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer's experts are 100 MB; neither they nor the layers before them stay in memory.

    Nor is the embedding of 26 MB ever there whole.
    """
    config = json.loads(json.dumps(families.FAMILIES[family]))
    size = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 128}
    size["vocab_size"] = 50_000
    config.get("text_config", config).update(size, num_hidden_layers=2, mlp_only_layers=[])
    monkeypatch.setitem(families.FAMILIES, family, config)
    built = families.build(family, tmp_path / "built", dtype=mx.bfloat16, quantize=None)
    source = originals.write(built, tmp_path / "source", FORMS[family])
    layer = 128 * 3 * 256 * 512 * 2
    assert sum(f.stat().st_size for f in source.glob("model*")) > 2 * layer
    command = ["--model", str(source), "--out", str(tmp_path / "out"), "--no-progress", *options]
    run = subprocess.run(
        [sys.executable, "-c", _MEASURE, *command], capture_output=True, text=True, check=True
    )
    peak = int(run.stdout.split("peak")[1])
    assert peak < layer / 5, f"{peak:,} bytes for layers of {layer:,}"

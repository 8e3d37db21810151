"""A packed store gives the same bits in one read an expert, and knows its checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import mlx_lm.utils
import pytest
from conftest import QUIET, assert_same, load_streamed, smallest_cache

from mlx_streamexperts import CheckpointError, StreamConfig, StreamError, pack, store, stream
from mlx_streamexperts.layer import ExpertLayer
from mlx_streamexperts.locate import prepare
from mlx_streamexperts.stream import expert_files


def layers_of(folder: Path) -> list[ExpertLayer]:
    return prepare(folder, StreamConfig(cache=1 << 60), {}).layers


def pack_into(checkpoint: Path, out: Path) -> Path:
    assert pack.main(["--model", str(checkpoint), "--out", str(out), "--no-progress"]) == 0
    return out


@pytest.fixture
def packed(checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of its own and its store."""
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))
    return folder, pack_into(folder, tmp_path / "store")


@pytest.mark.parametrize("bypass", ["on", "off"])
@pytest.mark.parametrize(
    ("family", "quantize"),
    [
        ("qwen3_moe", families.FOUR_BITS),
        ("qwen3_moe", None),
        ("gpt_oss", families.Quantize(mode="mxfp4")),
        ("nemotron_h", families.FOUR_BITS),
        ("qwen3_moe", families.Quantize(per_projection={"up_proj": {"bits": 8, "group_size": 32}})),
    ],
    ids=["affine", "unquantized", "mxfp4 with biases", "two projections", "mixed"],
)
def test_same_bits_in_one_read_an_expert(
    family: str,
    quantize: families.Quantize | None,
    bypass: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = checkpoint(family, quantize=quantize)
    packed = pack_into(folder, tmp_path / "store")
    tokens = families.token_stream(families.VOCAB, 40, seed=2)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, prefill=12)
    config = replace(QUIET, store=str(packed), bypass_page_cache=bypass)
    model = load_streamed(folder, 1 << 40, config)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        expert_stream.reset()
        assert_same(expected, families.run(model, tokens, prefill=12), family)
        stats = expert_stream.stats()
        assert stats.cache.misses > 10
        assert stats.read.reads <= stats.cache.misses  # neighbours may share one


def test_blocks_start_at_pages_and_hold_the_parts_in_order(packed: tuple[Path, Path]) -> None:
    folder, out = packed
    layers = layers_of(folder)
    raw = {f: Path(f).read_bytes() for f in expert_files(layers)}
    for number, layer in enumerate(layers):
        content = (out / f"layer-{number:05d}.experts").read_bytes()
        stride = len(content) // layer.experts
        assert stride % store.PAGE_BYTES == 0
        for expert in range(layer.experts):
            parts = b""
            for t in layer.tensors.values():
                at = t.stored.offsets[expert]
                parts += raw[t.stored.files[expert]][at : at + t.stored.row_bytes]
            block = content[expert * stride : (expert + 1) * stride]
            assert block == parts.ljust(stride, b"\0")


def test_verify_names_the_damaged_expert(
    packed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = packed
    assert pack.main(["--out", str(out), "--verify", "--no-progress"]) == 0
    file = out / "layer-00001.experts"
    layer = layers_of(folder)[1]
    stride = file.stat().st_size // layer.experts
    with file.open("r+b") as f:
        f.seek(3 * stride + 100)
        byte = f.read(1)
        f.seek(3 * stride + 100)
        f.write(bytes([byte[0] ^ 4]))
    capsys.readouterr()
    assert pack.main(["--out", str(out), "--verify", "--no-progress"]) == 1
    out_text, err = capsys.readouterr()
    assert f"expert 3 of {layer.name}" in err
    assert err.count("damaged: ") == 1
    total = sum(x.experts for x in layers_of(folder))
    assert f"{total - 1} of {total} experts" in out_text
    # Its advice works.
    file.unlink()
    pack_into(folder, out)
    assert pack.main(["--out", str(out), "--verify", "--no-progress"]) == 0


def test_an_interrupted_run_goes_on(packed: tuple[Path, Path], tmp_path: Path) -> None:
    folder, whole = packed
    out = tmp_path / "again"
    steps = store.write_store(layers_of(folder), out)
    layers = layers_of(folder)
    for _ in range(layers[0].experts + 2):  # two experts into the second layer
        next(steps)
    steps.close()
    assert not (out / "manifest.json").exists()
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        store.use_store(layers_of(folder), out)
    first = (out / "layer-00000.experts").stat().st_mtime_ns
    pack_into(folder, out)
    assert (out / "layer-00000.experts").stat().st_mtime_ns == first  # kept
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()
    assert sorted(f.name for f in out.iterdir()) == sorted(f.name for f in whole.iterdir())


KILLED = """
import os, sys
from pathlib import Path
from mlx_streamexperts import StreamConfig, store
from mlx_streamexperts.locate import prepare
layers = prepare(Path(sys.argv[1]), StreamConfig(cache=1 << 60), {}).layers
for i, _ in enumerate(store.write_store(layers, Path(sys.argv[2]))):
    if i == layers[0].experts + 2:
        os.kill(os.getpid(), 9)
"""


def test_a_killed_run_goes_on(packed: tuple[Path, Path], tmp_path: Path) -> None:
    folder, whole = packed
    out = tmp_path / "killed"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(out)])
    assert done.returncode == -signal.SIGKILL
    pack_into(folder, out)
    for file in whole.iterdir():
        assert (out / file.name).read_bytes() == file.read_bytes()


def test_no_room_is_said_before_anything_is_written(
    packed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    arguments = ["--model", str(packed[0]), "--out", str(tmp_path / "full"), "--no-progress"]
    assert pack.main(arguments) == 1
    assert "1,000 are free; nothing was written" in capsys.readouterr().err
    assert not list((tmp_path / "full").iterdir())


def change_header(folder: Path) -> None:
    """The same tensors under a header that says something else."""
    file = next(folder.glob("model*.safetensors"))
    data = bytearray(file.read_bytes())
    at = data.index(b'"format"')
    data[at + 1] ^= 1
    file.write_bytes(data)


def lengthen(folder: Path) -> None:
    with next(folder.glob("model*.safetensors")).open("ab") as f:
        f.write(b"\0")


@pytest.mark.parametrize("change", [change_header, lengthen])
def test_the_store_of_another_checkpoint_is_refused(
    change: Callable[[Path], None],
    packed: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = packed
    change(folder)
    with pytest.raises(CheckpointError, match="the checkpoint changed"):
        load_streamed(folder, 1 << 40, replace(QUIET, store=str(out)))
    arguments = ["--model", str(folder), "--out", str(out), "--no-progress"]
    assert pack.main(arguments) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert pack.main([*arguments, "--overwrite"]) == 0
    with stream(load_streamed(folder, 1 << 40, replace(QUIET, store=str(out)))):
        pass


def edited(out: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    file = out / "manifest.json"
    manifest = json.loads(file.read_text())
    edit(manifest)
    file.write_text(json.dumps(manifest))


EDITS: dict[str, Callable[[dict[str, Any]], None]] = {
    "other format": lambda m: m.update(format=99),
    "no layers": lambda m: m.pop("layers"),
    "layers a number": lambda m: m.update(layers=3),
    "layer a number": lambda m: m["layers"].__setitem__(0, 3),
    "one layer less": lambda m: m["layers"].pop(),
    "file elsewhere": lambda m: m["layers"][0].update(file="../../etc/passwd"),
    "negative stride": lambda m: m["layers"][0].update(stride=-16384),
    "huge stride": lambda m: m["layers"][0].update(stride=1 << 70),
    "negative offset": lambda m: m["layers"][0]["parts"][1].update(offset=-1),
    "offset of another part": lambda m: m["layers"][0]["parts"][1].update(offset=0),
    "other expert count": lambda m: m["layers"][0].update(experts=7),
    "other part": lambda m: m["layers"][0]["parts"][0].update(name="gate_proj.other"),
    "source a list": lambda m: m.update(source=[]),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS.keys())
def test_a_manifest_that_does_not_fit_is_refused(
    edit: Callable[[dict[str, Any]], None], packed: tuple[Path, Path]
) -> None:
    folder, out = packed
    edited(out, edit)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        load_streamed(folder, 1 << 40, replace(QUIET, store=str(out)))


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1}', "[" * 100_000])
def test_what_is_no_manifest_is_refused(content: str, packed: tuple[Path, Path]) -> None:
    folder, out = packed
    (out / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        store.use_store(layers_of(folder), out)


@pytest.mark.parametrize("size", [0, 1000, None])
def test_a_truncated_or_missing_layer_is_refused(
    size: int | None, packed: tuple[Path, Path]
) -> None:
    folder, out = packed
    file = out / "layer-00001.experts"
    file.unlink() if size is None else os.truncate(file, size)
    with pytest.raises(CheckpointError, match="layer-00001"):
        store.use_store(layers_of(folder), out)


def test_a_source_that_ends_early_is_named(packed: tuple[Path, Path], tmp_path: Path) -> None:
    folder, _ = packed
    layers = layers_of(folder)
    shard = expert_files(layers)[0]
    steps: Iterator[int] = store.write_store(layers, tmp_path / "short")
    os.truncate(shard, 5000)
    with pytest.raises(CheckpointError, match="ends within expert"):
        list(steps)


def test_without_xxhash_the_error_says_what_to_install(
    packed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xxhash", None)
    with pytest.raises(StreamError, match=r"mlx-streamexperts\[pack\]"):
        list(store.write_store(layers_of(packed[0]), tmp_path / "new"))
    # Reading a store needs no checksum.
    with stream(load_streamed(packed[0], 1 << 40, replace(QUIET, store=str(packed[1])))):
        pass

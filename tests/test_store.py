"""A packed store gives the same bits in one read an expert, and knows its checkpoint."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, assert_same, load_streamed, smallest_cache

from mlx_streamexperts import (
    CheckpointError,
    ExpertReadError,
    StreamConfig,
    StreamError,
    pack,
    stream,
)
from mlx_streamexperts._config import add_arguments, from_arguments
from mlx_streamexperts._experts import packed_store as store
from mlx_streamexperts._experts.layer import ExpertLayer
from mlx_streamexperts._experts.stream import expert_files
from mlx_streamexperts._loading.discover import discover


def layers_of(folder: Path) -> list[ExpertLayer]:
    return discover(folder, StreamConfig(), {}).layers


def pack_into(checkpoint: Path, out: Path) -> Path:
    assert pack.main(["--model", str(checkpoint), "--out", str(out), "--no-progress"]) == 0
    return out


@pytest.fixture
def packed(checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint of its own and its store."""
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))
    return folder, pack_into(folder, tmp_path / "store")


def test_a_packed_store_gives_the_checkpoints_bits(packed: tuple[Path, Path]) -> None:
    folder, out = packed
    assert sorted(f.suffix for f in out.iterdir()) == [".experts", ".experts", ".json"]
    tokens = mx.array([[1, 2, 3]])
    with stream(model := load_streamed(folder, 1 << 40)) as plain:
        plain.resize(smallest_cache(plain))
        expected = np.array(model(tokens))
    with stream(model := load_streamed(folder, 1 << 40, replace(QUIET, store=str(out)))) as s:
        s.resize(smallest_cache(s))
        assert np.array_equal(np.array(model(tokens)), expected)
        assert s.stats().cache.misses >= s.stats().read.reads  # an expert is one read


def flip(file: Path, at: int) -> None:
    """Change one bit; again: change it back."""
    with file.open("r+b") as f:
        f.seek(at)
        byte = f.read(1)
        f.seek(at)
        f.write(bytes([byte[0] ^ 4]))


def assert_stores_equal(whole: Path, other: Path) -> None:
    assert sorted(f.name for f in other.iterdir()) == sorted(f.name for f in whole.iterdir())
    for file in whole.iterdir():
        assert (other / file.name).read_bytes() == file.read_bytes(), file.name


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
        if all(x.expert_bytes % store.PAGE_BYTES for x in expert_stream.layers):
            assert stats.read.reads == stats.cache.misses
        else:  # without padding neighbours share one
            assert stats.read.reads <= stats.cache.misses


@pytest.mark.parametrize("bypass", ["on", "off"])
def test_experts_longer_than_a_read_are_shared_out(bypass: str, packed: tuple[Path, Path]) -> None:
    folder, out = packed
    tokens = families.token_stream(families.VOCAB, 40, seed=2)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, prefill=12)
    config = replace(
        QUIET, store=str(out), bypass_page_cache=bypass, read_size="3000B", verify_reads=True
    )
    model = load_streamed(folder, 1 << 40, config)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        expert_stream.reset()
        assert_same(expected, families.run(model, tokens, prefill=12), "read in pieces")
        stats, layer = expert_stream.stats(), expert_stream.layers[0]
        assert stats.read.reads >= stats.cache.misses * layer.expert_bytes // 3000


@pytest.mark.parametrize(
    "quantize",
    [
        families.FOUR_BITS,
        families.GLOBAL_SCALE,
        families.Quantize(per_projection={"up_proj": None}),
    ],
    ids=["affine", "a scale for each expert", "part unquantized"],
)
def test_blocks_start_at_pages_and_hold_the_parts_in_order(
    quantize: families.Quantize, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    if quantize.global_scale and not families.HAS_GLOBAL_SCALE:
        pytest.skip("this mlx-lm has none")
    folder = checkpoint("qwen3_moe", quantize=quantize)
    out = pack_into(folder, tmp_path / "store")
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
    flip(file, 3 * stride + 100)
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
    assert_stores_equal(whole, out)


def test_a_run_that_fails_at_any_write_goes_on(
    packed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, whole = packed
    fsync, failures = os.fsync, 0
    while True:
        out = tmp_path / f"full-{failures}"
        arguments = ["--model", str(folder), "--out", str(out), "--no-progress"]
        left = iter(range(failures, -1, -1))

        def full(fd: int, left: Iterator[int] = left) -> None:
            if next(left, None) == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(fd)

        with monkeypatch.context() as m:
            m.setattr(store.os, "fsync", full)
            status = pack.main(arguments)
        if status == 0:
            break
        assert "packing stopped: No space left" in capsys.readouterr().err
        assert pack.main(arguments) == 0
        assert_stores_equal(whole, out)
        failures += 1
    assert failures == 4 * len(layers_of(folder)) + 2  # file and name; of layer, sidecar, manifest


KILLED = """
import os, sys
from pathlib import Path
from mlx_streamexperts import StreamConfig
from mlx_streamexperts._experts import packed_store as store
from mlx_streamexperts._loading.discover import discover
layers = discover(Path(sys.argv[1]), StreamConfig(), {}).layers
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
    assert_stores_equal(whole, out)


def test_no_room_is_said_before_anything_is_written(
    packed: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    arguments = ["--model", str(packed[0]), "--out", str(tmp_path / "full"), "--no-progress"]
    assert pack.main(arguments) == 1
    assert "1,000 are free; nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "full").exists()


def test_no_room_leaves_what_overwrite_would_discard(
    packed: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = packed
    before = Path(shutil.copytree(out, tmp_path / "before"))
    arguments = ["--model", str(folder), "--out", str(out), "--no-progress", "--overwrite"]
    (out / "layer-00001.experts").unlink()  # so that discarding the rest is not room enough
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    assert pack.main(arguments) == 1
    (before / "layer-00001.experts").unlink()
    assert_stores_equal(before, out)
    monkeypatch.undo()
    assert pack.main(arguments) == 0
    assert pack.main(["--out", str(out), "--verify", "--no-progress"]) == 0


def test_overwrite_deletes_only_what_packing_writes(packed: tuple[Path, Path]) -> None:
    folder, out = packed
    mine = [out / n for n in ("layer-notes.txt", "layer-1.json", "layer-00001.safetensors")]
    for file in mine:
        file.write_text("mine")
    arguments = ["--model", str(folder), "--out", str(out), "--no-progress"]
    for extra in ([], ["--overwrite"]):
        assert pack.main([*arguments, *extra]) == 0
        assert all(file.read_text() == "mine" for file in mine)


def test_a_folder_that_is_none_is_an_error(
    packed: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    arguments = ["--model", str(packed[0]), "--out", str(tmp_path / "file"), "--no-progress"]
    assert pack.main(arguments) == 1
    assert capsys.readouterr().err.startswith("error: ")
    assert pack.main(["--out", str(tmp_path / "none"), "--verify", "--no-progress"]) == 1
    assert capsys.readouterr().err.startswith("error: ")


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


# What verifying and going on rely on, since neither of them lays the store out again.
ENTRIES: dict[str, Callable[[dict[str, Any]], None]] = {
    **{name: EDITS[name] for name in list(EDITS)[:4]},
    "layers empty": lambda m: m.update(layers=[]),
    "layers null": lambda m: m.update(layers=None),
    "file elsewhere": EDITS["file elsewhere"],
    "file above": lambda m: m["layers"][0].update(file=".."),
    "file no name": lambda m: m["layers"][0].update(file="layer-\0.experts"),
    "negative stride": EDITS["negative stride"],
    "huge stride": EDITS["huge stride"],
    "infinite stride": lambda m: m["layers"][0].update(stride=float("inf")),
    "odd stride": lambda m: m["layers"][0].update(stride=m["layers"][0]["stride"] + 1),
    "no bytes": lambda m: m["layers"][0].update(used=0),
    "used a truth": lambda m: m["layers"][0].update(used=True),
    "no checksums": lambda m: m["layers"][0].update(checksums=[]),
    "one checksum less": lambda m: m["layers"][0]["checksums"].pop(),
    "checksums numbers": lambda m: m["layers"][0].update(checksums=[1] * 16),
    "checksums gone": lambda m: m["layers"][0].pop("checksums"),
}


@pytest.mark.parametrize("edit", ENTRIES.values(), ids=ENTRIES.keys())
def test_a_manifest_that_does_not_fit_verifies_nothing_and_is_made_anew(
    edit: Callable[[dict[str, Any]], None],
    packed: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, out = packed
    whole = Path(shutil.copytree(out, tmp_path / "whole"))
    edited(out, edit)
    assert pack.main(["--out", str(out), "--verify", "--no-progress"]) == 1
    assert "manifest.json: " in capsys.readouterr().err
    pack_into(folder, out)
    assert_stores_equal(whole, out)


def test_sizes_beyond_the_file_are_damage_and_take_no_memory(
    packed: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, out = packed
    edited(out, lambda m: m["layers"][0].update(used=1 << 60, stride=1 << 61))
    assert pack.main(["--out", str(out), "--verify", "--no-progress"]) == 1
    assert capsys.readouterr().err.count("damaged: ") == 16


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
    with pytest.raises(StreamError, match="pip install xxhash"):
        list(store.write_store(layers_of(packed[0]), tmp_path / "new"))
    assert not (tmp_path / "new").exists()
    config = replace(QUIET, store=str(packed[1]), verify_reads=True)
    with pytest.raises(StreamError, match="pip install xxhash"):
        load_streamed(packed[0], 1 << 40, config)
    # Reading a store needs no checksum.
    with stream(load_streamed(packed[0], 1 << 40, replace(QUIET, store=str(packed[1])))):
        pass


@pytest.mark.parametrize("in_place", ["auto", "off"])
def test_a_verified_read_names_the_expert_and_leaves_its_slot_empty(
    in_place: str, packed: tuple[Path, Path]
) -> None:
    folder, out = packed
    tokens = families.token_stream(families.VOCAB, 40, seed=2)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, prefill=12)
    config = replace(QUIET, store=str(out), verify_reads=True, in_place=in_place)
    model = load_streamed(folder, 1 << 40, config)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        assert_same(expected, families.run(model, tokens, prefill=12), "nothing damaged")
        layer = expert_stream.layers[1]
        file = out / "layer-00001.experts"
        stride = file.stat().st_size // layer.experts
        for at in (0, layer.expert_bytes - 1):  # its first part and its last
            expert_stream.resize(smallest_cache(expert_stream))  # empty again
            flip(file, 3 * stride + at)
            with pytest.raises(ExpertReadError, match="checksum") as caught:
                families.run(model, tokens, prefill=12)
            assert (caught.value.layer, caught.value.expert) == (layer.name, 3)
            assert caught.value.file == file
            assert caught.value.offset == 3 * stride
            assert layer.cache.slot_of[3] < 0
            flip(file, 3 * stride + at)
            assert_same(expected, families.run(model, tokens, prefill=12), "mended")
    flip(file, 3 * stride)
    with pytest.raises(ExpertReadError, match=f"expert 3 of {layer.name}"):
        load_streamed(folder, 1 << 40, config)  # every expert resident: found while loading
    with stream(load_streamed(folder, 1 << 40, replace(config, verify_reads=False))):
        pass  # reads are trusted where nothing else is asked for


def test_verified_reads_are_an_option_that_needs_a_store() -> None:
    with pytest.raises(StreamError, match="needs a store"):
        StreamConfig(verify_reads=True)
    parser = ArgumentParser()
    add_arguments(parser)
    assert from_arguments(parser.parse_args(["--store", "x", "--verify-reads"])).verify_reads
    assert not from_arguments(parser.parse_args(["--store", "x"])).verify_reads

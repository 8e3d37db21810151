"""`pack --replace` moves experts layer by layer; killed anywhere, it loses nothing."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
import vlm_families
from conftest import QUIET, load_streamed, smallest_cache

from mlx_streamexperts import CheckpointError, StreamConfig, StreamError, pack, plan, stream
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._experts import moving, packed_store
from mlx_streamexperts._experts.layer import ExpertLayer
from mlx_streamexperts._io.checkpoint import INDEX, MOVED
from mlx_streamexperts._io.moved import read_moved
from mlx_streamexperts._loading import discover as loading_discover
from mlx_streamexperts._loading.discover import discover
from mlx_streamexperts._memory import model_graph
from mlx_streamexperts.convert import main as convert

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "model"))


def run(folder: Path, *options: str) -> int:
    return pack.main(["--model", str(folder), *options, "--no-progress"])


def output(folder: Path, **options: object) -> np.ndarray:
    """Logits, with experts read from files."""
    model = load_streamed(folder, 1 << 40, replace(QUIET, **options))  # type: ignore[arg-type]
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        return np.array(model(TOKENS))


def assert_as_it_was(original: Path, folder: Path) -> None:
    assert sorted(f.name for f in folder.iterdir()) == sorted(f.name for f in original.iterdir())
    for file in original.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def disk_bytes(folder: Path) -> int:
    return sum(f.stat().st_blocks * 512 for f in folder.rglob("*"))


def test_experts_move_and_come_back(
    original: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, before = np.array(mlx_lm.utils.load_model(folder)[0](TOKENS)), disk_bytes(folder)
    for file in folder.glob("model*"):
        os.utime(file, ns=(1, 1))
    assert run(folder, "--replace") == 0
    padding = 2 * 16 * 16384  # blocks of a store are padded to pages
    assert disk_bytes(folder) < before + padding
    holes = disk_bytes(folder) - disk_bytes(folder / "experts")
    assert holes < before // 2
    assert np.array_equal(output(folder), expected)
    assert np.array_equal(
        output(folder, store=str(folder / "experts"), verify_reads=True), expected
    )
    # What reads the shards as they are stops at the note, and says where the experts are.
    with pytest.raises(RuntimeError, match="moved-to-a-packed-store"):
        mlx_lm.utils.load_model(folder)
    # Other libraries find shards through the index: experts are said to be in the note.
    files = json.loads((folder / INDEX).read_text())["weight_map"]
    experts = {f for name, f in files.items() if ".switch_mlp." in name}
    assert experts == {MOVED}
    assert {f.name for f in folder.glob("model-0*")} < set(files.values())
    assert convert(["--model", str(folder), "--out", str(tmp_path / "converted")]) == 1
    assert run(folder, "--out", str(tmp_path / "again")) == 1
    assert capsys.readouterr().err.count("--unpack") == 2
    # The folder can be moved, and the store alone if one says where it is.
    elsewhere = folder.rename(tmp_path / "elsewhere")
    assert np.array_equal(output(elsewhere), expected)
    apart = (elsewhere / "experts").rename(tmp_path / "apart")
    with pytest.raises(CheckpointError, match="not there"):
        output(elsewhere)
    assert np.array_equal(output(elsewhere, store=str(apart)), expected)
    apart.rename(elsewhere / "experts")
    capsys.readouterr()
    assert run(elsewhere, "--replace") == 0
    assert "Nothing to do" in capsys.readouterr().out
    assert run(elsewhere, "--verify") == 0  # the folder says where its store is
    assert "experts are as they were packed" in capsys.readouterr().out
    assert run(elsewhere, "--unpack") == 0
    assert_as_it_was(original, elsewhere)
    assert run(elsewhere, "--unpack") == 1
    assert "nothing to unpack" in capsys.readouterr().err


def test_another_drive_needs_room_for_all_layers(
    original: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What one layer frees there is of no use to the next."""
    free, together = [0], [True]
    for owner in (platform, packed_store):
        monkeypatch.setattr(owner, "free_disk_bytes", lambda at: free[0])
        monkeypatch.setattr(owner, "on_one_drive", lambda a, b: together[0])

    def needed(task: str) -> int:
        before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        assert run(folder, task) == 1
        assert {f: f.read_bytes() for f in before} == before
        (said,) = re.findall(r"needs ([\d,]+) bytes", capsys.readouterr().err)
        return int(said.replace(",", ""))

    for task in ("--replace", "--unpack"):
        free[0], together[0] = 0, True
        free[0] = needed(task)  # of the largest layer
        together[0] = False
        assert needed(task) == 2 * free[0]  # of both
        together[0] = True
        assert run(folder, task) == 0
    assert_as_it_was(original, folder)


@pytest.mark.parametrize("family", ["deepseek_v41_engram", "cohere2_moe"])
def test_a_model_of_mlx_vlm_loads_from_the_files_that_its_index_names(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the index mlx-vlm loads all safetensors files, and engrams are not found."""
    utils = pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")
    folder = vlm_families.make_vlm_checkpoint(tmp_path / "model", family)
    mx.save_safetensors(str(folder / "adapters.safetensors"), {"lora_a": mx.zeros((4, 4))})
    # One shard of experts alone: the index must go on naming it, or mlx-vlm does not load it.
    index = json.loads((folder / INDEX).read_text())
    tensors = dict(load_all(folder))
    experts = {n: a for n, a in tensors.items() if ".switch_mlp." in n}
    assert experts
    for file in folder.glob("model*.safetensors"):
        file.unlink()
    for name, part in (
        ("experts-alone.safetensors", experts),
        ("model-rest.safetensors", {n: a for n, a in tensors.items() if n not in experts}),
    ):
        mx.save_safetensors(str(folder / name), part)
        index["weight_map"] |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps(index))
    original = Path(shutil.copytree(folder, tmp_path / "original"))
    monkeypatch.setattr(
        loading_discover,
        "measure",
        lambda _, switches, config: model_graph._estimate(switches, config),
    )
    expected = plan(folder, cache="1GB")
    assert run(folder, "--replace") == 0
    with pytest.raises(RuntimeError, match="moved-to-a-packed-store"):
        utils.load_model(folder)
    found = plan(folder, cache="1GB")
    assert (found.trunk, found.tables) == (expected.trunk, expected.tables)
    assert run(folder, "--unpack") == 0
    assert_as_it_was(original, folder)


def load_all(folder: Path) -> Iterator[tuple[str, mx.array]]:
    for file in folder.glob("model*.safetensors"):
        arrays = mx.load(str(file))
        mx.eval(arrays)
        yield from arrays.items()  # type: ignore[union-attr]


KILLED = """
import json, os, shutil, sys
from pathlib import Path
from mlx_streamexperts import StreamConfig
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._experts import moving, packed_store
from mlx_streamexperts._io.checkpoint import INDEX, MOVED
from mlx_streamexperts._loading.discover import discover

folder = Path("model")
STEPS = [(os, "fsync"), (os, "pwrite"), (platform, "punch_hole"), (Path, "replace"),
         (Path, "unlink")]
OFTEN = {"pwrite": 25, "punch_hole": 2}  # killed at one in so many

def places(in_shards=False):
    return discover(folder, StreamConfig(), {}, in_shards=in_shards).layers

def content(layers):
    found = []
    for layer in layers:
        for t in layer.tensors.values():
            for file, offset in zip(t.stored.files, t.stored.offsets):
                with open(file, "rb") as f:
                    f.seek(offset)
                    found.append(f.read(t.stored.row_bytes))
    return found

def in_a_fork(run, kill_at=0):
    child = os.fork()
    if child == 0:
        left = kill_at or -1
        def counted(original):
            every = OFTEN.get(original.__name__, 1)
            calls = 0
            def step(*args, **kwargs):
                nonlocal left, calls
                calls += 1
                left -= calls % every == 0
                if left == 0:
                    os.kill(os.getpid(), 9)
                return original(*args, **kwargs)
            return step
        for owner, name in STEPS:
            setattr(owner, name, counted(getattr(owner, name)))
        list(run())
        os._exit(0)
    return os.waitpid(child, 0)[1]

def killed_at_every_step(run, start):
    for step in range(1, 1000):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        status = in_a_fork(run, step)
        assert status in (0, 9), status
        assert content(places()) == expected, step
        if content(layers) != expected:  # then others must stop at the note
            assert (folder / MOVED).exists() and MOVED in (folder / INDEX).read_text(), step
        if status == 0:
            return step - 1
        if start == "moved" and not (folder / MOVED).exists():
            continue  # killed after its last step
        assert in_a_fork(run) == 0, step
        assert content(places()) == expected, step

shutil.copytree("original", folder)
expected = content(places())
layers = places(in_shards=True)
store = folder / "experts"
print(killed_at_every_step(lambda: moving.move_experts(layers, folder, store), "original"))
folder.rename("moved")
shutil.copytree("moved", "old")  # as earlier versions left it
note = json.loads(Path("old", MOVED).read_text())
del note["packed_by"], note["id"]
Path("old", MOVED).write_text(json.dumps(note))
Path("old/experts/only-copy.json").unlink()
killed_at_every_step(lambda: moving.move_experts(layers, folder, store), "old")
print(killed_at_every_step(lambda: moving.bring_back(layers, folder), "moved"))
"""


def test_killed_at_every_step_it_loads_and_goes_on(folder: Path, original: Path) -> None:
    folder.rename(folder.with_name("original"))
    done = subprocess.run(
        [sys.executable, "-c", KILLED], cwd=folder.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    steps = list(map(int, done.stdout.split()))
    assert min(steps) > 12, steps
    assert_as_it_was(original, folder)


def test_a_run_that_stops_between_layers_leaves_a_model_in_both_places(
    original: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected, free, layers = output(original), platform.punch_hole, []

    def stop(fd: int, offset: int, nbytes: int) -> int:
        layers.append(read_moved(folder).layers)  # type: ignore[union-attr]
        if len(layers[-1]) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return free(fd, offset, nbytes)

    with monkeypatch.context() as m:
        m.setattr(platform, "punch_hole", stop)
        m.setattr(platform, "holes_work", lambda _: True)
        assert run(folder, "--replace") == 1
    assert "run again" in capsys.readouterr().err
    note = read_moved(folder)
    assert note is not None
    del note.layers[max(note.layers)]  # the first layer alone has moved
    note.save()
    assert np.array_equal(output(folder), expected)
    store = folder / "experts"
    assert np.array_equal(output(folder, store=str(store), verify_reads=True), expected)
    assert run(folder, "--replace", "--out", str(folder / "other")) == 1
    assert "--out" in capsys.readouterr().err
    # What is only in the store is not packed again from holes when it is missing there.
    file = store / "layer-00000.experts"
    file.rename(folder / "away")
    assert run(folder, "--replace") == 1
    assert run(folder, "--unpack") == 1
    assert capsys.readouterr().err.count("nowhere else") == 2
    with pytest.raises(CheckpointError, match="nowhere else"):
        output(folder)
    (folder / "away").rename(file)
    assert run(folder, "--unpack") == 0
    assert_as_it_was(original, folder)


def test_bytes_that_read_back_wrong_free_nothing(
    original: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def flipped(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = os.preadv(fd, buffers, offset)
        buffers[0][7] ^= 1
        return count

    with monkeypatch.context() as m:
        m.setattr(platform, "read_into", flipped)
        assert run(folder, "--replace") == 1
    assert "reads back as other bytes" in capsys.readouterr().err
    assert not (folder / MOVED).exists()
    shutil.rmtree(folder / "experts")
    assert_as_it_was(original, folder)


def test_who_may_not_move(
    original: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = load_streamed(folder, 1 << 40)
    with stream(model):
        assert run(folder, "--replace") == 1
        assert "has this model loaded" in capsys.readouterr().err
    monkeypatch.setattr(platform, "holes_work", lambda _: False)
    assert run(folder, "--replace") == 1
    assert "cannot free parts" in capsys.readouterr().err
    shard = next(folder.glob("model-*"))
    blob = shard.rename(folder.parent / "blob")
    shard.symlink_to(blob)  # as in the Hub's cache
    assert run(folder, "--replace") == 1
    assert "is a link" in capsys.readouterr().err
    blob.replace(shard)
    assert_as_it_was(original, folder)
    layers = pack._layers(folder, pack.setup_arg_parser().parse_args([]))[0]
    with pytest.raises(StreamError, match="share bytes"):
        moving._check_apart([layers[0], layers[0]])
    for wrong in (["--unpack", "--replace"], ["--replace", "--overwrite"], []):
        with pytest.raises(SystemExit):
            run(folder, *wrong)


def test_holes_are_whole_blocks_within_the_range(tmp_path: Path) -> None:
    assert platform.holes_work(tmp_path)
    file = tmp_path / "f"
    file.write_bytes(b"x" * 40_000)
    with file.open("r+b") as f:
        assert platform.punch_hole(f.fileno(), 100, 4000) == 0
        assert platform.punch_hole(f.fileno(), 100, 8192 + 4096) == 8192
    content = file.read_bytes()
    assert content == b"x" * 4096 + bytes(8192) + b"x" * (40_000 - 4096 - 8192)


@pytest.mark.parametrize("lie", ["frees nothing", "frees too much", "fails"])
def test_a_file_system_that_does_not_keep_its_word_is_not_trusted(
    lie: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = platform.punch_hole

    def lying(fd: int, offset: int, nbytes: int) -> int:
        if lie == "fails":
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if lie == "frees nothing":
            return nbytes // 4096 * 4096
        os.pwrite(fd, bytes(4096), offset - 8192)
        return free(fd, offset, nbytes)

    monkeypatch.setattr(platform, "punch_hole", lying)
    assert not platform.holes_work(tmp_path)


def test_macs_free_parts_of_files_by_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, bytes | int]] = []
    monkeypatch.setattr(platform.sys, "platform", "darwin")
    monkeypatch.setattr(
        platform.fcntl, "fcntl", lambda _, kind, value=0: asked.append((kind, value))
    )
    with (tmp_path / "f").open("wb") as f:
        assert platform.punch_hole(f.fileno(), 5, 3 * 4096) == 2 * 4096
        platform.sync_to_drive(f.fileno())
    (kind, hole), full = asked
    assert kind == 99  # F_PUNCHHOLE and struct fpunchhole: flags, reserved, offset, length
    assert hole == struct.pack("=IIqq", 0, 0, 4096, 8192)
    assert full == (51, 0)  # F_FULLFSYNC


def as_before(folder: Path) -> None:
    """A moved folder as earlier versions left it: the note and the store do not say whose."""
    note = json.loads((folder / MOVED).read_text())
    del note["packed_by"], note["id"]
    (folder / MOVED).write_text(json.dumps(note))
    for file in folder.rglob("only-copy.json"):
        file.unlink()


def stop_after_a_layer(folder: Path, loader: str) -> None:
    """Move the first layer alone; with mlx-vlm all its layers have other names."""
    found = discover(folder, StreamConfig(loader=loader), {}, in_shards=True)
    moving_on = moving.move_experts(
        found.layers, folder, folder / "experts", f"{found.library} {version(found.library)}"
    )
    for _ in moving_on:
        if (folder / "experts" / "layer-00001.experts.partial").exists():
            break
    moving_on.close()
    assert read_moved(folder).layers.popitem()[1] == 0  # type: ignore[union-attr]


@pytest.mark.parametrize("complete", [False, True])
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("first", ["mlx-lm", "mlx-vlm"])
def test_layers_with_another_librarys_names_are_never_taken_for_others(
    first: str,
    old: bool,
    complete: bool,
    original: Path,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")
    other = {"mlx-lm": "mlx-vlm", "mlx-vlm": "mlx-lm"}[first]
    if complete:
        assert run(folder, "--replace", "--loader", first) == 0
    else:
        stop_after_a_layer(folder, first)
    if old:
        as_before(folder)
    before = {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    wrong = [other] if first == "mlx-lm" or not old else [other, "auto"]
    capsys.readouterr()
    for loader in wrong:
        for action in ("--unpack", "--replace"):
            assert run(folder, action, "--loader", loader) == 1
            assert f"--loader {first}" in capsys.readouterr().err
        with pytest.raises(CheckpointError, match=rf"nowhere else.*--loader {first}"):
            discover(folder, StreamConfig(loader=loader), {})
    assert {f: f.read_bytes() for f in folder.rglob("*") if f.is_file()} == before
    # The note says which library it is; without that it has to be stated.
    stated = "auto" if wrong == [other] else first
    rows = discover(folder, StreamConfig(loader=stated), {}).layers[0]
    assert {Path(f).parent.name for t in rows.tensors.values() for f in t.stored.files} == {
        "experts"
    }
    assert run(folder, "--replace", "--loader", stated) == 0
    assert run(folder, "--verify") == 0
    assert run(folder, "--unpack") == 0  # going on has completed an old note
    assert_as_it_was(original, folder)


def test_parts_in_another_order_are_not_read_from_a_store_that_is_unfinished(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A version of mlx-lm that keeps a layer's name and reorders its projections."""
    stop_after_a_layer(folder, "mlx-lm")
    tables = ExpertLayer.tensors.fget  # type: ignore[attr-defined]
    turned = property(lambda layer: dict(reversed(tables(layer).items())))
    monkeypatch.setattr(ExpertLayer, "tensors", turned)
    with pytest.raises(CheckpointError, match="was packed otherwise"):
        discover(folder, StreamConfig(), {})
    assert run(folder, "--unpack") == 1


def test_a_store_is_one_folders_only_copy(
    original: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = Path(shutil.copytree(folder, tmp_path / "twin"))
    store = tmp_path / "store"
    assert run(folder, "--replace", "--out", str(store)) == 0
    packed = store / "layer-00001.experts"
    good = packed.read_bytes()
    packed.write_bytes(b"x" + good[1:])
    for which in (["--model", str(folder)], ["--out", str(store)]):
        assert pack.main(["--verify", *which, "--no-progress"]) == 1
        assert "Do not delete these files" in capsys.readouterr().err
    packed.write_bytes(good)
    copied = Path(shutil.copytree(folder, tmp_path / "copied"))
    for model, *options in (
        (twin, "--replace"),
        (twin,),
        (twin, "--overwrite"),
    ):
        assert run(model, *options, "--out", str(store)) == 1
        assert f"the experts of {folder} are in it and nowhere else" in capsys.readouterr().err
    assert run(copied, "--unpack") == 1
    assert "nowhere else" in capsys.readouterr().err
    assert_as_it_was(original, twin)
    renamed = folder.rename(tmp_path / "renamed")
    assert run(renamed, "--unpack") == 0
    assert_as_it_was(original, renamed)
    assert not store.exists()
    # Stores of earlier versions are known by the note in the folder above.
    assert run(renamed, "--replace") == 0
    as_before(renamed)
    assert run(twin, "--overwrite", "--out", str(renamed / "experts")) == 1
    assert run(renamed, "--replace") == 0
    assert run(renamed, "--unpack") == 0
    assert_as_it_was(original, renamed)

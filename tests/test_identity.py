"""A file is read only if it is the one that the model was loaded from.

The twins here have the same name, size, header and time as the original, and other weights.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import originals
import pytest
from conftest import QUIET, load_streamed, smallest_cache

from mlx_streamexperts import CheckpointError, ExpertReadError, StreamError, pack, stream
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts.convert import _command as convert
from mlx_streamexperts.convert._command import convert as convert_folder

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
Build = Callable[..., Path]


@pytest.fixture
def folder(checkpoint: Build, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


def twin(file: Path) -> bytes:
    """Other weights behind the same header."""
    data = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    for i in range(start, len(data)):
        data[i] ^= 1
    return bytes(data)


def replaced(file: Path) -> None:
    """Another file is put in its place, as a download does it."""
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(twin(file))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.rename(file)
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def rewritten(file: Path) -> None:
    """As `cp` does it: the file stays the same one, and its time does not."""
    before = file.stat()
    with file.open("r+b") as f:
        f.write(twin(file))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert file.stat().st_ino == before.st_ino


@pytest.mark.parametrize("change", [replaced, rewritten])
@pytest.mark.parametrize("what", ["shard", "store"])
def test_a_twin_is_not_read_in_its_place(
    change: Callable[[Path], None], what: str, folder: Path, tmp_path: Path
) -> None:
    config = QUIET
    files = sorted(folder.glob("*.safetensors"))
    if what == "store":
        out = tmp_path / "store"
        assert pack.main(["--model", str(folder), "--out", str(out), "--no-progress"]) == 0
        config = replace(QUIET, store=str(out))
        files = sorted(out.glob("*.experts"))
    with stream(load_streamed(folder, 1 << 40, config)) as whole:
        cache = smallest_cache(whole)
    model = load_streamed(folder, cache, config)
    with stream(model):
        for file in files:
            change(file)
        with pytest.raises(ExpertReadError, match="replaced by another one, or rewritten"):
            mx.eval(model(TOKENS))


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    made = tmp_path / "model.safetensors"
    made.write_bytes((16).to_bytes(8, "little") + bytes(200_000))
    yield made


def is_same(mark: tuple[int, ...], file: Path) -> bool:
    fd = os.open(file, os.O_RDONLY)
    try:
        return platform.same_file(mark, fd, file)
    finally:
        os.close(fd)


def test_on_another_device_the_content_decides(file: Path) -> None:
    """Mounted again, for example: device and number are others."""
    device, number, *rest = platform.file_mark(file)
    before = (device + 1, number + 7, *rest)
    assert is_same(before, file)
    replaced(file)
    assert not is_same(before, file)


def test_a_file_system_that_has_unstable_inodes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, number, *rest = platform.file_mark(file)
    before = (device, number + 7, *rest)
    assert not is_same(before, file)
    monkeypatch.setattr(platform, "_has_unstable_inodes", lambda device: True)
    assert is_same(before, file)
    replaced(file)
    assert not is_same(before, file)
    assert not is_same((device, file.stat().st_ino, *rest), file)  # the number is used again


def test_which_file_systems_number_anew(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 27 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "36 22 0:45 / /mnt/a rw - fuse.sshfs host:/a rw\n"
        "37 22 0:46 / /mnt/b rw master:2 - cifs //host/b rw\n"
        "38 22 0:47 / /mnt/c rw - nfs4 host:/c rw\n"
    )
    kinds = {
        (major, minor): platform._has_unstable_inodes(os.makedev(major, minor), mounts)
        for major, minor in ((8, 1), (0, 45), (0, 46), (0, 47), (9, 9))
    }
    assert [k for k, anew in kinds.items() if anew] == [(0, 45), (0, 46)]
    assert not platform._has_unstable_inodes(os.makedev(0, 45), tmp_path / "none")  # as on macOS


def test_a_store_of_a_twin_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "store"
    command = ["--model", str(folder), "--out", str(out), "--no-progress"]
    assert pack.main(command) == 0
    for shard in folder.glob("*.safetensors"):
        replaced(shard)
    with pytest.raises(CheckpointError, match="the checkpoint changed"):
        load_streamed(folder, 1 << 40, replace(QUIET, store=str(out)))
    assert pack.main(command) == 1


def test_a_hot_set_of_a_twin_is_refused(folder: Path, tmp_path: Path) -> None:
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        expert_stream.save_hot_set(tmp_path / "hot.json")
    for shard in folder.glob("*.safetensors"):
        replaced(shard)
    with pytest.raises(CheckpointError, match="saved from another checkpoint"):
        load_streamed(folder, 1 << 40, replace(QUIET, hot_set=str(tmp_path / "hot.json")))


def test_a_conversion_does_not_go_on_from_a_twins(checkpoint: Build, tmp_path: Path) -> None:
    built = checkpoint("qwen3_moe", quantize=None)
    source = originals.write(built, tmp_path / "source", originals.single)
    convert_folder(source, tmp_path / "out")
    for shard in source.glob("*.safetensors"):
        replaced(shard)
    with pytest.raises(StreamError, match="other files"):
        convert_folder(source, tmp_path / "out")
    command = ["--model", str(source), "--out", str(tmp_path / "out"), "--no-progress"]
    assert convert.main(command) == 1

"""One process at a time writes an output folder; a killed one does not block the next."""

from __future__ import annotations

import errno
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import originals
import pytest
from conftest import until

from mlx_streamexperts import StreamError, pack
from mlx_streamexperts._io import output
from mlx_streamexperts._io.output import LOCK, exclusive

Build = Callable[..., Path]

# Stops in the middle of its first file, until it is killed.
_STUCK = """
import sys, time
from mlx_streamexperts import convert, pack
from mlx_streamexperts._experts import packed_store
from mlx_streamexperts.convert import _shards
_shards.write_at = packed_store.checksum = lambda *arguments: time.sleep(600)
sys.exit({"convert": convert, "pack": pack}[sys.argv[1]].main(sys.argv[2:]))
"""


@contextmanager
def stuck(program: str, arguments: list[str], out: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is writing into `out`; killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", _STUCK, program, *arguments])
    try:

        def writes() -> bool:
            assert process.poll() is None
            return any([*out.glob("model*.partial"), *out.glob("layer*.partial")])

        until(writes)
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("program", ["convert", "pack"])
def test_a_second_process_is_refused_until_the_first_is_gone(
    program: str, checkpoint: Build, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = originals.write(checkpoint("qwen3_moe"), tmp_path / "source", originals.stacked)
    out = tmp_path / "out"
    arguments = ["--model", str(source), "--out", str(out), "--no-progress"]
    mine = {"convert": "converting", "pack": "packing"}[program]
    with stuck(program, arguments, out) as process:
        before = sorted(out.iterdir())
        for second in ("convert", "pack"):
            for extra in ([], ["--overwrite"]):
                main = importlib.import_module(f"mlx_streamexperts.{second}").main
                assert main([*arguments, *extra]) == 1
                error = capsys.readouterr().err
                assert f"error: {out}: in use ({mine}, process {process.pid})" in error
        assert sorted(out.iterdir()) == before
        # What is being written is no source either.
        for second in ("convert", "pack"):
            main = importlib.import_module(f"mlx_streamexperts.{second}").main
            assert main(["--model", str(out), "--out", str(tmp_path / "further")]) == 1
            assert f"process {process.pid}" in capsys.readouterr().err
        assert not (tmp_path / "further").exists()
    assert (out / LOCK).exists()  # left by the killed one
    if program == "convert":
        assert pack.main(["--model", str(out), "--out", str(tmp_path / "further")]) == 1
        assert "conversion into this folder is unfinished" in capsys.readouterr().err
    assert importlib.import_module(f"mlx_streamexperts.{program}").main(arguments) == 0
    assert not (out / LOCK).exists()


def test_one_at_a_time_although_the_lock_file_comes_and_goes(tmp_path: Path) -> None:
    folder, inside = tmp_path / "a" / "b", tmp_path / "inside"
    entered, refused = [0] * 4, [0] * 4
    failures: list[BaseException] = []

    def work(i: int) -> None:
        try:
            while entered[i] < 25:
                try:
                    with exclusive(folder, "testing"):
                        inside.touch(exist_ok=False)
                        time.sleep(0)
                        inside.unlink()
                        entered[i] += 1
                except StreamError:
                    refused[i] += 1
                    time.sleep(0.0001)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sum(refused) > 0
    assert not inside.exists()


def test_an_empty_folder_goes_as_it_came(tmp_path: Path) -> None:
    with exclusive(tmp_path / "a" / "b", "testing"):
        assert (tmp_path / "a" / "b" / LOCK).read_text().startswith("testing, process ")
    assert not (tmp_path / "a").exists()
    (tmp_path / "kept").mkdir()
    with exclusive(tmp_path / "kept", "testing"):
        pass
    assert not list((tmp_path / "kept").iterdir())
    with exclusive(tmp_path / "c" / "d", "testing"):
        (tmp_path / "c" / "d" / "file").write_text("")
    assert [f.name for f in (tmp_path / "c" / "d").iterdir()] == ["file"]


def test_a_file_system_without_locks_is_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*arguments: object) -> int:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(output, "try_lock", none)
    with pytest.warns(UserWarning, match="no locks"), exclusive(tmp_path / "out", "testing"):
        (tmp_path / "out" / "file").write_text("")
    assert (tmp_path / "out" / "file").exists()


def test_where_no_folder_can_be_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StreamError, match="cannot be written"), exclusive(tmp_path / "file", "x"):
        pass


def test_a_folder_that_cannot_be_made_is_refused_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/proc says of a new folder that there is no such file, as of a parent that is gone."""

    def gone(*_: object, **__: object) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "x")

    monkeypatch.setattr(Path, "mkdir", gone)
    with (
        pytest.raises(StreamError, match="folder: cannot be created: No such file"),
        exclusive(tmp_path / "folder", "writing"),
    ):
        pass

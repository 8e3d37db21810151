"""Traces and timelines that run at a time, are closed in any order, or cannot be written."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from mlx_streamexperts import ExpertStream, StreamError
from mlx_streamexperts._io import output

Streamed = tuple[nn.Module, ExpertStream]
KINDS = ["trace", "timeline"]


def go(model: nn.Module) -> None:
    mx.eval(model(mx.array([[1, 2, 3, 4, 5]])))


def count(file: Path) -> int:
    """Calls of a trace, or calls that a timeline shows waiting for their indices."""
    text = file.read_text()
    if not text.startswith('{"traceEvents'):
        return len(text.splitlines()) - 1
    events = json.loads(text)["traceEvents"]
    return sum(e["ph"] == "X" and e["name"] == "sync" for e in events)


def begin(s: ExpertStream, kind: str, file: Path) -> Any:
    return getattr(s, kind)(file)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first_closed", [0, 1])
def test_both_record_whichever_is_closed_first(
    kind: str, first_closed: int, streamed: Streamed, tmp_path: Path
) -> None:
    model, s = streamed
    go(model)  # all experts of the text are there: each run has as many phases as the next
    files = [tmp_path / "a", tmp_path / "b"]
    alone = tmp_path / "alone"
    with begin(s, kind, alone):
        go(model)
    a = begin(s, kind, files[0])
    go(model)
    b = begin(s, kind, files[1])
    go(model)
    order = [a, b] if first_closed == 0 else [b, a]
    order[0].close()
    go(model)
    order[1].close()
    order[0].close()
    runs = [2, 2] if first_closed == 0 else [3, 1]
    assert [count(f) for f in files] == [n * count(alone) for n in runs]
    assert count(alone) > 0
    go(model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "alone", "b"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_recording_into_the_same_file_is_refused(
    kind: str, streamed: Streamed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, s = streamed
    monkeypatch.chdir(tmp_path)
    with begin(s, kind, tmp_path / "same"):
        for other in (Path("same"), tmp_path / "same"):
            for another in KINDS:
                with pytest.raises(StreamError, match="another recording"):
                    begin(s, another, other)
        go(model)
    assert count(tmp_path / "same") > 0
    with begin(s, kind, tmp_path / "same"):
        go(model)


class Full:
    """A file on a disk that takes no more."""

    def __init__(self, file: Any, room: int) -> None:
        self._file, self._room = file, room

    def write(self, text: str) -> int:
        self._room -= len(text)
        if self._room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return int(self._file.write(text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Full:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("room", [0, 300])
def test_a_full_disk_ends_the_recording_and_not_the_generation(
    kind: str, room: int, streamed: Streamed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, s = streamed
    (tmp_path / "kept").write_text("an earlier one")
    real = Path.open

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        file = real(self, *args, **kwargs)
        return Full(file, room) if self.name.endswith(".partial") else file

    monkeypatch.setattr(Path, "open", full)
    recording = begin(s, kind, tmp_path / "kept")
    go(model)
    with pytest.raises(StreamError, match=r"kept: .*No space left on device.*make room"):
        recording.close()
    recording.close()
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]
    assert (tmp_path / "kept").read_text() == "an earlier one"
    monkeypatch.undo()
    with begin(s, kind, tmp_path / "kept"):
        go(model)
    assert count(tmp_path / "kept") > 0


def test_what_is_written_whole_leaves_nothing_half(tmp_path: Path) -> None:
    """Hot sets, settings, reports, a converter's notes."""
    file = tmp_path / "x.json"
    output.write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        output.write_json(file, {"a": "long" * 9999, "b": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_closing_the_stream_ends_its_recordings(
    kind: str, streamed: Streamed, tmp_path: Path
) -> None:
    model, s = streamed
    recording = begin(s, kind, tmp_path / "open")
    go(model)
    s.close()
    assert count(tmp_path / "open") > 0
    recording.close()
    with pytest.raises(StreamError, match="closed"):
        begin(s, kind, tmp_path / "open")


AT_EXIT = """
import sys
import mlx.core as mx
import mlx_lm.utils
from mlx_streamexperts import StreamConfig, demo_model, patch, stream
with patch(cache="3MB", config=StreamConfig(progress=False)):
    model, _ = mlx_lm.utils.load_model(demo_model())
recordings = [stream(model).trace(sys.argv[1]), stream(model).timeline(sys.argv[2])]
mx.eval(model(mx.array([[1, 2, 3]])))
"""


def test_a_programs_end_ends_its_recordings(tmp_path: Path) -> None:
    files = [tmp_path / "a", tmp_path / "b"]
    subprocess.run([sys.executable, "-c", AT_EXIT, *map(str, files)], check=True, timeout=300)
    assert all(count(f) > 0 for f in files)
    assert len(list(tmp_path.iterdir())) == 2

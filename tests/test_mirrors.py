"""Several drives give the same bits as one, and one that fails or hangs costs no read.

All files are real. Drives are folders; the tests make them fail by replacing `_osinfo.read_into`,
the only call that reads.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, leftovers, load_streamed, smallest_cache, until

from mlx_streamexperts import CheckpointError, StreamConfig, StreamError, mirror, pack, stream
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._analysis.throttle import slowed
from mlx_streamexperts._errors import ExpertReadError
from mlx_streamexperts._io import mirrors as module
from mlx_streamexperts._io import output
from mlx_streamexperts._io.mirrors import Drive, Mirrors, find_mirrors
from mlx_streamexperts._io.ranges import ByteRange
from mlx_streamexperts._io.reader import ExpertReader, Ticket

SIZE = 400_003
CONTENT = [random.Random(n).randbytes(SIZE) for n in range(2)]
PATIENCE = 60.0  # seconds until a test gives up instead of hanging


class Played:
    """A `read_into` for drives that are folders of one drive here; some fail, some hang.

    Attributes:
        fails: the error number of every read of a drive, by folder.
        held: drives whose reads wait until the event is set, by folder.
        seen: reads that began, by folder.
    """

    def __init__(self, *folders: Path) -> None:
        self.fails: dict[Path, int] = {}
        self.held: dict[Path, threading.Event] = {}
        self.seen = dict.fromkeys(folders, 0)
        self._real = platform.read_into

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        at = Path(os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")).parent
        self.seen[at] += 1
        time.sleep(0.001)  # as on a drive, reads overlap
        if number := self.fails.get(at):
            raise OSError(number, os.strerror(number))
        if (event := self.held.get(at)) is not None:
            assert event.wait(PATIENCE)
            for b in buffers:  # whatever a broken drive delivers in the end
                b[:] = bytes(len(b))
            return sum(map(len, buffers))
        return self._real(fd, buffers, offset)


@pytest.fixture
def drives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path, Played]]:
    """Two folders: the first with two files, the second with a copy of the first file."""
    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("needs Linux to tell which file a descriptor is of")
    own, other = tmp_path / "own", tmp_path / "other"
    for folder, count in ((own, 2), (other, 1)):
        folder.mkdir()
        for n in range(count):
            (folder / f"layer-{n}.experts").write_bytes(CONTENT[n])
    played = Played(own, other)
    monkeypatch.setattr(platform, "read_into", played)
    monkeypatch.setattr(module, "_FIRST_PROBE_SECONDS", 0.01)
    monkeypatch.setattr(module, "_LEAST_PIECE_BYTES", 4096)  # many reads
    monkeypatch.setattr(module, "_PIECE_STEP_BYTES", 4096)
    monkeypatch.setattr(module, "_RECOVERY_SECONDS", 0.001)  # reads take microseconds here
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", PATIENCE)  # a pause is no hang
    monkeypatch.setattr(module, "_PATIENCE_UNKNOWN_SECONDS", PATIENCE)
    yield own, other, played
    for event in played.held.values():
        event.set()


def mirrored(own: Path, *others: Path, depth: int = 2) -> Mirrors:
    files = sorted(map(str, own.iterdir()))
    marks = {f: platform.file_mark(Path(f)) for f in files}
    return find_mirrors(files, list(map(str, others)), marks, False, depth)


def open_reader(own: Path, *others: Path, depth: int = 2) -> tuple[ExpertReader, Mirrors]:
    found = mirrored(own, *others, depth=depth)
    return ExpertReader(depth, mirrors=found), found


def read_all(reader: ExpertReader, own: Path, files: Sequence[int] = (0, 1)) -> None:
    """Read whole files in parts of odd sizes, and compare."""
    memory = {n: bytearray(SIZE) for n in files}
    order = random.Random(0)
    ranges, start = [], 0
    while start < SIZE:
        end = min(SIZE, start + order.randrange(1, 40_000))
        ranges += [
            ByteRange(str(own / f"layer-{n}.experts"), start, memoryview(m)[start:end], "l", n, "w")
            for n, m in memory.items()
        ]
        start = end
    reader.submit(ranges).wait()
    assert all(m == CONTENT[n] for n, m in memory.items())


def hang(
    own: Path, other: Path, played: Played, reader: ExpertReader, monkeypatch: pytest.MonkeyPatch
) -> threading.Event:
    """From now on reads of the other drive wait for the event, and hang after 50 ms.

    Those of the own drive never do: its rate is known, and a drive of unknown rate has a patience
    of its own. A pause of the process would otherwise leave the other drive alone, and its reads
    are waited for then.
    """
    assert reader.mirrors is not None
    read_all(reader, own)
    assert reader.mirrors.drives[0].rate
    reader.mirrors.drives[1].rate = None
    event = played.held[other] = threading.Event()
    monkeypatch.setattr(module, "_PATIENCE_UNKNOWN_SECONDS", 0.05)
    return event


def read_until(condition: Callable[[], bool], reader: ExpertReader, own: Path) -> None:
    """Read and compare at least once, until the condition holds: drives are chosen by the clock."""

    def done() -> bool:
        read_all(reader, own)
        return condition()

    until(done)


def test_two_drives_give_the_same_bytes(drives: tuple[Path, Path, Played]) -> None:
    own, other, played = drives
    without = leftovers()
    reader, _ = open_reader(own, other)
    before = leftovers()
    read_until(lambda: min(played.seen.values()) > 0, reader, own)
    assert reader.stats.drive_bytes.keys() == {str(own), str(other)}
    assert sum(reader.stats.drive_bytes.values()) == reader.stats.bytes
    assert reader.stats.bytes % (2 * SIZE) == 0
    assert not reader.stats.moved
    new = leftovers() - before
    assert not [name for name in new if name.startswith("thread")]
    reader.close()
    new = leftovers() - without
    assert not [name for name in new if name.startswith("thread expert-reader")]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENXIO])
def test_a_drive_that_fails_costs_no_read_and_is_taken_back(
    number: int, drives: tuple[Path, Path, Played], caplog: pytest.LogCaptureFixture
) -> None:
    own, other, played = drives
    without = leftovers()
    reader, found = open_reader(own, other)
    read_all(reader, own)
    caplog.clear()
    played.fails[other] = number
    read_until(lambda: found.drives[1].down, reader, own)
    until(lambda: found.drives[1].probe_after > 0.03)  # probed, and refused
    assert found.drives[1].down
    assert reader.stats.moved >= 1 and not reader.stats.errors
    (warning,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert str(other) in warning and os.strerror(number) in warning
    played.fails.clear()
    until(lambda: not found.drives[1].down)
    played.seen[other] = 0
    read_until(lambda: played.seen[other] > 0, reader, own)
    reader.close()
    assert "thread drive-probe" not in leftovers() - without


def test_the_models_own_drive_may_fail_too(drives: tuple[Path, Path, Played]) -> None:
    own, other, played = drives
    reader, _ = open_reader(own, other)
    played.fails[own] = errno.EIO
    for _ in range(3):
        read_all(reader, own, files=[0])
    with pytest.raises(ExpertReadError, match=r"layer-1\.experts"):
        read_all(reader, own)  # the second file is nowhere else
    played.fails[other] = errno.EIO
    with pytest.raises(ExpertReadError, match="Input/output error"):
        read_all(reader, own, files=[0])
    played.fails.clear()
    read_all(reader, own)  # at once, without a probe
    reader.close()


def test_a_replaced_file_is_not_read_until_it_is_back(
    drives: tuple[Path, Path, Played], tmp_path: Path
) -> None:
    own, other, _ = drives
    reader, found = open_reader(own, other)
    copy, kept = other / "layer-0.experts", tmp_path / "kept"
    copy.rename(kept)
    copy.write_bytes(CONTENT[1])
    read_until(lambda: found.drives[1].down, reader, own)
    until(lambda: found.drives[1].probe_after > 0.03)
    assert found.drives[1].down and not reader.stats.errors
    copy.unlink()  # vanished
    after = found.drives[1].probe_after
    until(lambda: found.drives[1].probe_after > after)
    kept.rename(copy)
    until(lambda: not found.drives[1].down)
    read_all(reader, own)
    reader.close()


def test_a_read_that_hangs_is_done_by_the_other_drive(
    drives: tuple[Path, Path, Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When it comes back at last, with garbage, it writes to nobody's memory."""
    own, other, played = drives
    reader, found = open_reader(own, other)
    event = hang(own, other, played, reader, monkeypatch)
    memory = bytearray(SIZE)
    parts = [
        ByteRange(str(own / "layer-0.experts"), at, memoryview(memory)[at : at + 5000], "l", at, "")
        for at in range(0, SIZE, 5000)
    ]
    while not (late := [t for t in reader._late if t.is_alive()]):
        ticket = reader.submit(parts)
        until(lambda t=ticket: help_wait(t))  # type: ignore[misc]
        assert not ticket.errors
        assert memory == CONTENT[0]
    assert found.drives[1].down
    assert reader.stats.moved >= 1
    assert len(reader._threads) == 4 and all(t.is_alive() for t in reader._threads)
    read_all(reader, own)
    assert found.drives[1].down  # not even probed while a read is out
    event.set()
    del played.held[other]
    for t in late:
        t.join(PATIENCE)
    assert memory == CONTENT[0]
    until(lambda: not found.drives[1].down)
    reader.close()


def help_wait(ticket: Ticket) -> bool:
    ticket.wait_for_any(list(ticket.left)) if ticket.left else None
    return not ticket.left


def test_a_reader_closes_while_a_drive_hangs(
    drives: tuple[Path, Path, Played], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, other, played = drives
    before = threading.enumerate()
    reader, _ = open_reader(own, other)
    event = hang(own, other, played, reader, monkeypatch)
    hung = played.seen[other]
    memory = bytearray(b"\xff" * SIZE)  # what comes late is zeros
    part = memoryview(memory)
    parts = [
        ByteRange(str(own / "layer-0.experts"), at, part[at : at + 4096], "l", at, "")
        for at in range(0, SIZE, 4096)
    ]
    while played.seen[other] == hung:
        ticket = reader.submit(parts)
        until(lambda t=ticket: played.seen[other] > hung or not t.left)  # type: ignore[misc]
    reader.close()
    after = bytes(memory)
    new = [t for t in threading.enumerate() if t not in before]
    late = [t for t in new if t.name.startswith("expert-reader")]
    assert late  # the hung ones, and no other
    event.set()
    for t in late:
        t.join(PATIENCE)
    assert memory == after


def test_a_slow_drive_does_not_hold_all_threads(drives: tuple[Path, Path, Played]) -> None:
    """What only the slow drive has waits for it; what the other one has too does not."""
    own, other, played = drives
    reader, found = open_reader(own, other)
    event = played.held[own] = threading.Event()
    memory = bytearray(SIZE)
    alone = [
        ByteRange(str(own / "layer-1.experts"), n * 20_000, memoryview(memory)[n:][:1], "l", n, "")
        for n in range(10)
    ]
    reader.submit(alone)
    until(lambda: played.seen[own] == 2)
    read_all(reader, own, files=[0])
    assert played.seen[own] == 2  # as many as the drive takes
    event.set()
    reader.close()
    assert found.drives[0].reads == 0


def test_rates_are_those_of_all_reads_together() -> None:
    """Four reads at once that end after 1 to 4 s are 1 MB/s, though each took longer."""
    drive = Drive("a", None, {})  # type: ignore[arg-type]
    for _ in range(4):
        drive.begin(1_000_000, 100.0)
    for n in range(1, 4):
        drive.end(1_000_000, 100.0 + n, True)
    assert drive.rate == pytest.approx(1e6)
    # Half of the last read should be done; then comes another one.
    assert drive.expected(500_000, 103.5, 1.0) == pytest.approx(1.0)
    assert drive.expected(500_000, 999.0, 1.0) == pytest.approx(0.5)  # it hangs: it counts as done
    drive.end(1_000_000, 104.0, True)
    drive.begin(10_000_000, 200.0)  # idle in between
    drive.end(10_000_000, 220.0, True)
    assert 5e5 < drive.rate < 1e6
    assert drive.expected(1_000_000, 220.0, 1.0) == pytest.approx(1e6 / drive.rate)


def test_a_drives_first_read_says_nothing_of_its_rate() -> None:
    drive = Drive("a", None, {})  # type: ignore[arg-type]
    drive.begin(1_000_000, 100.0)
    drive.end(1_000_000, 200.0, True)
    assert drive.rate is None and drive.total == 1_000_000
    drive.begin(1_000_000, 200.0)
    drive.end(1_000_000, 201.0, True)
    assert drive.rate == pytest.approx(1e6)


@pytest.mark.parametrize("held", [range(1, 2), range(1000, 1001)])
def test_a_drive_whose_reads_were_held_up_is_used_like_its_equal_again(
    held: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two buses of 2 GB/s on a clock of their own; 16 reads a layer, some of one drive held up."""

    class Clock:
        now = 100.0

        def perf_counter(self) -> float:
            return self.now

    clock, nbytes = Clock(), 256 << 10
    monkeypatch.setattr(module, "time", clock)
    drives = [Drive(name, None, {"f": 1}) for name in "ab"]  # type: ignore[arg-type]
    found = Mirrors(drives, depth=8)
    ranges = [ByteRange("f", 0, memoryview(bytearray(nbytes)), "l", 0, "w")]
    free, begun = {"a": 0.0, "b": 0.0}, {"a": 0, "b": 0}
    for _ in range(4000):
        left, under_way = 16, []
        while left or under_way:
            while left and found.has_room(ranges):
                drive, _ = found._choose("f", nbytes, [])
                mine = found._begin(drive, "f", nbytes, alone=True)
                end = max(free[drive.folder], clock.now) + nbytes / 2e9
                if drive.folder == "b" and begun["b"] in held:
                    end += 0.05
                free[drive.folder], left = end, left - 1
                begun[drive.folder] += 1
                under_way.append((end + 80e-6, mine))
            first = min(under_way, key=itemgetter(0))
            under_way.remove(first)
            clock.now = first[0]
            found._end(first[1], delivered=True)
        clock.now += 0.001
    assert 0.4 < begun["b"] / 64_000 < 0.6


def test_a_slow_drive_that_may_have_recovered_is_tried_again() -> None:
    drive = Drive("a", None, {})  # type: ignore[arg-type]
    for begin, seconds in ((99.0, 1.0), (100.0, 1.0), (101.0, 1000.0)):
        drive.begin(1_000_000, begin)
        drive.end(1_000_000, begin + seconds, True)
    assert drive.rate is not None and drive.rate < 1e4
    assert drive.expected(1_000_000, drive.last + 1000, 4e6) == pytest.approx(0.25)  # as any
    drive.total = module._MEASURED_BYTES
    slow = 1_000_000 / drive.rate
    now = drive.last + 1000.0
    assert drive.expected(1_000_000, drive.last, 1.0) == pytest.approx(slow)
    later = drive.last + 3 * module._RECOVERY_SECONDS
    assert drive.expected(1_000_000, later, 1.0) == pytest.approx(slow / 8)
    assert drive.expected(1_000_000, now, 1.0) == pytest.approx(1.0)  # as it was at best


def test_mirrors_that_differ_are_refused_by_name(drives: tuple[Path, Path, Played]) -> None:
    own, other, _ = drives
    copy = other / "layer-0.experts"
    with pytest.raises(CheckpointError, match=f"{other}/gone: this mirror is no folder"):
        mirrored(own, other / "gone")
    with pytest.raises(CheckpointError, match=f"{copy}: is no copy.*its size differs"):
        copy.write_bytes(CONTENT[0][:-1])
        mirrored(own, other)
    with pytest.raises(CheckpointError, match=f"{copy}: is no copy.*its content differs"):
        copy.write_bytes(CONTENT[1])
        mirrored(own, other)
    copy.unlink()
    with pytest.raises(CheckpointError, match=f"{other}: this mirror has none"):
        mirrored(own, other)
    os.link(own / "layer-0.experts", copy)
    with pytest.raises(CheckpointError, match="is the same file"):
        mirrored(own, other)


TOKENS = [mx.array([[3, 1, 4, 1, 5, 9, 2, 6]]), mx.array([[2]]), mx.array([[7]])]


@pytest.fixture
def model_folder(
    checkpoint: Callable[..., Path], tmp_path: Path, not_compiled: None
) -> tuple[Path, list[np.ndarray]]:
    """A checkpoint of its own, and stock's logits."""
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))
    stock, _ = mlx_lm.utils.load_model(folder)
    return folder, [np.array(stock(t)) for t in TOKENS]


@pytest.mark.parametrize("packed", [False, True])
def test_a_model_with_a_partial_mirror_is_exact(
    packed: bool,
    model_folder: tuple[Path, list[np.ndarray]],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, expected = model_folder
    source, store, other = folder, None, tmp_path / "mirror"
    if packed:
        source, store = tmp_path / "store", str(tmp_path / "store")
        assert pack.main(["--model", str(folder), "--out", store, "--no-progress"]) == 0
    shutil.copytree(source, other)
    files = sorted([*other.glob("*.experts"), *other.glob("*.safetensors")])
    if len(files) > 1:
        files[-1].unlink()
    config = StreamConfig(progress=False, prefetch="on", store=store, mirrors=[str(other)])
    assert config == replace(config) and hash(config)
    with stream(model := load_streamed(folder, 1 << 40, config)) as s:
        s.resize(smallest_cache(s))
        with s.timeline(tmp_path / "timeline.json"), slowed(1e9, 0.001):
            for _ in range(3):
                for t, e in zip(TOKENS, expected, strict=True):
                    assert np.array_equal(np.array(model(t)), e)
        stats = s.stats()
        assert sum(stats.read.drive_bytes.values()) == stats.read.bytes
        assert set(stats.read.drive_bytes) == {str(source), str(other)}
        s.reset()
        assert not s.stats().read.drive_bytes
        real = platform.read_into
        marks = {os.stat(f).st_ino for f in other.iterdir()}

        def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            if os.fstat(fd).st_ino in marks:
                raise OSError(errno.EIO, "pulled")
            return real(fd, buffers, offset)

        monkeypatch.setattr(platform, "read_into", fail)
        for t, e in zip(TOKENS, expected, strict=True):
            assert np.array_equal(np.array(model(t)), e)
        assert s.stats().read.errors == 0
    assert sum("is on the same drive as" in r.message for r in caplog.records) == 1
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    reads = [e["args"]["drives"] for e in events if e["name"] in ("read", "prefetch")]
    assert {drive for r in reads for drive in r} == {str(source), str(other)}


def test_a_mirror_of_another_store_is_refused(
    model_folder: tuple[Path, list[np.ndarray]], tmp_path: Path
) -> None:
    folder, _ = model_folder
    store, other = tmp_path / "store", tmp_path / "mirror"
    assert pack.main(["--model", str(folder), "--out", str(store), "--no-progress"]) == 0
    shutil.copytree(store, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["layers"][0]["checksums"][1] = "0" * 16
    (other / "manifest.json").write_text(json.dumps(manifest))
    config = replace(QUIET, store=str(store), mirrors=[str(other)])
    with pytest.raises(CheckpointError, match=r"mirror/layer-00000\.experts: was not packed"):
        load_streamed(folder, 1 << 40, config)
    (other / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"mirror/manifest\.json"):
        load_streamed(folder, 1 << 40, config)
    with pytest.raises(StreamError, match="mirrors must be a list"):
        StreamConfig(mirrors=str(other))


def run_mirror(*arguments: object) -> int:
    return mirror.main([*map(str, arguments), "--no-progress"])


def contents(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture
def several_shards(checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, list[str]]:
    """A checkpoint with one shard for each layer and one for the rest; those with experts."""
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))
    shards: dict[str, dict[str, mx.array]] = {}
    for file in folder.glob("*.safetensors"):
        for name, array in mx.load(str(file)).items():  # type: ignore[union-attr]
            layer = name.split(".")[2] if ".layers." in name else "rest"
            shards.setdefault(f"model-{layer}.safetensors", {})[name] = array
        mx.eval(shards)
        file.unlink()
    for name, tensors in shards.items():
        mx.save_safetensors(str(folder / name), tensors, {"format": "mlx"})
    return folder, sorted(n for n, x in shards.items() if any("switch_mlp" in k for k in x))


def test_mirror_copies_what_is_read_most_and_completes_it(
    several_shards: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    not_compiled: None,
) -> None:
    folder, (first, second) = several_shards
    out, trace = tmp_path / "out", tmp_path / "trace.jsonl"
    size = (folder / second).stat().st_size
    with stream(model := load_streamed(folder, 1 << 40)) as s:
        s.resize(smallest_cache(s))
        with s.trace(trace):
            mx.eval(model(TOKENS[1]))
        s.save_hot_set(tmp_path / "hot.json")
    lines = trace.read_text().splitlines()
    trace.write_text("\n".join(x for x in lines if '"layer": 0' not in x) + "\n")
    assert run_mirror(folder, out, "--bytes", 96, "--most-read", trace) == 1
    assert "did you mean" in capsys.readouterr().err and not out.exists()
    limit = f"{1.5 * size / 1e6:.6f}MB"
    assert run_mirror(folder, out, "--bytes", limit, "--most-read", trace) == 0
    assert list(contents(out)) == [second]  # of the layer that the trace has
    assert "1 of 2 files" in capsys.readouterr().out
    arguments = [str(folder), str(out), "--most-read", str(tmp_path / "hot.json")]
    assert mirror.main(arguments) == 0
    shown = capsys.readouterr().err
    assert "Copied: 100%" in shown and "Checked: 100%" in shown
    assert sorted(contents(out)) == [first, second]
    assert all((folder / name).read_bytes() == data for name, data in contents(out).items())
    with (out / first).open("r+b") as f:  # where no sample is taken
        f.seek(size * 3 // 4)
        byte = f.read(1)
        f.seek(-1, 1)
        f.write(bytes([byte[0] ^ 1]))
    capsys.readouterr()
    status = run_mirror(folder, out, "--verify")
    assert status == 1 and f"{first}: its bytes" in capsys.readouterr().err
    (out / first).write_bytes(b"something else")
    assert run_mirror(folder, out) == 1
    assert f"{first}: is no copy" in capsys.readouterr().err


def test_mirror_checks_free_space_first(
    several_shards: tuple[Path, list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mirror, "free_disk_bytes", lambda folder: 100)
    assert run_mirror(several_shards[0], tmp_path / "out") == 1
    assert "100 are free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert run_mirror(several_shards[0], several_shards[0]) == 1
    assert "is the source itself" in capsys.readouterr().err


def test_mirror_killed_at_any_moment_leaves_a_mirror_that_works(
    model_folder: tuple[Path, list[np.ndarray]], tmp_path: Path
) -> None:
    folder, expected = model_folder
    store, out = tmp_path / "store", tmp_path / "out"
    assert pack.main(["--model", str(folder), "--out", str(store), "--no-progress"]) == 0
    config = replace(QUIET, store=str(store), mirrors=[str(out)])
    killed = 0
    for step in range(100):
        if (pid := os.fork()) == 0:  # no MLX and no thread of ours runs in the child
            steps = iter(range(step))

            def count(real: Callable[..., object]) -> Callable[..., object]:
                def call(*args: object) -> object:
                    if next(steps, None) is None:  # noqa: B023
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args)

                return call

            mirror._CHUNK_BYTES = 8192
            mirror.sync_to_drive = count(mirror.sync_to_drive)  # type: ignore[assignment]
            mirror._digest = count(mirror._digest)  # type: ignore[assignment]
            output.sync_folder = count(output.sync_folder)  # type: ignore[assignment]
            Path.replace = count(Path.replace)  # type: ignore[method-assign, assignment]
            os._exit(run_mirror(store, out))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
        copies = list(out.glob("*.experts"))
        assert all(f.read_bytes() == (store / f.name).read_bytes() for f in copies)
        if copies and killed % 3 == 0:
            with stream(model := load_streamed(folder, 1 << 20, config)):
                assert np.array_equal(np.array(model(TOKENS[0])), expected[0])
    assert killed >= 5
    assert contents(out) == contents(store)

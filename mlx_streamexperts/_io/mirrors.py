"""Several drives that hold the same files: which of them a read goes to, and what if it fails.

`Mirrors` stands between the reader and one `ShardFiles` for each drive. The drive is chosen when a
read begins: the one that is expected to finish first. Copies are compared when the model is loaded,
and again before a drive that failed is used again. This module must never let a read that hangs
write into expert memory later: a read that another drive could do instead goes to memory of its
thread, and is copied from there.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._errors import CheckpointError, ExpertReadError
from .._osinfo import content_sample, file_mark
from .checkpoint import file_identity
from .files import ShardFiles, deliver, direct_works
from .ranges import ByteRange, span_bytes

_log = logging.getLogger(__name__)

# A layer's reads are cut into about so many pieces, so that drives of any rates end together. A
# piece is long enough for its handling in Python (0.1 ms) to be a third of its time at most.
_PIECES = 16
_LEAST_PIECE_BYTES, _LEAST_PIECE_SECONDS = 256 << 10, 300e-6
_PIECE_STEP_BYTES = 16_384

# A drive's rate is that of about the last half second in which it was busy.
_WINDOW_SECONDS = 0.5
# A drive that was slow and is not used any more may have recovered: every so many seconds
# it is taken to be twice as fast, up to the fastest that it ever was. If the read that it then gets
# is faster than its rate, that alone counts: one read held up for 50 ms had kept a drive as fast as
# the other out of use for 5 s and more.
_RECOVERY_SECONDS = 0.5
# Until it has read so much, it may have been slow because the machine was busy, and may recover to
# be as fast as any: otherwise one read that was held up at the start would rule it out for good.
_MEASURED_BYTES = 16 << 20

# A read hangs if it takes longer than this, and than so many times what was expected of it.
_PATIENCE_SECONDS, _PATIENCE_TIMES = 2.0, 20.0
_PATIENCE_UNKNOWN_SECONDS = 5.0  # before a rate is known: drives that sleep take as long to wake

_FIRST_PROBE_SECONDS, _LAST_PROBE_SECONDS = 1.0, 60.0
_PROBE_BYTES = 4096


class GivenUpError(Exception):
    """The read hung, and another thread does it now: this one must touch nothing any more."""


@dataclass(eq=False)
class Drive:
    """A folder with the experts' files, or copies of some of them.

    Attributes:
        folder: what users call it.
        files: reads them.
        holds: the size of each file, by its path in the model's own folder.
        reads: under way, hung ones included.
        pending: bytes of reads under way.
        rate: bytes/s while it was busy, all reads together; None until two have ended.
        best: the highest rate so far.
        total: bytes that it has read.
        down: it failed, and is not used.
    """

    folder: str
    files: ShardFiles
    holds: dict[str, int]
    reads: int = 0
    pending: int = 0
    rate: float | None = None
    best: float = 0.0
    total: int = 0
    down: bool = False
    since: float = 0.0  # when its last read ended, or when it became busy
    last: float = 0.0  # when its last read began
    tried: bool = False  # the read that ends next is the first after a while
    up_since: float = -math.inf  # monotonic clock
    probe_after: float = 0.0  # seconds from its failure, or its last probe
    probe_at: float = 0.0
    window: list[float] = field(default_factory=lambda: [0.0, 0.0])  # bytes, busy seconds

    def path(self, file: str) -> str:
        """Where this drive has a file."""
        return self.files.path(file)

    def begin(self, nbytes: int, now: float) -> None:
        if self.reads == 0:
            self.since, self.tried = now, now - self.last > _RECOVERY_SECONDS
        self.reads += 1
        self.pending += nbytes
        self.last = now

    def end(self, nbytes: int, now: float, delivered: bool) -> None:
        """Note that a read of `nbytes` has ended."""
        self.reads -= 1
        self.pending -= nbytes
        busy, self.since = now - self.since, now
        if delivered:
            self.total += nbytes
            if self.total == nbytes:  # it opened the file: 0.1 to 1 ms, the next ones took 0.01
                return
            if self.tried and nbytes > (self.rate or 0.0) * busy:  # what was slow is over
                self.window = [0.0, 0.0]
            self.window[0] += nbytes
            self.window[1] += busy
            self.rate = self.window[0] / max(self.window[1], 1e-9)
            self.tried = False
            self.best = max(self.best, self.rate)
            if self.window[1] > _WINDOW_SECONDS:
                self.window = [x / 2 for x in self.window]

    def expected(self, nbytes: int, now: float, unknown: float) -> float:
        """Seconds until a read of `nbytes` would end if it began now.

        Args:
            nbytes: its length.
            now: the time.
            unknown: the rate to assume if none is known, bytes/s.
        """
        rate = self.rate or unknown
        if self.rate and not self.reads and now - self.last > _RECOVERY_SECONDS:
            periods = min(30.0, (now - self.last) / _RECOVERY_SECONDS)
            most = self.best if self.total >= _MEASURED_BYTES else unknown
            rate = min(max(most, rate), rate * 2**periods)
        left = 0.0
        if self.reads:  # since the last one ended, no more than one can have been delivered
            left = self.pending - min(max(0.0, now - self.since) * rate, self.pending / self.reads)
        return (left + nbytes) / rate


@dataclass(slots=True, eq=False)
class _UnderWay:
    """A read that can be given up. `given_up` is set once; the thread must then copy nothing."""

    drive: Drive
    file: str
    nbytes: int
    begun: float
    patience: float
    given_up: bool = False


class Mirrors:
    """The drives that hold a model's experts.

    Args:
        drives: the model's own first; it holds every file.
        depth: reads in flight at each, so that a slow one cannot hold all threads.
    """

    def __init__(self, drives: Sequence[Drive], depth: int) -> None:
        self.drives = list(drives)
        self._depth = depth
        self._holders = {f: [d for d in self.drives if f in d.holds] for f in self.drives[0].holds}
        self._under_way: dict[int, _UnderWay] = {}  # by thread
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._probing: threading.Thread | None = None

    @property
    def copies(self) -> int:
        """Number of files on all drives but the first."""
        return sum(len(d.holds) for d in self.drives[1:])

    def close(self) -> None:
        """Close all files. No read may be under way but those that were given up."""
        self._closed.set()
        with self._lock:
            probing = self._probing
        if probing is not None and probing is not threading.current_thread():
            probing.join(_FIRST_PROBE_SECONDS)
            if probing.is_alive():  # it hangs, and may use its drive's files
                return
        for drive in self.drives:
            drive.files.close()

    def piece_bytes(self, nbytes: int, most: int) -> int:
        """How long reads should be.

        Args:
            nbytes: bytes of all reads that are waited for together.
            most: upper bound.
        """
        fastest = max((d.rate or 0.0 for d in self.drives), default=0.0)
        least = max(_LEAST_PIECE_BYTES, int(fastest * _LEAST_PIECE_SECONDS))
        piece = max(least, nbytes // _PIECES)
        return min(most, -(-piece // _PIECE_STEP_BYTES) * _PIECE_STEP_BYTES)

    def has_room(self, ranges: Sequence[ByteRange]) -> bool:
        """Can a read begin now? Not if the drive that it should go to has its number under way.

        It is better to wait for that drive than to choose another one too early.
        """
        up = [d for d in self._holders[ranges[0].file] if not d.down]
        if not up:
            return True
        return self._best(up, span_bytes(ranges)).reads < self._depth

    def read(self, ranges: Sequence[ByteRange]) -> tuple[int, Drive, int]:
        """Read ranges that lie side by side in one file, from one of the drives that hold it.

        Returns:
            The number of system calls, the drive, and how many others failed before.

        Raises:
            ExpertReadError: no drive could read them; the error is the last one's.
            GivenUpError: the read hung, and the caller's work has been given to another thread.
        """
        file = ranges[0].file
        nbytes = span_bytes(ranges)
        tried: list[Drive] = []
        while True:
            with self._lock:
                drive, alone = self._choose(file, nbytes, tried)
                mine = self._begin(drive, file, nbytes, alone)
            try:
                if alone:
                    calls = drive.files.read(ranges)
                else:
                    source, calls = drive.files.fetch(ranges)
            except BaseException as e:
                self._end(mine, delivered=False)
                tried.append(drive)
                if not isinstance(e, ExpertReadError):
                    raise
                with self._lock:
                    failed = self._fail(drive)
                if failed:
                    self._warn(drive, f"{e.file}: {e.reason}")
                if len(tried) == len(self._holders[file]):
                    raise
                continue
            self._end(mine, delivered=True)
            if not alone:
                deliver(ranges, source)
            return calls, drive, len(tried)

    def give_up(self) -> set[int]:
        """Give up reads that hang and that another drive can do; their drive is down.

        Returns:
            The threads that are still in such a read, also those of earlier calls.
        """
        if not self._under_way:
            return set()
        now, hung = time.perf_counter(), None
        with self._lock:
            for read in self._under_way.values():
                late = now - read.begun > read.patience
                if late and not read.given_up and self._others(read.file, read.drive):
                    hung = read
            failed = hung is not None and self._fail(hung.drive)
            for read in self._under_way.values():
                if read.drive.down and not read.given_up:
                    read.given_up = bool(self._others(read.file, read.drive))
            threads = {t for t, read in self._under_way.items() if read.given_up}
        if hung is not None and failed:
            self._warn(hung.drive, f"a read has not ended after {now - hung.begun:.1f} s")
        return threads

    def is_mine(self) -> bool:
        """Is the calling thread the one that probes drives?"""
        return threading.current_thread() is self._probing

    def _others(self, file: str, drive: Drive) -> list[Drive]:
        return [d for d in self._holders[file] if d is not drive and not d.down]

    def _choose(self, file: str, nbytes: int, tried: Sequence[Drive]) -> tuple[Drive, bool]:
        """The drive for a read, and whether no other could do it; the caller holds the lock."""
        left = [d for d in self._holders[file] if d not in tried]
        up = [d for d in left if not d.down]
        if len(up) < 2:
            return (up or left)[0], True
        free = [d for d in up if d.reads < self._depth]  # others may have begun since `has_room`
        return self._best(free or up, nbytes), False

    def _best(self, drives: Sequence[Drive], nbytes: int) -> Drive:
        """The drive that is expected to end a read of `nbytes` first."""
        now = time.perf_counter()
        unknown = 1.01 * (max(d.rate or 0.0 for d in self.drives) or 1e9)  # first of equals
        return min(drives, key=lambda d: d.expected(nbytes, now, unknown))

    def _begin(self, drive: Drive, file: str, nbytes: int, alone: bool) -> _UnderWay:
        now, patience = time.perf_counter(), _PATIENCE_UNKNOWN_SECONDS
        if drive.rate:
            expected = drive.expected(nbytes, now, drive.rate)
            patience = max(_PATIENCE_SECONDS, _PATIENCE_TIMES * expected)
        drive.begin(nbytes, now)
        mine = _UnderWay(drive, file, nbytes, now, patience)
        if not alone:
            self._under_way[threading.get_ident()] = mine
        return mine

    def _end(self, mine: _UnderWay, delivered: bool) -> None:
        with self._lock:
            self._under_way.pop(threading.get_ident(), None)
            mine.drive.end(mine.nbytes, time.perf_counter(), delivered and not mine.given_up)
        if mine.given_up:
            raise GivenUpError

    def _fail(self, drive: Drive) -> bool:
        """Use a drive no more until it has been probed; the caller holds the lock.

        Returns:
            Whether it was used until now.
        """
        if drive.down or self._closed.is_set():
            return False
        now = time.monotonic()
        relapsed = now - drive.up_since < _LAST_PROBE_SECONDS
        wait = 2 * drive.probe_after if relapsed else _FIRST_PROBE_SECONDS
        drive.down, drive.probe_after = True, min(wait, _LAST_PROBE_SECONDS)
        drive.probe_at = now + drive.probe_after
        if self._probing is None:
            probing = threading.Thread(target=self._probe, name="drive-probe", daemon=True)
            with suppress(RuntimeError):  # the system's limit of threads: it stays down
                probing.start()
                self._probing = probing
        return True

    def _warn(self, drive: Drive, why: str) -> None:
        _log.warning(
            f"{drive.folder}: this drive is not used for now ({why}). What other drives hold too "
            "is read from there; the drive is tried again from time to time"
        )

    def _probe(self) -> None:
        """Take drives back whose files can be read again and are those of the load."""
        while True:
            with self._lock:
                down = [d for d in self.drives if d.down]
                if not down:
                    self._probing = None
                    return
            wait = min(d.probe_at for d in down) - time.monotonic()
            if self._closed.wait(min(max(wait, 0.01), _FIRST_PROBE_SECONDS)):
                return
            for drive in down:
                if time.monotonic() < drive.probe_at:
                    continue
                if self._is_sound(drive):
                    with self._lock:
                        drive.down, drive.up_since = False, time.monotonic()
                        drive.rate, drive.window = None, [0.0, 0.0]
                    _log.warning(f"{drive.folder}: this drive is used again")
                else:
                    drive.probe_after = min(2 * drive.probe_after, _LAST_PROBE_SECONDS)
                    drive.probe_at = time.monotonic() + drive.probe_after

    def _is_sound(self, drive: Drive) -> bool:
        """Open each file of a drive anew, which compares its mark, and read a part of it."""
        with self._lock:
            if drive.reads:  # one hangs there, or goes there for want of another drive
                return False
            drive.files.close()
        with suppress(ExpertReadError):
            for file, size in drive.holds.items():
                part = memoryview(bytearray(min(_PROBE_BYTES, size)))
                drive.files.fetch([ByteRange(file, size // 2, part[: size - size // 2], "", 0, "")])
            return True
        return False


def find_mirrors(
    files: Sequence[str],
    folders: Sequence[str],
    marks: dict[str, tuple[int, ...]],
    direct: bool,
    depth: int,
) -> Mirrors:
    """Compare the copies in mirror folders with the files themselves.

    Args:
        files: every file that experts are read from.
        folders: the mirrors. A copy has the name of its file; any may be missing.
        marks: of `files`, from `_osinfo.file_mark`.
        direct: bypass the page cache, on drives that can.
        depth: reads in flight at each drive.

    Raises:
        CheckpointError: a mirror is no folder, has none of the files, or one that differs.
    """
    sizes = {f: marks[f][2] for f in files}
    drives = [Drive(str(Path(files[0]).parent), ShardFiles(direct, marks), sizes)]
    known: dict[str, dict[str, Any]] = {}
    devices = {marks[files[0]][0]: drives[0].folder}
    for folder in folders:
        copies, own = {}, {}
        if not Path(folder).is_dir():
            raise CheckpointError(f"{folder}: this mirror is no folder: connect its drive")
        for file in files:
            copy = Path(folder) / Path(file).name
            if not copy.is_file():
                continue
            try:
                if copy.samefile(file):
                    raise CheckpointError(f"{copy}: is the same file as {file}, no copy of it")
                if file not in known:
                    known[file] = identity(Path(file))
                check_copy(copy, file, known[file])
                copies[file], own[file] = str(copy), file_mark(copy)
            except OSError as e:
                raise CheckpointError(f"{copy}: cannot be read: {e.strerror}") from e
        if not copies:
            raise CheckpointError(
                f"{folder}: this mirror has none of the files that experts are read from "
                f"({Path(files[0]).name}, ...): streamexperts mirror writes them"
            )
        bypass = direct and direct_works(Path(next(iter(copies.values()))))
        held = {f: sizes[f] for f in copies}
        drives.append(Drive(folder, ShardFiles(bypass, own, copies), held))
        device = next(iter(own.values()))[0]
        if device in devices:
            _log.warning(
                f"{folder}: is on the same drive as {devices[device]}: reading from both is no "
                "faster than from one"
            )
        devices.setdefault(device, folder)
    return Mirrors(drives, depth)


def identity(file: Path) -> dict[str, Any]:
    """What a copy of a file must have: size, samples of its content, and a shard's header.

    Raises:
        CheckpointError: it cannot be read.
    """
    if file.suffix == ".safetensors":
        return file_identity(file)
    try:
        return {"bytes": file.stat().st_size, "sample": content_sample(file)}
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e.strerror}") from e


def check_copy(copy: Path, file: str | Path, expected: dict[str, Any]) -> None:
    """Compare a copy with a file's `identity`.

    Raises:
        CheckpointError: it differs, or cannot be read.
    """
    found = identity(copy)
    if found == expected:
        return
    what = next(k for k in expected if found.get(k) != expected[k])
    names = {"bytes": "size", "header_sha256": "header", "sample": "content"}
    raise CheckpointError(
        f"{copy}: is no copy of {file}, its {names[what]} differs: remove it, and let "
        "streamexperts mirror write it again"
    )

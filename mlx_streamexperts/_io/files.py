"""One read of a shard, which is complete or an error: system calls, alignment, short reads.

Many threads read at once. No other module opens weight files for streaming.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from operator import itemgetter
from pathlib import Path

import numpy as np

from .. import _osinfo as platform
from .._errors import ExpertReadError, StreamError
from .checkpoint import shard_files
from .ranges import ByteRange, span_bytes

_REPLACED = "the file was replaced by another one, or rewritten, after the model was loaded"

# Files that libraries open besides: how many the limit makes room for, and the fewest that do.
_SPARE_FILES, _FEWEST_FILES = 64, 8

_SHORT_COPY_BYTES = 32 << 10  # copied in the time that it takes to let other threads run

_memory_of = itemgetter(2)  # `ByteRange.into`


class ShardFiles:
    """Shards, opened at first use.

    Args:
        direct: bypass the page cache.
        expected: mark of each file when the model was loaded; see `_osinfo.file_mark`.
        copies: where copies of the files are that are read instead. Ranges, `expected` and this
            name a file by its own path; errors name the copy.
    """

    def __init__(
        self,
        direct: bool,
        expected: dict[str, tuple[int, ...]],
        copies: dict[str, str] | None = None,
    ) -> None:
        self.direct, self._expected, self._copies = direct, expected, copies or {}
        self._files: dict[str, tuple[int, int]] = {}  # path -> (descriptor, alignment)
        self._lock = threading.Lock()
        self._local = threading.local()

    def close(self) -> None:
        """Close all descriptors. No read may be under way."""
        while self._files:
            os.close(self._files.popitem()[1][0])

    def read(self, ranges: Sequence[ByteRange]) -> int:
        """Read ranges that lie side by side in one file; returns the number of system calls.

        Raises:
            ExpertReadError: the file cannot be read, or ends too early.
        """
        fd, alignment = self._files.get(ranges[0].file) or self._open(ranges[0])
        if alignment > 1 and not _aligned(ranges, alignment):
            source, calls = self.fetch(ranges)
            deliver(ranges, source)
            return calls
        buffers = list(map(_memory_of, ranges))
        offset, calls = ranges[0].offset, 0
        while buffers:
            try:
                count = platform.read_into(fd, buffers, offset)
            except OSError as e:
                raise self._failure(ranges, offset, e.errno) from e
            calls += 1
            if count == 0:
                raise self._failure(ranges, offset, None)
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers.pop(0))
            if count:
                if alignment > 1 and count % alignment:  # a direct read ends early only at the end
                    raise self._failure(ranges, offset, None)
                buffers[0] = buffers[0][count:]
        return calls

    def announce(self, runs: Iterable[Sequence[ByteRange]]) -> None:
        """Let the system begin reads through the page cache. Files that are not open are left out.

        Args:
            runs: each of ranges that lie side by side in one file.
        """
        for run in runs:
            if opened := self._files.get(run[0].file):
                platform.announce_read(opened[0], run[0].offset, span_bytes(run))

    def fetch(self, ranges: Sequence[ByteRange]) -> tuple[memoryview, int]:
        """Read ranges that lie side by side in one file into aligned memory of this thread.

        Returns:
            Their bytes, which stay until this thread's next call, and the number of system calls.

        Raises:
            ExpertReadError: as `read`.
        """
        fd, alignment = self._files.get(ranges[0].file) or self._open(ranges[0])
        begin = ranges[0].offset
        end = begin + sum(len(r.into) for r in ranges)
        start = begin - begin % alignment
        length = -(-(end - start) // alignment) * alignment
        bounce = self._bounce(length)
        got = calls = 0
        while start + got < end:
            try:
                count = platform.read_into(fd, [bounce[got:length]], start + got)
            except OSError as e:
                raise self._failure(ranges, start + got, e.errno) from e
            calls += 1
            if count == 0 or (count % alignment and start + got + count < end):
                raise self._failure(ranges, start + got + count, None)
            got += count
        return bounce[begin - start : end - start], calls

    def _bounce(self, nbytes: int) -> memoryview:
        """This thread's page-aligned buffer of at least `nbytes`."""
        buffer = getattr(self._local, "buffer", None)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._local.buffer = memoryview(mmap.mmap(-1, nbytes))
        return buffer

    def _open(self, first: ByteRange) -> tuple[int, int]:
        """Open a shard; returns its descriptor and the alignment that reads must have."""
        with self._lock:
            known = self._files.get(first.file)
            if known is not None:  # another thread was faster
                return known
            path = Path(self.path(first.file))
            try:
                if self.direct:
                    known = platform.open_direct(path)
                else:
                    known = platform.open_buffered(path), 1
            except OSError as e:
                raise self._failure([first], first.offset, e.errno) from e
            try:
                share_lock(known[0])
                self._check_same(first, known[0], path)
            except BaseException:
                os.close(known[0])
                raise
            self._files[first.file] = known
            return known

    def _check_same(self, first: ByteRange, fd: int, path: Path) -> None:
        expected = self._expected.get(first.file)
        try:
            if expected and not platform.same_file(expected, fd, path):
                raise self._failure([first], first.offset, None, _REPLACED)
        except OSError as e:
            raise self._failure([first], first.offset, e.errno) from e

    def path(self, file: str) -> str:
        """Where a file is read."""
        return self._copies.get(file, file)

    def _failure(
        self, ranges: Sequence[ByteRange], offset: int, errno: int | None, *reason: str
    ) -> ExpertReadError:
        """An error that names the range in which `offset` lies."""
        at = ranges[0]
        offset = max(offset, at.offset)  # a widened read may fail before the first byte asked for
        for r in ranges:
            if r.offset <= offset:
                at = r
        return ExpertReadError(*label(at)[:3], Path(self.path(at.file)), offset, errno, *reason)


def deliver(ranges: Sequence[ByteRange], source: memoryview) -> None:
    """Copy what `ShardFiles.fetch` read for these ranges to where it must go."""
    position = 0
    for r in ranges:
        size = len(r.into)
        part = source[position : position + size]
        if size <= _SHORT_COPY_BYTES:
            r.into[:] = part
        else:  # NumPy lets other threads run while it copies
            np.copyto(np.frombuffer(r.into, np.uint8), np.frombuffer(part, np.uint8))
        position += size


def share_lock(fd: int) -> None:
    """Keep others from moving a file's bytes elsewhere while it is open here.

    File systems without locks do without.
    """
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def allow_open(count: int, what: str) -> None:
    """Make sure that this process may open `count` more files, by raising its own limit.

    Args:
        count: how many.
        what: whose files, for the error.

    Raises:
        StreamError: the system does not allow so many.
    """
    opened = platform.open_descriptors()
    wanted = opened + count + _SPARE_FILES
    allowed = platform.allow_descriptors(wanted)
    if allowed < opened + count + _FEWEST_FILES:
        raise StreamError(
            f"{what}: {count} files have to be open at once. This process has {opened} open and "
            f"may have {allowed}: start it after `ulimit -n {wanted}`"
        )


def room_for_clients(most: int, folders: Sequence[Path]) -> int:
    """How many connections a server may have open besides the shards that it reads.

    Args:
        most: upper bound of the result.
        folders: of the models, of which one at a time is loaded.
    """
    shards = max([len(shard_files(f)) for f in folders], default=0)
    others = shards + max(_SPARE_FILES, platform.open_descriptors() - shards)
    return max(1, min(most, platform.allow_descriptors(others + most) - others))


def direct_works(file: Path) -> bool:
    """Can `file` be read past the page cache? Its first block is read to find out."""
    try:
        fd, alignment = platform.open_direct(file)
    except OSError:
        return False
    try:
        block = memoryview(mmap.mmap(-1, max(alignment, platform.PAGE_BYTES)))
        platform.read_into(fd, [block], 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _aligned(ranges: Sequence[ByteRange], alignment: int) -> bool:
    return ranges[0].offset % alignment == 0 and all(
        len(r.into) % alignment == 0
        and np.frombuffer(r.into, np.uint8).ctypes.data % alignment == 0
        for r in ranges
    )


def label(r: ByteRange) -> tuple[str, int, str, Path]:
    """The first arguments of an `ExpertReadError`."""
    return r.layer, r.expert, r.tensor, Path(r.file)

"""Files of a folder, each holding the parts of one prefix.

    8 bytes     length of the header
    header      JSON: format, name, parent, the arrays with their checksums; then its own checksum
    arrays      one after the other, from multiples of 64

A file is written under another name and renamed, so that kill -9 leaves no half of one. Each array
has a checksum: after a power failure or a fault of the drive the file is deleted, never used. One
that only cannot be opened now stays, and so does everything that has no name of ours.
Several processes may share a folder: a file is never changed, and a process that still wanted one
that another deletes computes that prefix again. No error of the drive goes further than a line in
the log: files are read, not mapped, since a mapped page that cannot be read ends the process.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .._config import format_size
from .._osinfo import free_disk_bytes
from .states import in_batches

FORMAT = 2
SUFFIX = ".prefix"
KEEP_FREE_BYTES = 2 * 10**9
"""Left on the drive by whatever is written."""

_MODEL = re.compile("[0-9a-f]{32}")  # folders; users may keep other things beside them
_FILE = re.compile(r"\d+-\w+(\.prefix|\.\d+-\d+-\d+\.partial)")
_NO_DIGEST = "0" * 64
_ALIGN, _STALE_SECONDS, _MOST_HEADER = 64, 3600.0, 1 << 28
_PROBATION = 10  # the share of a folder that entries may take before they were used: one in 10
_log = logging.getLogger(__name__)


class DamagedError(Exception):
    """A file is not what was written, or cannot be read (then an OSError is the cause)."""


@dataclass(frozen=True)
class Entry:
    """An entry that was opened, its header checked.

    Attributes:
        file: the file.
        header: see above.
        start: where arrays begin.
    """

    file: Path
    header: dict[str, Any]
    start: int

    def array(self, name: str) -> mx.array:
        """An array of the entry.

        Raises:
            DamagedError: its bytes cannot be read, or are not those that were written.
        """
        try:
            at = self.header["arrays"][name]
            with self.file.open("rb") as f:
                f.seek(self.start + at["offset"])
                raw = f.read(at["bytes"])
            if hashlib.sha256(raw).hexdigest() != at["sha256"]:
                raise DamagedError(f"{self.file}: {name} is damaged")
            flat = mx.array(np.frombuffer(raw, np.uint8))
            array = flat.view(getattr(mx, at["dtype"])).reshape(at["shape"])
            mx.eval(array)
            return array
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
            raise DamagedError(f"{self.file}: {name}: {e!r}") from e


@dataclass(frozen=True)
class Head:
    """What is known of an entry without its arrays.

    Attributes:
        parent: the entry whose first `begin` tokens come before this one's; None if it begins.
        begin, end: which tokens of the prompt it holds.
        tokens: these, [end - begin].
        kinds: of its caches.
        grows: they consist of rows alone, so that fewer tokens than `end` can be used.
        aligned: they were computed in whole chunks from the beginning.
        made: when it was written; a file's own time is later once it was used.
    """

    parent: str | None
    begin: int
    end: int
    tokens: npt.NDArray[np.int64]
    kinds: list[str]
    grows: bool
    aligned: bool
    made: int

    def as_header(self) -> dict[str, Any]:
        return {**vars(self), "tokens": self.tokens.tolist()}

    @classmethod
    def of(cls, header: dict[str, Any]) -> Head:
        known = {name: header[name] for name in cls.__dataclass_fields__}
        return cls(**{**known, "tokens": np.array(known["tokens"], np.int64)})


class Entries:
    """The entries of a folder.

    Args:
        folder: is created, for this user alone.
        most_bytes: what all files may take; see `_make_room`.

    Attributes:
        evicted: entries that this object deleted to make room.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self._count = self.evicted = 0
        self._told: int | None = None  # the last error for which an entry could not be opened
        self._heads: dict[str, dict[str, Head]] = {}  # by model and name: files never change

    def heads(self, model: str) -> dict[str, Head]:
        """A model's entries that are there now, by name."""
        names: set[str] = set()
        with suppress(OSError):
            found = os.listdir(self.folder / model)
            names = {f.removesuffix(SUFFIX) for f in found if f.endswith(SUFFIX)}
        known = self._heads.setdefault(model, {})
        for name in known.keys() - names:
            del known[name]
        for name in names - known.keys():
            if (entry := self.open(model, name)) is not None:
                try:
                    known[name] = Head.of(entry.header)
                except (KeyError, TypeError, ValueError) as e:
                    self.refuse(entry.file, e)
        return known

    def open(self, model: str, name: str) -> Entry | None:
        """An entry; None if it is not there, damaged or of another version; see `refuse`."""
        file = self.folder / model / (name + SUFFIX)
        try:
            with file.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
                raw = f.read(min(length, _MOST_HEADER))
                digest = f.read(hashlib.sha256().digest_size)
            if len(raw) != length or hashlib.sha256(raw).digest() != digest:
                raise DamagedError(f"{file}: its header is damaged")
            header = json.loads(raw)
            if header["format"] != FORMAT:
                return None
            if (header["name"], header["model"]) != (name, model):
                raise DamagedError(f"{file}: another entry's content")
            return Entry(file, header, _aligned(40 + length))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, DamagedError) as e:
            self.refuse(file, e)
            return None

    def used(self, entry: Entry) -> None:
        """Note that an entry was used now."""
        now = max(int(time.time()), entry.header["made"] + 1)
        with suppress(OSError):
            os.utime(entry.file, (now, now))

    def refuse(self, file: Path, why: Exception) -> None:
        """Delete a damaged entry: its prefix is computed again.

        One that cannot be opened, because this process has too many files open for example, may be
        as sound as ever. Only a fault of the drive counts as damage.
        """
        cause = why.__cause__ or why
        if isinstance(cause, OSError) and cause.errno != errno.EIO:
            if cause.errno not in (errno.ENOENT, self._told):  # another process deletes what it may
                _log.warning(f"{file}: cannot be read now: {cause.strerror}")
                self._told = cause.errno
            return
        said = str(why) if str(file) in str(why) else f"{file}: {why}"
        _log.warning(f"{said}: deleted, its prefix is computed again")
        with suppress(OSError):
            file.unlink()

    def write(
        self,
        model: str,
        name: str,
        head: Head,
        more: dict[str, Any],
        arrays: dict[str, mx.array],
    ) -> int:
        """Delete what is too much beside an entry, and write it. A full drive costs it only.

        Args:
            model, name: where it goes.
            head: what it holds.
            more: what its header says besides.
            arrays: evaluated one by one.

        Returns:
            Bytes written; 0 if it could not be written.
        """
        file = self.folder / model / (name + SUFFIX)
        self._count += 1
        own = f"{os.getpid()}-{threading.get_ident()}-{self._count}"
        partial = file.with_name(f"{name}.{own}.partial")
        header = {**more, **head.as_header(), "model": model, "name": name, "format": FORMAT}
        header["arrays"], size = _places(arrays)
        size += (start := _aligned(40 + len(_text(header))))
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.parent.mkdir(mode=0o700, exist_ok=True)
            self._check_room(size)
            if not self._make_room(size, (model, head.parent)):
                return 0
            with partial.open("xb") as f:
                for at, array in in_batches(arrays):
                    raw = np.array(array.reshape(-1).view(mx.uint8)).data
                    f.seek(start + header["arrays"][at]["offset"])
                    f.write(raw)
                    header["arrays"][at]["sha256"] = hashlib.sha256(raw).hexdigest()
                f.truncate(size)
                f.seek(0)
                text = _text(header)
                f.write(len(text).to_bytes(8, "little") + text + hashlib.sha256(text).digest())
            os.utime(partial, (head.made, head.made))
            partial.rename(file)
            return size
        except OSError as e:
            _log.warning(f"{file}: not kept: {e.strerror or e}")
            return 0
        finally:
            with suppress(OSError):
                partial.unlink()

    def _check_room(self, more: int) -> None:
        """Raise an OSError if the drive would be too full."""
        free = free_disk_bytes(self.folder)
        if free - more < KEEP_FREE_BYTES:
            raise OSError(
                f"{format_size(free)} are free on the drive, and {format_size(KEEP_FREE_BYTES)} "
                "stay free"
            )

    def _make_room(self, more: int = 0, below: tuple[str, str | None] | None = None) -> bool:
        """Delete entries that are too much, and what killed processes left.

        Only an entry that no other builds on may go: a conversation before the system prompt that
        others share with it. Of those, entries that were never used go first, as long as they take
        more than a tenth of the folder (else new ones would go before their second request); then
        the least recently used.

        Args:
            more: bytes of an entry that is about to be written.
            below: model and name of the entry that it builds on.

        Returns:
            Whether it fits; if not, nothing is deleted.
        """
        sizes: dict[tuple[str, str], int] = {}
        times: dict[tuple[str, str], float] = {}
        over = more - self.most_bytes
        for file, stat in self._files():
            key = file.parent.name, file.name.removesuffix(SUFFIX)
            if file.suffix != SUFFIX and stat.st_mtime < time.time() - _STALE_SECONDS:
                file.unlink(missing_ok=True)
                continue
            over += stat.st_size
            if file.suffix == SUFFIX:
                sizes[key], times[key] = stat.st_size, stat.st_mtime
        if over <= 0:
            return True
        heads = {(m, n): h for m in {m for m, _ in sizes} for n, h in self.heads(m).items()}
        children = Counter((m, h.parent) for (m, _), h in heads.items())
        if below is not None:
            children[below] += 1
        ends = {k for k in sizes if not children[k]}

        def never_used(key: tuple[str, str]) -> bool:  # what another process deleted has no head
            return key in heads and times[key] <= heads[key].made

        unused, going = set(filter(never_used, ends)), []
        while over > 0 and ends:
            many = sum(sizes[k] for k in unused) + more > self.most_bytes // _PROBATION
            key = min(unused if many and unused else ends, key=lambda k: (times[k], sizes[k]))
            going.append(key)
            over -= sizes[key]
            ends.discard(key)
            unused.discard(key)
            if key in heads and heads[key].parent is not None:
                parent = key[0], heads[key].parent
                children[parent] -= 1
                if not children[parent] and parent in sizes:
                    ends.add(parent)
                    unused.update(filter(never_used, [parent]))
        if over > 0:
            return False
        for model, name in going:
            (self.folder / model / (name + SUFFIX)).unlink(missing_ok=True)
            self.evicted += 1
        return True

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for file in self.folder.glob("*/*"):
            if _MODEL.fullmatch(file.parent.name) and _FILE.fullmatch(file.name):
                with suppress(FileNotFoundError):
                    yield file, file.stat()


def _places(arrays: dict[str, mx.array]) -> tuple[dict[str, Any], int]:
    """What a header says of arrays before they are written, and where their last one ends."""
    found, offset = {}, 0
    for name, array in arrays.items():
        found[name] = {
            "dtype": str(array.dtype).removeprefix("mlx.core."),
            "shape": array.shape,
            "offset": offset,
            "bytes": array.nbytes,
            "sha256": _NO_DIGEST,
        }
        offset = _aligned(offset + array.nbytes)
    return found, offset


def _text(header: dict[str, Any]) -> bytes:
    return json.dumps(header).encode()


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN

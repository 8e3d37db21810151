"""Files of a folder, each holding the parts of one prefix.

    8 bytes     length of the header
    header      JSON: format, name, parent, the arrays with their checksums; then its own checksum
    arrays      one after the other, from multiples of 64

A file is written under another name and renamed, so that kill -9 leaves no half of one. Each array
has a checksum: after a power failure or a fault of the drive the file is deleted, never used.
Several processes may share a folder: a file is never changed, and a process that still wanted one
that another deletes computes that prefix again. No error of the drive goes further than a line in
the log: files are read, not mapped, since a mapped page that cannot be read ends the process.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from .._config import format_size
from .._osinfo import free_disk_bytes

FORMAT = 2
SUFFIX = ".prefix"
KEEP_FREE_BYTES = 2 * 10**9
"""Left on the drive by whatever is written."""

_UNFINISHED = (".body", ".partial")
_ALIGN, _STALE_SECONDS, _MOST_HEADER = 64, 3600.0, 1 << 28
_PROBATION = 10  # the share of a folder that entries may take before they were used: one in 10
_log = logging.getLogger(__name__)


class DamagedError(Exception):
    """A file is not what was written."""


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
                    self.delete(entry.file, e)
        return known

    def open(self, model: str, name: str) -> Entry | None:
        """An entry; None if it is not there or damaged. A damaged one is deleted."""
        file = self.folder / model / (name + SUFFIX)
        try:
            with file.open("rb") as f:
                length = int.from_bytes(f.read(8), "little")
                raw = f.read(min(length, _MOST_HEADER))
                digest = f.read(hashlib.sha256().digest_size)
            if len(raw) != length or hashlib.sha256(raw).digest() != digest:
                raise DamagedError(f"{file}: its header is damaged")
            header = json.loads(raw)
            if (header["format"], header["name"], header["model"]) != (FORMAT, name, model):
                raise DamagedError(f"{file}: another entry's content")
            return Entry(file, header, _aligned(40 + length))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, DamagedError) as e:
            self.delete(file, e)
            return None

    def used(self, entry: Entry) -> None:
        """Note that an entry was used now."""
        now = max(int(time.time()), entry.header["made"] + 1)
        with suppress(OSError):
            os.utime(entry.file, (now, now))

    def delete(self, file: Path, why: Exception) -> None:
        """Delete a damaged entry: its prefix is computed again."""
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
        arrays: Iterable[tuple[str, mx.array]],
    ) -> int:
        """Write an entry, then delete what is too much. A full drive costs this entry only.

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
        body, partial = (file.with_name(f"{name}.{own}.{k}") for k in ("body", "partial"))
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file.parent.mkdir(mode=0o700, exist_ok=True)
            header = {**more, **head.as_header(), "model": model, "name": name}
            size = self._write(partial, body, header, arrays)
            os.utime(partial, (head.made, head.made))
            partial.rename(file)
            self._make_room()
            return size
        except OSError as e:
            _log.warning(f"{file}: not kept: {e.strerror or e}")
            return 0
        finally:
            for left in (body, partial):
                with suppress(OSError):
                    left.unlink()

    def _write(
        self,
        partial: Path,
        body: Path,
        header: dict[str, Any],
        arrays: Iterable[tuple[str, mx.array]],
    ) -> int:
        found: dict[str, Any] = {}
        offset = 0
        with body.open("xb") as f:
            for name, array in arrays:
                raw = np.array(array.reshape(-1).view(mx.uint8)).data
                self._check_room(len(raw))
                f.seek(offset)
                f.write(raw)
                found[name] = {
                    "dtype": str(array.dtype).removeprefix("mlx.core."),
                    "shape": array.shape,
                    "offset": offset,
                    "bytes": len(raw),
                    "sha256": hashlib.sha256(raw).hexdigest(),
                }
                offset = _aligned(offset + len(raw))
        text = json.dumps({**header, "format": FORMAT, "arrays": found}).encode()
        start = _aligned(40 + len(text))
        self._check_room(start + offset)
        with partial.open("xb") as f, body.open("rb") as g:
            f.write(len(text).to_bytes(8, "little") + text + hashlib.sha256(text).digest())
            f.seek(start)
            shutil.copyfileobj(g, f, 8 << 20)
        return start + offset

    def _check_room(self, more: int) -> None:
        """Raise an OSError if the drive would be too full."""
        free = free_disk_bytes(self.folder)
        if free - more < KEEP_FREE_BYTES:
            raise OSError(
                f"{format_size(free)} are free on the drive, and {format_size(KEEP_FREE_BYTES)} "
                "stay free"
            )

    def _make_room(self) -> None:
        """Delete entries that are too much, and what killed processes left.

        Only an entry that no other builds on may go: a conversation before the system prompt that
        others share with it. Of those, entries that were never used go first, as long as they take
        more than a tenth of the folder (else new ones would go before their second request); then
        the least recently used.
        """
        sizes: dict[tuple[str, str], int] = {}
        times: dict[tuple[str, str], float] = {}
        for file, stat in self._files():
            key = file.parent.name, file.name.removesuffix(SUFFIX)
            if file.suffix == SUFFIX:
                sizes[key], times[key] = stat.st_size, stat.st_mtime
            elif file.suffix in _UNFINISHED and stat.st_mtime < time.time() - _STALE_SECONDS:
                file.unlink(missing_ok=True)
        over = sum(sizes.values()) - self.most_bytes
        if over <= 0:
            return
        heads = {(m, n): h for m in {m for m, _ in sizes} for n, h in self.heads(m).items()}
        children = Counter((m, h.parent) for (m, _), h in heads.items())
        ends = {k for k in sizes if not children[k]}
        unused = {k for k in ends if k in heads and times[k] <= heads[k].made}
        while over > 0 and ends:
            rare = unused if sum(sizes[k] for k in unused) > self.most_bytes // _PROBATION else ends
            key = min(rare, key=lambda k: (times[k], sizes[k]))
            (self.folder / key[0] / (key[1] + SUFFIX)).unlink(missing_ok=True)
            self.evicted += 1
            over -= sizes[key]
            ends.discard(key)
            unused.discard(key)
            if key in heads and heads[key].parent is not None:
                parent = key[0], heads[key].parent
                children[parent] -= 1
                if not children[parent] and parent in sizes:
                    ends.add(parent)
                    if times[parent] <= heads[parent].made:
                        unused.add(parent)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        for file in self.folder.glob("*/*"):
            with suppress(FileNotFoundError):
                yield file, file.stat()


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN

"""Packs a Hub repository that is never on this machine as a whole.

The result is a folder as `pack --replace` leaves it: experts are in a packed store in it, and its
shards have holes where they were. Everything arrives in pieces of byte ranges. What is on the drive
is noted every 256 MiB, so that a run that was killed goes on from there; config.json comes last,
when all files were compared with the Hub's checksums, so that nothing loads before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import _osinfo as platform
from .._errors import CheckpointError, StreamError
from .._io.checkpoint import PACKING, header_identity, is_weights, read_json_object
from .._io.moved import Moved, read_moved
from .._io.output import LOCK, exclusive, partial_name, sync_folder, write_json
from .._io.remote import Repository, Span, pieces
from .layer import ExpertLayer
from .moving import expert_tensors, parts_of_files
from .packed_store import (
    checksum,
    claim,
    describe,
    file_bytes,
    finished,
    reopen,
    sidecar,
    source_of,
    write_store,
)

_FORMAT = 1
_NOTED_BYTES = 256 << 20  # a sync to the drive takes up to 30 ms
_TRUNK = "trunk"
_STORE = "experts"
_HASHING = 4  # shards at once


class Reception:
    """A repository on its way into a folder.

    Attributes:
        total: bytes of trunk and experts.
        shard_bytes: bytes of all shards.
    """

    def __init__(
        self, repository: Repository, layers: Sequence[ExpertLayer], note: dict[str, Any],
        headers: Path, shards: Sequence[str], folder: Path,
    ) -> None:  # fmt: skip
        self._repository, self._layers, self._folder = repository, layers, folder
        self._progress = note
        self._store = folder / _STORE
        self._headers = headers
        self._shards = sorted(shards)
        self.shard_bytes = sum(repository.files[n].size for n in self._shards)
        self._trunk = _without_experts(layers, [headers / name for name in self._shards])
        experts = sum(x.experts * x.expert_bytes for x in layers)
        self.total = experts + sum(s.end - s.begin for s in self._trunk)
        for layer in layers:  # from here on in the folder that will have them
            tables = {name: t.stored for name, t in layer.tensors.items()}
            layer.slots.relocate(
                {
                    name: replace(t, files=tuple(str(folder / Path(f).name) for f in t.files))
                    for name, t in tables.items()
                }
            )

    def fetch(self) -> Iterator[int]:
        """Get everything but config.json; yields bytes done, those of earlier runs included.

        Raises:
            StreamError: the disk has no room, or cannot be written.
            CheckpointError: the repository cannot be read, or is not what it says.
        """
        self._prepare()
        yield from self._fetch_trunk()
        yield from write_store(
            self._layers, self._store, moved=read_moved(self._folder), copy=self._fetch_layer
        )

    def verify(self) -> Iterator[int]:
        """Compare all shards with the Hub's SHA-256; yields bytes of shards.

        Raises:
            CheckpointError: one differs. Its layers are removed, so that the next run gets them.
        """
        rows = self._rows()
        with ThreadPoolExecutor(_HASHING) as pool:
            found = pool.map(lambda name: self._sha256(name, rows.get(name, [])), self._shards)
            for name, got in zip(self._shards, found, strict=True):
                expected = self._repository.files[name].sha256
                if expected is not None and got != expected:
                    pool.shutdown(cancel_futures=True)
                    self._discard(name)
                    raise CheckpointError(
                        f"{self._repository.name}/{name}: what arrived has SHA-256 {got}, the Hub "
                        f"says {expected}. Its parts were removed: run again to get them again"
                    )
                yield self._repository.files[name].size

    def finish(self) -> None:
        """Make the folder usable."""
        shutil.copyfile(self._headers / "config.json", self._folder / "config.json.partial")
        (self._folder / "config.json.partial").replace(self._folder / "config.json")
        sync_folder(self._folder)
        (self._folder / PACKING).unlink()

    def _prepare(self) -> None:
        """Write the small files, the note, and shards that have nothing but headers."""
        self._check_room()
        note = read_moved(self._folder)
        if note is None:
            names = {layer.name: n for n, layer in enumerate(self._layers)}
            note = Moved(self._folder, self._store, self._identities(), names)
            self._note(_TRUNK, 0)
        note.check_names(layer.name for layer in self._layers)
        note.identify(self._progress["packed_by"])
        missing = [n for n in self._shards if not self._has_its_size(n)]
        if missing:
            self._note(_TRUNK, 0)
        for file in sorted(self._headers.iterdir()):
            if file.name != "config.json" and not is_weights(file.name):
                shutil.copyfile(file, self._folder / file.name)
        note.save()
        note.divert_index(expert_tensors(self._layers))
        self._store.mkdir(exist_ok=True)
        claim(self._store, note)
        for name in missing:
            header = _header_bytes(self._headers / name)
            with (self._headers / name).open("rb") as source:
                (self._folder / name).write_bytes(source.read(header))
            os.truncate(self._folder / name, self._repository.files[name].size)

    def _has_its_size(self, shard: str) -> bool:
        """A run may have been killed before it gave a shard its size."""
        file = self._folder / shard
        return file.exists() and file.stat().st_size == self._repository.files[shard].size

    def _identities(self) -> dict[str, Any]:
        """What `file_identity` will say of the shards with experts, were they whole."""
        files = sorted({f for x in self._layers for f, _, _ in parts_of_files(x)})
        return {Path(f).name: self._identity(Path(f).name) for f in files}

    def _identity(self, name: str) -> dict[str, Any]:
        digest = hashlib.sha256()
        for begin, end in platform.sampled(self._repository.files[name].size):
            digest.update(self._repository.read(name, begin, end))
        sample = digest.hexdigest()[: platform.SAMPLE_DIGITS]
        return {**header_identity(self._headers / name), "sample": sample}

    def _check_room(self) -> None:
        packed = sum(file_bytes(describe(n, x)) for n, x in enumerate(self._layers))
        needed = packed + sum(s.end - s.begin for s in self._trunk)
        files = [f for f in self._folder.rglob("*") if f.is_file()]
        needed -= sum(f.stat().st_blocks * 512 for f in files)
        if (free := platform.free_disk_bytes(self._folder)) < needed:
            raise StreamError(
                f"{self._folder}: {self._repository.name} needs {needed:,} bytes there and "
                f"{free:,} are free; nothing was written"
            )
        if not platform.holes_work(self._folder):
            raise StreamError(
                f"{self._folder}: this file system cannot leave out parts of files (APFS, ext4, "
                "XFS and Btrfs can): choose another drive"
            )

    def _fetch_trunk(self) -> Iterator[int]:
        with ExitStack() as stack:
            shards = {}
            for name in self._shards:
                shards[name] = os.open(self._folder / name, os.O_RDWR)
                stack.callback(os.close, shards[name])

            def put(span: Span, data: bytearray) -> None:
                _write(shards[span.name], memoryview(data), span.begin)

            yield from self._arriving(_TRUNK, self._trunk, put, list(shards.values()))

    def _fetch_layer(self, layer: ExpertLayer, plan: dict[str, Any], path: Path) -> Iterator[int]:
        spans = [Span(Path(f).name, begin, end) for f, begin, end in parts_of_files(layer)]
        if not path.exists() or path.stat().st_size != file_bytes(plan):
            path.write_bytes(b"")
            os.truncate(path, file_bytes(plan))
            self._note(plan["file"], 0)
        places = _Places(layer, plan)
        fd = os.open(path, os.O_RDWR)
        try:

            def put(span: Span, data: bytearray) -> None:
                for begin, end, at in places.of(span):
                    part = memoryview(data)[begin - span.begin : end - span.begin]
                    _write(fd, part, at)

            yield from self._arriving(plan["file"], spans, put, [fd])
            plan["checksums"] = [
                checksum(os.pread(fd, plan["used"], expert * plan["stride"]))
                for expert in range(layer.experts)
            ]
        finally:
            os.close(fd)

    def _arriving(
        self, part: str, spans: list[Span], put: Callable[[Span, bytearray], None], fds: list[int]
    ) -> Iterator[int]:
        """Get ranges and put them in place; yields bytes done.

        Args:
            part: what the ranges are, for the note of how many pieces are on the drive.
            spans: the ranges.
            put: writes a piece into a file.
            fds: those files.
        """
        done = self._progress["pieces"].get(part, 0)
        yield sum(s.end - s.begin for n, s in enumerate(pieces(spans)) if n < done)
        pending = 0

        def note() -> None:
            for fd in fds:
                platform.sync_to_drive(fd)
            self._note(part, done)

        for span, data in self._repository.read_all(spans, done):
            put(span, data)
            done += 1
            pending += len(data)
            if pending >= _NOTED_BYTES:
                note()
                pending = 0
            yield len(data)
        note()

    def _note(self, part: str, pieces_done: int) -> None:
        self._progress["pieces"][part] = pieces_done
        etags = {n: f.etag for n, f in self._repository.files.items() if f.etag is not None}
        write_json(self._folder / PACKING, {**self._progress, "etags": etags})

    def _rows(self) -> dict[str, list[tuple[int, int, Path, int]]]:
        """By shard: offset and length of each expert's part, its file and place in the store."""
        rows: dict[str, list[tuple[int, int, Path, int]]] = {}
        for number, layer in enumerate(self._layers):
            plan = describe(number, layer)
            packed = self._store / plan["file"]
            for part in plan["parts"]:
                table = layer.tensors[part["name"]].stored
                for n, (file, offset) in enumerate(zip(table.files, table.offsets, strict=True)):
                    at = n * plan["stride"] + part["offset"]
                    rows.setdefault(Path(file).name, []).append(
                        (offset, part["nbytes"], packed, at)
                    )
        return rows

    def _sha256(self, name: str, rows: list[tuple[int, int, Path, int]]) -> str:
        """The digest of a shard whose experts are in the store."""
        digest, at = hashlib.sha256(), 0
        shard, size = self._folder / name, self._repository.files[name].size
        for offset, nbytes, file, place in [*sorted(rows), (size, 0, shard, 0)]:
            _digest(digest, shard, at, offset - at)
            skip = max(0, at - offset)  # of bytes that two layers have
            _digest(digest, file, place + skip, nbytes - skip)
            at = max(at, offset + nbytes)
        return digest.hexdigest()

    def _discard(self, shard: str) -> None:
        source = source_of(self._layers)
        gone, kept = [], []
        for number, layer in enumerate(self._layers):
            plan = describe(number, layer)
            if any(Path(f).name == shard for f, _, _ in parts_of_files(layer)):
                gone.append(plan)
            elif (sums := finished(self._store, plan, source)) is not None:
                kept.append({**plan, "checksums": sums})
        reopen(self._store, source, kept)
        (self._folder / shard).unlink()
        for plan in gone:
            (self._store / plan["file"]).unlink(missing_ok=True)
            sidecar(self._store, plan).unlink(missing_ok=True)


def begun(folder: Path, asked: str) -> dict[str, Any] | None:
    """What an earlier run noted in its folder; None if there was none.

    Args:
        folder: where the repository goes.
        asked: the repository as the user named it.

    Raises:
        StreamError: the folder holds something else.
    """
    if (folder / PACKING).exists():
        note = read_json_object(folder / PACKING, "pieces")
        done, etags = note.get("pieces"), note.get("etags")
        if (
            note.get("format") != _FORMAT
            or not isinstance(note.get("commit"), str)
            or not isinstance(etags, dict)
            or not isinstance(done, dict)
            or not all(type(n) is int and n >= 0 for n in done.values())
        ):
            raise CheckpointError(f"{folder / PACKING}: damaged: remove the folder and begin again")
        if note.get("repository") != asked:
            raise StreamError(
                f"{folder}: {note.get('repository')} is being packed there: choose another folder"
            )
        return note
    unnoted = (LOCK, partial_name(folder / PACKING).name)  # killed while it wrote the first note
    if folder.exists() and any(f.name not in unnoted for f in folder.iterdir()):
        what = "has a packed model already" if read_moved(folder) else "is not empty"
        raise StreamError(f"{folder}: {what}: choose another folder")
    return None


def packed_by(note: dict[str, Any] | None) -> str:
    """The library that located the experts in an earlier run, and its version; or nothing.

    Args:
        note: what `begun` returns.
    """
    return str((note or {}).get("packed_by", ""))


@contextmanager
def receiving(
    repository: Repository, asked: str, layers: Sequence[ExpertLayer], headers: Path,
    shards: Sequence[str], folder: Path, located_by: str,
) -> Iterator[Reception]:  # fmt: skip
    """Begin to pack a repository, or go on with it; nobody else writes the folder meanwhile.

    Args:
        repository: at the commit that an earlier run had, if there was one.
        asked: the repository as the user named it.
        layers: as located in `headers`.
        headers: a folder with the repository's headers and small files.
        shards: names of the shards that the model consists of; the repository may have others.
        folder: where it goes.
        located_by: the library that located the layers, and its version.

    Raises:
        StreamError: the folder holds something else, an earlier run had the layers laid out
            otherwise (another library did), or another process is writing there.
    """
    with exclusive(folder, "packing from the Hub"):
        note = begun(folder, asked)
        if note is None:
            note = {
                "about": "A repository of the Hub is being packed here; run pack again to go on.",
                "format": _FORMAT,
                "repository": asked,
                "commit": repository.commit,
                "pieces": {},
            }
        layout = _layout(layers)
        if note.get("layout", layout) != layout:  # pieces would go to other places
            raise StreamError(
                f"{folder}: the experts that are there were laid out by {packed_by(note)}, and "
                f"{located_by} lays them out otherwise: use that (--loader), or remove the folder "
                "and begin again"
            )
        note = {**note, "layout": layout, "packed_by": packed_by(note) or located_by}
        for name, etag in note.get("etags", {}).items():
            known = repository.files.get(name)
            if known is None or known.etag not in (None, etag):
                raise CheckpointError(
                    f"{repository.name}/{name}: changed since packing it began: remove {folder} "
                    "and begin again"
                )
            known.etag = etag
        try:
            yield Reception(repository, layers, note, headers, shards, folder)
        except OSError as e:
            raise StreamError(
                f"{e.filename or folder}: packing stopped: {e.strerror}; what arrived is kept, run "
                "again to continue"
            ) from e


def _layout(layers: Sequence[ExpertLayer]) -> str:
    """A digest of where in the store the bytes of all layers belong."""
    plans = [describe(number, layer) for number, layer in enumerate(layers)]
    return hashlib.sha256(json.dumps(plans).encode()).hexdigest()[:32]


class _Places:
    """Where in a layer's file the bytes of its shards belong."""

    def __init__(self, layer: ExpertLayer, plan: dict[str, Any]) -> None:
        rows = []  # of one expert's part: shard, begin, end, place
        for part in plan["parts"]:
            table = layer.tensors[part["name"]].stored
            for expert, (file, begin) in enumerate(zip(table.files, table.offsets, strict=True)):
                at = expert * plan["stride"] + part["offset"]
                rows.append((Path(file).name, begin, begin + part["nbytes"], at))
        self._rows = sorted(rows)
        self._begins = [row[:2] for row in self._rows]

    def of(self, span: Span) -> Iterator[tuple[int, int, int]]:
        """The parts of a range: begin and end in the shard, and the place in the layer's file."""
        first = max(0, bisect_right(self._begins, (span.name, span.begin)) - 1)
        for name, begin, end, at in self._rows[first:]:
            if name > span.name or (name == span.name and begin >= span.end):
                return
            low, high = max(begin, span.begin), min(end, span.end)
            if name == span.name and low < high:
                yield low, high, at + low - begin


def _without_experts(layers: Sequence[ExpertLayer], shards: Sequence[Path]) -> list[Span]:
    """The ranges of shards that hold neither a header nor experts."""
    taken = sorted(part for layer in layers for part in parts_of_files(layer))
    spans = []
    for file in shards:
        at, size = _header_bytes(file), file.stat().st_size
        for _, begin, end in [*(t for t in taken if t[0] == str(file)), ("", size, size)]:
            if at < begin:
                spans.append(Span(file.name, at, begin))
            at = max(at, end)
    return spans


def _header_bytes(shard: Path) -> int:
    with shard.open("rb") as f:
        return 8 + int.from_bytes(f.read(8), "little")


def _write(fd: int, data: memoryview, at: int) -> None:
    while data:
        count = os.pwrite(fd, data, at)
        data, at = data[count:], at + count


def _digest(digest: Any, file: Path, begin: int, nbytes: int) -> None:
    if nbytes <= 0:
        return
    with file.open("rb", buffering=0) as f:
        while nbytes > 0:
            data = os.pread(f.fileno(), min(nbytes, 1 << 20), begin)
            if not data:
                return  # too short; the digest will say so
            digest.update(data)
            begin, nbytes = begin + len(data), nbytes - len(data)

"""Moves a checkpoint's experts into a packed store, and back, without room for both.

It goes layer by layer. A layer's bytes are at every moment complete in one place, which the note in
the model folder names (`_io/moved.py`): they leave the old place only after they were read back
from the new one and the note was written. Therefore a run that is killed anywhere leaves a model
that loads, and the next run goes on from there.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from .. import _osinfo as platform
from .._errors import CheckpointError, StreamError
from .._io.checkpoint import extents
from .._io.moved import Moved, read_moved
from .._io.output import exclusive
from .layer import ExpertLayer
from .packed_store import (
    MANIFEST,
    check_size,
    checksum,
    claim,
    describe,
    file_bytes,
    finished,
    not_as_packed,
    owns,
    read_check,
    refuse_only_copy,
    relocate,
    remove_all,
    reopen,
    sidecar,
    source_of,
    use_store,
    write_store,
)
from .stream import expert_files


def use_moved(
    layers: Sequence[ExpertLayer],
    moved: Moved,
    store: Path | None = None,
    verify_reads: bool = False,
    in_part: bool = False,
    planning: bool = False,
    *,
    names: Iterable[str],
) -> None:
    """Read the experts that have moved from the store from now on.

    Args:
        layers: as located in the checkpoint.
        moved: the note in its folder.
        store: the store, if it is not where the note says.
        verify_reads, in_part, planning: as in `use_store`.
        names: all expert layers of the model, even if `layers` are some of them.

    Raises:
        CheckpointError: the store is not there, or does not have what the note says; or the layers
            have moved under other names, as another library gives them.
    """
    moved.check_names(names)
    folder = store or moved.store
    if not folder.is_dir():
        raise CheckpointError(
            f"{moved.folder}: its experts are in a packed store at {folder}, which is not there: "
            "connect that drive, or state where it is (--store)"
        )
    if (folder / MANIFEST).exists():
        use_store(layers, folder, verify_reads, in_part, planning, advice=moved.way_out)
        return
    for layer in layers:  # moving them was interrupted
        if layer.name in moved.layers:
            plan = describe(moved.layers[layer.name], layer)
            check_size(folder, plan, "bring this folder back; these experts are nowhere else")
            # Another library may have the same name for it, and its parts in another order.
            sums = finished(folder, plan, None)
            if sums is None:
                raise CheckpointError(not_as_packed(folder, plan, moved))
            relocate(layer, plan, folder, read_check(sums) if verify_reads else None)


def move_experts(
    layers: Sequence[ExpertLayer], folder: Path, store: Path, packed_by: str = ""
) -> Iterator[int]:
    """Move the experts of a checkpoint into a store; yields bytes done as it goes.

    Args:
        layers: all of the model's, as located in the checkpoint.
        folder: the model folder.
        store: the store's folder; created if needed.
        packed_by: the library that located them, and its version.

    Raises:
        StreamError: the file system cannot free parts of files, a program has the model open, the
            folder holds links, the store is another folder's only copy, the disk is full, or
            cannot be written.
        CheckpointError: the source ends early or cannot be read, or some layers have moved under
            other names, as another library gives them.
    """
    with _writing(folder), exclusive(folder, "moving its experts"), ExitStack() as stack:
        moved = read_moved(folder)
        if moved is not None and moved.store.resolve() != store.resolve():
            raise StreamError(
                f"{folder}: its experts are moving to {moved.store}, not to {store}: go on with "
                f"that (--out {moved.store}), or --unpack first"
            )
        if moved is not None:
            moved.check_names(layer.name for layer in layers)
        if store.is_dir():
            refuse_only_copy(store, moved)
        _check_apart(layers)
        shards = _locked(layers, stack)
        if not platform.holes_work(folder):
            raise StreamError(
                f"{folder}: this file system cannot free parts of files (APFS, ext4, XFS and "
                "Btrfs can): pack without --replace, or on another drive"
            )
        if moved is None:
            moved = Moved(folder, store, source_of(layers))
            moved.identify(packed_by)
        elif not moved.id:
            moved.identify(packed_by)
            moved.save()
        note, numbers = moved, {layer.name: n for n, layer in enumerate(layers)}
        tensors = expert_tensors(layers)

        def free(layer: ExpertLayer, plan: dict[str, Any]) -> None:
            if layer.name not in note.layers:
                _check_packed(store / plan["file"], plan)
            claim(store, note)
            if layer.name not in note.layers:
                note.layers[layer.name] = numbers[layer.name]
                note.save()
            note.divert_index(tensors)
            for file, begin, end in parts_of_files(layer):
                platform.punch_hole(shards[file], begin, end - begin)
            for fd in shards.values():
                os.fsync(fd)

        yield from write_store(layers, store, moved=moved, then=free)


def bring_back(layers: Sequence[ExpertLayer], folder: Path) -> Iterator[int]:
    """Move experts back into their shards, which have their old bytes then; yields bytes done.

    The store loses each layer that is back.

    Args:
        layers: all of the model's, as located in the checkpoint.
        folder: the model folder.

    Raises:
        StreamError: nothing has moved, the store is incomplete, damaged or another folder's only
            copy, a program has the model open, or the disk is full.
        CheckpointError: the layers have moved under other names, as another library gives them.
    """
    with _writing(folder), exclusive(folder, "bringing its experts back"):
        moved = read_moved(folder)
        if moved is None:
            raise StreamError(f"{folder}: has its experts; there is nothing to unpack")
        if not moved.store.is_dir():
            raise StreamError(f"{moved.store}: the packed store is not there: connect its drive")
        moved.check_names(layer.name for layer in layers)
        with ExitStack() as stack:
            stack.enter_context(exclusive(moved.store, "unpacking"))
            if moved.layers:
                refuse_only_copy(moved.store, moved)
            if owns(moved, moved.store):  # otherwise no layer has moved
                yield from _bring_back(layers, moved, _locked(layers, stack))
        moved.remove()
        with suppress(OSError):  # it holds other files
            moved.store.rmdir()


def _bring_back(
    layers: Sequence[ExpertLayer], moved: Moved, shards: dict[str, int]
) -> Iterator[int]:
    store, source = moved.store, source_of(layers)
    away = []
    for layer in layers:
        if layer.name in moved.layers:
            plan = describe(moved.layers[layer.name], layer)
            sums = finished(store, plan, source)
            if sums is None:
                raise StreamError(not_as_packed(store, plan, moved) + ". Nothing was changed")
            away.append((layer, {**plan, "checksums": sums}))
    frees = platform.on_one_drive(store, moved.folder)
    needed = (max if frees else sum)([0, *(file_bytes(plan) for _, plan in away)])
    if (free := platform.free_disk_bytes(moved.folder)) < needed:
        raise StreamError(
            f"{moved.folder}: unpacking needs {needed:,} bytes and {free:,} are free; nothing was "
            "changed"
        )
    reopen(store, source, [plan for _, plan in away])
    yield sum(x.experts * x.expert_bytes for x in layers if x.name not in moved.layers)
    for layer, plan in away:
        yield from _write_back(layer, plan, store, shards)
        for fd in shards.values():
            platform.sync_to_drive(fd)
        _check_back(layer, plan, shards)
        del moved.layers[layer.name]
        moved.save()
        (store / plan["file"]).unlink()
        sidecar(store, plan).unlink()
    remove_all(store)


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise StreamError(
            f"{e.filename or folder}: stopped: {e.strerror}; the model loads as it is, run again "
            "to continue"
        ) from e


def _locked(layers: Sequence[ExpertLayer], stack: ExitStack) -> dict[str, int]:
    """Open every shard for writing while no reader has it open; its descriptor by name.

    `ShardFiles` holds a shared lock of each file that it reads.
    """
    opened: dict[str, int] = {}
    for name in expert_files(layers):
        if Path(name).is_symlink() or os.stat(name).st_nlink > 1:
            raise StreamError(
                f"{name}: is a link, and freeing parts of the file would damage it for others "
                "(the Hub's cache shares files): copy the model to a folder of its own first, for "
                "example with hf download --local-dir"
            )
        fd = opened[name] = os.open(name, os.O_RDWR)
        stack.callback(os.close, fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            if e.errno in (errno.EWOULDBLOCK, errno.EAGAIN):
                raise StreamError(f"{name}: a program has this model loaded: end it first") from e
    return opened


def parts_of_files(layer: ExpertLayer) -> list[tuple[str, int, int]]:
    """The parts of files that hold a layer: file, begin, end; neighbours joined."""
    return extents((t.stored for t in layer.tensors.values()), range(layer.experts))


def expert_tensors(layers: Sequence[ExpertLayer]) -> set[str]:
    """Names of the stored tensors that hold experts."""
    return {name for x in layers for t in x.tensors.values() for name in t.stored.names}


def _check_apart(layers: Sequence[ExpertLayer]) -> None:
    """Refuse layers that share bytes: one's would go while the other still needs them."""
    last = ("", 0, "")
    for file, begin, end, name in sorted((*r, x.name) for x in layers for r in parts_of_files(x)):
        if file == last[0] and begin < last[1]:
            raise StreamError(
                f"{file}: {last[2]} and {name} share bytes; such a checkpoint can be packed, but "
                "not with --replace"
            )
        last = file, end, name


def _check_packed(file: Path, plan: dict[str, Any]) -> None:
    """Read a layer's file back from the drive and compare it with what was written."""
    stride, used = plan["stride"], plan["used"]
    platform.drop_page_cache(file)
    try:
        fd, _ = platform.open_direct(file)
    except OSError:
        fd = os.open(file, os.O_RDONLY)
    try:
        block = memoryview(mmap.mmap(-1, stride))
        for expert, expected in enumerate(plan["checksums"]):
            got = platform.read_into(fd, [block], expert * stride)
            if got != stride or checksum(block[:used]) != expected:
                raise StreamError(
                    f"{file}: expert {expert} of {plan['name']} reads back as other bytes than "
                    "were written. The checkpoint still has this layer: delete that file and run "
                    "again; if it stays so, the drive is failing"
                )
    finally:
        os.close(fd)


def _write_back(
    layer: ExpertLayer, plan: dict[str, Any], store: Path, shards: dict[str, int]
) -> Iterator[int]:
    """Copy a layer from its file in the store into the shards."""
    path = store / plan["file"]
    with path.open("rb", buffering=0) as f:
        for expert in range(layer.experts):
            block = memoryview(os.pread(f.fileno(), plan["used"], expert * plan["stride"]))
            if checksum(block) != plan["checksums"][expert]:
                raise StreamError(
                    f"{path}: expert {expert} of {layer.name} is damaged, and it is nowhere else; "
                    "the other layers can still be read from the store"
                )
            for part in plan["parts"]:
                stored, begin = layer.tensors[part["name"]].stored, part["offset"]
                data, at = block[begin : begin + part["nbytes"]], stored.offsets[expert]
                while data:
                    count = os.pwrite(shards[stored.files[expert]], data, at)
                    data, at = data[count:], at + count
            yield layer.expert_bytes


def _check_back(layer: ExpertLayer, plan: dict[str, Any], shards: dict[str, int]) -> None:
    """Read a layer back from the shards and compare it with what was packed."""
    for file in shards:
        platform.drop_page_cache(Path(file))
    for expert, expected in enumerate(plan["checksums"]):
        parts = [t.stored for t in layer.tensors.values()]
        data = b"".join(
            os.pread(shards[t.files[expert]], t.row_bytes, t.offsets[expert]) for t in parts
        )
        if checksum(data) != expected:
            raise StreamError(
                f"{parts[0].files[expert]}: expert {expert} of {layer.name} reads back as other "
                "bytes than were written; the drive is failing. The store still has this layer"
            )

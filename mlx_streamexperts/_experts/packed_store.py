"""The packed store: each expert's parts side by side, so that a miss is one read.

It is a folder with one file per layer and a manifest, made from a checkpoint and tied to it. Each
expert's block starts at a page of 16 KiB (Apple's page size, and a multiple of every drive's block
size), holds the expert's parts in a fixed order, and has a checksum. The manifest is written last:
a folder without one is unfinished.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .._errors import CheckpointError, StreamError
from .._io.checkpoint import file_identity, read_json_object
from .._io.moved import Moved, read_moved
from .._io.output import exclusive, partial_name, sync_folder, write_json
from .._osinfo import free_disk_bytes, on_one_drive, sync_to_drive
from .layer import ExpertLayer
from .stream import expert_files

PAGE_BYTES = 16_384
_FORMAT = 1
MANIFEST = "manifest.json"
_ONLY_COPY = "only-copy.json"
# The files that packing writes. It deletes no others: the folder may hold a user's files too.
_LAYER_FILE = re.compile(r"layer-\d{5}\.experts")
_OURS = re.compile(rf"({_LAYER_FILE.pattern}(\.json)?|manifest\.json)(\.partial)?")


@dataclass(frozen=True)
class Damage:
    """An expert whose bytes differ from those that were packed."""

    layer: str
    expert: int
    file: Path


Then = Callable[[ExpertLayer, dict[str, Any]], None]
"""Called when a layer's file is complete, with the layer and its entry in the manifest."""

Copy = Callable[[ExpertLayer, dict[str, Any], Path], Iterator[int]]
"""Writes and syncs a layer's file and adds the checksums to its entry; yields bytes done."""


def write_store(
    layers: Sequence[ExpertLayer],
    folder: Path,
    overwrite: bool = False,
    moved: Moved | None = None,
    then: Then | None = None,
    copy: Copy | None = None,
) -> Iterator[int]:
    """Pack the experts of `layers`; yields bytes done as it goes, resumed layers included.

    If it is interrupted and run again, it continues after the last complete layer.

    Args:
        layers: as located in their checkpoint.
        folder: the store's folder; created if needed.
        overwrite: discard another checkpoint's store there.
        moved: the model folder's note, if the store is or becomes the only copy of its experts.
            Layers that it names are never written again, unless `copy` gets them.
        then: called after each layer. It frees the layer's bytes elsewhere, so that there need not
            be room for all layers at once.
        copy: gets a layer's bytes from where they are; by default from the checkpoint's files. The
            file that it had begun when a run was killed is there again in the next run.

    Raises:
        StreamError: the disk has no room or cannot be written, `folder` holds the store of
            another checkpoint or the only copy of another folder's experts, another process is
            writing there, or the xxhash library is missing.
        CheckpointError: the source ends early or cannot be read.
    """
    _xxhash()  # before anything is written
    try:
        with exclusive(folder, "packing"):
            yield from _write_store(layers, folder, overwrite, moved, then, copy)
    except OSError as e:
        raise StreamError(
            f"{e.filename or folder}: packing stopped: {e.strerror}; complete layers are "
            "kept, run again to continue"
        ) from e


def _write_store(
    layers: Sequence[ExpertLayer],
    folder: Path,
    overwrite: bool,
    moved: Moved | None,
    then: Then | None,
    copy: Copy | None,
) -> Iterator[int]:
    source = source_of(layers)
    plans = [describe(number, layer) for number, layer in enumerate(layers)]
    refuse_only_copy(folder, moved)
    if not overwrite:
        _refuse_foreign(folder, source)
    done = [None if overwrite else finished(folder, plan, source) for plan in plans]
    unfinished = [p for p, sums in zip(plans, done, strict=True) if sums is None]
    for plan in unfinished:
        if moved is not None and copy is None and plan["name"] in moved.layers:
            raise StreamError(not_as_packed(folder, plan, moved))
    redone = {p["file"] for p in unfinished} | {sidecar(folder, p).name for p in unfinished}
    stale = [
        file
        for file in _ours(folder)
        if overwrite or (copy is None and file.suffix == ".partial") or file.name in redone
    ]
    frees = then is not None and moved is not None and on_one_drive(folder, moved.folder)
    needed = (max if frees else sum)([0, *map(file_bytes, unfinished)])
    free = free_disk_bytes(folder) + sum(file.stat().st_size for file in stale)
    if copy is not None:  # it goes on with what it has
        free += sum(f.stat().st_blocks * 512 for f in _ours(folder) if f.suffix == ".partial")
    if needed > free:  # before anything is discarded: the old store may be the only one
        raise StreamError(
            f"{folder}: packing needs {needed:,} bytes and {free:,} are free; nothing was written"
        )
    if unfinished and not overwrite and (folder / MANIFEST).exists():
        reopen(
            folder,
            source,
            [
                {**plan, "checksums": sums}
                for plan, sums in zip(plans, done, strict=True)
                if sums is not None
            ],
        )
    for file in stale:
        file.unlink()
    for i, (layer, plan) in enumerate(zip(layers, plans, strict=True)):
        if done[i] is None:
            path = folder / plan["file"]
            yield from (copy or _copy_layer)(layer, plan, partial_name(path))
            partial_name(path).replace(path)
            sync_folder(folder)
            write_json(sidecar(folder, plan), {"source": source, "layer": plan})
        else:
            plan["checksums"] = done[i]
            yield layer.experts * layer.expert_bytes
        if then is not None:
            then(layer, plan)
    write_json(
        folder / MANIFEST,
        {"format": _FORMAT, "page_bytes": PAGE_BYTES, "source": source, "layers": plans},
    )
    for plan in plans:
        sidecar(folder, plan).unlink(missing_ok=True)


def use_store(
    layers: Sequence[ExpertLayer],
    folder: Path,
    verify_reads: bool = False,
    in_part: bool = False,
    planning: bool = False,
    advice: str = "pack again",
) -> None:
    """Read the experts of `layers` from a store from now on.

    Args:
        layers: as located in their checkpoint.
        folder: the store.
        verify_reads: compare each expert's checksum after each of its reads.
        in_part: `layers` are some of the model's; files of the others may be missing.
        planning: only the checkpoint's headers may be here.
        advice: what to do if it was packed otherwise; messages end with it.

    Raises:
        CheckpointError: it is not a finished store, is damaged, or belongs to another checkpoint.
        StreamError: `verify_reads` needs a library that is not installed.
    """
    file = folder / MANIFEST
    source, stored = _read_manifest(file)
    own, numbers = source_of(layers), list(range(len(layers)))
    if in_part and isinstance(source, dict):
        source = {shard: source[shard] for shard in source if shard in own}
        at = {entry["name"]: number for number, entry in enumerate(stored)}
        numbers = [at[layer.name] for layer in layers if layer.name in at]
        stored = [stored[number] for number in numbers]
    if planning:
        source, own = _headers(source), _headers(own)
    _compare_sources(file, source, own)
    expected = [describe(n, layer) for n, layer in zip(numbers, layers, strict=False)]
    if len(stored) != len(layers):
        raise CheckpointError(f"{file}: does not describe {len(layers)} layers: {advice}")
    for layer, mine, theirs in zip(layers, expected, stored, strict=True):
        # The places of bytes all follow from the checkpoint; the manifest is not trusted with them.
        if mine != {k: theirs.get(k) for k in mine}:
            raise CheckpointError(
                f"{file}: {layer.name} is not laid out as this checkpoint's would be: {advice}"
            )
        check_size(folder, mine, advice)
    for layer, mine, theirs in zip(layers, expected, stored, strict=True):
        relocate(layer, mine, folder, read_check(theirs["checksums"]) if verify_reads else None)


def check_mirrors(folder: Path, mirrors: Sequence[str]) -> None:
    """Check that the layers in mirrors of a store were packed with it, by its checksums.

    Args:
        folder: the store, as `use_store` accepted it.
        mirrors: folders that may hold some of its files, or none.

    Raises:
        CheckpointError: a mirror has files of the store without its manifest, or of another store.
    """
    source, stored = _read_manifest(folder / MANIFEST)
    for mirror in map(Path, mirrors):
        held = [entry for entry in stored if (mirror / entry["file"]).is_file()]
        if not held:
            continue
        file = mirror / MANIFEST
        theirs_source, theirs = _read_manifest(file)
        for entry in held:
            if theirs_source != source or entry not in theirs:
                raise CheckpointError(
                    f"{mirror / entry['file']}: was not packed together with {folder} ({file} "
                    "differs): remove it, and let streamexperts mirror write it again"
                )


def layer_files(folder: Path) -> dict[Path, list[tuple[str, int, int]]]:
    """A store's files, each with the experts that it holds: layer, expert, bytes.

    Raises:
        CheckpointError: not a finished store, or a file is missing.
    """
    files = {}
    for entry in _read_manifest(folder / MANIFEST)[1]:
        check_size(folder, entry, "pack again")
        experts = [(entry["name"], n, entry["used"]) for n in range(entry["experts"])]
        files[folder / entry["file"]] = experts
    return files


def check_size(folder: Path, plan: dict[str, Any], advice: str) -> None:
    """Check that a layer's file is there and has its size.

    Raises:
        CheckpointError: it is not; the message ends with `advice`.
    """
    path, expected = folder / plan["file"], file_bytes(plan)
    size = path.stat().st_size if path.is_file() else -1
    if size != expected:
        state = "is missing" if size < 0 else f"has {size:,} bytes of {expected:,}"
        raise CheckpointError(f"{path} {state}: {advice}")


def relocate(
    layer: ExpertLayer,
    plan: dict[str, Any],
    folder: Path,
    as_packed: Callable[[int, Sequence[memoryview]], bool] | None = None,
) -> None:
    """Read a layer from its file in a store from now on.

    Args:
        layer: as located in its checkpoint.
        plan: its entry in the manifest, as `describe` makes it.
        folder: the store.
        as_packed: as in `ExpertSlots.relocate`.
    """
    files = (str(folder / plan["file"]),) * layer.experts
    packed = {}
    for part in plan["parts"]:
        offsets = range(part["offset"], file_bytes(plan), plan["stride"])
        table = layer.tensors[part["name"]].stored
        packed[part["name"]] = replace(table, files=files, offsets=tuple(offsets))
    layer.slots.relocate(packed, as_packed)


def verify_store(folder: Path) -> Iterator[tuple[int, Damage | None]]:
    """Re-read every expert of a store; yields bytes read, and the damage if there is any.

    Raises:
        CheckpointError: not a finished store, or a file is missing or cannot be read.
    """
    for layer in _read_manifest(folder / MANIFEST)[1]:
        path, stride, used = folder / layer["file"], layer["stride"], layer["used"]
        try:
            with path.open("rb") as f:
                size = os.fstat(f.fileno()).st_size
                for expert, expected in enumerate(layer["checksums"]):
                    # Read nothing past the end: a manifest's sizes must not decide how much memory
                    # is allocated. The padding belongs to the block.
                    good = (expert + 1) * stride <= size
                    if good:
                        f.seek(expert * stride)
                        good = checksum(f.read(used)) == expected
                    yield used, None if good else Damage(layer["name"], expert, path)
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read: {e.strerror}") from e


def _read_manifest(file: Path) -> tuple[Any, list[dict[str, Any]]]:
    """A manifest's source and its layers.

    Raises:
        CheckpointError: packing does not write such a manifest.
    """
    manifest = read_json_object(file, "layers")
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(
            f"{file}: format {manifest.get('format')!r}, this version reads {_FORMAT}: pack again"
        )
    layers = manifest.get("layers")
    if not isinstance(layers, list) or not layers:
        raise CheckpointError(f"{file}: describes no layers: pack again")
    for number, layer in enumerate(layers):
        if not _as_packed(layer):
            raise CheckpointError(
                f"{file}: layer {number} is not described as packing describes it: pack again"
            )
    return manifest.get("source"), layers


def _as_packed(layer: Any) -> bool:
    """Does packing write such an entry for a layer, with a checksum for every expert?"""
    if not isinstance(layer, dict):
        return False
    sizes = [layer.get(k) for k in ("experts", "used", "stride")]
    sums, file = layer.get("checksums"), layer.get("file")
    return (
        isinstance(layer.get("name"), str)
        and isinstance(file, str)
        and _LAYER_FILE.fullmatch(file) is not None
        and all(type(n) is int and 0 < n < 1 << 63 for n in sizes)
        and layer["used"] <= layer["stride"]
        and layer["stride"] % PAGE_BYTES == 0
        and isinstance(sums, list)
        and len(sums) == layer["experts"]
        and all(isinstance(s, str) for s in sums)
    )


def _ours(folder: Path) -> list[Path]:
    """The files in a folder that packing wrote."""
    return sorted(f for f in folder.iterdir() if _OURS.fullmatch(f.name) and not f.is_dir())


def describe(number: int, layer: ExpertLayer) -> dict[str, Any]:
    """A layer's entry in the manifest, without the checksums."""
    parts, offset = [], 0
    for name, tensor in layer.tensors.items():
        nbytes = tensor.stored.row_bytes
        parts.append(
            {
                "name": name,
                "tensor": tensor.stored.names[0],
                "dtype": tensor.stored.dtype,
                "shape": list(tensor.slot.shape),
                "offset": offset,
                "nbytes": nbytes,
            }
        )
        offset += nbytes
    return {
        "name": layer.name,
        "file": f"layer-{number:05d}.experts",
        "experts": layer.experts,
        "stride": -(-offset // PAGE_BYTES) * PAGE_BYTES,
        "used": offset,
        "parts": parts,
    }


def file_bytes(plan: dict[str, Any]) -> int:
    return int(plan["experts"] * plan["stride"])


def sidecar(folder: Path, plan: dict[str, Any]) -> Path:
    """The file that marks a layer's file as complete, until there is a manifest."""
    return folder / f"{plan['file']}.json"


def reopen(folder: Path, source: dict[str, Any], entries: Sequence[dict[str, Any]]) -> None:
    """Make a store unfinished, if it is not yet; some of its layers stay complete.

    Args:
        folder: the store.
        source: the checkpoint, as `source_of` describes it.
        entries: those layers' entries in the manifest, with checksums.
    """
    for entry in entries:
        write_json(sidecar(folder, entry), {"source": source, "layer": entry})
    (folder / MANIFEST).unlink(missing_ok=True)


def claim(folder: Path, moved: Moved) -> None:
    """Note in a store that the experts of a model folder are nowhere else.

    Args:
        folder: the store.
        moved: the model folder's note. It is saved first, because a store whose owner knows
            nothing of it would be refused to everybody.
    """
    model = str(moved.folder.resolve())
    if only_copy_of(folder) == (model, moved.id) and (folder / _ONLY_COPY).exists():
        return
    moved.save()
    about = (
        "The experts in this folder are nowhere else: do not delete it. To get them back into the "
        "model: python -m mlx_streamexperts.pack --unpack --model <the model folder>"
    )
    write_json(folder / _ONLY_COPY, {"about": about, "model": model, "id": moved.id})


def remove_all(folder: Path) -> None:
    """Remove what is left in a store whose experts are all elsewhere again."""
    for file in _ours(folder):
        file.unlink()
    (folder / _ONLY_COPY).unlink(missing_ok=True)


def only_copy_of(folder: Path) -> tuple[str, str] | None:
    """The model folder whose experts are in this store and nowhere else, and its note's id.

    Returns:
        None if the store is a copy, or an earlier version moved experts to it and it is not in the
        model folder.

    Raises:
        CheckpointError: the notes about that are damaged.
    """
    file = folder / _ONLY_COPY
    if file.exists():
        known = read_json_object(file, "model")
        return str(known.get("model")), str(known.get("id"))
    above = read_moved(folder.resolve().parent)
    if above is not None and above.store.resolve() == folder.resolve():
        return str(above.folder), above.id
    return None


def owns(moved: Moved | None, folder: Path) -> bool:
    """May the owner of this note change the store? Not if it is another folder's only copy."""
    owner = only_copy_of(folder)
    if owner is None:
        return True
    if moved is None or moved.id != owner[1]:
        return False
    model = Path(owner[0])
    if not model.exists() or model.samefile(moved.folder):
        return True  # the folder may have got another name
    other = read_moved(model)  # or it was copied, and both have the note
    return other is None or other.id != moved.id or other.store.resolve() != folder.resolve()


def refuse_only_copy(folder: Path, moved: Moved | None) -> None:
    """Refuse to change a store that is the only copy of another folder's experts.

    Raises:
        StreamError: it is.
    """
    if not owns(moved, folder):
        model = only_copy_of(folder)
        raise StreamError(
            f"{folder}: the experts of {model[0] if model else '?'} are in it and nowhere else: "
            "choose another folder, or --unpack that model first"
        )


def not_as_packed(folder: Path, plan: dict[str, Any], moved: Moved) -> str:
    """What to say of a layer that is only in the store, and not as `plan` says."""
    path = folder / plan["file"]
    if path.is_file() and path.stat().st_size == file_bytes(plan):
        state, way = "was packed otherwise, or its checksums are lost", moved.way_out
    else:
        state, way = "missing or incomplete", "bring this folder back, and run again"
    return f"{path}: {state}, and the experts of {plan['name']} are nowhere else: {way}"


def _copy_layer(layer: ExpertLayer, plan: dict[str, Any], path: Path) -> Iterator[int]:
    """Copy a layer from the checkpoint's files, expert by expert."""
    sums = []
    block = bytearray(plan["stride"])  # the padding after the last part stays zero
    sources = {f: os.open(f, os.O_RDONLY) for f in expert_files([layer])}
    try:
        with path.open("wb") as out:
            for expert in range(layer.experts):
                for part in plan["parts"]:
                    stored = layer.tensors[part["name"]].stored
                    file, offset = stored.files[expert], stored.offsets[expert]
                    try:
                        data = os.pread(sources[file], part["nbytes"], offset)
                    except OSError as e:
                        raise CheckpointError(
                            f"{file}: tensor {stored.names[expert]} cannot be read: {e.strerror}"
                        ) from e
                    if len(data) != part["nbytes"]:
                        raise CheckpointError(
                            f"{file}: tensor {stored.names[expert]} ends within expert {expert}"
                        )
                    block[part["offset"] : part["offset"] + part["nbytes"]] = data
                sums.append(checksum(memoryview(block)[: plan["used"]]))
                out.write(block)
                yield layer.expert_bytes
            out.flush()
            sync_to_drive(out.fileno())
    finally:
        for fd in sources.values():
            os.close(fd)
    plan["checksums"] = sums


def finished(folder: Path, plan: dict[str, Any], source: dict[str, Any] | None) -> list[str] | None:
    """Checksums of a layer that an earlier run has packed; None if it has to be packed.

    Args:
        folder: the store.
        plan: the layer, as `describe` makes it.
        source: the checkpoint, as `source_of` describes it; None accepts any.
    """
    path, known_by = folder / plan["file"], sidecar(folder, plan)
    if not path.is_file() or path.stat().st_size != file_bytes(plan):
        return None
    entries: list[Any]
    try:
        if known_by.is_file():
            known = read_json_object(known_by, "layer")
            known_source, entries = known.get("source"), [known.get("layer")]
        else:
            known_source, entries = _read_manifest(folder / MANIFEST)
    except CheckpointError:  # it cannot vouch for the file
        return None
    for entry in entries:
        if _as_packed(entry) and plan == {k: entry.get(k) for k in plan}:
            return entry["checksums"] if source in (None, known_source) else None
    return None


def _refuse_foreign(folder: Path, source: dict[str, Any]) -> None:
    for file in _ours(folder):
        if file.suffix != ".json":
            continue
        try:
            _compare_sources(file, read_json_object(file, "layers").get("source"), source)
        except CheckpointError as e:
            raise StreamError(
                f"{e}. Choose another folder, or --overwrite to discard what is there."
            ) from e


def source_of(layers: Sequence[ExpertLayer]) -> dict[str, Any]:
    """A store's tie to its checkpoint: each shard's size, and digests of header and samples."""
    files = [Path(file) for file in expert_files(layers)]
    moved = read_moved(files[0].parent) if files else None
    identity = file_identity if moved is None else moved.identity
    return {file.name: identity(file) for file in files}


def _headers(source: Any) -> Any:
    """A source without the digests of samples."""
    if not isinstance(source, dict):
        return source
    return {
        shard: {k: v for k, v in known.items() if k != "sample"}
        if isinstance(known, dict)
        else known
        for shard, known in source.items()
    }


def _compare_sources(file: Path, theirs: Any, mine: dict[str, Any]) -> None:
    if theirs == mine:
        return
    if not isinstance(theirs, dict) or set(theirs) != set(mine):
        raise CheckpointError(f"{file}: packed from a checkpoint with other shards")
    shard = next(s for s in mine if theirs[s] != mine[s])
    raise CheckpointError(
        f"{file}: packed when {shard} was {theirs[shard]}, now it is {mine[shard]}: the checkpoint "
        "changed, or is another one"
    )


def _xxhash() -> Any:
    try:
        import xxhash
    except ImportError as e:
        raise StreamError("checksums need the xxhash library: pip install xxhash") from e
    return xxhash


def checksum(data: bytes | memoryview) -> str:
    return str(_xxhash().xxh3_64_hexdigest(data))


def read_check(checksums: list[str]) -> Callable[[int, Sequence[memoryview]], bool]:
    """Returns a check: are an expert's parts, in their order, the bytes that were packed?"""
    xxh3_64 = _xxhash().xxh3_64

    def as_packed(expert: int, parts: Sequence[memoryview]) -> bool:
        digest = xxh3_64()
        for part in parts:
            digest.update(part)
        return bool(digest.hexdigest() == checksums[expert])

    return as_packed

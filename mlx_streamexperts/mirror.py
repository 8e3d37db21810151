"""Copy a model's expert files to a second drive, so that experts are read from both at once.

python -m mlx_streamexperts.mirror ./my-model /Volumes/Second/my-model
python -m mlx_streamexperts.generate --model ./my-model --mirror /Volumes/Second/my-model -p "hello"

SOURCE is a model or a packed store (then: --store SOURCE --mirror DIR). Only files with experts are
copied, each as a whole; a mirror may lack some of them, and --bytes limits its size. Each copy is
read back and compared before it gets its name. A run that was stopped or killed leaves a mirror
that works; the same command again completes it.

A load compares each copy's size, header, first 64 KiB, middle and end with its file. Damage
elsewhere, even of one byte, is found only by --verify, which reads every byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ._cli.options import add_reading_arguments, describe, ended, failed
from ._config import StreamConfig, format_size, parse_size
from ._errors import CheckpointError, StreamError
from ._io.checkpoint import read_json_object
from ._io.mirrors import check_copy, identity
from ._io.moved import read_moved
from ._io.output import check_not_written, exclusive, partial_name, whole
from ._osinfo import drop_page_cache, free_disk_bytes, sync_to_drive
from ._progress import progress_bar

# Functions import what imports mlx-lm: that takes a second, and `--help` does without.

_CHUNK_BYTES = 8 << 20
_MANIFEST = "manifest.json"  # `packed_store.MANIFEST`

Parts = list[tuple[str, int, int]]
"""What a file holds: layer, expert, bytes."""


@dataclass(frozen=True)
class _Source:
    """What can be mirrored.

    Attributes:
        folder: where it is.
        files: each file with experts, and what of them it holds.
        is_store: it is a packed store.
        option: what a load needs besides the mirror.
    """

    folder: Path
    files: dict[Path, Parts]
    is_store: bool
    option: str


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser()
    describe(parser, "mirror", __doc__)
    parser.add_argument(
        "source", metavar="SOURCE", help="model folder, repository, or packed store"
    )
    parser.add_argument("dir", metavar="DIR", type=Path, help="folder on another drive")
    parser.add_argument(
        "--bytes", metavar="SIZE", help="the most that the mirror may take, for example 200GB"
    )
    parser.add_argument(
        "--most-read",
        metavar="FILE",
        type=Path,
        help="a trace or a hot set of the model: files with the experts that it names most, for "
        "their size, come first. Default: in the order of their names",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="compare every byte of the copies that are there already, too: nothing else finds "
        "damage where a load takes no sample",
    )
    add_reading_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    return ended(lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    try:
        limit = parse_size(args.bytes) if args.bytes else None
        source = _source(args)
        if args.dir.exists() and args.dir.samefile(source.folder):
            raise StreamError(f"{args.dir}: is the source itself: name a folder on another drive")
        with exclusive(args.dir, "mirroring"):
            return _mirror(source, args, limit)
    except StreamError as e:
        return failed(e)
    except OSError as e:
        text = f"{e.filename or args.dir}: {e.strerror}; complete copies are kept, run again"
        return failed(StreamError(text))


def _source(args: argparse.Namespace) -> _Source:
    from ._experts.packed_store import layer_files
    from ._loading.discover import discover
    from ._loading.load import resolve

    folder = Path(args.source)
    is_store = (folder / _MANIFEST).is_file() and not (folder / "config.json").exists()
    folder = folder if is_store else resolve(args.source)
    check_not_written(folder, "mirroring it")
    moved = None if is_store else read_moved(folder)
    if moved is not None:  # its experts are in a store, which a load finds by itself
        check_not_written(moved.store, "mirroring it")
        return _Source(moved.store, layer_files(moved.store), True, "")
    if is_store:
        return _Source(folder, layer_files(folder), True, f"--store {folder} ")
    found = discover(folder, StreamConfig(), {"trust_remote_code": args.trust_remote_code})
    files: dict[Path, Parts] = {Path(f): [] for f in found.rows.files}
    for layer in found.layers:
        for tensor in layer.tensors.values():
            for expert, file in enumerate(tensor.stored.files):
                part = (layer.name, expert, tensor.stored.row_bytes)
                files.setdefault(Path(file), []).append(part)
    return _Source(folder, files, False, "")


def _mirror(source: _Source, args: argparse.Namespace, limit: int | None) -> int:
    there: list[Path] = []
    for file in sorted(source.files):
        copy = args.dir / file.name
        partial_name(copy).unlink(missing_ok=True)  # of a run that was killed
        if copy.exists():
            check_copy(copy, file, identity(file))
            there.append(file)
    if source.is_store:
        _copy_manifest(source.folder, args.dir)
    chosen = _chosen(source, there, args.most_read, limit)
    needed, free = sum(f.stat().st_size for f in chosen), free_disk_bytes(args.dir)
    if needed > free:
        raise StreamError(
            f"{args.dir}: the mirror needs {needed:,} bytes more and {free:,} are free: make room, "
            "or state --bytes for a smaller one; no expert was copied"
        )
    if args.dir.stat().st_dev == next(iter(source.files)).stat().st_dev:
        print(
            f"{args.dir} is on the same drive as {source.folder}: a mirror there makes nothing "
            "faster",
            file=sys.stderr,
        )
    again = there if args.verify else []
    checked = needed + sum(f.stat().st_size for f in again)
    with (
        progress_bar("Copied", args.progress and needed > 0, needed) as copying,
        progress_bar("Checked", args.progress and checked > 0, checked) as checking,
    ):
        for file in again:
            if _digest(file) != _digest(args.dir / file.name, checking.update):
                raise CheckpointError(
                    f"{args.dir / file.name}: its bytes are not those of {file}: remove it and "
                    "run again"
                )
        for file in chosen:
            _copy(file, args.dir / file.name, copying.update, checking.update)
    done = [*there, *chosen]
    size = format_size(sum(f.stat().st_size for f in done))
    print(
        f"{len(done)} of {len(source.files)} files ({size}) are mirrored. Use: "
        f"{source.option}--mirror {args.dir}"
    )
    return 0


def _chosen(
    source: _Source, there: list[Path], most_read: Path | None, limit: int | None
) -> list[Path]:
    """The files to copy, in their order."""
    uses = Counter[tuple[str, int]]() if most_read is None else _uses(most_read)
    if most_read is not None and not any(
        (layer, expert) in uses for parts in source.files.values() for layer, expert, _ in parts
    ):
        raise CheckpointError(f"{most_read}: names no expert of {source.folder}")
    sizes = {file: file.stat().st_size for file in source.files}

    def worth(file: Path) -> float:
        read = sum(uses[layer, expert] * size for layer, expert, size in source.files[file])
        return read / max(1, sizes[file])

    left = sys.maxsize if limit is None else limit - sum(sizes[f] for f in there)
    chosen = []
    for file in sorted(source.files, key=lambda f: (-worth(f), f)):
        if file not in there and sizes[file] <= left:
            left -= sizes[file]
            chosen.append(file)
    if not chosen and not there:
        raise StreamError(f"{limit:,} bytes are not enough for any file of {source.folder}")
    return chosen


def _uses(file: Path) -> Counter[tuple[str, int]]:
    """How often a trace, or a hot set, names each expert, by layer name and expert."""
    uses = Counter[tuple[str, int]]()
    try:
        with file.open() as f:
            head = json.loads(f.readline())
        names = list(map(str, head["layers"]))
    except OSError as e:
        raise StreamError(f"{file}: cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, TypeError):  # a hot set has more than one line
        for layer in read_json_object(file, "layers").get("layers") or ():
            if isinstance(layer, dict) and isinstance(layer.get("experts"), list):
                uses.update((str(layer.get("name")), e) for e in layer["experts"])
        return uses
    from ._experts.trace import read_trace

    for name, calls in zip(names, read_trace(file).layers, strict=True):
        for experts in calls:
            uses.update((name, int(e)) for e in experts.ravel())
    return uses


def _copy_manifest(store: Path, folder: Path) -> None:
    """A store's manifest comes first: without it, and its checksums, no copy counts."""
    from ._experts.packed_store import check_mirrors

    if (folder / _MANIFEST).exists():
        check_mirrors(store, [str(folder)])
    if not (folder / _MANIFEST).exists() or not any(folder.glob("*.experts")):
        with whole(folder / _MANIFEST) as partial:
            partial.write_bytes((store / _MANIFEST).read_bytes())
            with partial.open("rb") as f:
                sync_to_drive(f.fileno())


def _copy(
    file: Path, copy: Path, copied: Callable[[int], object], checked: Callable[[int], object]
) -> None:
    """Copy a file; the copy gets its name when it is on the drive and was read back."""
    digest = hashlib.sha256()
    with whole(copy) as partial:
        with file.open("rb", buffering=0) as source, partial.open("wb") as out:
            while data := source.read(_CHUNK_BYTES):
                digest.update(data)
                out.write(data)
                copied(len(data))
            out.flush()
            sync_to_drive(out.fileno())
        drop_page_cache(partial)
        if _digest(partial, checked) != digest.hexdigest():
            raise StreamError(f"{copy}: what was written cannot be read back: check the drive")


def _digest(file: Path, read: Callable[[int], object] = lambda nbytes: None) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as f:
        while data := f.read(_CHUNK_BYTES):
            digest.update(data)
            read(len(data))
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())

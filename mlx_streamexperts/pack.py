"""Write a packed store, a copy of a checkpoint's experts in which each expert is one read.

python -m mlx_streamexperts.pack --model ./my-model --out ./my-model-packed
python -m mlx_streamexperts.pack --out ./my-model-packed --verify
python -m mlx_streamexperts.generate --model ./my-model --store ./my-model-packed -p "hello"

The store takes as much disk space as the experts. The checkpoint does not change and is still
needed: for the trunk, and to check that the store belongs to it. An interrupted run continues where
it stopped.

python -m mlx_streamexperts.pack --model ./my-model --replace
python -m mlx_streamexperts.generate --model ./my-model -p "hello"
python -m mlx_streamexperts.pack --model ./my-model --unpack

python -m mlx_streamexperts.pack mlx-community/Qwen3-30B-A3B-4bit --out ./my-model
python -m mlx_streamexperts.generate --model ./my-model -p "hello"

A repository of the Hub that is named without --model is packed while it arrives: the checkpoint is
never on this machine, and the folder is all that is needed to load the model. An interrupted run
continues where it stopped.

With --replace the experts move into the store one layer at a time, and their bytes in the
checkpoint become free disk space. The model loads from both together, at any time. --unpack moves
them back, and the files are what they were.
"""

from __future__ import annotations

import argparse
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ._cli.options import add_output_arguments, describe, ended, failed
from ._config import StreamConfig, format_size
from ._errors import StreamError
from ._io.moved import read_moved, refuse_moved
from ._io.output import check_not_written
from ._progress import progress_bar

if TYPE_CHECKING:
    from ._experts.layer import ExpertLayer

# Functions import what imports mlx-lm: that takes a second, and `--help` does without.


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser()
    describe(parser, "pack", __doc__)
    parser.add_argument(
        "repository",
        nargs="?",
        help="a Hugging Face repository, if wanted with @ and a branch, tag or commit; a folder "
        "on this machine is stated by --model. The repository is "
        "packed into --out by ranged requests, without ever holding the checkpoint. The result is "
        "a model folder of its own",
    )
    parser.add_argument(
        "--model",
        help="model folder, or Hugging Face repository that is downloaded whole first. Default: "
        "the embedded demonstration model.",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read a store and compare its checksums; the exit status is 1 if any differs",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="free the experts' bytes in the checkpoint, each layer's when it is in the store and "
        "was read back from there. Takes the disk space of one layer. --out is then the folder "
        "`experts` in the model folder by default",
    )
    parser.add_argument(
        "--unpack",
        action="store_true",
        help="undo --replace: move the experts back into the checkpoint, and remove the store",
    )
    parser.add_argument(
        "--loader",
        choices=("auto", "mlx-lm", "mlx-vlm"),
        default="auto",
        help="the library that will load the model (default: auto)",
    )
    add_output_arguments(parser, "the store's folder", "another checkpoint", required=False)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if args.repository and Path(args.repository).exists():
        parser.error(_as_folder(args))
    if args.replace + args.unpack + args.verify > 1:
        parser.error("--replace, --unpack and --verify exclude each other")
    if (args.replace or args.unpack) and (args.model is None or args.overwrite):
        parser.error("--replace and --unpack need --model, and take no --overwrite")
    if args.unpack and args.out is not None:
        parser.error("--unpack takes no --out: the model folder says where its experts are")
    if args.repository and (
        args.model or args.overwrite or args.replace or args.unpack or args.verify
    ):
        parser.error("a repository is packed with --out alone; --model is for what is here")
    there = args.out or args.replace or args.unpack or (args.verify and args.model)
    if not there:
        parser.error("--out is needed")
    try:
        if args.repository:
            return _pack_repository(args)
        if args.verify:
            return _verify(args)
        return _move(args) if args.replace or args.unpack else _pack(args)
    except StreamError as e:
        return failed(e)


def _as_folder(args: argparse.Namespace) -> str:
    """What to write instead of a repository's name that names something on this machine."""
    option = "--out" if args.verify else "--model"
    out = "" if args.verify or args.replace or args.unpack or args.out else " --out FOLDER"
    return (
        f"{args.repository}: is on this machine, and only a repository of the Hub is named without "
        f"an option: write {option} {args.repository}{out}"
    )


def _pack(args: argparse.Namespace) -> int:
    from ._experts.packed_store import write_store
    from ._loading.demo import demo_model
    from ._loading.load import resolve

    if args.model is None:
        print(f"No --model given: packing the demonstration model {demo_model()}", file=sys.stderr)
    folder = resolve(args.model or demo_model())
    check_not_written(folder, "packing it")
    refuse_moved(folder, "packing it again")
    layers, total, _, _ = _layers(folder, args)
    with progress_bar("Packing", args.progress, total) as bar:
        for nbytes in write_store(layers, args.out, args.overwrite):
            bar.update(nbytes)
    print(f"Packed {format_size(total)} of experts in {len(layers)} layers into {args.out}")
    return 0


def _pack_repository(args: argparse.Namespace) -> int:
    from ._experts import from_hub
    from ._io.hub import fetch_headers, fetching
    from ._io.remote import Repository

    asked = args.repository
    before = from_hub.begun(args.out, asked)
    with fetching(asked, "cannot be packed"):
        name = asked if before is None else f"{asked.partition('@')[0]}@{before['commit']}"
        repository = Repository(name)
    with TemporaryDirectory(prefix="mlx-streamexperts-headers-") as temporary:
        headers = Path(temporary)
        if args.loader == "auto" and (by := from_hub.packed_by(before)):
            args.loader = by.partition(" ")[0]
        fetch_headers(repository, headers)
        try:
            layers, total, packed_by, shards = _layers(headers, args)
        except StreamError as e:  # it names a folder that nobody knows
            raise StreamError(str(e).replace(temporary, asked)) from e
        with from_hub.receiving(
            repository, asked, layers, headers, shards, args.out, packed_by
        ) as arriving:
            with progress_bar("Fetching", args.progress, arriving.total) as bar:
                for nbytes in arriving.fetch():
                    bar.update(nbytes)
            with progress_bar("Verifying", args.progress, arriving.shard_bytes) as bar:
                for nbytes in arriving.verify():
                    bar.update(nbytes)
            arriving.finish()
    print(f"Packed {asked}, {format_size(total)} of experts in {len(layers)} layers: {args.out}")
    return 0


def _move(args: argparse.Namespace) -> int:
    from ._experts.moving import bring_back, move_experts

    folder = Path(args.model)
    if not folder.is_dir():
        raise StreamError(f"{folder}: is no folder; only a model in a folder of its own can change")
    layers, total, packed_by, _ = _layers(folder, args)
    moved = read_moved(folder)
    if args.unpack:
        with progress_bar("Unpacking", args.progress, total) as bar:
            for nbytes in bring_back(layers, folder):
                bar.update(nbytes)
        print(f"Moved {format_size(total)} of experts back into {folder}")
        return 0
    store = args.out or (folder / "experts" if moved is None else moved.store)
    with progress_bar("Moving", args.progress, total) as bar:
        for nbytes in move_experts(layers, folder, store, packed_by):
            bar.update(nbytes)
    if moved is not None and moved.layers.keys() >= {x.name for x in layers}:
        print(f"Nothing to do: all {format_size(total)} of experts are already in {store}")
    else:
        print(f"Moved {format_size(total)} of experts in {len(layers)} layers into {store}")
    return 0


def _layers(
    folder: Path, args: argparse.Namespace
) -> tuple[list[ExpertLayer], int, str, list[str]]:
    """A checkpoint's expert layers, their bytes, the library that found them, and its shards."""
    from ._experts.stream import refuse_without_experts
    from ._loading.discover import discover

    trust = {"trust_remote_code": args.trust_remote_code}
    found = discover(folder, StreamConfig(loader=args.loader), trust, in_shards=True)
    layers, total = found.layers, sum(x.experts * x.expert_bytes for x in found.layers)
    refuse_without_experts(layers, f"{folder}: packing copies experts")
    shards = [file.name for file in found.shards]
    return layers, total, f"{found.library} {version(found.library)}", shards


def _verify(args: argparse.Namespace) -> int:
    from ._experts.packed_store import only_copy_of, verify_store

    store, only_copy = args.out, True
    if store is None:
        moved = read_moved(Path(args.model))
        if moved is None:
            raise StreamError(f"{args.model}: its experts have not moved; --out names the store")
        store = moved.store
    elif store.is_dir():
        only_copy = only_copy_of(store) is not None
    experts, damaged = 0, []
    with progress_bar("Verifying", args.progress) as bar:
        for nbytes, damage in verify_store(store):
            bar.update(nbytes)
            experts += 1
            if damage is not None:
                damaged.append(damage)
    for d in damaged:
        print(f"damaged: expert {d.expert} of {d.layer} in {d.file}", file=sys.stderr)
    print(f"{experts - len(damaged)} of {experts} experts are as they were packed")
    if damaged and only_copy:
        print(
            "Do not delete these files: the experts in them are nowhere else. Restore them from a "
            "backup, or download the model again.",
            file=sys.stderr,
        )
    elif damaged:
        print("Delete the damaged files and pack again; the others are kept.", file=sys.stderr)
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(ended(main))

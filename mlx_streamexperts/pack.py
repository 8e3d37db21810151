"""Write a packed store, a copy of a checkpoint's experts in which each expert is one read.

python -m mlx_streamexperts.pack --model ./my-model --out ./my-model-packed
python -m mlx_streamexperts.pack --out ./my-model-packed --verify
python -m mlx_streamexperts.generate --model ./my-model --store ./my-model-packed -p "hello"

The store takes as much disk space as the experts. The checkpoint does not change and is still
needed: for the trunk, and to check that the store belongs to it. An interrupted run continues where
it stopped.
"""

from __future__ import annotations

import argparse
import sys

from ._cli.options import add_output_arguments, failed
from ._config import StreamConfig, format_size
from ._errors import StreamError
from ._experts.packed_store import verify_store, write_store
from ._io.output import check_not_written
from ._loading.demo import demo_model
from ._loading.discover import discover
from ._loading.load import resolve
from ._progress import progress_bar


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m mlx_streamexperts.pack",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        help="model folder or Hugging Face repository. Default: the embedded demonstration model.",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read a store and compare its checksums; the exit status is 1 if any differs",
    )
    parser.add_argument(
        "--loader",
        choices=("auto", "mlx-lm", "mlx-vlm"),
        default="auto",
        help="the library that will load the model (default: auto)",
    )
    add_output_arguments(parser, "the store's folder", "another checkpoint")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    try:
        return _verify(args) if args.verify else _pack(args)
    except StreamError as e:
        return failed(e)


def _pack(args: argparse.Namespace) -> int:
    if args.model is None:
        print(f"No --model given: packing the demonstration model {demo_model()}", file=sys.stderr)
    folder = resolve(args.model or demo_model())
    check_not_written(folder, "packing it")
    trust = {"trust_remote_code": args.trust_remote_code}
    layers = discover(folder, StreamConfig(loader=args.loader), trust).layers
    total = sum(x.experts * x.expert_bytes for x in layers)
    with progress_bar("Packing", args.progress, total) as bar:
        for nbytes in write_store(layers, args.out, args.overwrite):
            bar.update(nbytes)
    print(f"Packed {format_size(total)} of experts in {len(layers)} layers into {args.out}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    experts, damaged = 0, []
    with progress_bar("Verifying", args.progress) as bar:
        for nbytes, damage in verify_store(args.out):
            bar.update(nbytes)
            experts += 1
            if damage is not None:
                damaged.append(damage)
    for d in damaged:
        print(f"damaged: expert {d.expert} of {d.layer} in {d.file}", file=sys.stderr)
    print(f"{experts - len(damaged)} of {experts} experts are as they were packed")
    if damaged:
        print("Delete the damaged files and pack again; the others are kept.", file=sys.stderr)
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())

"""Write a large random-weight `qwen3_moe` checkpoint: command line of the package's writer."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_streamexperts._analysis.random_model import write_random_model as write_random_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    for name, default in (("layers", 8), ("experts", 64), ("top-k", 8), ("bits", 0)):
        parser.add_argument("--" + name, type=int, default=default)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=768)
    parser.add_argument("--heads", type=int, help="of 64 elements each; more make a heavier trunk")
    args = vars(parser.parse_args())
    write_random_model(args.pop("folder"), **args)


if __name__ == "__main__":
    main()

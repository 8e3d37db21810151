"""Will a model run on this machine, how fast, and what limits it? From headers, before loading.

python -m mlx_streamexperts.doctor                          which models suit this machine?
python -m mlx_streamexperts.doctor --model mlx-community/Kimi-K2.5
python -m mlx_streamexperts.doctor --model ./my-model --machine "m4 max 128" --drive 7GB/s
python -m mlx_streamexperts.doctor --selftest

From a Hub repository only headers are fetched (a few megabytes), never weights. Speeds are
predictions with a range; measured figures are marked. --selftest tests on this machine what
streaming promises.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .._cli.options import make_parser
from .._memory.hardware import NAMED_MACHINES


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of `doctor`, and those of streaming."""
    parser = argparse.ArgumentParser()
    model = parser.add_argument("--model")
    parser.add_argument(
        "--machine",
        action="append",
        metavar="NAME",
        help="predict for this Mac instead of measuring this machine: a chip and its memory, such "
        "as 'm4 max 128' (repeatable; or 'all' for " + ", ".join(NAMED_MACHINES) + ")",
    )
    parser.add_argument(
        "--drive",
        metavar="RATE",
        help="take the drive to give this rate, such as 7GB/s, or 7GB/s:100us with a latency",
    )
    parser.add_argument(
        "--drive-seconds",
        type=float,
        default=4.0,
        metavar="N",
        help="measure the drive so long (default: 4). Many drives slow down when they grow hot, "
        "after a minute, say",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=1000,
        help="prompt length for the time to the first token",
    )
    parser.add_argument("--trace", type=Path, help="use the hit rate of this recorded trace")
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        help="judge the model on this many machines together (--pipeline). --memory and --machine "
        "then apply to each; or give one for each: --memory 96GB,64GB, and --machine once per rank",
    )
    parser.add_argument(
        "--link",
        default="1GB/s:300us",
        help="with --ranks: rate and latency of the network (default: 1GB/s:300us)",
    )
    parser.add_argument(
        "--files",
        type=int,
        metavar="RANK",
        help="with --ranks: print only the names of the files that this rank needs",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the checkpoint"
    )
    parser.add_argument(
        "--selftest",
        action="store_true",
        help="test on this machine what streaming promises, with small models that need no "
        "download (a minute or two); --model FOLDER names files to read",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    make_parser(parser, "doctor", __doc__)
    model.help = (
        "model folder or Hugging Face repository. Default: describe this machine, and say which "
        "well-known models suit it"
    )
    return parser

"""Rewrite an original checkpoint once, into the form that this package streams.

python -m mlx_streamexperts.convert --model ./original --out ./converted
python -m mlx_streamexperts.convert --model ./original --out ./converted -q --q-bits 4

Original Hugging Face checkpoints store experts one by one, fused (gate_up_proj), packed as int4 or
as FP8. The result has the same bits as that of mlx_lm.convert, but needs only the memory of a few
experts. Run the same command again after an interruption: whole shards are kept.
"""

from __future__ import annotations

import argparse

from .._cli.options import add_output_arguments, describe
from .._cli.stock_parsers import stock_constants


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line's options; those of mlx_lm.convert mean the same as there."""
    names = ("QUANT_RECIPES", "MODEL_CONVERSION_DTYPES")
    recipes, types = stock_constants("mlx_lm.convert", names)
    parser = argparse.ArgumentParser()
    describe(parser, "convert", __doc__)
    parser.add_argument(
        "--model", required=True, help="the original: model folder or Hugging Face repository"
    )
    parser.add_argument("-q", "--quantize", action="store_true", help="quantize the weights")
    parser.add_argument(
        "--q-bits", type=int, help="bits per weight (default: the mode's, affine 4)"
    )
    parser.add_argument(
        "--q-group-size", type=int, help="group size (default: the mode's, affine 64)"
    )
    parser.add_argument(
        "--q-mode",
        choices=("affine", "mxfp4", "nvfp4", "mxfp8"),
        default="affine",
        help="quantization mode (default: affine)",
    )
    parser.add_argument("--quant-predicate", choices=recipes, help="mixed-bit recipe")
    parser.add_argument(
        "--dtype",
        choices=types,
        help="element type of unquantized weights (default: config.json's, or as stored)",
    )
    parser.add_argument(
        "--shard-size", default="5GB", help="limit of an output file's size (default: 5GB)"
    )
    add_output_arguments(parser, "the new model folder", "another conversion")
    return parser

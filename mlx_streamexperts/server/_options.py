"""Serve streamed models over HTTP: mlx_lm.server with all its options, and a memory budget.

python -m mlx_streamexperts.server
python -m mlx_streamexperts.server --model mlx-community/Qwen3.5-397B-A17B-4bit --memory 90GB

OpenAI's and Anthropic's APIs at /v1, Ollama's chat at /api, figures at /metrics (Prometheus), and a
live page at /.
"""

from __future__ import annotations

import argparse
import os

from .._cli.options import add_prefix_arguments, make_parser
from .._cli.stock_parsers import stock_parser
from ._log import FORMATS

_KEY_VARIABLE = "STREAMEXPERTS_API_KEY"


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options and ours."""
    parser = make_parser(stock_parser("mlx_lm.server", "main"), "server", __doc__)
    add_prefix_arguments(parser)
    group = parser.add_argument_group("serving")
    group.add_argument(
        "--also-serve",
        action="append",
        default=[],
        metavar="MODEL",
        help="another model folder or repository that requests may name. It replaces the loaded "
        "model, within the same budget. Can be given more than once",
    )
    group.add_argument(
        "--api-key",
        default=os.environ.get(_KEY_VARIABLE),
        help="answer only requests that carry this bearer token. Default: "
        f"${_KEY_VARIABLE}, which other users of this machine cannot see in the list of processes",
    )
    group.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also answer requests whose Host header has this name. Without this option a server "
        "on a loopback address answers loopback names only, and any other server answers every "
        "name. Can be given more than once",
    )
    group.add_argument(
        "--max-body", default="16MiB", help="longest request body (default: %(default)s)"
    )
    group.add_argument(
        "--log-format",
        choices=FORMATS,
        default=FORMATS[0],
        help="a line of text or of JSON for each request (default: %(default)s)",
    )
    group.add_argument(
        "--fetch-images",
        action="store_true",
        help="let requests make this server fetch images from http(s) URLs, as mlx_lm.server does",
    )
    return parser

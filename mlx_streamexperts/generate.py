"""Generate text with streamed experts: `mlx_lm.generate` with every one of its options, and ours.

python -m mlx_streamexperts.generate --prompt "Then said Jesus unto his disciples,"
python -m mlx_streamexperts.generate --model mlx-community/Kimi-K2.5 --memory 96GB -p "hello"
"""

from __future__ import annotations

import argparse
import importlib
import sys

from .cli import make_parser, stream_settings
from .demo import DEMO_PROMPT, demo_model
from .errors import StreamError
from .wrap import add_report_arguments, print_error, program

# Not `import mlx_lm.generate`: the package binds that name to a function.
stock = importlib.import_module("mlx_lm.generate")


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options and ours."""
    parser = make_parser(stock.setup_arg_parser(), "python -m mlx_streamexperts.generate", __doc__)
    add_report_arguments(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    try:
        config, model = stream_settings(args)
        parser.set_defaults(model=model)
        if model == str(demo_model()):
            parser.set_defaults(prompt=DEMO_PROMPT)  # it knows no answer to mlx-lm's "hello"
        with program(stock, parser, argv, args, config) as session:
            stock.main()
        if args.verbose:
            session.print_summary()
    except StreamError as e:
        return print_error(e)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Benchmark a streamed model: `mlx_lm.benchmark` with all of its options and ours.

python -m mlx_streamexperts.bench --prompt-tokens 128 --generation-tokens 64 --num-trials 3
python -m mlx_streamexperts.bench --model ./my-model --memory 24GB -p 512 -g 128 -n 3

The summary covers the timed trials, without the warm-up. mlx-lm's benchmark repeats one random
prompt, whose routing differs from that of text and is the same in each trial. So its hit rate says
nothing about real use.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from typing import Any

from ._cli.options import ended, failed, interrupted, program_parser
from ._config import StreamConfig
from ._errors import StreamError

_INSTEAD = "python -m mlx_streamexperts.generate prints tokens per second too"


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options and ours."""
    return program_parser("mlx_lm.benchmark", "bench", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    from mlx_lm import benchmark as stock  # here: this takes a second

    from ._cli.mlx_lm_program import program
    from ._cli.settings import stream_settings
    from ._hooks import swapped

    try:
        config, model = stream_settings(args, _INSTEAD)
        parser.set_defaults(model=model)
        room = _with_room(config, args)
        trust = {"trust_remote_code": args.trust_remote_code}
        original = stock.load

        def load(*rest: Any, **more: Any) -> Any:  # stock trusts every tokenizer's code
            return original(*rest, **{**more, "tokenizer_config": trust})

        with (
            program(stock, parser, argv, args, room, warm_up=1, shows_text=False) as session,
            swapped(stock, load=load),
        ):
            stock.main()
        session.print_summary()
    except StreamError as e:
        return failed(e)
    except KeyboardInterrupt:
        return interrupted()
    return 0


def _with_room(config: StreamConfig, args: argparse.Namespace) -> StreamConfig:
    """Plan KV cache for all sequences at once, unless `--context-tokens` is stated."""
    if config.context_tokens is not None:
        return config
    tokens = args.batch_size * (args.prompt_tokens + args.generation_tokens)
    return replace(config, context_tokens=max(1, tokens))


if __name__ == "__main__":
    sys.exit(ended(main))

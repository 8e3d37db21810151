"""Chat with a streamed model: `mlx_lm.chat` with all of its options and ours.

python -m mlx_streamexperts.chat --model mlx-community/Qwen3.5-397B-A17B-4bit --memory 90GB

Ctrl-C ends a reply and keeps the conversation; a second one ends the chat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ._cli.options import check_prefix_arguments, ended, failed, program_parser
from ._errors import StreamError

_INSTEAD = "mlx-vlm has a chat of its own: python -m mlx_streamexperts.run mlx_vlm.chat --model ..."
_PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options and ours."""
    return program_parser("mlx_lm.chat", "chat", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    from mlx_lm import chat as stock  # here: this takes a second

    from ._cli.mlx_lm_program import program
    from ._cli.settings import stream_settings
    from ._cli.stopping import Interrupts

    try:
        check_prefix_arguments(args)
        config, model = stream_settings(args, _INSTEAD)
        parser.set_defaults(model=model)
        interrupts = Interrupts()
        run = program(stock, parser, argv, args, config, interrupts=interrupts)
        with run as session, _templates():
            try:
                stock.main()
            except (EOFError, KeyboardInterrupt):  # Ctrl-D or Ctrl-C ends a chat
                print()
        session.print_summary()
    except StreamError as e:
        return failed(e)
    return 0


@contextmanager
def _templates() -> Iterator[None]:
    """Give models without a chat template, which mlx-lm needs, one that adds nothing."""
    from mlx_lm import chat as stock

    from ._hooks import swapped

    original = stock.load

    def load(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        model, tokenizer, *rest = original(*args, **kwargs)
        if not tokenizer.has_chat_template:
            print("This model has no chat template: it continues your text", file=sys.stderr)
            tokenizer.chat_template = _PLAIN_TEMPLATE
            tokenizer.has_chat_template = True
        return model, tokenizer, *rest

    with swapped(stock, load=load):
        yield


if __name__ == "__main__":
    sys.exit(ended(main))

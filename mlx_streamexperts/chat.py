"""Chat with a streamed model: `mlx_lm.chat` with all of its options and ours.

python -m mlx_streamexperts.chat --model mlx-community/Qwen3.5-397B-A17B-4bit --memory 90GB

Ctrl-C ends a reply and keeps the conversation; a second one ends the chat.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ._cli.options import check_prefix_arguments, ended, failed, program_parser
from ._config import format_size
from ._errors import StreamError

if TYPE_CHECKING:
    from ._cli.mlx_lm_program import Session

_INSTEAD = "mlx-vlm has a chat of its own: python -m mlx_streamexperts.run mlx_vlm.chat --model ..."
_THINKING_TOKENS = 4096  # mlx-lm's 256 end within the thinking
_PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options and ours."""
    return program_parser("mlx_lm.chat", "chat", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = setup_arg_parser()
    usual = parser.get_default("max_tokens")
    parser.set_defaults(max_tokens=None)
    stated = parser.parse_args(argv).max_tokens is not None
    parser.set_defaults(max_tokens=usual)
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
        with run as session, _templates(), _told_hits(session), _room_to_think(stated):
            try:
                stock.main()
            except (EOFError, KeyboardInterrupt):  # Ctrl-D or Ctrl-C ends a chat
                print()
        session.print_summary()
    except StreamError as e:
        return failed(e)
    return 0


@contextmanager
def _told_hits(session: Session) -> Iterator[None]:
    """Add the hit rate and what was read to mlx-lm's line below a reply."""
    from mlx_lm import chat as stock

    from ._hooks import swapped

    original, hits, asked, read = stock.ChatUI.end_turn, 0, 0, 0

    def end_turn(ui: Any, response: Any) -> None:
        nonlocal hits, asked, read
        original(ui, response)
        if response is None or not session.patched.streams:
            return
        stats = session.patched.streams[0].stats()
        now = stats.cache.hits, stats.cache.hits + stats.cache.misses, stats.read.bytes
        if now[1] > asked:
            rate = (now[0] - hits) / (now[1] - asked)
            print(f"  {rate:.0%} of the experts were in memory, {format_size(now[2] - read)} read")
        hits, asked, read = now

    with swapped(stock.ChatUI, end_turn=end_turn):
        yield


@contextmanager
def _room_to_think(stated: bool) -> Iterator[None]:
    """Let a model that thinks before it answers do both, unless `--max-tokens` is stated."""
    from mlx_lm import chat as stock

    from ._hooks import swapped

    original, told = stock.stream_generate, False

    def stream_generate(model: Any, tokenizer: Any, *rest: Any, **options: Any) -> Iterator[Any]:
        nonlocal told
        if not stated and tokenizer.has_thinking:
            options["max_tokens"] = _THINKING_TOKENS
            if not told:
                print(
                    f"This model thinks before it answers: a reply may take {_THINKING_TOKENS} "
                    "tokens (--max-tokens states another number)",
                    file=sys.stderr,
                )
            told = True
        yield from original(model, tokenizer, *rest, **options)

    with swapped(stock, stream_generate=stream_generate):
        yield


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

"""Generate text with streamed experts: `mlx_lm.generate` with every one of its options, and ours.

python -m mlx_streamexperts.generate --prompt "Then said Jesus unto his disciples,"
python -m mlx_streamexperts.generate --model mlx-community/Kimi-K2.5 --memory 96GB -p "hello"
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx

from .cli import make_parser, stream_settings
from .config import format_size
from .demo import DEMO_PROMPT, demo_model
from .errors import StreamError
from .patching import patch
from .stream import ExpertStream

# Not `import mlx_lm.generate`: the package binds that name to a function.
stock = importlib.import_module("mlx_lm.generate")


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options and ours."""
    return make_parser(stock.setup_arg_parser(), "python -m mlx_streamexperts.generate", __doc__)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    try:
        config, model = stream_settings(args)
        parser.set_defaults(model=model)
        if model == str(demo_model()):
            parser.set_defaults(prompt=DEMO_PROMPT)  # it knows no answer to mlx-lm's "hello"
        with patch(config=config) as patched, _timed() as timing, _arguments(parser, argv):
            stock.main()
        if args.verbose:
            print(summary(patched.streams[0], timing))
    except StreamError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


def summary(expert_stream: ExpertStream, timing: dict[str, float]) -> str:
    """The lines that follow mlx-lm's own: what streaming cost."""
    stats = expert_stream.stats()
    plan = expert_stream.plan
    lines = []
    if "first_token" in timing:
        lines.append(f"Time to first token: {timing['first_token']:.3f} s")
    if stats.resident_layers == len(expert_stream.layers):
        lines.append("Experts: all resident, nothing was streamed")
    else:
        lines.append(
            f"Experts: {stats.cache.hit_rate:.1%} hit rate with {plan.resident_share:.1%} resident "
            f"({stats.cache.compulsory} first uses, {stats.cache.capacity} misses after eviction)"
        )
        waited = stats.read.wait_seconds
        share = f", {waited / timing['total']:.0%} of the time" if timing.get("total") else ""
        lines.append(
            f"Read: {format_size(stats.read.bytes)} in {stats.read.reads} reads, "
            f"waited {waited:.3f} s{share}"
        )
    lines.append(
        f"Memory: peak {format_size(mx.get_peak_memory())}"
        + ("" if plan.memory is None else f" of {format_size(plan.memory)}")
        + f" (trunk {format_size(plan.trunk)}, expert cache {format_size(plan.cache)})"
    )
    return "\n".join(lines)


@contextmanager
def _arguments(parser: argparse.ArgumentParser, argv: list[str] | None) -> Iterator[None]:
    """Let mlx-lm's main parse our command line: it ignores the options it does not know."""
    command = sys.argv if argv is None else [parser.prog, *argv]
    with (
        mock.patch.object(stock, "setup_arg_parser", lambda: parser),
        mock.patch.object(sys, "argv", command),
    ):
        yield


@contextmanager
def _timed() -> Iterator[dict[str, float]]:
    """Seconds from the start of generation to the first token, and to the end."""
    timing: dict[str, float] = {}
    original = stock.stream_generate

    def timed(*args: Any, **kwargs: Any) -> Iterator[Any]:
        start = time.perf_counter()
        for response in original(*args, **kwargs):
            timing.setdefault("first_token", time.perf_counter() - start)
            timing["total"] = time.perf_counter() - start
            yield response

    with mock.patch.object(stock, "stream_generate", timed):
        yield timing


if __name__ == "__main__":
    sys.exit(main())

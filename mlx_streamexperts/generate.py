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
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn

from .cli import failed, join_ranks, make_parser, only_rank_0_prints, stream_settings
from .config import format_size
from .demo import DEMO_PROMPT, demo_model
from .errors import StreamError
from .patching import patch
from .stream import ExpertStream, stream

# Not `import mlx_lm.generate`: the package binds that name to a function.
stock = importlib.import_module("mlx_lm.generate")


def setup_arg_parser() -> argparse.ArgumentParser:
    """mlx-lm's options and ours."""
    parser = make_parser(stock.setup_arg_parser(), "python -m mlx_streamexperts.generate", __doc__)
    group = parser.add_argument_group("recording")
    group.add_argument(
        "--timeline", help="write where the time went to this file, for ui.perfetto.dev"
    )
    group.add_argument(
        "--trace", help="write which experts the routers chose to this file (JSON lines)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    streams: list[ExpertStream] = []
    try:
        group = join_ranks()
        if group.size() > 1:
            _for_several(args)
        with only_rank_0_prints(group):
            config, model = stream_settings(args)
            parser.set_defaults(model=model)
            if model == str(demo_model()):
                parser.set_defaults(prompt=DEMO_PROMPT)  # it knows no answer to mlx-lm's "hello"
            recordings = ExitStack()
            patched = patch(config=config)
            streams = patched.streams
            with (
                recordings,
                patched,
                _watched(args, recordings) as timing,
                _arguments(parser, argv),
            ):
                stock.main()
            if args.verbose:
                print(summary(streams[0], timing))
    except StreamError as e:
        return failed(e, streams)
    except RuntimeError as e:
        if not any(s.ranks for s in streams):
            raise
        return failed(e, streams)
    return 0


def _for_several(args: argparse.Namespace) -> None:
    """Share the model with the other ranks, as far as mlx-lm can.

    Raises:
        StreamError: an option that it cannot.
    """
    args.pipeline = True
    for option in ("draft_model", "adapter_path", "prompt_cache_file"):
        if getattr(args, option) is not None:
            flag = "--" + option.replace("_", "-")
            raise StreamError(f"{flag} does not work with several machines; run without")
    rank = str(mx.distributed.init().rank())
    for option in ("timeline", "trace"):
        if (file := getattr(args, option)) is not None:
            setattr(args, option, file.replace("{rank}", rank))


@dataclass
class Timing:
    """One generation.

    Attributes:
        first_token: seconds from its start to the first token, or None if there was none.
        total: seconds to the last.
        prompt_tokens: tokens of the prompt.
        prompt_bytes: what was read from the drive until the first token.
        phases: seconds by phase, where a timeline was taken.
    """

    first_token: float | None = None
    total: float = 0.0
    prompt_tokens: int = 0
    prompt_bytes: int = 0
    phases: dict[str, float] = field(default_factory=dict)


def summary(expert_stream: ExpertStream, timing: Timing) -> str:
    """The lines that follow mlx-lm's own: what streaming cost."""
    mine = _summary(expert_stream, timing)
    if (ranks := expert_stream.ranks) is None:
        return "\n".join(mine)
    everybody = ranks.exchange([str(expert_stream.stage), mine])
    return "\n".join(
        line
        for (stage, lines), name in zip(everybody, ranks.names, strict=True)
        for line in (f"{name}: {stage.partition(', ')[2]}", *("  " + text for text in lines))
    )


def _summary(expert_stream: ExpertStream, timing: Timing) -> list[str]:
    """Of one process."""
    stats, plan = expert_stream.stats(), expert_stream.plan
    lines = []
    if timing.first_token is not None:
        chunks = -(-timing.prompt_tokens // plan.prefill_tokens)
        lines.append(
            f"Time to first token: {timing.first_token:.3f} s, {timing.prompt_tokens} tokens in "
            f"{chunks} chunk{'s' if chunks > 1 else ''}, {format_size(timing.prompt_bytes)} read"
        )
    if stats.resident_layers == len(expert_stream.layers):
        lines.append("Experts: all resident, nothing was streamed")
    else:
        lines.append(
            f"Experts: {stats.cache.hit_rate:.1%} hit rate with {plan.resident_share:.1%} resident "
            f"({stats.cache.compulsory} first uses, {stats.cache.capacity} misses after eviction)"
        )
        waited = stats.read.wait_seconds
        share = f", {waited / timing.total:.0%} of the time" if timing.total else ""
        lines.append(
            f"Read: {format_size(stats.read.bytes)} in {stats.read.reads} reads, "
            f"waited {waited:.3f} s{share}"
        )
        if stats.ahead.issued:
            lines.append(
                f"Read ahead: {stats.ahead.issued} experts, {stats.cache.prefetched} used "
                f"({stats.ahead.late} of them late), {stats.cache.wasted} wasted, "
                f"{stats.ahead.cancelled} taken back; delayed others by "
                f"{stats.read.delay_seconds:.3f} s; {stats.looking_ahead} of "
                f"{len(expert_stream.layers)} layers look ahead"
            )
    if timing.phases:
        elapsed = timing.phases["elapsed"]
        parts = ", ".join(
            f"{name} {seconds / elapsed:.1%}"
            for name, seconds in timing.phases.items()
            if name != "elapsed"
        )
        lines.append(f"Timeline: {elapsed:.3f} s: {parts}")
    lines.append(
        f"Memory: peak {format_size(mx.get_peak_memory())}"
        + ("" if plan.memory is None else f" of {format_size(plan.memory)}")
        + f" (trunk {format_size(plan.trunk)}, expert cache {format_size(plan.cache)})"
    )
    return lines


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
def _watched(args: argparse.Namespace, recordings: ExitStack) -> Iterator[Timing]:
    """Time the generation, record it if asked to, and let prompts go in chunks as planned."""
    timing = Timing()
    original = stock.stream_generate
    local = ("help", "model", "verbose", "pipeline")  # all else decides which text there is
    shared = [a for a in stock.setup_arg_parser()._actions if a.dest not in local]

    def watched(model: nn.Module, *rest: Any, **options: Any) -> Iterator[Any]:
        streamed = stream(model)
        if streamed.ranks is not None:
            said = {a.dest: str(getattr(args, a.dest, None)) for a in shared}
            streamed.ranks.agree({"the option": said})
        if options.get("prefill_step_size") is None:
            options["prefill_step_size"] = streamed.plan.prefill_tokens
        timeline = None
        if args.timeline is not None:
            timeline = recordings.enter_context(streamed.timeline(args.timeline))
        if args.trace is not None:
            recordings.enter_context(streamed.trace(args.trace))
        start = time.perf_counter()
        for response in original(model, *rest, **options):
            timing.total = time.perf_counter() - start
            if timing.first_token is None:
                timing.first_token = timing.total
                timing.prompt_tokens = response.prompt_tokens
                timing.prompt_bytes = streamed.stats().read.bytes
            yield response
        if timeline is not None:
            timing.phases = timeline.summary()

    with mock.patch.object(stock, "stream_generate", watched):
        yield timing


if __name__ == "__main__":
    sys.exit(main())

"""Runs mlx-lm's own programs with streamed experts and our options.

While a program runs, its `setup_arg_parser` is replaced by one with our options too, and its
generation functions by ones that take times. Nothing else of a program changes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TextIO

import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from .._config import StreamConfig, format_size
from .._errors import StreamError
from .._experts.stream import ExpertStream, stream
from .._experts.timeline import Timeline
from .._hooks import swapped
from .._loading.load import patch
from .._prefixes.remembered import SHORTEST, PrefixCache, prefill
from .prompt_line import prompt_line
from .stopping import Interrupts, ending
from .summary import Timing, experts_read, of_all_ranks, rows
from .terminal import print_rows

_PREFILL_BATCH = 8  # prompts that mlx-lm's BatchGenerator puts into one pass


@dataclass
class Session:
    """One run of a program.

    Attributes:
        args: the parsed command line.
        patched: the patch; it holds the streams of all models loaded.
        timing: times of the generations.
        shows_text: the program prints a reply as it comes.
        interrupts: Ctrl-C ends a reply, not the program; None if it ends the program.
        kept: prefixes on the drive, if there were any to look for.
    """

    args: argparse.Namespace
    patched: patch
    timing: Timing = field(default_factory=Timing)
    shows_text: bool = True
    interrupts: Interrupts | None = None
    kept: PrefixCache | None = None
    recordings: ExitStack = field(default_factory=ExitStack)
    _timeline: Timeline | None = None
    _recording: bool = False

    def record(self, expert_stream: ExpertStream) -> None:
        """Start the recordings of `--timeline` and `--trace`, once.

        Raises:
            StreamError: a file cannot be created.
        """
        if self._recording:
            return
        self._recording = True
        timeline, trace = self.args.timeline, self.args.trace
        try:
            if timeline is not None:
                self._timeline = self.recordings.enter_context(expert_stream.timeline(timeline))
            if trace is not None:
                self.recordings.enter_context(expert_stream.trace(trace))
        except OSError as e:
            file = str(e.filename).removesuffix(".partial")
            raise StreamError(f"{file}: cannot be created: {e.strerror}") from e

    def prefixes(self, model: nn.Module, options: dict[str, Any]) -> PrefixCache | None:
        """The prefixes of a generation with these options; None if none are used."""
        folder = getattr(self.args, "prefix_cache", None)
        others = ("draft_model", "input_embeddings", "logits_processors")
        if folder is None or any(options.get(name) is not None for name in others):
            return None
        caches = options.get("prompt_cache")
        if caches is not None and not all(c.empty() for c in caches):
            return None  # a chat goes on
        if self.kept is None:
            adapter = getattr(self.args, "adapter_path", None)
            names = ("kv_bits", "kv_group_size", "quantized_kv_start")
            quantized = {n: options[n] for n in names if n in options}
            self.kept = PrefixCache(model, folder, self.args.prefix_bytes, adapter, **quantized)
        return self.kept

    def note_phases(self) -> None:
        """Copy the timeline's sums so far into `timing`, if there is a timeline."""
        if self._timeline is not None:
            self.timing.phases = self._timeline.summary()

    def print_summary(self, file: TextIO | None = None) -> None:
        """Print the cost of streaming, or nothing if no model was loaded."""
        if self.patched.streams:
            lines = rows(self.patched.streams, self.timing, self.args.layer_hits)
            if self.kept is not None:
                read, written = self.kept.read_tokens, format_size(self.kept.written_bytes)
                text = f"{read} tokens from the drive, {written} written"
                if not (read or self.kept.written_bytes):
                    text += f" (only {SHORTEST} new tokens or more are kept)"
                lines.append(("Prefix cache", text))
            lines = of_all_ranks(self.patched.streams[0], lines)
            print_rows(lines, "Expert streaming", file)


@contextmanager
def program(
    stock: ModuleType,
    parser: argparse.ArgumentParser,
    argv: list[str] | None,
    args: argparse.Namespace,
    config: StreamConfig,
    warm_up: int = 0,
    shows_text: bool = True,
    interrupts: Interrupts | None = None,
) -> Iterator[Session]:
    """Let `stock.main()` run with streamed experts, within the `with` block.

    Args:
        stock: the program's module.
        parser: parser of its options and ours.
        argv: arguments of the command line; None for those of this process.
        args: the arguments, parsed.
        config: streaming options.
        warm_up: generations to leave out of the session's figures.
        shows_text, interrupts: see `Session`.
    """
    with patch(config=config) as patched:
        session = Session(args, patched, shows_text=shows_text, interrupts=interrupts)
        with session.recordings, _watched(stock, session, warm_up), _arguments(stock, parser, argv):
            yield session


@contextmanager
def _arguments(
    stock: ModuleType, parser: argparse.ArgumentParser, argv: list[str] | None
) -> Iterator[None]:
    """Let mlx-lm's main parse our command line with our parser; it ignores our options."""
    command = sys.argv if argv is None else [parser.prog, *argv]
    with swapped(stock, setup_arg_parser=lambda: parser), swapped(sys, argv=command):
        yield


@contextmanager
def _watched(stock: ModuleType, session: Session, warm_up: int) -> Iterator[None]:
    """Time and record generations, and divide prompts into the planned chunks."""
    original, done = stock.stream_generate, 0
    local = ("help", "model", "verbose", "pipeline")  # the others determine the text
    shared = [a.dest for a in stock.setup_arg_parser()._actions if a.dest not in local]
    said = {name: str(getattr(session.args, name, None)) for name in shared}
    original_batch: Any = getattr(stock, "batch_generate", None)

    def ended(streamed: ExpertStream) -> None:
        nonlocal done
        done += 1
        session.note_phases()
        if done == warm_up:
            session.timing = Timing()
            for x in session.patched.streams:
                x.reset()

    def watched(model: nn.Module, *rest: Any, **options: Any) -> Iterator[Any]:
        streamed = stream(model)
        session.record(streamed)
        if streamed.ranks is not None:
            streamed.ranks.agree({"the option": said})
        if options.get("prefill_step_size") is None:
            options["prefill_step_size"] = streamed.plan.prefill_tokens
        timing, before = session.timing, session.timing.total
        bytes_before = streamed.stats().read.bytes
        experts_first = bytes_first = 0
        first, first_elapsed = True, 0.0
        total = None if len(rest) < 2 or isinstance(rest[1], str) else len(rest[1])
        if total == 0:
            raise StreamError(
                "the prompt is empty: --prompt takes the text to go on with. If it has text, the "
                "model folder lacks its tokenizer's files: download them again"
            )
        caught = ending(session.interrupts, streamed, options.get("prompt_cache"))
        shown = prompt_line(streamed, total, streamed.config.progress)
        start = time.perf_counter()
        with caught as reply, shown as line:
            if total is not None and (kept := session.prefixes(model, options)) is not None:
                tokenizer, prompt, *more = rest
                caches = options.get("prompt_cache")
                if caches is None:
                    caches = make_prompt_cache(model, options.get("max_kv_size"))
                options["prompt_cache"], left = prefill(model, prompt, kept, caches)
                rest = (tokenizer, left, *more)
            for response in original(model, *rest, **options):
                elapsed = time.perf_counter() - start
                timing.total = before + elapsed
                timing.tokens += 1
                timing.drafted += response.from_draft
                if line is not None:
                    if session.shows_text:
                        line.close()
                    else:
                        line.generated(response.generation_tokens)
                if first:
                    first = False
                    reply.begun = True
                    timing.first_token = (timing.first_token or 0.0) + elapsed
                    timing.generations += 1
                    count = total or response.prompt_tokens
                    timing.prompt_tokens += count
                    timing.chunks += len(streamed.plan.passes(count))
                    bytes_first, experts_first = streamed.stats().read.bytes, experts_read(streamed)
                    timing.prompt_bytes += bytes_first - bytes_before
                    first_elapsed = elapsed
                if total is not None and response.prompt_tokens < total:  # the others were kept
                    response.prompt_tokens = total
                    response.prompt_tps = total / first_elapsed
                yield response
                if reply.asked():
                    break
        if not first:
            timing.later_experts += experts_read(streamed) - experts_first
            timing.later_bytes += streamed.stats().read.bytes - bytes_first
        ended(streamed)

    def watched_batch(
        model: nn.Module, tokenizer: Any, prompts: list[list[int]], **options: Any
    ) -> Any:
        streamed, timing = stream(model), session.timing
        session.record(streamed)
        if options.get("prefill_step_size") is None:
            together = min(len(prompts), options.get("prefill_batch_size", _PREFILL_BATCH))
            options["prefill_step_size"] = max(1, streamed.plan.prefill_tokens // together)
        start = time.perf_counter()
        with prompt_line(streamed, sum(map(len, prompts)), streamed.config.progress):
            result = original_batch(model, tokenizer, prompts, **options)
        timing.total += time.perf_counter() - start
        timing.tokens += result.stats.generation_tokens
        ended(streamed)
        return result

    replaced: dict[str, Any] = {"stream_generate": watched}
    if original_batch is not None:
        replaced["batch_generate"] = watched_batch
    with swapped(stock, **replaced):
        yield

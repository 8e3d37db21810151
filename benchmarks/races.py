"""Races: random schedules of threads on one streamed model, every result compared with stock's.

    python -X dev benchmarks/races.py --schedules 1000
    python -X dev benchmarks/races.py --seed 4711 --schedules 1 --repeat 50

Each schedule loads a small random model with options drawn by chance. Up to four threads call it,
each with its own KV cache (steps, steps built lazily, prompts in waves, batches, mlx-lm's
generator), while others resize its cache, load, use and drop further streams, read and reset its
statistics, record traces and timelines, or close it. Threads give way at random lines of the
package (yields.py). Every result must be the bits of stock mlx-lm. No error is right but
`StreamError` once the model is being closed. At the end the slots must add up, the model be exact,
and no thread, file or byte of MLX's memory be left. A schedule that does not end is a failure that
shows every thread's stack.

`--seed N` makes the first schedule's decisions those of N, the next one's of N + 1, and so on.
Exit code: 0 if nothing was found, 1 otherwise, 3 after a hang.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import platform
import random
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from yields import Yields

from mlx_streamexperts import ExpertStream, StreamConfig, StreamError
from mlx_streamexperts._analysis.exactness import load_stock, load_streamed
from mlx_streamexperts._analysis.random_model import write_random_model
from mlx_streamexperts._io.files import direct_works

VOCAB, EXPERTS, LAYERS = 256, 8, 3
EXPERT_BYTES = 3 * 64 * 128 * 4
HANG_SECONDS = 60.0
SETTLE_SECONDS = 60.0  # at most, for MLX to let go of what its own threads have just run
SMALL_BYTES = 256  # MLX keeps some numbers for a thread


@dataclass(frozen=True)
class Script:
    """Tokens [B, T] of each call of a sequence, and stock's logits [B, T, V] for them."""

    calls: list[np.ndarray]
    logits: list[np.ndarray]


@dataclass(frozen=True)
class Reply:
    """A prompt [T], and the tokens and log-probabilities [V] of stock's greedy reply."""

    prompt: np.ndarray
    steps: list[tuple[int, np.ndarray]]


class Stock:
    """What stock mlx-lm says, worked out once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = load_stock(folder)
        self.direct = direct_works(next(folder.glob("*.safetensors")))
        draw = np.random.default_rng(0)
        shapes = [(1, 1), (1, 4), (1, 12), (1, 40), (2, 3), (3, 1)] * 3
        self.scripts = [self._script(draw, *shape) for shape in shapes]
        self.replies = [self._reply(draw.integers(0, VOCAB, n)) for n in (1, 2, 7, 40)]
        del self.model

    def _script(self, draw: np.random.Generator, rows: int, prompt: int) -> Script:
        lengths = (prompt, 1, 1, 1, 2, 1)
        calls = [draw.integers(0, VOCAB, (rows, n)) for n in lengths]
        cache = make_prompt_cache(self.model)
        return Script(calls, [np.array(self.model(mx.array(c), cache=cache)) for c in calls])

    def _reply(self, prompt: np.ndarray) -> Reply:
        return Reply(prompt, list(replies(self.model, prompt)))


def replies(model: nn.Module, prompt: np.ndarray) -> Any:
    """Tokens and log-probabilities that mlx-lm's generator gives."""
    for token, logprobs in generate_step(mx.array(prompt), model, max_tokens=5):
        yield int(token), np.array(logprobs)


@dataclass
class Found:
    """What schedules came to.

    Attributes:
        counts: of schedules, calls, compared results, yields, resizes, loads and so on.
        failures: what was wrong, with the seed of its schedule.
    """

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


class Schedule:
    """One schedule: a model, and what threads do to it.

    Args:
        seed: decides everything that chance decides.
    """

    def __init__(self, stock: Stock, seed: int, found: Found, work: Path) -> None:
        self.stock, self.seed, self.found, self.work = stock, seed, found, work
        self.chance = random.Random(seed)
        self.config = self._config()
        self.callers = self.chance.choice((1, 1, 2, 3, 4))
        self.closing = False
        self.lock = threading.Lock()
        self.model: nn.Module
        self.stream: ExpertStream

    def _config(self) -> StreamConfig:
        pick = self.chance.choice
        return StreamConfig(
            cache=self._size(self.chance), progress=False,
            prefetch=pick(("off", "on", "on", "auto")), prefetch_depth=pick((1, 2)),
            run_ahead=pick(("off", "on")), overlap=pick(("auto", "on", "off")),
            threads=pick((1, 2, 4)), policy=pick(("lrfu", "lru", "s3fifo")),
            in_place=pick(("auto", "auto", "auto", "off")), read_size=pick(("4KiB", "4MiB")),
            bypass_page_cache=pick(("off", "on")) if self.stock.direct else "off",
        )  # fmt: skip

    @staticmethod
    def _size(chance: random.Random) -> int:
        """Bytes of a cache: the fewest slots, all of them, or anything between."""
        slots = chance.choice((2, chance.randrange(2, EXPERTS), EXPERTS))
        spare = chance.randrange(LAYERS) if slots < EXPERTS else 0
        return (slots * LAYERS + spare) * EXPERT_BYTES

    def run(self) -> None:
        """Everything; what is wrong goes into `found`."""
        before = leftovers()
        share = self.chance.choice((0.001, 0.005, 0.02))
        with Yields(self.seed, share, 1e-3, counts := {}):
            self.model, self.stream = load_streamed(self.stock.folder, self.config)
            self._together(self._actors())
            self._in_the_end()
        self.found.counts["yields"] += sum(counts.values())
        self.found.counts["schedules"] += 1
        until = time.monotonic() + SETTLE_SECONDS
        while left_behind(before, after := leftovers()):
            if time.monotonic() > until:
                return self.fail(f"left behind: {after}, before it {before}")
            time.sleep(0.05)

    def _actors(self) -> dict[str, Callable[[random.Random], None]]:
        actors: dict[str, Callable[[random.Random], None]] = {}
        for i in range(self.callers):
            actors[f"caller {i}"] = self._call
        odds = {"resize": 0.6, "resize too": 0.1, "load": 0.3, "look": 0.4, "close": 0.2}
        doing = {
            "resize": self._resize, "resize too": self._resize, "load": self._load,
            "look": self._look, "close": self._close,
        }  # fmt: skip
        for name, odd in odds.items():
            if self.chance.random() < odd:
                actors[name] = doing[name]
        return actors

    def _together(self, actors: dict[str, Callable[[random.Random], None]]) -> None:
        threads = [
            threading.Thread(target=self._guarded, args=(name, act), name=name)
            for name, act in actors.items()
        ]
        for thread in threads:
            thread.start()
        end = time.monotonic() + HANG_SECONDS
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
            if thread.is_alive():
                print(f"\nschedule {self.seed} hangs: {self.config}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(all_threads=True)
                os._exit(3)

    def _guarded(self, name: str, act: Callable[[random.Random], None]) -> None:
        try:
            act(random.Random(f"{self.seed} {name}"))
        except StreamError:
            if not self.closing:
                self.fail(f"{name}: {traceback.format_exc()}")
            self.count("refused when closed")
        except BaseException:
            self.fail(f"{name}: {traceback.format_exc()}")

    def fail(self, what: str) -> None:
        self.found.failures.append(f"schedule {self.seed}: {what}\n  {self.config}")

    def count(self, what: str, n: int = 1) -> None:
        with self.lock:
            self.found.counts[what] += n

    def compare(self, got: Any, expected: Any, what: str) -> None:
        self.count("compared")
        if not np.array_equal(got, expected):
            self.count("wrong")
            self.fail(f"{what} differs from stock's")

    # What threads do.

    def _call(self, chance: random.Random) -> None:
        ways = [self._steps, self._steps, self._generate]
        if self.callers == 1:  # from two threads on, each evaluates what it builds
            ways.append(self._lazily)
        for _ in range(chance.randrange(1, 4)):
            chance.choice(ways)(self.model, chance)

    def _steps(self, model: nn.Module, chance: random.Random) -> None:
        script = chance.choice(self.stock.scripts)
        cache = make_prompt_cache(model)
        for step, (call, expected) in enumerate(zip(script.calls, script.logits, strict=True)):
            self.count("calls")
            got = np.array(model(mx.array(call), cache=cache))
            self.compare(got, expected, f"call {step} of {script.calls[0].shape}")
            if chance.random() < 0.05:
                return  # an abandoned sequence

    def _generate(self, model: nn.Module, chance: random.Random) -> None:
        reply = chance.choice(self.stock.replies)
        self.count("generators")
        for got, expected in zip(replies(model, reply.prompt), reply.steps, strict=True):
            self.count("calls")
            self.compare(got[0], expected[0], "a token")
            self.compare(got[1], expected[1], "log-probabilities")
            if chance.random() < 0.05:
                return

    def _lazily(self, model: nn.Module, chance: random.Random) -> None:
        """Sequences side by side, whose logits are evaluated in any order, later, or never."""
        pairs = [(chance.choice(self.stock.scripts), make_prompt_cache(model)) for _ in range(2)]
        todo = sorted(chance.sample(range(12), 12), key=lambda i: i // 2)
        built: list[tuple[mx.array, np.ndarray]] = []
        try:
            for i in todo:
                script, cache = pairs[i % 2]
                self.count("calls")
                logits = model(mx.array(script.calls[i // 2]), cache=cache)
                built.append((logits, script.logits[i // 2]))
                chance.shuffle(built)
                while len(built) > chance.randrange(6):
                    self._evaluate(*built.pop())
        finally:  # what was built before the model was closed is exact too
            while built and chance.random() < 0.9:
                self._evaluate(*built.pop())

    def _evaluate(self, logits: mx.array, expected: np.ndarray) -> None:
        self.compare(np.array(logits), expected, "what was built lazily")

    def _resize(self, chance: random.Random) -> None:
        for _ in range(chance.randrange(1, 5)):
            time.sleep(chance.random() * 0.02)
            self.stream.resize(self._size(chance))
            self.count("resizes")

    def _load(self, chance: random.Random) -> None:
        """Another stream of the same checkpoint comes, is used, and goes."""
        for _ in range(chance.randrange(1, 3)):
            model, stream = load_streamed(self.stock.folder, self.config)
            self.count("loads")
            self._steps(model, chance)
            if chance.random() < 0.7:
                stream.close()
            del model, stream

    def _look(self, chance: random.Random) -> None:
        """Statistics, recordings, and all else that only looks."""
        s = self.stream
        looks: list[Callable[[], Any]] = [
            lambda: s.stats().as_dict(), s.reset, lambda: repr(s), s.held_bytes,
            lambda: s.save_hot_set(self.work / "hot.json"),
            lambda: self._record(s.trace, chance), lambda: self._record(s.timeline, chance),
        ]  # fmt: skip
        for _ in range(chance.randrange(3, 12)):
            time.sleep(chance.random() * 0.005)
            chance.choice(looks)()
            self.count("looks")

    def _record(self, what: Callable[[Path], Any], chance: random.Random) -> None:
        with what(self.work / "record"):
            time.sleep(chance.random() * 0.01)

    def _close(self, chance: random.Random) -> None:
        time.sleep(chance.random() * 0.1)
        self.closing = True
        self.stream.close()
        self.count("closed in use")

    # What must be so afterwards.

    def _in_the_end(self) -> None:
        if self.closing:
            try:
                self._steps(self.model, self.chance)
                self.fail("a closed model answers")
            except StreamError:
                pass
        else:
            self._guarded("in the end", lambda chance: self._steps(self.model, chance))
            self._add_up()
            if self.chance.random() < 0.5:
                self.stream.close()
        del self.model, self.stream

    def _add_up(self) -> None:
        for layer in self.stream.layers:
            cache = layer.cache
            taken = [int(cache.slot_of[e]) for e in cache.resident]
            if sorted(taken + cache._free) != list(range(cache.slots)):
                self.fail(f"{layer.name}: slots lost or twice: {taken} and {cache._free}")
            if layer.closed:
                self.fail(f"{layer.name} is closed: {layer.why_closed}")


def left_behind(before: tuple[list[str], int, int], after: tuple[list[str], int, int]) -> bool:
    """Are there other threads or files, or is there more memory?"""
    return after[:2] != before[:2] or after[2] - before[2] > SMALL_BYTES


def leftovers() -> tuple[list[str], int, int]:
    """Threads, number of open files, MLX's memory."""
    gc.collect()
    names = sorted(t.name for t in threading.enumerate() if t.name != "tqdm_monitor")
    return names, len(os.listdir("/dev/fd")), mx.get_active_memory()


def run(seed: int, schedules: int, repeat: int = 1, seconds: float = 1e9) -> Found:
    """Run schedules until all are done, the time is up, or five were bad."""
    found = Found()
    warnings.simplefilter("error", ResourceWarning)
    sys.unraisablehook = lambda e: found.failures.append(f"unraisable: {e.exc_value!r} {e.object}")
    threading.excepthook = lambda e: found.failures.append(f"{e.thread}: {e.exc_value!r}")
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        shape = {"layers": LAYERS, "experts": EXPERTS, "top_k": 2, "hidden": 128, "inner": 64}
        stock = Stock(write_random_model(Path(folder) / "model", vocab=VOCAB, **shape))
        for i in range(schedules * repeat):
            if len(found.failures) >= 5 or time.monotonic() - begun > seconds:
                break
            print(f"\rschedule {seed + i // repeat} ", end="", file=sys.stderr, flush=True)
            faulthandler.dump_traceback_later(2 * HANG_SECONDS, exit=True)
            Schedule(stock, seed + i // repeat, found, Path(folder)).run()
        faulthandler.cancel_dump_traceback_later()
    print(file=sys.stderr)
    found.counts["seconds"] = int(time.monotonic() - begun)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule (default: 0)")
    parser.add_argument("--schedules", type=int, default=100, help="(default: 100)")
    parser.add_argument("--repeat", type=int, default=1, help="run each so often (default: 1)")
    parser.add_argument("--seconds", type=float, default=1e9, help="begin none after so long")
    parser.add_argument("--out", type=Path, help="file for the result (JSON)")
    args = parser.parse_args()
    found = run(args.seed, args.schedules, args.repeat, args.seconds)
    result = {
        "python": platform.python_version(), "dev_mode": sys.flags.dev_mode,
        "cpus": os.cpu_count(), "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__,
        "seed": args.seed, **found.counts, "failures": found.failures,
    }  # fmt: skip
    for failure in found.failures:
        print(failure, file=sys.stderr)
    print(json.dumps({k: v for k, v in result.items() if k != "failures"}))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1))
    return bool(found.failures)


if __name__ == "__main__":
    raise SystemExit(main())

"""Python calls of one expert layer or one token: how many, in which files, and steps between them.

Counted by `sys.setprofile` in the calling thread, and only in frames whose file lies inside the
installed package. These figures do not depend on how fast the machine is.

- calls: the profiler's "call" events. A generator counts each time that it is resumed, and up to
  Python 3.11 a comprehension counts too. Code that `dataclass` and `NamedTuple` generate lies in no
  file and is left out, like C, MLX, mlx-lm and the standard library.
- files: the different files that these frames lie in.
- hops: calls in another file than the call before, whatever returned meanwhile.
- switches: how often the innermost such frame's file changes, by a call or by a return. A call into
  another file and back is two. The first entry and the last exit do not count.

A "layer" is a call of one `ExpertLayer` of the embedded model for one token: 8 of 64 experts, half
of them resident, 4-bit, in nine parts. With prefetch it probes the next router and finds nothing
to read. A "token" is the model's own forward pass over one token, with 8 such layers, of which one
lacks two experts, or none. Each row is the most frequent of several rounds, because a call
sometimes does work that earlier calls left.

The script replaces `time.perf_counter` by a clock that moves a microsecond with each call, because
the package decides by measured times which thread reads and how a call runs. By this clock reads
are quick, as they are from the page cache, so the caller does them. Overlap at its default then
runs the resident experts first, as it does before its tuning begins. "In threads" are the calls in
the package's own threads meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

import mlx_streamexperts
from mlx_streamexperts import StreamConfig, demo_model, patch, stream

PACKAGE = os.path.dirname(os.path.abspath(mlx_streamexperts.__file__)) + os.sep
EXPERTS, TOP_K, HIDDEN, TOKEN = 64, 8, 320, 11
LAYER = 4  # which is called, or lacks experts
WARM_UP, ROUNDS = 6, 15  # fewer calls that miss than overlap's trial waits for
X = mx.zeros((1, 1, HIDDEN), mx.bfloat16)


class Cost(NamedTuple):
    """What one call costs."""

    calls: int
    files: tuple[str, ...]
    hops: int
    switches: int


class Profile:
    """Counts in the thread that calls `count`, and in threads begun since it was made."""

    def __init__(self) -> None:
        self._counting = False
        self.elsewhere = 0  # calls in those threads
        threading.setprofile(self._in_thread)

    def count(self, call: Callable[[], Any]) -> Cost:
        """What `call` costs."""
        self._inside: list[FrameType] = []  # the package's frames, the innermost last
        self._called: list[str] = []  # the file of each call
        self._switches = self.elsewhere = 0
        self._counting = True
        sys.setprofile(self._here)
        try:
            call()
        finally:
            sys.setprofile(None)
            self._counting = False
        hops = sum(a != b for a, b in itertools.pairwise(self._called))
        files = sorted(os.path.relpath(f, PACKAGE) for f in set(self._called))
        return Cost(len(self._called), tuple(files), hops, self._switches)

    def _here(self, frame: FrameType, event: str, arg: object) -> None:
        file, inside = frame.f_code.co_filename, self._inside
        if not file.startswith(PACKAGE):
            return
        if event == "call":
            self._called.append(file)
            self._switches += bool(inside) and inside[-1].f_code.co_filename != file
            inside.append(frame)
        elif event == "return":
            assert inside.pop() is frame
            self._switches += bool(inside) and inside[-1].f_code.co_filename != file

    def _in_thread(self, frame: FrameType, event: str, arg: object) -> None:
        if self._counting and event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            self.elsewhere += 1


@contextmanager
def loaded(cores: int | None, **options: Any) -> Iterator[nn.Module]:
    """The embedded model, half of its experts resident; all that is not named is off."""
    options = {"prefetch": "off", "run_ahead": "off", **options}
    config = StreamConfig(cache=1 << 40, progress=False, bypass_page_cache="off",
                          cores=cores, **options)  # fmt: skip
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(demo_model())
    with stream(model) as expert_stream:
        expert_stream.resize(expert_stream.plan.experts // 2)
        yield model


def call_for(layer: Any, experts: list[int]) -> None:
    """Call a layer for these experts, at least one."""
    indices = mx.array((experts * TOP_K)[:TOP_K])[None, None]  # [1, 1, K]
    mx.eval(layer(X, indices))


def layer_costs(profile: Profile, model: nn.Module, misses: int) -> list[tuple[Cost, int]]:
    """Of each round's call of one layer: its cost, and the calls in threads."""
    layer, rng = stream(model).layers[LAYER], np.random.default_rng(0)
    while len(here := layer.cache.resident) < EXPERTS // 2:
        call_for(layer, [e for e in range(EXPERTS) if e not in here])
    costs = []
    for _ in range(WARM_UP + ROUNDS):
        here = layer.cache.resident
        away = [e for e in range(EXPERTS) if e not in here]
        chosen = [*rng.choice(here, TOP_K - misses, False), *rng.choice(away, misses, False)]
        indices = mx.array(rng.permutation(chosen))[None, None]  # [1, 1, K]
        mx.eval(indices)
        costs.append(counted(profile, model, lambda i=indices: layer(X, i), misses))
    return costs[WARM_UP:]


def token_costs(profile: Profile, model: nn.Module, misses: int) -> list[tuple[Cost, int]]:
    """Of each round's pass of one token: its cost, and the calls in threads."""
    layer, cache, token = stream(model).layers[LAYER], make_prompt_cache(model), mx.array([[TOKEN]])
    chosen: list[np.ndarray] = []
    with loaded(1) as other:  # waits for every layer's indices
        stream(other).layers[LAYER].on_routing.add(chosen.append)
        mx.eval(other(token))
    wanted = set(chosen[0].ravel().tolist())
    others = itertools.cycle(e for e in range(EXPERTS) if e not in wanted)
    mx.eval(model(token, cache=cache))
    trim_prompt_cache(cache, 1)
    costs = []
    for _ in range(WARM_UP + ROUNDS):
        while misses and len(wanted.difference(layer.cache.resident)) < misses:
            call_for(layer, [next(others)])  # one of them makes room
        costs.append(counted(profile, model, lambda: model(token, cache=cache), misses))
        trim_prompt_cache(cache, 1)
    return costs[WARM_UP:]


def counted(
    profile: Profile, model: nn.Module, call: Callable[[], mx.array], misses: int
) -> tuple[Cost, int]:
    """Cost of a call that must have so many misses, and the calls in threads."""
    before = stream(model).stats().cache.misses
    outputs: list[mx.array] = []
    cost = profile.count(lambda: outputs.append(call()))
    mx.eval(outputs)
    assert stream(model).stats().cache.misses - before == misses
    return cost, profile.elsewhere


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cores", type=int, default=2, help="that calls are divided for")
    args = parser.parse_args()
    ticks = itertools.count(1_000_000_000)
    time.perf_counter = lambda: 1e-6 * next(ticks)
    profile = Profile()
    settings: list[tuple[str, Any, dict[str, str]]] = [
        ("layer", layer_costs, {}),
        ("layer, overlap off", layer_costs, {"overlap": "off"}),
        ("layer, overlap on", layer_costs, {"overlap": "on"}),
        ("layer, prefetch on", layer_costs, {"prefetch": "on"}),
        ("token, overlap off", token_costs, {"overlap": "off"}),
        ("token, run-ahead on", token_costs, {"overlap": "off", "run_ahead": "on"}),
    ]
    print(f"Python {sys.version.split()[0]}, MLX {mx.__version__}, for {args.cores} cores")
    print("what                  misses  calls  files   hops  switches  rounds  in threads")
    entered: dict[tuple[str, ...], list[str]] = {}
    for name, costs_of, options in settings:
        for misses in (2, 0):
            with loaded(args.cores, **options) as model:
                costs = costs_of(profile, model, misses)
            cost, rounds = Counter(c for c, _ in costs).most_common(1)[0]
            threads = sorted({n for _, n in costs})
            print(
                f"{name:22s}{misses:6d}{cost.calls:7d}{len(cost.files):7d}{cost.hops:7d}"
                f"{cost.switches:10d}{rounds:5d}/{len(costs)}{threads[0]:9d}"
                + (f" to {threads[-1]}" if len(threads) > 1 else ""),
                flush=True,
            )
            entered.setdefault(cost.files, []).append(f"{name}, {misses} misses")
    for files, names in entered.items():
        print(f"\n{'; '.join(names)}:\n  {' '.join(files)}")


if __name__ == "__main__":
    main()

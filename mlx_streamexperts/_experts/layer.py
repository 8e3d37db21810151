"""The streamed expert layer: drop-in for mlx-lm's `SwitchGLU` and `SwitchMLP`.

It computes what the module it stands in for computes, by calling that module itself: its expert
tables are exchanged for a bank of slots, and expert indices for slot indices. Each (token, expert)
row is computed on its own, so relocating experts changes no bit. It must never overwrite a slot
that an unevaluated matmul will still read (`Bank.flush_readers`), nor return before every expert
that it used was read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .._cache.expert_map import ExpertCache
from .._errors import StreamError
from .._io.reader import ExpertReader
from .._listeners import Listeners
from .autotune import Pace, Trial
from .bank import numbers
from .cpu_streams import Lanes
from .refusals import Experts, refuse_transforms
from .slots import Arrivals, ExpertSlots, ExpertTensor
from .split import SORTED_ROWS, RowRule, SplitCall
from .thread_guard import Callers

PHASES = ("sync", "map", "wait", "build")
"""Phases of a call; see `timeline.py`."""

# Ways to run a call some of whose experts are still being read: wait and run it whole; run those
# that are there meanwhile; run each lot as it arrives as well. Every part costs a set of kernel
# calls (100 to 200 us on a CPU), so that small experts are better run whole.
WAYS = ("whole", "halves", "lots")

_CLOSED = "this model's expert stream is closed"
_FORKED = (
    "this process was forked after the model was loaded, and threads and devices do not survive a "
    "fork: start the process by multiprocessing's 'spawn' (get_context('spawn')), or as a program "
    "of its own, and load the model there. To load it in a forked process hangs, in MLX"
)


@dataclass(slots=True)
class LayerStats:
    """Counters of one layer.

    Attributes:
        calls: forward calls that had to ask which experts are wanted.
        waves: extra passes of calls that needed more experts than there are slots.
        overlapped: calls that ran resident experts while missing ones were read.
        seconds: the caller's time by phase; see `timeline.py`.
    """

    calls: int = 0
    waves: int = 0
    overlapped: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))


class Prediction(Protocol):
    """Experts that the next layers will probably choose."""

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays to evaluate together with the layer's own indices."""

    def start_reads(self) -> None:
        """Prefetch the experts that are likely and not resident."""


class Prefetcher(Protocol):
    """The calls that a layer makes to its prefetcher; `prefetch.py` has the implementation."""

    @property
    def on(self) -> bool:
        """Does the layer predict at present?"""

    def begin_step(self) -> bool:
        """Note that the layer is called; returns whether to predict for the next layers."""

    def predict(self, x: mx.array) -> Prediction | None:
        """Build the next layers' choices for this layer's input x [..., D]."""

    def check(self, needed: Sequence[int]) -> None:
        """Compare the experts predicted for this layer with those that it needs."""

    def end_step(self) -> None:
        """Note that this layer has its experts."""


class PassRunner(Protocol):
    """Runs whole forward passes through the layers; `runahead.py` has the implementation.

    Attributes:
        thread: the thread whose pass it runs, or None.
    """

    thread: int | None

    def forward(self, layer: ExpertLayer, x: mx.array, indices: mx.array) -> mx.array:
        """Run one layer of that pass: x [..., D], indices [..., K] -> [..., K, D]."""


class SyncedForward(NamedTuple):
    """The result of a call that waited for its indices.

    Attributes:
        output: [..., K, D].
        needed: the distinct experts chosen.
        missed: one of them was not resident.
    """

    output: mx.array
    needed: list[int]
    missed: bool


class _Probe(threading.local):
    """The layer whose router this thread is asking; its experts then do not run."""

    layer: ExpertLayer | None = None


probe = _Probe()


class StopForward(Exception):  # noqa: N818, it is no error
    """Ends a block's call during a probe, once its router has chosen."""

    def __init__(self, indices: mx.array) -> None:
        self.indices = indices


class StreamedSwitch(Experts):
    """Stands in for one `SwitchGLU` or `SwitchMLP`: `y[..., k, :] = expert[indices[..., k]](x)`.

    Bank memory is kept out of the module tree: it is no parameter, and nothing that walks the model
    (adapters, quantizers, savers) may take a slot for an expert. What else a model hangs on its
    experts (a norm, say) stays visible.
    """

    def __init__(self, layer: ExpertLayer) -> None:
        super().__init__()
        self.layer = layer
        object.__setattr__(self, "tables", layer.switch)  # not as a child: no parameters
        holders = {id(t.slot.module) for t in layer.tensors.values()}
        for key, value in layer.switch.items():
            if id(value) not in holders:
                self[key] = value

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """See `ExpertLayer.__call__`."""
        if probe.layer is self.layer:
            raise StopForward(indices)
        try:
            return self.layer(x, indices)
        except ValueError as e:
            refuse_transforms(e)
            raise


class ExpertLayer:
    """One layer's experts, and the passes over them.

    Args:
        name: module path in the model.
        switch: the module stood in for; its expert tables are never evaluated.
        tensors: every expert tensor of the module, by name within it.
        experts: routed experts in the layer.

    Attributes:
        slots: the slots and what is on its way into them.
        stats: further counters.
        resident: all experts are in the slot of their own index, nothing is asked or mapped.
        on_routing: called with each call's experts [..., K] while traces are taken.
        on_phase: told of each phase while timelines are taken: phase, layer, begin, end.
        prefetcher: predicts what the next layers want; None without prefetch.
        closed, why_closed: calls raise `StreamError`, and what that says.
    """

    def __init__(
        self, name: str, switch: nn.Module, tensors: dict[str, ExpertTensor], experts: int
    ) -> None:
        self.name, self.switch, self.tensors, self.experts = name, switch, tensors, experts
        self.slots = ExpertSlots(name, tensors, experts)
        self.expert_bytes = self.slots.expert_bytes
        self.stats = LayerStats()
        self.resident = False
        self.on_routing = Listeners[Callable[[np.ndarray], None]]()
        self.on_phase = Listeners[Callable[[str, str, float, float], None]]()
        self.closed, self.why_closed = True, _CLOSED
        self.prefetcher: Prefetcher | None = None
        self._runner: PassRunner | None = None
        self._calling = False  # a call has the lock, or was interrupted
        self._pace = Pace(Trial(WAYS, WAYS[0]))
        self._rows = RowRule.of(switch)
        self._lanes = Lanes(1)
        self.lock = threading.RLock()
        self._callers = Callers()

    @property
    def cache(self) -> ExpertCache:
        """The expert -> slot map and its statistics."""
        return self.slots.cache

    def use_prefetcher(self, prefetcher: Prefetcher) -> None:
        """Let calls tell this prefetcher what they need, and predict for the next layers."""
        self.prefetcher = prefetcher

    def use_runner(self, runner: PassRunner) -> None:
        """Let calls in the thread of this runner's pass go to it."""
        self._runner = runner

    def open(
        self,
        slots: int,
        reader: ExpertReader,
        policy: str,
        pace: Pace,
        callers: Callers,
        lanes: Lanes,
        in_place: bool,
    ) -> None:
        """Allocate `slots` slots, all empty, and be ready for calls.

        Args:
            slots: experts that fit.
            pace: decides how calls overlap with reads, for all layers that are alike.
            callers: which threads call the model, for all of its layers.
            lanes: compute its calls.
        """
        with self.lock:
            self.closed, self.resident = True, False  # until all is there
            self.why_closed = "a change of its cache was interrupted; call resize again"
            self._pace, self._callers, self._lanes = pace, callers, lanes
            self.slots.open(slots, reader, policy, in_place)
            self.closed = False

    def load_all(self) -> Iterator[int]:
        """Read every expert into the slot of its own index; yields bytes read as it goes.

        Afterwards the layer maps nothing and asks the device nothing. Needs as many slots as
        experts, all empty, and the lock since they were opened.
        """
        yield from self.fill(range(self.experts))
        if not np.array_equal(self.cache.slot_of, np.arange(self.experts)):
            raise StreamError(f"{self.name}: loading out of order")  # an empty cache fills in order
        self.resident = True

    def fill(self, experts: Sequence[int]) -> Iterator[int]:
        """Read experts into empty slots, no more than there are; yields bytes read as it goes."""
        step = max(1, (64 << 20) // self.expert_bytes)
        for first in range(0, len(experts), step):
            chunk = list(experts[first : first + step])
            self.slots.begin(chunk).all()
            yield len(chunk) * self.expert_bytes
        self.cache.stats = type(self.cache.stats)()  # loading is not a miss

    def close(self) -> None:
        """Free the slots; later calls raise `StreamError`."""
        with self.lock:
            self.closed, self.resident, self.why_closed = True, False, _CLOSED
            self.slots.close()

    def disown(self) -> None:
        """In a process that was forked: never touch slots, reader or device again."""
        self.closed, self.resident, self.why_closed = True, False, _FORKED
        self.lock = threading.RLock()

    def reset(self) -> None:
        """Set every counter to zero."""
        self.stats = LayerStats()
        self.slots.prefetch_stats = type(self.slots.prefetch_stats)()
        self.cache.stats = type(self.cache.stats)()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        """Run the chosen experts.

        Args:
            x: [..., D] tokens.
            indices: [..., K] the experts that each token's router chose.

        Returns:
            [..., K, D], each chosen expert's output.

        Raises:
            ExpertReadError: an expert's bytes could not be read.
        """
        if self.resident:
            with self.lock:  # the tables of one bank: another thread may be exchanging them
                if self.resident:
                    if self.on_routing.now:
                        self._report_routing(numbers(indices))
                    return self._run(x, indices)
        if self.closed:
            with self.lock:  # unless another thread is just opening it
                self._check_open()
        runner = self._runner
        if runner is not None and runner.thread == threading.get_ident():
            return runner.forward(self, x, indices)
        return self.forward_synced(x, indices).output

    def forward_synced(
        self, x: mx.array, indices: mx.array, predict_next: bool = True
    ) -> SyncedForward:
        """Wait for the indices, make their experts resident, and run them.

        Args:
            predict_next: prefetch for the next layers meanwhile, if that pays.
        """
        start = time.perf_counter()
        prefetcher, prediction = self.prefetcher, None
        few = indices.size < SORTED_ROWS
        if predict_next and few and prefetcher is not None and prefetcher.begin_step():
            mx.async_eval(indices)  # the device works while we ask
            start = self.record_phase("sync", start)
            prediction = prefetcher.predict(x)
            start = self.record_phase("map", start)
            if prediction is not None:
                mx.eval(indices, *prediction.arrays)
        experts = numbers(indices)  # [..., K], the call's only host sync
        began = self.record_phase("sync", start)
        self._pace.tick(began)
        self._callers.note()
        with self.lock:
            self._check_open()
            self._calling = True
            needed = self.count(experts)
            if len(needed) > self.cache.slots:
                missed = True
                y = self._in_waves(x, experts, sorted(needed))
            else:
                arrivals = self.slots.begin(needed)
                missed = bool(arrivals.left)
                if missed and few:
                    self._pace.mark(began)
                if prediction is not None:
                    prediction.start_reads()
                self.record_phase("map", began)
                y = self._at_once(x, experts, arrivals)
                mx.async_eval(y)  # the device works while the caller builds what follows
                if prefetcher is not None:
                    prefetcher.end_step()
            # A prompt's output is not kept unevaluated: it would be, of each layer.
            y = self.slots.bank.track_reader(y, self._callers.shared or not few)
            self._calling = False
        return SyncedForward(y, needed, missed)

    def prefetch(self, experts: Sequence[int], distance: int) -> None:
        """Start reading experts that this layer may need soon, the likeliest first.

        Does nothing while another call of this layer is under way: the prediction is late then.

        Args:
            distance: layers until they may be needed; nearer ones are read first.
        """
        # Taking the lock only if it is free would let Ctrl-C keep it: `with` alone is whole.
        if not self._calling:
            with self.lock:
                if not (self.resident or self.closed):
                    self.slots.prefetch(experts, distance)

    def _check_open(self) -> None:
        if self.closed:
            raise StreamError(f"{self.name}: {self.why_closed}")

    def settle(self) -> None:
        """Evaluate what this thread has built with the slots."""
        with self.lock:
            self.slots.bank.flush_readers()

    def hit(self, experts: np.ndarray) -> None:
        """Account for a call of one token, whose experts [1, ..., K] were all there."""
        with self.lock:
            needed = self.cache.hit(experts.ravel())
            self._note_call(experts, needed)

    def count(self, experts: np.ndarray) -> list[int]:
        """Account for a call that chose these experts [..., K]; returns the distinct ones."""
        needed = self.cache.wanted(experts)
        self._note_call(experts, needed)
        return needed

    def _note_call(self, experts: np.ndarray, needed: Sequence[int]) -> None:
        self._report_routing(experts)
        self.stats.calls += 1
        if self.prefetcher is not None:
            self.prefetcher.check(needed)

    def _report_routing(self, experts: np.ndarray) -> None:
        for listener in self.on_routing.now:
            listener(experts)

    def finish_arrived(self, x: mx.array, experts: np.ndarray, arrivals: Arrivals) -> mx.array:
        """Run a call's experts [..., K], known and accounted for, once they have arrived."""
        with self.lock:
            return self.slots.bank.track_reader(self._at_once(x, experts, arrivals))

    def _at_once(self, x: mx.array, experts: np.ndarray, arrivals: Arrivals) -> mx.array:
        """All needed experts fit into the slots together: the decode path.

        Those that are resident run while others are read, and these in lots as they arrive.
        """
        start, way = time.perf_counter(), self._pace.trial.way
        if arrivals.left and way != "whole":
            split = self._split(x, experts)
            chosen = dict.fromkeys(experts.ravel().tolist())
            ready = [e for e in chosen if e not in arrivals.left]
            self.stats.overlapped += bool(ready)
            try:
                while arrivals.left:
                    if ready:
                        mx.async_eval(split.run(split.rows_of(ready)))
                    start = self.record_phase("build", start)
                    ready = arrivals.some() if way == "lots" else arrivals.all()
                    start = self.record_phase("wait", start)
            except Exception:
                arrivals.abandon()
                raise
            if split.begun:
                split.run(split.rows_of(ready))
                y = split.joined()
                self.record_phase("build", start)
                return y
        arrivals.all()
        start = self.record_phase("wait", start)
        if self._rows.divides(experts.size, self.experts, self.cache.slots):
            split = self._split(x, experts)
            split.run(np.arange(experts.size))
            y = split.joined()
        else:
            y = self._run(x, mx.array(self.cache.slot_of[experts].astype(np.uint32)))
        self.record_phase("build", start)
        return y

    def _run(self, x: mx.array, slots: mx.array) -> mx.array:
        return self._lanes.run(self.switch, x, slots, self.expert_bytes)

    def _split(self, x: mx.array, experts: np.ndarray) -> SplitCall:
        cache = self.cache
        return SplitCall(self._run, x, experts, cache.slot_of, cache.slots, self._rows)

    def _in_waves(self, x: mx.array, experts: np.ndarray, needed: list[int]) -> mx.array:
        """More experts than slots: they pass through, each read once.

        While a wave computes, the next one is read into the slots of the wave before. The call's
        most used experts come last and stay: what follows a prompt wants those.
        """
        slots = self.cache.slots
        self.slots.drain()
        waves = self.cache.waves(needed, np.bincount(experts.ravel(), minlength=self.experts))
        self.stats.waves += len(waves) - 1
        split = self._split(x, experts)
        before: list[mx.array] = []
        start = time.perf_counter()
        arrivals = self.slots.begin(*waves[0])
        for i, (wave, _) in enumerate(waves):
            arrivals.all()
            start = self.record_phase("wait", start)
            y = split.run(split.rows_of(wave))
            mx.async_eval(y)
            start = self.record_phase("build", start)
            if i + 1 < len(waves):
                # The next wave overwrites slots of waves before this one: they must have run.
                if slots == 1:
                    mx.eval(y)
                elif before:
                    mx.eval(before)
                start = self.record_phase("sync", start)
                arrivals = self.slots.begin(*waves[i + 1])
                start = self.record_phase("map", start)
            before = y
        return split.joined()

    def record_phase(self, phase: str, start: float) -> float:
        """Account for the time since `start`; returns now."""
        now = time.perf_counter()
        self.stats.seconds[phase] += now - start
        for on_phase in self.on_phase.now:
            on_phase(phase, self.name, start, now)
        return now

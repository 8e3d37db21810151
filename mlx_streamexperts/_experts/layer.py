"""One layer of routed experts, streamed: the path of a token from router indices to expert outputs.

`StreamedSwitch` stands where the model has mlx-lm's `SwitchGLU` or `SwitchMLP`. A call takes these
steps, in this order (`ExpertLayer.forward_synced`):

    x [..., D], indices [..., K]        from the model: tokens, and the experts chosen for each
    experts = numbers(indices)          int [..., K] on the host; the only wait for the device
    needed = cache.wanted(experts)      the distinct experts
    arrivals = slots.begin(needed)      each has a slot; reads of the missing ones are queued
    arrivals.all()                      wait until their bytes are in the slots
    slot_of[experts]                    uint32 [..., K]: slots take the place of experts
    switch(x, slots)                    [..., K, D]: mlx-lm's own module, over the bank's arrays

Each (token, expert) row is computed on its own, so moving experts to other slots changes no bit.

A layer must never overwrite a slot that an unevaluated matmul will still read
(`Bank.flush_readers`), nor return before every expert that it uses has been read. It knows its
prefetcher and the runner of speculative passes only by the protocols below.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .._cache.expert_map import CacheStats, ExpertCache
from .._errors import StreamError, UnsupportedModelError
from .._io.reader import ExpertReader
from .._listeners import Listeners
from .autotune import StepTimer
from .bank import numbers
from .cpu_streams import CpuStreams
from .keep_awake import KeepAwake
from .refusals import Experts, refuse_transforms
from .slots import Arrivals, ExpertSlots, ExpertTensor, PrefetchStats, SmallTable
from .split import SORTED_ROWS, RowRule, SplitCall
from .thread_guard import ThreadGuard

PHASES = ("sync", "map", "wait", "build")
"""Phases of a call; `timeline.py` describes them."""

OVERLAPS = ("none", "halves", "batches")
"""How a call runs while experts that it misses are being read.

It waits and runs everything at once; it runs the resident experts meanwhile; or it also runs each
batch of missing experts as it arrives. Every part costs its own kernel calls (100 to 200 us on a
CPU), so small experts are better run at once.
"""

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
        calls: forward calls that looked up their experts.
        waves: extra passes of calls that needed more experts than there are slots.
        overlapped: calls that ran resident experts while missing ones were read.
        seconds: the caller's time by phase.
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

    def forward(
        self,
        layer: ExpertLayer,
        x: mx.array,
        indices: mx.array,
        weights: mx.array | None,
        lossy: Any = None,
    ) -> mx.array:
        """Run one layer of that pass; arguments and result as of `ExpertLayer.__call__`.

        `lossy` is a `Weighing` of a layer that may leave experts out, and the result is weighted.
        """


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


@dataclass(frozen=True)
class Traits:
    """What sets an expert module apart from mlx-lm's.

    Attributes:
        pinned: experts that each token uses once, whatever its router chooses.
        own_tables: names of the module's own arrays that have a row for each expert.
        tokenwise: called with the module, x and indices if x is [B, L, D] with 2 to `most` tokens:
            calls the module for each of the L tokens. None if the module has no such rule.
        most: see `tokenwise`.
    """

    pinned: tuple[int, ...] = ()
    own_tables: tuple[str, ...] = ()
    tokenwise: Callable[[Callable[..., mx.array], mx.array, mx.array], mx.array] | None = None
    most: int = 0


class _HiddenError(UnsupportedModelError, AttributeError):
    """Code outside of a streamed layer asks for a projection of it: to `hasattr`, it has none."""


class StreamedSwitch(Experts):
    """Stands in for one `SwitchGLU` or `SwitchMLP`: `y[..., k, :] = expert[indices[..., k]](x)`.

    The bank's arrays stay out of the module tree: they are not parameters, and code that walks the
    model (adapters, quantizers, savers) must not take a slot for an expert. Anything else that a
    model attaches to its experts (a norm, for example) stays visible.

    Projections are never visible: mlx-vlm calls those that it finds, with numbers of experts where
    these tables have slots.
    """

    down_proj = None  # mlx-vlm's Inkling looks at its bits in every pass; None has none

    def __init__(self, layer: ExpertLayer) -> None:
        super().__init__()
        self.layer = layer
        object.__setattr__(self, "tables", layer.switch)  # not as a child: no parameters
        slots = layer.slots.slot_tensors.values()
        holders = {id(slot.module) for slot in slots}
        own = {slot.attribute for slot in slots if slot.module is layer.switch}
        for key, value in layer.switch.items():
            if id(value) not in holders and key not in own:
                self[key] = value

    def __getattr__(self, name: str) -> Any:
        if name not in self and name in vars(self).get("tables", ()):
            raise _HiddenError(
                f"{self.layer.name}: its experts are streamed, so code that runs their {name} "
                "by itself cannot: the slots hold other experts. If this is mlx-vlm's check of a "
                "draft (speculative decoding), generate without a draft model"
            )
        return super().__getattr__(name)

    def __call__(self, x: mx.array, indices: mx.array, weights: mx.array | None = None) -> mx.array:
        """See `ExpertLayer.__call__`."""
        if probe.layer is self.layer:
            raise StopForward(indices)
        try:
            return self.layer(x, indices, weights)
        except ValueError as e:
            refuse_transforms(e)
            raise


class ExpertLayer:
    """One layer's experts, and the calls that run them.

    Args:
        name: module path in the model.
        switch: the module stood in for; its expert tables are never evaluated.
        tensors: every expert tensor of the module, by name within it.
        experts: routed experts in the layer.
        small: tensors of a few bytes an expert that stay in memory, by name.
        traits: of the module.

    Attributes:
        slots: the slots, and the reads on their way into them.
        stats: further counters.
        resident: every expert is in the slot of its own index; calls look nothing up.
        on_routing: called with each call's experts [..., K] while a trace is recorded.
        on_phase: called with phase, layer, begin and end while a timeline is recorded.
        on_call: called with True when a call begins, and with False again and again while it waits
            for reads. What it raises ends the call.
        prefetcher: predicts what the next layers need; None without prefetch.
        closed, why_closed: calls raise `StreamError` with that reason.
        lock: held by calls while they use slots.
    """

    def __init__(
        self,
        name: str,
        switch: nn.Module,
        tensors: dict[str, ExpertTensor],
        experts: int,
        small: dict[str, SmallTable] | None = None,
        traits: Traits | None = None,
    ) -> None:
        self.name, self.switch, self.experts = name, switch, experts
        self.traits = traits or Traits()
        self.slots = ExpertSlots(name, tensors, experts, small, self.traits.pinned)
        self.expert_bytes = self.slots.expert_bytes
        self.stats = LayerStats()
        self.resident = False
        self.on_routing = Listeners[Callable[[np.ndarray], None]]()
        self.on_phase = Listeners[Callable[[str, str, float, float], None]]()
        self.on_call = self.slots.on_call
        self.prefetcher: Prefetcher | None = None
        self.closed, self.why_closed = True, _CLOSED
        self.lock = threading.RLock()
        self._runner: PassRunner | None = None
        self._calling = False  # a call has the lock, or was interrupted
        self._rows = RowRule.of(switch)
        # The CPU computes row by row, so nothing depends on whether a module calls itself.
        self._tokenwise = self.traits.tokenwise if self._rows.count else None
        self._timer: StepTimer  # these three are set by open
        self._guard: ThreadGuard
        self._cpu_streams: CpuStreams
        self._keep_awake: KeepAwake | None = None

    @property
    def tensors(self) -> dict[str, ExpertTensor]:
        """Every expert tensor, by name within the module."""
        return self.slots.tensors

    @property
    def cache(self) -> ExpertCache:
        """The expert -> slot map and its statistics."""
        return self.slots.cache

    def use_prefetcher(self, prefetcher: Prefetcher) -> None:
        """Let calls report their experts to this prefetcher, and predict for the next layers."""
        self.prefetcher = prefetcher

    def use_runner(self, runner: PassRunner) -> None:
        """Hand calls to this runner while it runs a pass in the calling thread."""
        self._runner = runner

    def runner(self) -> PassRunner | None:
        """The runner whose pass this thread is in."""
        runner = self._runner
        return runner if runner and runner.thread == threading.get_ident() else None

    def open(
        self,
        slots: int,
        reader: ExpertReader,
        policy: str,
        timer: StepTimer,
        guard: ThreadGuard,
        cpu_streams: CpuStreams,
        in_place: bool,
        keep_awake: KeepAwake | None = None,
        keep: bool = False,
    ) -> None:
        """Allocate `slots` slots, all empty unless `keep`, and accept calls.

        Args:
            slots: experts that fit.
            reader: reads the experts.
            policy: name of the cache's policy.
            timer: decides how calls overlap with reads, for all layers with experts of this size.
            guard: knows which threads call the model's layers.
            cpu_streams: runs the matmuls.
            in_place: read straight into MLX's arrays.
            keep_awake: keeps the device awake while a call waits for reads.
            keep: move the most useful experts to the new slots.
        """
        with self.lock:
            self.closed, self.resident = True, False  # until everything is there
            self.why_closed = "a change of its cache was interrupted; call resize again"
            self._timer, self._guard, self._cpu_streams = timer, guard, cpu_streams
            self._keep_awake = keep_awake
            self.slots.open(slots, reader, policy, in_place, keep)
            if slots < self.experts:
                for _ in self.fill(self.traits.pinned):
                    pass
            self.closed = False

    def load_all(self) -> Iterator[int]:
        """Read every expert into the slot of its own index; yields bytes read as it goes.

        From then on the layer looks nothing up and never waits for the device. It needs as many
        slots as experts, all empty, and the caller must have held the lock since `open`.
        """
        yield from self.fill(range(self.experts))
        if not np.array_equal(self.cache.slot_of, np.arange(self.experts)):
            raise StreamError(f"{self.name}: loading out of order")  # an empty cache fills in order
        self.resident = True

    def fill(self, experts: Sequence[int]) -> Iterator[int]:
        """Read experts into empty slots; yields bytes read as it goes.

        Args:
            experts: distinct ones, no more than there are slots.
        """
        step = max(1, (64 << 20) // self.expert_bytes)
        for first in range(0, len(experts), step):
            chunk = list(experts[first : first + step])
            self.slots.begin(chunk).all()
            yield len(chunk) * self.expert_bytes
        self.cache.stats = CacheStats()  # loading is not a miss

    def close(self) -> None:
        """Free the slots; later calls raise `StreamError`."""
        with self.lock:
            self.closed, self.resident, self.why_closed = True, False, _CLOSED
            self.slots.close()

    def disown(self) -> None:
        """Never touch slots, reader or device again: this is a forked process."""
        self.closed, self.resident, self.why_closed = True, False, _FORKED
        self.lock = threading.RLock()

    def reset(self) -> None:
        """Set every counter to zero."""
        self.stats = LayerStats()
        self.slots.prefetch_stats = PrefetchStats()
        self.cache.stats = CacheStats()

    def flush_readers(self) -> None:
        """Evaluate everything that this thread has built with the slots."""
        with self.lock:
            self.slots.bank.flush_readers()

    def __call__(self, x: mx.array, indices: mx.array, weights: mx.array | None = None) -> mx.array:
        """Run the chosen experts.

        Args:
            x: [..., D] tokens.
            indices: [..., K] the experts that each token's router chose.
            weights: [..., K], each row's own factor, for a module that takes it
                (DeepSeek V4.1's multiplies in front of the last projection).

        Returns:
            [..., K, D], each chosen expert's output.

        Raises:
            ExpertReadError: an expert's bytes could not be read.
            StreamError: the stream is closed.
        """
        for listener in self.on_call.now:
            listener(True)
        if self.resident:
            with self.lock:  # another thread may be exchanging the bank
                if self.resident:
                    if self.on_routing.now:
                        self._report_routing(self._routed(numbers(indices)))
                    return self._run(x, indices, weights)
        if self.closed:
            with self.lock:  # another thread may be opening it just now
                self._check_open()
        if self._tokenwise and self._is_block(x) and x.shape[0] * indices.shape[-1] >= SORTED_ROWS:
            return self._tokenwise(self, x, indices)
        runner = self._runner
        if runner is not None and runner.thread == threading.get_ident():
            return runner.forward(self, x, indices, weights)
        return self.forward_synced(x, indices, weights).output

    def forward_synced(
        self,
        x: mx.array,
        indices: mx.array,
        weights: mx.array | None = None,
        predict_next: bool = True,
    ) -> SyncedForward:
        """Wait for the indices, make their experts resident, and run them.

        Args:
            x: [..., D] tokens.
            indices: [..., K].
            weights: [..., K] or None, as of `__call__`.
            predict_next: prefetch for the next layers meanwhile, if that pays.
        """
        start = time.perf_counter()
        prefetcher, prediction = self.prefetcher, None
        few = indices.size < SORTED_ROWS
        if predict_next and few and prefetcher is not None and prefetcher.begin_step():
            mx.async_eval(indices)  # the device works while the next routers are probed
            start = self.record_phase("sync", start)
            prediction = prefetcher.predict(x)
            start = self.record_phase("map", start)
            if prediction is not None:
                mx.eval(indices, *prediction.arrays)
        experts = numbers(indices)  # int [..., K]; waits for the device
        began = self.record_phase("sync", start)
        self._timer.lap(began)
        self._guard.enter()
        with self.lock:
            if self.closed:
                self._check_open()
            self._calling = True
            slots = self.slots
            needed = self.account(experts)
            if len(needed) > slots.cache.slots:
                missed = True
                y = self._in_waves(self._split(x, experts, weights), experts, sorted(needed))
            else:
                arrivals = slots.begin(needed)
                missed = bool(arrivals.left)
                if missed and few:
                    self._timer.time_step(began)
                if prediction is not None:
                    prediction.start_reads()
                self.record_phase("map", began)
                y = self._run_arriving(x, experts, weights, arrivals)  # [..., K, D]
                mx.async_eval(y)  # the device works while the caller builds the next operations
                if prefetcher is not None:
                    prefetcher.end_step()
            # A prompt's output is evaluated now: kept unevaluated, it would be in memory once for
            # each layer.
            y = slots.bank.track_reader(y, eager=self._guard.shared or not few)
            self._calling = False
        return SyncedForward(y, needed, missed)

    def finish_arrived(
        self, x: mx.array, experts: np.ndarray, weights: mx.array | None, arrivals: Arrivals
    ) -> mx.array:
        """Run a call whose experts are known, accounted for, and being read.

        Args:
            x: [..., D] tokens.
            experts: int [..., K].
            weights: [..., K] or None, as of `__call__`.
            arrivals: the missing ones of them.

        Returns:
            [..., K, D]
        """
        with self.lock:
            return self.slots.bank.track_reader(self._run_arriving(x, experts, weights, arrivals))

    def account(self, experts: np.ndarray) -> list[int]:
        """Account for a call that chose these experts [..., K]; returns the distinct ones."""
        routed = self._routed(experts)
        needed = self.slots.cache.wanted(routed)
        self._note_call(routed, needed)
        return [*self.traits.pinned, *needed]

    def account_hit(self, experts: np.ndarray) -> None:
        """Account for a call of one token whose experts [1, ..., K] were all resident."""
        with self.lock:
            routed = self._routed(experts)
            self._note_call(routed, self.slots.cache.hit(routed.ravel()))

    def prefetch(self, experts: Sequence[int], distance: int) -> None:
        """Start reading experts that this layer may need soon, the likeliest first.

        Does nothing while another call of this layer runs: the prediction is late then.

        Args:
            experts: distinct ones.
            distance: layers until they may be needed; nearer ones are read first.
        """
        # Taking the lock only if it is free would let Ctrl-C keep it: `with` alone is whole.
        if not self._calling:
            with self.lock:
                if not (self.resident or self.closed):
                    self.slots.prefetch(experts, distance)

    def record_phase(self, phase: str, start: float) -> float:
        """Count the time since `start` as this phase's; returns now."""
        now = time.perf_counter()
        self.stats.seconds[phase] += now - start
        for listener in self.on_phase.now:
            listener(phase, self.name, start, now)
        return now

    def _check_open(self) -> None:
        if self.closed:
            raise StreamError(f"{self.name}: {self.why_closed}")

    def _note_call(self, experts: np.ndarray, needed: Sequence[int]) -> None:
        self.stats.calls += 1
        if self.on_routing.now:
            self._report_routing(experts)
        if self.prefetcher is not None:
            self.prefetcher.check(needed)

    def _routed(self, experts: np.ndarray) -> np.ndarray:
        """Of a call's experts [..., K], those that its router chose."""
        if not self.traits.pinned:
            return experts
        chosen = ~np.isin(experts, self.traits.pinned)
        return experts[chosen].reshape(*experts.shape[:-1], -1)

    def _is_block(self, x: mx.array) -> bool:
        """Does the module compute these tokens [..., D] one by one, as it would in decoding?"""
        return self._tokenwise is not None and x.ndim == 3 and 1 < x.shape[1] <= self.traits.most

    def _report_routing(self, experts: np.ndarray) -> None:
        for listener in self.on_routing.now:
            listener(experts)

    def _run_arriving(
        self, x: mx.array, experts: np.ndarray, weights: mx.array | None, arrivals: Arrivals
    ) -> mx.array:
        """Run experts [..., K] that all have slots, once the missing ones have arrived.

        This is the path of decoding. Resident experts may run while missing ones are read.
        """
        start, cache, overlap = time.perf_counter(), self.slots.cache, self._timer.tuner.choice
        if arrivals.left and overlap != "none":
            split = self._split(x, experts, weights)
            y = self._run_overlapped(split, experts, arrivals, overlap)
            if y is not None:
                return y
            start = time.perf_counter()
        if arrivals.left:
            self._await(arrivals.all)
            start = self.record_phase("wait", start)
        divides = self._rows.ratio and not self._is_block(x)
        if divides and self._rows.divides(experts.size, self.experts, cache.slots):
            split = self._split(x, experts, weights)
            split.run(np.arange(experts.size))
            y = split.joined()
        else:
            y = self._run(x, mx.array(cache.slot_of[experts].astype(np.uint32)), weights)
        self.record_phase("build", start)
        return y

    def _run_overlapped(
        self, split: SplitCall, experts: np.ndarray, arrivals: Arrivals, overlap: str
    ) -> mx.array | None:
        """Run the resident ones of experts [..., K] while others are read.

        Returns:
            [..., K, D], or None if nothing was resident until all had arrived: then nothing ran.
        """
        start = time.perf_counter()
        ready = [e for e in dict.fromkeys(experts.ravel().tolist()) if e not in arrivals.left]
        self.stats.overlapped += bool(ready)
        try:
            while arrivals.left:
                if ready:
                    mx.async_eval(split.run(split.rows_of(ready)))
                start = self.record_phase("build", start)
                ready = self._await(arrivals.some if overlap == "batches" else arrivals.all)
                start = self.record_phase("wait", start)
        except Exception:
            arrivals.abandon()
            raise
        if not split.begun:
            return None
        split.run(split.rows_of(ready))
        y = split.joined()
        self.record_phase("build", start)
        return y

    def _await(self, arrive: Callable[[], list[int]]) -> list[int]:
        """Wait for reads; the device stays awake meanwhile, if it should."""
        if self._keep_awake is None:
            return arrive()
        with self._keep_awake.during_wait():
            return arrive()

    def _run(self, x: mx.array, slots: mx.array, weights: mx.array | None) -> mx.array:
        """x [..., D], slots [..., K], weights [..., K] -> [..., K, D]."""
        return self._cpu_streams.run(self.switch, x, slots, self.expert_bytes, weights)

    def _split(self, x: mx.array, experts: np.ndarray, weights: mx.array | None) -> SplitCall:
        cache = self.slots.cache
        return SplitCall(
            self._run, x, experts, weights, cache.slot_of, cache.slots, self._rows,
            whole=self._is_block(x),
        )  # fmt: skip

    def _in_waves(self, split: SplitCall, experts: np.ndarray, needed: list[int]) -> mx.array:
        """Run more experts than there are slots: they pass through the slots, each read once.

        While a wave is computed, the next one is read into the slots of the wave before. The
        experts that the call uses most come last and stay, for the tokens that follow.
        """
        cache = self.slots.cache
        self.slots.drain()
        waves = cache.waves(needed, np.bincount(experts.ravel(), minlength=self.experts))
        self.stats.waves += len(waves) - 1
        before: list[mx.array] = []
        start = time.perf_counter()
        arrivals = self.slots.begin(*waves[0])
        for i, (wave, _) in enumerate(waves):
            self._await(arrivals.all)
            start = self.record_phase("wait", start)
            y = split.run(split.rows_of(wave))
            mx.async_eval(y)
            start = self.record_phase("build", start)
            if i + 1 < len(waves):
                # The next wave overwrites slots of earlier waves: those must have run.
                if cache.movable == 1:
                    mx.eval(y)
                elif before:
                    mx.eval(before)
                start = self.record_phase("sync", start)
                arrivals = self.slots.begin(*waves[i + 1])
                start = self.record_phase("map", start)
            before = y
        return split.joined()

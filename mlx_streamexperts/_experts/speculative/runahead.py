"""Run-ahead decoding: one speculative pass for a whole token, checked afterwards.

To read a router's indices the host must wait for the device, once per layer: on an H100 a layer of
Qwen3.5-397B's shape takes 365 us without that wait and 900 us with it. A run-ahead step speculates
instead: a table on the device maps the layer's experts to slots, the host keeps that table up to
date, and the indices of several layers are checked together later. If every expert was in its slot,
the pass was exact. If one was not, the pass still predicts the experts of all later layers: they
are read at once, the KV caches are restored (`cache_snapshot.py`), and the pass runs again; layers
that were exact keep their outputs. Only an exact pass is ever returned.

Measured times decide which layers to speculate on, and whether a wrong pass should go on for its
predictions (`policy.py`). The idea is a processor's run-ahead execution (Dundas and Mudge,
"Improving data cache performance by pre-executing instructions under a cache miss", ICS 1997).
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..bank import numbers
from ..cpu_streams import called
from ..foreign_modules import ForeignModules
from ..layer import ExpertLayer
from ..lossy import Weighing
from ..refusals import refuse_transforms
from ..slots import Arrivals
from ..split import SORTED_ROWS
from ..thread_guard import ThreadGuard
from .cache_snapshot import Restore, snapshot
from .policy import SpeculationPolicy
from .slot_tables import SlotTables

# The shares of a pass's layers after which the graph built so far goes to the device. The device is
# idle until the first group comes, and every group costs the host. 60 layers on an H100, of stock
# mlx-lm's speed: if the device is the limit, 1.00 in the groups of "speculate", 0.95 in thirds,
# 0.81 all at once; if the host is (the device is done before the next layer is built), 0.79, 0.82
# and 0.90.
_SENDS = {
    "speculate": (0.07, 0.2, 0.5),
    "at once": (),
    "sync": (1 / 3, 2 / 3),
    "predict": tuple(n / 8 for n in range(1, 8)),
}

_PASSES = 3
"""After so many passes, a step waits for every layer that is not known to be exact."""


@dataclass(slots=True)
class RunAheadStats:
    """Counters of run-ahead decoding. A step is a forward pass of few tokens, as in decoding.

    Attributes:
        steps: steps that speculated on at least one layer.
        exact_at_once: of those, steps whose first pass was exact.
        passes: passes that these steps took.
        speculated: layers mapped on the device and found exact; each saved a wait for the device.
        synced: layers of all steps whose indices the host waited for.
        wrong: layers speculated on that turned out to lack an expert.
        predicted: experts that wrong passes chose in layers after the first wrong one.
        predicted_used: of those, experts that the exact pass used.
    """

    steps: int = 0
    exact_at_once: int = 0
    passes: int = 0
    speculated: int = 0
    synced: int = 0
    wrong: int = 0
    predicted: int = 0
    predicted_used: int = 0


class _WrongPass(Exception):  # noqa: N818, it is no error
    """Ends a pass that is known to be wrong."""


class _CalledTwice(Exception):  # noqa: N818
    """The model does not call each layer once per pass: it is left alone."""


@dataclass(slots=True)
class _State:
    """What a step knows of one layer.

    Attributes:
        called: in this pass.
        indices: [..., K] of this pass, not checked yet.
        unchecked: [..., K, D], the output for them.
        y: [..., K, D], exact.
        experts: int [..., K], known for certain while `y` is not.
        arrivals: those of `experts` that are being read; None if they have no slots.
        predicted: experts that a wrong pass chose.
        lossy: weights the outputs of a layer that may leave experts out; None in exact runs.
    """

    called: bool = False
    indices: mx.array = field(init=False)
    unchecked: mx.array | None = None
    y: mx.array | None = None
    experts: np.ndarray | None = None
    arrivals: Arrivals | None = None
    predicted: set[int] = field(default_factory=set)
    lossy: Weighing | None = None


class RunAhead:
    """Runs the steps of one model; the `PassRunner` of its layers.

    Args:
        layers: the model's expert layers, in the order of their calls.
        top_k: the most experts that one token has in a layer.
        guard: knows which threads call the model.
        waited: returns the seconds waited for reads so far.
        always: speculate on every layer, whatever was measured.
        lossy: layers may leave experts out.

    Attributes:
        thread: the thread whose step is under way, or None.
        stats: counters.
        policy: learns which layers to speculate on.
    """

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        top_k: int,
        guard: ThreadGuard,
        waited: Callable[[], float],
        always: bool,
        lossy: bool = False,
    ) -> None:
        self.layers, self.always, self._lossy = list(layers), always, lossy
        self.thread: int | None = None
        self.stats, self.policy = RunAheadStats(), SpeculationPolicy(len(self.layers))
        self._most_tokens = (SORTED_ROWS - 1) // top_k  # of a call that counts as decoding
        self._guard, self._waited = guard, waited
        guard.exempt_steps(lambda: self.thread is not None)
        self._lock = threading.RLock()  # a stream may be closed in the middle of its own step
        self._usable, self._observed = True, False
        self._foreign: ForeignModules | None = None
        self._caches: Callable[[], Any] = lambda: None  # the first cache of the last step
        self._number = {id(x): i for i, x in enumerate(self.layers)}
        self._tables = SlotTables(self.layers)
        # Of the step and the pass under way:
        self._states: list[_State] = []
        self._speculate_on = np.zeros(len(self.layers), bool)
        self._again = self._masked = self._goes_on = False
        self._due: set[int] = set()  # layers after which the graph goes to the device
        self._unsent: list[int] = []  # layers speculated on that the device does not know yet
        self._sent: list[tuple[list[int], list[mx.array]]] = []  # groups that are not checked
        self._wrong: int | None = None  # the first layer that lacked an expert
        for layer in self.layers:
            layer.use_runner(self)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No step runs meanwhile."""
        with self._lock:
            yield

    def disown(self) -> None:
        """Never run a step again: this is a forked process, and the step was another thread's."""
        self._usable, self._lock = False, threading.RLock()

    def watch(self, model: nn.Module) -> None:
        """Run each pass once if code that is not mlx-lm's is attached to this model later."""
        self._foreign = ForeignModules(model)

    def step(self, call: Callable[[], Any], tokens: int, caches: Any) -> Any:
        """Run a forward pass of the model, speculating as far as it pays.

        Args:
            call: the model's own forward pass.
            tokens: of the call.
            caches: the KV caches that it changes, or None.

        Returns:
            The result of `call`, exact.

        Raises:
            Exception: any error of `call`; the caches are then as they were before.
        """
        if self._guard.enter():
            with self._lock:  # a step of the first thread ends before another thread begins
                pass
            return call()
        small = self._usable and tokens <= self._most_tokens
        restore = snapshot(caches) if small else None
        if restore is None or self._is_observed(caches):
            return call()
        with self._lock:
            if not self._guard.shared:
                try:
                    return self._step(call, restore)
                except _CalledTwice:
                    self._usable = False
                except ValueError as e:
                    refuse_transforms(e)
                    raise
        return call()

    def _is_observed(self, caches: Any) -> bool:
        """Would foreign code see passes that may be wrong? Found out once per sequence."""
        first = next(iter(caches or ()), None)
        if first is None or self._caches() is not first:
            self._observed = self._foreign is not None and self._foreign.any()
            if first is not None:
                self._caches = weakref.ref(first)
        return self._observed

    def forward(
        self,
        layer: ExpertLayer,
        x: mx.array,
        indices: mx.array,
        weights: mx.array | None,
        lossy: Weighing | None = None,
    ) -> mx.array:
        """Run a layer's part of the pass under way, as `ExpertLayer.__call__` would.

        A lossy layer's result is weighted by its router.
        """
        i = self._number[id(layer)]
        state = self._states[i]
        if state.called:
            raise _CalledTwice
        state.called = True
        if state.y is not None:
            return state.y
        if state.arrivals is not None and state.experts is not None:
            state.y = layer.finish_arrived(x, state.experts, weights, state.arrivals)
            state.arrivals = None
            if state.lossy is not None:
                state.y = state.y * state.lossy.weights
            return state.y
        state.lossy = lossy
        if not self._speculate_on[i]:
            self._check()
        if self._speculate_on[i] or self._wrong is not None:
            return self._speculate(i, x, indices, weights)
        if lossy is not None:
            indices = lossy.synced(indices)
        result = layer.forward_synced(x, indices, weights, predict_next=not self._again)
        state.y = result.output if lossy is None else result.output * lossy.weights
        self.stats.synced += 1
        self.policy.record_layers([i], result.missed, self._again)
        self._count_predicted(i, result.needed)
        return state.y

    def _step(self, call: Callable[[], Any], restore: Restore) -> Any:
        began, waited = time.perf_counter(), self._waited()
        self._states = [_State() for _ in self.layers]
        self._again = False
        start = "predict" if self.always else self.policy.start
        predict, count = start == "predict", len(self.layers)
        self._due = {round(share * count) - 1 for share in _SENDS[start]}
        choose = start in ("speculate", "at once")
        self._speculate_on = self._choose() if choose else np.full(count, predict)
        speculated = int(self._speculate_on.sum())
        self._masked = predict or self._expected(0) >= 1
        self.thread = threading.get_ident()
        try:
            result, passes = self._until_exact(call, restore, predict)
            if speculated:
                self.stats.steps += 1
                self.stats.passes += passes
                self.stats.exact_at_once += passes == 1
            now = time.perf_counter()
            self.policy.record_step(now - began, self._waited() - waited, speculated, passes)
            return result
        except BaseException:
            restore()
            self._forget()
            raise
        finally:  # no calls here: Ctrl-C could end them half-way
            self.thread = None
            self._states = []

    def _until_exact(
        self, call: Callable[[], Any], restore: Restore, predict: bool
    ) -> tuple[Any, int]:
        """Returns the result of the first exact pass, and how many passes it took."""
        for passes in itertools.count(1):
            self._begin_pass(passes, predict and passes == 1)
            try:
                result = call()
                self._check(result)
                return result, passes
            except _WrongPass:
                restore()
                self._forget()
        raise AssertionError

    def _forget(self) -> None:
        """Drop the outputs of a wrong pass: nobody uses them, and no other thread can run them."""
        for layer, state in zip(self.layers, self._states, strict=True):
            if state.unchecked is not None and state.unchecked is not state.y:
                with layer.lock:
                    layer.slots.bank.forget(state.unchecked)
            state.unchecked = None

    def _begin_pass(self, number: int, predict: bool) -> None:
        self._again, self._wrong, self._goes_on = number > 1, None, predict or self.always
        self._unsent, self._sent = [], []
        for state in self._states:
            state.called = False
        if self._again:
            self._masked = True
            if number > _PASSES:
                self._speculate_on[:] = False
            elif not self.always:
                self._speculate_on &= self._choose()

    def _choose(self) -> np.ndarray:
        """The layers to speculate on, bool [layers]; any value for those known to be exact."""
        if not self._again:
            return self.policy.choose(self.policy.lacking)
        known = np.array([s.y is not None or s.arrivals is not None for s in self._states])
        lacking = np.where(known, 0.0, self.policy.lacking_again)
        return self.policy.choose(lacking, again=True)

    def _expected(self, first: int) -> float:
        """How many layers from this one on probably lack an expert."""
        if self._again:
            return self.policy.lacking_again * (len(self.layers) - first)
        return float(self.policy.lacking[first:].sum())

    def _speculate(
        self, i: int, x: mx.array, indices: mx.array, weights: mx.array | None
    ) -> mx.array:
        """Run a layer with experts mapped to slots on the device."""
        layer, state = self.layers[i], self._states[i]
        start = time.perf_counter()
        with layer.lock:
            if self._again:
                layer.slots.await_prefetched()
                start = layer.record_phase("wait", start)
            slots, absent = self._tables.of(i)  # uint32 [experts] each
            start = layer.record_phase("map", start)
            y = called(layer.switch, x, slots[indices], weights)  # [..., K, D]
            if state.lossy is not None:
                y = state.lossy.on_device(y, absent[indices])
            elif self._masked:  # missing experts contribute zero
                y = mx.where(absent[indices][..., None] > 0, 0, y)
            state.indices, state.unchecked = indices, layer.slots.bank.track_reader(y)
        self._unsent.append(i)
        layer.record_phase("build", start)
        if i in self._due:
            before = len(self._sent)
            self._send()
            self._check_sent(before)
        return y

    def _send(self) -> None:
        """Let the device begin with the graph built so far."""
        if self._unsent:
            indices = [self._states[i].indices for i in self._unsent]
            if len({x.shape for x in indices}) == 1:
                # As one array: if memory moves by pages, reading each costs 46 us.
                indices = [mx.concatenate(indices)]
            weights = []
            if self._lossy:
                lossy = [self._states[i].lossy for i in self._unsent]
                weights = [x.weights for x in lossy if x is not None]
            mx.async_eval(indices, weights)
            self._sent.append((self._unsent, indices))
            self._unsent = []

    def _check_sent(self, count: int) -> None:
        """Check the first `count` groups that were sent."""
        groups, self._sent = self._sent[:count], self._sent[count:]
        for group, indices in groups:
            start = time.perf_counter()
            chosen = [numbers(x) for x in indices]
            if len(chosen) < len(group):
                chosen = np.split(chosen[0], len(group))
            for k, i in enumerate(group) if self._lossy else ():
                if (lossy := self._states[i].lossy) is not None:
                    chosen[k] = lossy.choose(chosen[k], self._tables.present(i))
            start = self.layers[group[0]].record_phase("sync", start)
            if self._all_held(group, chosen):
                self.layers[group[0]].record_phase("map", start)
                continue
            for i, experts in zip(group, chosen, strict=True):
                self._check_layer(i, experts)

    def _all_held(self, group: list[int], chosen: list[np.ndarray]) -> bool:
        """Account for a group of layers, if it is a pass of one token and all experts were there.

        Args:
            group: the layers' numbers.
            chosen: int [1, ..., K] of each.
        """
        if self._wrong is not None or any(x.size != x.shape[-1] for x in chosen):
            return False
        if not self._tables.held(group, chosen):
            return False
        for i, experts in zip(group, chosen, strict=True):
            state = self._states[i]
            if state.predicted:
                self._count_predicted(i, experts.ravel().tolist())
            self.layers[i].account_hit(experts)
            if state.lossy is not None:
                state.lossy.count()
            state.y = state.unchecked
        self.policy.record_layers(group, False, self._again)
        self.stats.speculated += len(group)
        return True

    def _check(self, result: Any = None) -> None:
        """Check every layer speculated on so far.

        Args:
            result: of the pass if it is over: the device goes on with that meanwhile.

        Raises:
            _WrongPass: a layer lacked an expert, and the pass need not go on or is over.
        """
        self._send()
        if isinstance(result, mx.array) and self._wrong is None and self._sent:
            mx.async_eval(result)
        self._check_sent(len(self._sent))
        if self._wrong is not None and (result is not None or not self._goes_on):
            raise _WrongPass

    def _check_layer(self, i: int, experts: np.ndarray) -> None:
        """Check whether a layer speculated on held every expert chosen, int [..., K]."""
        layer, state = self.layers[i], self._states[i]
        start = time.perf_counter()
        with layer.lock:
            held = self._tables.held([i], [experts])
            self.policy.record_layers([i], not held, self._again)
            if self._wrong is not None:  # the indices are a prediction
                chosen = list(dict.fromkeys(experts.ravel().tolist()))
                state.predicted = set(chosen)
                layer.slots.prefetch(chosen, i - self._wrong)
            elif len(np.unique(experts)) > layer.cache.slots:
                self._wrong, self._speculate_on[i] = i, False
            else:
                needed = layer.account(experts)
                if state.lossy is not None:
                    state.lossy.count()
                self._count_predicted(i, needed)
                arrivals = layer.slots.begin(needed)
                if held:
                    state.y = state.unchecked
                    self.stats.speculated += 1
                else:
                    self._wrong, state.experts, state.arrivals = i, experts, arrivals
                    self.stats.wrong += 1
                    self._goes_on = self._goes_on or self._expected(i + 1) >= 1
        layer.record_phase("map", start)
        if self._wrong is not None and not self._goes_on:
            raise _WrongPass

    def _count_predicted(self, i: int, needed: Sequence[int]) -> None:
        """Count how many of the experts predicted for a layer are needed."""
        state = self._states[i]
        if state.predicted:
            self.stats.predicted += len(state.predicted)
            self.stats.predicted_used += len(state.predicted.intersection(needed))
            state.predicted = set()

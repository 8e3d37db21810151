"""Run-ahead decoding: a whole token in one graph, checked afterwards.

To read a router's indices the host must wait for the device, once a layer: on an H100 a layer of
Qwen3.5-397B's shape takes 365 us without that wait and 900 us with it. Here a layer may instead be
*trusted*: its experts are mapped to slots on the device, by a table whose memory the host keeps up
to date, and all trusted layers' indices are checked later. If every expert was in its slot, the
pass was exact. If one was not, the pass has told which experts the token will want in all later
layers; they are read at once, the caches are taken back (rewind.py) and the pass is run again,
layers that were exact standing as they are. Only an exact pass is ever returned.

Which layers are trusted, and whether a pass should go on for the sake of what it tells, is decided
by what was measured (trust.py). The idea is a processor's run-ahead execution (Dundas and Mudge,
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
import numpy as np

from ..bank import numbers
from ..foreign_modules import Strangers
from ..layer import ExpertLayer
from ..refusals import refuse_transforms
from ..slots import Arrivals
from ..split import SORTED_ROWS
from ..thread_guard import Callers
from .cache_snapshot import Undo, remember
from .policy import Trust
from .slot_tables import SlotTables

# After which shares of a pass's layers what was built is sent to the device. It is idle until the
# first group comes, and every group costs the host. 60 layers on an H100, of stock mlx-lm's speed:
# where the device decides, 1.00 in the groups of "trust", 0.95 in thirds, 0.81 all at once; where
# the host decides (the device is done before the next layer is built), 0.79, 0.82 and 0.90.
_SENDS = {
    "trust": (0.07, 0.2, 0.5),
    "at once": (),
    "ask": (1 / 3, 2 / 3),
    "scout": tuple(n / 8 for n in range(1, 8)),
}

_PASSES = 3
"""Passes of a step after which nothing is trusted any more that is not known."""


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


class Astray(Exception):  # noqa: N818, it is no error
    """Ends a pass that is known to be wrong."""


class _Unsuitable(Exception):  # noqa: N818
    """The model calls its layers otherwise than once a pass: it is left alone."""


@dataclass(slots=True)
class _State:
    """What a step knows of one layer.

    Attributes:
        called: in this pass.
        indices, tried: [..., K] and [..., K, D] of this pass, not known to be exact.
        y: [..., K, D], exact.
        experts: [..., K], known for certain while `y` is not.
        arrivals: what of `experts` is on its way; None where they have no slots.
        predicted: experts that a wrong pass chose.
    """

    called: bool = False
    indices: mx.array = field(init=False)
    tried: mx.array | None = None
    y: mx.array | None = None
    experts: np.ndarray | None = None
    arrivals: Arrivals | None = None
    predicted: set[int] = field(default_factory=set)


class RunAhead:
    """Runs the steps of one model.

    Args:
        layers: the model's expert layers, in the order of their calls.
        top_k: the most experts that a layer's token has.
        callers: which threads call the model.
        waited: seconds that were waited for reads so far.
        always: trust every layer whatever was measured.

    Attributes:
        thread: the thread whose step is under way, or None.
        stats: counters.
        trust: what was learned about the layers.
        strangers: finds out who would see a pass that is run twice.
    """

    strangers: Strangers | None = None

    def __init__(
        self,
        layers: Sequence[ExpertLayer],
        top_k: int,
        callers: Callers,
        waited: Callable[[], float],
        always: bool,
    ) -> None:
        self.layers, self.always = list(layers), always
        self.thread: int | None = None
        self.stats, self.trust = RunAheadStats(), Trust(len(self.layers))
        self._rows = (SORTED_ROWS - 1) // top_k  # tokens of a call that counts as decoding
        self._callers, self._waited = callers, waited
        self._lock = threading.RLock()  # a stream may be closed in the middle of its own step
        self._usable, self._overheard = True, False
        self._caches: Callable[[], Any] = lambda: None  # the first of those of the last step
        self._number = {id(x): i for i, x in enumerate(self.layers)}
        self._tables = SlotTables(self.layers)
        # Of the step and the pass under way:
        self._states: list[_State] = []
        self._trusts = np.zeros(len(self.layers), bool)
        self._again = self._masked = self._goes_on = False
        self._due: set[int] = set()  # layers after which to send what was built
        self._unsent: list[int] = []  # trusted layers that the device does not know of
        self._sent: list[tuple[list[int], list[mx.array]]] = []  # and others, not checked
        self._wrong: int | None = None  # the first layer that lacked an expert
        for layer in self.layers:
            layer.use_runner(self)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No step is under way meanwhile."""
        with self._lock:
            yield

    def disown(self) -> None:
        """In a process that was forked: another thread's step is nobody's there."""
        self._usable, self._lock = False, threading.RLock()

    def step(self, call: Callable[[], Any], rows: int, caches: Any) -> Any:
        """Run a forward pass of the model, trusting what it pays to trust.

        Args:
            call: the model's own forward pass.
            rows: tokens of the call.
            caches: the caches that it changes, or None.

        Returns:
            What `call` returns; exact.

        Raises: whatever `call` raises; a step that it raised from has left the caches as they were.
        """
        if self._callers.note():
            with self._lock:  # a step of the first thread ends before anybody else begins
                pass
            return call()
        undo = remember(caches) if self._usable and rows <= self._rows else None
        if undo is None or self._is_overheard(caches):
            return call()
        with self._lock:
            if not self._callers.shared:
                try:
                    return self._step(call, undo)
                except _Unsuitable:
                    self._usable = False
                except ValueError as e:
                    refuse_transforms(e)
                    raise
        return call()

    def _is_overheard(self, caches: Any) -> bool:
        """Would somebody see passes that may be wrong? Found out once for each sequence."""
        first = next(iter(caches or ()), None)
        if first is None or self._caches() is not first:
            self._overheard = self.strangers is not None and self.strangers.any()
            if first is not None:
                self._caches = weakref.ref(first)
        return self._overheard

    def forward(self, layer: ExpertLayer, x: mx.array, indices: mx.array) -> mx.array:
        """A layer's part of the pass under way: x [..., D], indices [..., K] -> [..., K, D]."""
        i = self._number[id(layer)]
        state = self._states[i]
        if state.called:
            raise _Unsuitable
        state.called = True
        if state.y is not None:
            return state.y
        if state.arrivals is not None and state.experts is not None:
            state.y = layer.finish_arrived(x, state.experts, state.arrivals)
            state.arrivals = None
            return state.y
        if not self._trusts[i]:
            self._check()
        if self._trusts[i] or self._wrong is not None:
            return self._try(i, x, indices)
        result = layer.forward_synced(x, indices, predict_next=not self._again)
        state.y = result.output
        self.stats.synced += 1
        self.trust.note([i], result.missed, self._again)
        self._compare(i, result.needed)
        return state.y

    def _step(self, call: Callable[[], Any], undo: Undo) -> Any:
        began, waited = time.perf_counter(), self._waited()
        self._states = [_State() for _ in self.layers]
        self._again = False
        way = "scout" if self.always else self.trust.way
        scout, count = way == "scout", len(self.layers)
        self._due = {round(share * count) - 1 for share in _SENDS[way]}
        trusting = way in ("trust", "at once")
        self._trusts = self._choose() if trusting else np.full(count, scout)
        trusted = int(self._trusts.sum())
        self._masked = scout or self._expected(0) >= 1
        self.thread, self._callers.stepping = threading.get_ident(), True
        try:
            result, passes = self._until_exact(call, undo, scout)
            if trusted:
                self.stats.steps += 1
                self.stats.passes += passes
                self.stats.exact_at_once += passes == 1
            now = time.perf_counter()
            self.trust.timed(now - began, self._waited() - waited, trusted, passes)
            return result
        except BaseException:
            undo()
            self._forget()
            raise
        finally:
            self.thread, self._callers.stepping = None, False
            self._states = []

    def _until_exact(self, call: Callable[[], Any], undo: Undo, scout: bool) -> tuple[Any, int]:
        """What the first exact pass returns, and how many it took."""
        for passes in itertools.count(1):
            self._begin_pass(passes, scout and passes == 1)
            try:
                result = call()
                self._check(result)
                return result, passes
            except Astray:
                undo()
                self._forget()
        raise AssertionError

    def _forget(self) -> None:
        """What a wrong pass has built and nobody looks at: no other thread could evaluate it."""
        for layer, state in zip(self.layers, self._states, strict=True):
            if state.tried is not None and state.tried is not state.y:
                with layer.lock:
                    layer.slots.bank.forget(state.tried)
            state.tried = None

    def _begin_pass(self, number: int, scout: bool) -> None:
        self._again, self._wrong, self._goes_on = number > 1, None, scout or self.always
        self._unsent, self._sent = [], []
        for state in self._states:
            state.called = False
        if self._again:
            self._masked = True
            if number > _PASSES:
                self._trusts[:] = False
            elif not self.always:
                self._trusts &= self._choose()

    def _choose(self) -> np.ndarray:
        """Which layers to trust, bool [layers]; it does not matter for those known to be exact."""
        if not self._again:
            return self.trust.choose(self.trust.lacking)
        known = np.array([s.y is not None or s.arrivals is not None for s in self._states])
        lacking = np.where(known, 0.0, self.trust.lacking_again)
        return self.trust.choose(lacking, again=True)

    def _expected(self, first: int) -> float:
        """How many layers from this one on are likely to lack an expert."""
        if self._again:
            return self.trust.lacking_again * (len(self.layers) - first)
        return float(self.trust.lacking[first:].sum())

    def _try(self, i: int, x: mx.array, indices: mx.array) -> mx.array:
        """Map experts to slots on the device."""
        layer, state = self.layers[i], self._states[i]
        start = time.perf_counter()
        with layer.lock:
            if self._again:
                layer.slots.await_prefetched()
                start = layer.record_phase("wait", start)
            slots, absent = self._tables.of(i)
            start = layer.record_phase("map", start)
            y = layer.switch(x, slots[indices])  # [..., K, D]
            if self._masked:  # what is not there contributes nothing
                y = mx.where(absent[indices][..., None] > 0, 0, y)
            state.indices, state.tried = indices, layer.slots.bank.track_reader(y)
        self._unsent.append(i)
        layer.record_phase("build", start)
        if i in self._due:
            before = len(self._sent)
            self._send()
            self._look(before)
        return y

    def _send(self) -> None:
        """Let the device begin with what was built."""
        if self._unsent:
            indices = [self._states[i].indices for i in self._unsent]
            if len({x.shape for x in indices}) == 1:
                # As one array: where memory moves by pages, looking at each costs 46 us.
                indices = [mx.concatenate(indices)]
            mx.async_eval(indices)
            self._sent.append((self._unsent, indices))
            self._unsent = []

    def _look(self, count: int) -> None:
        """Check the first so many groups of what was sent."""
        groups, self._sent = self._sent[:count], self._sent[count:]
        for group, indices in groups:
            start = time.perf_counter()
            chosen = [numbers(x) for x in indices]
            if len(chosen) < len(group):
                chosen = np.split(chosen[0], len(group))
            start = self.layers[group[0]].record_phase("sync", start)
            if self._all_held(group, chosen):
                self.layers[group[0]].record_phase("map", start)
                continue
            for i, experts in zip(group, chosen, strict=True):
                self._judge(i, experts)

    def _all_held(self, group: list[int], chosen: list[np.ndarray]) -> bool:
        """Account for layers of a pass of one token, if all of them had every expert.

        Args:
            group: their numbers.
            chosen: int [1, ..., K] of each.
        """
        if self._wrong is not None or any(x.size != x.shape[-1] for x in chosen):
            return False
        if not self._tables.all_held(group, chosen):
            return False
        for i, experts in zip(group, chosen, strict=True):
            state = self._states[i]
            if state.predicted:
                self._compare(i, experts.ravel().tolist())
            self.layers[i].hit(experts)
            state.y = state.tried
        self.trust.note(group, False, self._again)
        self.stats.speculated += len(group)
        return True

    def _check(self, result: Any = None) -> None:
        """Check every layer that was trusted so far.

        Args:
            result: of the pass, if it is over: the device goes on with that meanwhile.

        Raises:
            Astray: one of them lacked an expert, and the pass need not go on or is over.
        """
        self._send()
        if isinstance(result, mx.array) and self._wrong is None and self._sent:
            mx.async_eval(result)
        self._look(len(self._sent))
        if self._wrong is not None and (result is not None or not self._goes_on):
            raise Astray

    def _judge(self, i: int, experts: np.ndarray) -> None:
        """See whether a layer that was trusted had every expert: those chosen, [..., K]."""
        layer, state = self.layers[i], self._states[i]
        start = time.perf_counter()
        with layer.lock:
            held = self._tables.held(i, experts)
            self.trust.note([i], not held, self._again)
            if self._wrong is not None:  # a guess, then
                chosen = list(dict.fromkeys(experts.ravel().tolist()))
                state.predicted = set(chosen)
                layer.slots.prefetch(chosen, i - self._wrong)
            elif len(np.unique(experts)) > layer.cache.slots:
                self._wrong, self._trusts[i] = i, False
            else:
                needed = layer.count(experts)
                self._compare(i, needed)
                arrivals = layer.slots.begin(needed)
                if held:
                    state.y = state.tried
                    self.stats.speculated += 1
                else:
                    self._wrong, state.experts, state.arrivals = i, experts, arrivals
                    self.stats.wrong += 1
                    self._goes_on = self._goes_on or self._expected(i + 1) >= 1
        layer.record_phase("map", start)
        if self._wrong is not None and not self._goes_on:
            raise Astray

    def _compare(self, i: int, needed: Sequence[int]) -> None:
        """Hold what was foretold of a layer against what it wants."""
        state = self._states[i]
        if state.predicted:
            self.stats.predicted += len(state.predicted)
            self.stats.predicted_used += len(state.predicted.intersection(needed))
            state.predicted = set()

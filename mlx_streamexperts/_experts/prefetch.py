"""Predicts which experts the next layers will want, and starts reading them.

The residual stream changes little from one layer to the next, so the next layers' routers, applied
to the input of this layer's router, name most of the experts that they will choose (70 to 80 % in
published measurements). The prefetcher calls each of those blocks as it is and stops it when it
reaches its experts (`StopForward`): softmax, sigmoid, bias-corrected and grouped routers all answer
for themselves, and only the router is computed. The answer is evaluated together with the indices
that the layer waits for anyway.

A prediction never affects a result: it only starts reads into spare slots, behind demand reads.
Each layer predicts only while measurements show that its steps are faster for it (`AutoTuner`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .autotune import AutoTuner
from .bank import numbers
from .foreign_modules import ForeignModules
from .layer import ExpertLayer, StopForward, probe

# The norm before the experts, by the names that mlx-lm's models give it, most reliable first.
_NORMS = (
    "pre_feedforward_layernorm_2", "pre_feedforward_layernorm", "post_attention_layernorm",
    "pre_mlp_layernorm", "ffn_norm", "post_attention_norm", "norm", "ln_2",
)  # fmt: skip
_GATES = ("gate", "router", "wg")

# Share of predictions that must come true for one to be read. Nobody is asked at `_NEVER`.
_LIKELY, _NEVER = 0.6, 2.0

_TRIES = 3
"""A block that failed this often in a row is not probed any more."""

SMALL_EXPERT_BYTES = 512 << 10
"""Probing takes half a millisecond of Python per layer; a smaller expert is read sooner."""


class Router:
    """Probes one layer's router: which experts would its block choose?

    Args:
        layer: the layer probed.
        block: the module that calls its experts.
        norm: the norm before the block, or None if it was not found.
    """

    def __init__(self, layer: ExpertLayer, block: nn.Module, norm: nn.Module | None) -> None:
        self.layer, self._block, self._norm = layer, block, norm
        self._gate = next((name for name in _GATES if name in block), None)
        self._foreign = ForeignModules(block, *([norm] if norm is not None else []))
        self._lock = threading.Lock()

    @property
    def observed(self) -> bool:
        """Would foreign code see the probe?"""
        return self._foreign.any()

    def choose(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        """Let the block choose for x [..., D].

        Returns:
            Indices [N, K], and the router's scores for them [N, K] if they are available.

        Raises:
            Exception: any error of a block that cannot be probed.
        """
        x = x.reshape(1, -1, x.shape[-1])  # blocks differ in the shapes that they accept
        with self._lock:
            try:
                return self._choose(x)
            except (AttributeError, TypeError):
                if self._gate is None:
                    raise
                self._gate = None  # not called as a function: do without scores
                return self._choose(x)

    def _choose(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        answers: list[Any] = []
        gate: Any = self._block[self._gate] if self._gate else None

        def overheard(*args: Any, **kwargs: Any) -> Any:
            answer = gate(*args, **kwargs)
            if probe.layer is self.layer:  # another thread may be in an ordinary call of the block
                answers.append(answer)
            return answer

        try:
            probe.layer = self.layer
            if self._gate:
                self._block[self._gate] = overheard
            self._block(x)
        except StopForward as stopped:
            indices = stopped.indices
        else:
            raise ValueError(f"{self.layer.name}: its block did not call it")
        finally:
            probe.layer = None
            if self._gate:
                self._block[self._gate] = gate
        return indices, _scores(answers, indices, self.layer.experts)

    def weight(self, width: int, dtype: mx.Dtype) -> mx.array | None:
        """The norm's effective weight [D], or None."""
        if self._norm is None or isinstance(self._norm, nn.LayerNorm):
            return None
        return self._norm(mx.ones((width,), dtype))  # of root mean square 1: gives the weight


class Precision:
    """Share of one layer's predictions for another that came true, by rank.

    Counts only predicted experts that were not resident.
    """

    def __init__(self) -> None:
        self._right: list[float] = []  # moving averages

    def of(self, rank: int) -> float:
        """The share of predictions of this rank that came true; 1 before the first one."""
        return self._right[rank] if rank < len(self._right) else 1.0

    def note(self, rank: int, right: bool) -> None:
        """Record whether a prediction of this rank came true."""
        while len(self._right) <= rank:
            self._right.append(1.0)
        self._right[rank] += 0.05 * (right - self._right[rank])


class Answer(NamedTuple):
    """One probed layer's answer, not yet evaluated: indices [N, K] and scores [N, K]."""

    target: RouterPrefetcher
    distance: int
    precision: Precision
    indices: mx.array
    scores: mx.array | None


@dataclass
class RouterPrediction:
    """The experts that a layer's successors will probably choose, not yet evaluated.

    Attributes:
        answers: of each successor.
        at_least: precision that a rank must have for its experts to be read.
    """

    answers: list[Answer]
    at_least: float

    @property
    def arrays(self) -> list[mx.array]:
        """Arrays to evaluate together with the layer's own indices."""
        return [a for x in self.answers for a in (x.indices, x.scores) if a is not None]

    def start_reads(self) -> None:
        """Prefetch the experts that are likely and not resident."""
        for target, distance, precision, indices, scores in self.answers:
            layer = target.router.layer
            chosen = numbers(indices).ravel()  # [N*K]
            if scores is not None:
                chosen = chosen[np.argsort(-numbers(scores).ravel())]
            slot_of = layer.cache.slot_of
            ranked = [
                (rank, expert)
                for rank, expert in enumerate(dict.fromkeys(chosen.tolist()))
                if slot_of[expert] < 0
            ]
            target.expect(precision, ranked)
            candidates = [e for rank, e in ranked if precision.of(rank) >= self.at_least]
            if candidates:
                layer.prefetch(candidates, distance)


class RouterPrefetcher:
    """Predicts for one layer's successors, and learns how well others predict for it.

    Args:
        router: the layer's own.
        successors: the prefetchers of the layers that this one predicts for, nearest first.
        always: probe them whatever was measured.

    Attributes:
        tuner: finds out from which precision on prefetching pays here.
    """

    def __init__(
        self, router: Router, successors: Sequence[RouterPrefetcher], always: bool
    ) -> None:
        self.router, self.always = router, always
        self._successors = list(successors)
        self._predecessor: RouterPrefetcher | None = None
        self._expected: list[tuple[Precision, int, int]] = []  # precision, rank, expert
        self._scales: dict[str, mx.array | None] = {}  # by successor
        self._precision = {s.router.layer.name: Precision() for s in successors}
        self._failures = dict.fromkeys(self._precision, 0)  # in a row
        small = router.layer.expert_bytes < SMALL_EXPERT_BYTES
        self.tuner = AutoTuner((_LIKELY, 0.0, _NEVER), _NEVER if small else _LIKELY, turn=4)
        self._began: float | None = None
        for successor in successors[:1]:
            successor._predecessor = self

    @property
    def on(self) -> bool:
        """Does this layer predict at present?"""
        return bool(self._successors) and (self.always or self.tuner.choice < _NEVER)

    def begin_step(self) -> bool:
        """Start timing a step; returns whether to predict in it."""
        self._began = time.perf_counter()
        return self.on

    def predict(self, x: mx.array) -> RouterPrediction | None:
        """Build the choices of the successors' routers for this layer's input x [..., D].

        Returns:
            None if none of them can be probed.

        Raises:
            RuntimeError: a device error of MLX; it says nothing about a block.
        """
        answers = []
        for distance, target in enumerate(self._successors, 1):
            router = target.router
            if router.layer.resident or router.observed:
                continue
            name = router.layer.name
            try:
                scale = self._scale(router, x)
                chosen = router.choose(x if scale is None else x * scale)
            except Exception as e:  # this model's blocks cannot be probed
                if type(e) in (RuntimeError, MemoryError):
                    raise
                self._failures[name] += 1
                if self._failures[name] >= _TRIES:
                    self._successors = [s for s in self._successors if s is not target]
                continue
            self._failures[name], precision = 0, self._precision[name]
            answers.append(Answer(target, distance, precision, *chosen))
        at_least = 0.0 if self.always else self.tuner.choice
        return RouterPrediction(answers, at_least) if answers else None

    def expect(self, precision: Precision, ranked: Sequence[tuple[int, int]]) -> None:
        """Keep experts predicted for this layer until `check`.

        Args:
            precision: learns which of them came true.
            ranked: rank and expert of each.
        """
        self._expected += [(precision, rank, expert) for rank, expert in ranked]

    def check(self, needed: Sequence[int]) -> None:
        """Compare the experts predicted for this layer with those that it needs."""
        if self._expected:
            for precision, rank, expert in self._expected:
                precision.note(rank, expert in needed)
            self._expected.clear()

    def end_step(self) -> None:
        """This layer has its experts: the timed step of the layer before it is over."""
        before = self._predecessor
        if before is not None and before._began is not None:
            before.tuner.record(time.perf_counter() - before._began)
            before._began = None

    def _scale(self, router: Router, x: mx.array) -> mx.array | None:
        """Turns this layer's normed input into the successor's: the ratio of the weights [D]."""
        key = router.layer.name
        if key not in self._scales:
            mine, theirs = (r.weight(x.shape[-1], x.dtype) for r in (self.router, router))
            ratio = None
            if mine is not None and theirs is not None:
                ratio = mx.where(mx.abs(mine) > 1e-3, theirs / mine, 1)
                mx.eval(ratio)
            self._scales[key] = ratio
        return self._scales[key]


def connect(model: nn.Module, layers: Sequence[ExpertLayer], depth: int, always: bool) -> None:
    """Let every layer that a block calls predict for the next `depth` layers of its stack."""
    stacks: dict[str, list[RouterPrefetcher]] = {}  # from the last layer to the first
    for layer in reversed(layers):
        stack, block, norm = _surroundings(model, layer.name)
        if block is not None:
            later = stacks.setdefault(stack, [])
            made = RouterPrefetcher(Router(layer, block, norm), later[: -depth - 1 : -1], always)
            later.append(made)
            layer.use_prefetcher(made)


def _surroundings(model: nn.Module, path: str) -> tuple[str, nn.Module | None, nn.Module | None]:
    """The path of an expert module's stack of decoder layers, the block that calls the experts,
    and the norm before it.
    """
    parts = path.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if not numbers or numbers[-1] + 2 >= len(parts):
        return path, None, None
    node: Any = model
    decoder: Any = None
    for i, part in enumerate(parts[:-1]):
        node = node[int(part)] if isinstance(node, list) else node[part]
        if i == numbers[-1]:
            decoder = node
    norm = next((decoder[n] for n in _NORMS if n in decoder), None)
    return ".".join(parts[: numbers[-1]]), node, norm


def gate_of(model: nn.Module, layer: ExpertLayer) -> nn.Module | None:
    """The router beside a layer's experts; None if it is not where families have it."""
    _, block, _ = _surroundings(model, layer.name)
    gates = [block[name] for name in _GATES if name in block] if block is not None else []
    return gates[0] if gates and isinstance(gates[0], nn.Module) else None


def _scores(answers: list[Any], indices: mx.array, experts: int) -> mx.array | None:
    """The chosen experts' scores in a gate's answer: logits of all experts, or of the chosen."""
    for answer in answers[-1:]:
        arrays = answer if isinstance(answer, tuple) else (answer,)
        for array in arrays:
            if not isinstance(array, mx.array) or array is indices:
                continue
            if not mx.issubdtype(array.dtype, mx.floating):
                continue
            if array.shape == indices.shape:
                return array.astype(mx.float32)
            if array.shape == (*indices.shape[:-1], experts):
                return mx.take_along_axis(array, indices, axis=-1).astype(mx.float32)
    return None

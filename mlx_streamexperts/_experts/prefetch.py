"""Which experts the next layers will want: their own routers, asked early.

A residual stream changes little from one layer to the next, so the next layers' routers applied to
what this layer's router sees choose much of what they will choose (others report 70 to 80 %). Each
layer's block is called as it stands, with its experts standing aside, so that softmax, sigmoid,
bias-corrected and grouped routers all answer for themselves, and only the router is ever computed.
The answer comes with the indices that the layer waits for anyway.

Guesses are never trusted: they only start reads, behind those that a layer waits for, into spare
slots. Each layer looks ahead only while its steps are measured to be faster for it (`Trial`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .autotune import Trial
from .bank import numbers
from .foreign_modules import Strangers

if TYPE_CHECKING:
    from .layer import ExpertLayer

# The norm before the experts, by the names that mlx-lm's models give it, in the order of trust.
_NORMS = (
    "pre_feedforward_layernorm_2", "pre_feedforward_layernorm", "post_attention_layernorm",
    "pre_mlp_layernorm", "ffn_norm", "post_attention_norm", "norm", "ln_2",
)  # fmt: skip
_GATES = ("gate", "router", "wg")

_LIKELY, _NEVER = 0.6, 2.0

_TRIES = 3
"""After so many failures in a row a block is not asked any more."""

SMALL_EXPERT_BYTES = 512 << 10
"""Experts below this are likely to be read faster than it takes to be clever about them."""


class _Asking(threading.local):
    """The layer whose router this thread asks: only here its experts stand aside."""

    layer: ExpertLayer | None = None


asking = _Asking()


class Heard(Exception):  # noqa: N818, it is no error
    """Ends the call of a block that was asked: its experts' turn would be next."""

    def __init__(self, indices: mx.array) -> None:
        self.indices = indices


class Router:
    """A layer's block, asked which experts it would choose.

    Args:
        layer: the layer asked.
        block: the module that calls its experts.
        norm: the norm before the block, or None where it was not found.
    """

    def __init__(self, layer: ExpertLayer, block: nn.Module, norm: nn.Module | None) -> None:
        self.layer, self._block, self._norm = layer, block, norm
        self._gate = next((name for name in _GATES if name in block), None)
        self._strangers = Strangers(block, *([norm] if norm is not None else []))
        self._lock = threading.Lock()

    @property
    def overheard(self) -> bool:
        """Would somebody see that the block is asked?"""
        return self._strangers.any()

    def choose(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        """Let the block choose for x [..., D].

        Returns:
            indices [N, K], and the router's scores for them where they can be had.

        Raises:
            Exception: whatever a block raises that cannot be asked so.
        """
        x = x.reshape(1, -1, x.shape[-1])  # blocks differ in what shapes they accept
        with self._lock:
            try:
                return self._choose(x)
            except (AttributeError, TypeError):
                if self._gate is None:
                    raise
                self._gate = None  # not called as a function: without scores, then
                return self._choose(x)

    def _choose(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        said: list[Any] = []
        gate: Any = self._block[self._gate] if self._gate else None

        def overheard(*args: Any, **kwargs: Any) -> Any:
            answer = gate(*args, **kwargs)
            if asking.layer is self.layer:  # and not another thread, in a call of the block
                said.append(answer)
            return answer

        try:
            asking.layer = self.layer
            if self._gate:
                self._block[self._gate] = overheard
            self._block(x)
        except Heard as heard:
            indices = heard.indices
        else:
            raise ValueError(f"{self.layer.name}: its block did not call it")
        finally:
            asking.layer = None
            if self._gate:
                self._block[self._gate] = gate
        return indices, _scores(said, indices, self.layer.experts)

    def weight(self, width: int, dtype: mx.Dtype) -> mx.array | None:
        """The norm's effective weight, [D], or None."""
        if self._norm is None or isinstance(self._norm, nn.LayerNorm):
            return None
        return self._norm(mx.ones((width,), dtype))  # of root mean square 1: the weight comes out


class Precision:
    """How often a guess that would have to be read comes true, by its rank among the guesses."""

    def __init__(self) -> None:
        self._right: list[float] = []  # moving averages

    def of(self, rank: int) -> float:
        """The share of guesses of this rank that came true; 1 before any did or did not."""
        return self._right[rank] if rank < len(self._right) else 1.0

    def note(self, rank: int, right: bool) -> None:
        """A guess of this rank did or did not come true."""
        while len(self._right) <= rank:
            self._right.append(1.0)
        self._right[rank] += 0.05 * (right - self._right[rank])


class Asked(NamedTuple):
    """One successor's answer, not yet evaluated: indices [N, K] and scores [N, K]."""

    router: Router
    distance: int
    precision: Precision
    indices: mx.array
    scores: mx.array | None


@dataclass
class Guesses:
    """What a layer's successors might want, not yet evaluated."""

    asked: list[Asked]
    at_least: float

    @property
    def arrays(self) -> list[mx.array]:
        """To be evaluated together with the asking layer's indices."""
        return [a for x in self.asked for a in (x.indices, x.scores) if a is not None]

    def read_ahead(self) -> None:
        """Start reading what is not resident and likely enough."""
        for router, distance, precision, indices, scores in self.asked:
            layer = router.layer
            chosen = numbers(indices).ravel()  # [N*K]
            if scores is not None:
                chosen = chosen[np.argsort(-numbers(scores).ravel())]
            slot_of = layer.cache.slot_of
            ranked = [
                (rank, expert)
                for rank, expert in enumerate(dict.fromkeys(chosen.tolist()))
                if slot_of[expert] < 0
            ]
            layer.guessed += [(precision, rank, expert) for rank, expert in ranked]
            candidates = [e for rank, e in ranked if precision.of(rank) >= self.at_least]
            if not candidates:
                continue
            # Another thread may be in a call of that layer: then the guess is late anyway. (Taking
            # the lock only if it is free would let Ctrl-C keep it: `with` alone is whole.)
            if not layer.calling:
                with layer.lock:
                    if not (layer.resident or layer.closed):
                        layer.slots.prefetch(candidates, distance)


class Lookahead:
    """One layer's view of its successors.

    Attributes:
        trial: whether it pays here.
        always: ask whatever the trial says.
    """

    def __init__(self, own: Router, successors: list[Router], always: bool) -> None:
        self._own, self._successors, self.always = own, successors, always
        self._scales: dict[str, mx.array | None] = {}  # by successor
        self._precision = {r.layer.name: Precision() for r in successors}
        self._failures = dict.fromkeys(self._precision, 0)  # in a row
        # What share of guesses must come true to be read; above 1 nobody is asked. Asking takes
        # half a millisecond of Python a layer, in which a small expert is read.
        small = own.layer.expert_bytes < SMALL_EXPERT_BYTES
        self.trial = Trial((_LIKELY, 0.0, _NEVER), _NEVER if small else _LIKELY, turn=4)
        self._began: float | None = None
        for successor in successors[:1]:
            successor.layer.awaited = self

    @property
    def on(self) -> bool:
        """Does this layer look ahead at present?"""
        return bool(self._successors) and (self.always or self.trial.way < _NEVER)

    def ask(self, x: mx.array) -> Guesses | None:
        """Build what the successors would choose for this layer's input x [..., D].

        None where it does not pay.

        Raises:
            RuntimeError: MLX's: a device error is nothing that a block has to do with.
        """
        self._began = time.perf_counter()
        if not self.on:
            return None
        asked = []
        for distance, router in enumerate(self._successors, 1):
            if router.layer.resident or router.overheard:
                continue
            name = router.layer.name
            try:
                scale = self._scale(router, x)
                chosen = router.choose(x if scale is None else x * scale)
            except Exception as e:  # this model's blocks cannot be asked like that
                if type(e) in (RuntimeError, MemoryError):
                    raise
                self._failures[name] += 1
                if self._failures[name] >= _TRIES:
                    self._successors = [r for r in self._successors if r is not router]
                continue
            self._failures[name], precision = 0, self._precision[name]
            asked.append(Asked(router, distance, precision, *chosen))
        at_least = 0.0 if self.always else self.trial.way
        return Guesses(asked, at_least) if asked else None

    def arrived(self) -> None:
        """The next layer has what it needs: a step of the trial is over."""
        if self._began is not None:
            self.trial.note(time.perf_counter() - self._began)
            self._began = None

    def _scale(self, router: Router, x: mx.array) -> mx.array | None:
        """What turns this layer's normed input into the successor's: the ratio of the weights."""
        key = router.layer.name
        if key not in self._scales:
            mine, theirs = (r.weight(x.shape[-1], x.dtype) for r in (self._own, router))
            ratio = None
            if mine is not None and theirs is not None:
                ratio = mx.where(mx.abs(mine) > 1e-3, theirs / mine, 1)
                mx.eval(ratio)
            self._scales[key] = ratio
        return self._scales[key]


def link(model: nn.Module, layers: Sequence[ExpertLayer], depth: int, always: bool) -> None:
    """Let every layer look ahead to the next `depth` expert layers of its stack."""
    routers: list[tuple[str, Router]] = []
    for layer in layers:
        stack, block, norm = _surroundings(model, layer.name)
        if block is not None:
            routers.append((stack, Router(layer, block, norm)))
    for i, (stack, own) in enumerate(routers):
        successors = [r for other, r in routers[i + 1 :] if other == stack][:depth]
        own.layer.ahead = Lookahead(own, successors, always) if successors else None


def _surroundings(model: nn.Module, path: str) -> tuple[str, nn.Module | None, nn.Module | None]:
    """Of an expert module: the path of its stack of decoder layers, the block that calls the
    experts, and the norm before it.
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


def _scores(said: list[Any], indices: mx.array, experts: int) -> mx.array | None:
    """Scores of the chosen experts in what a gate returned: logits of all, or of the chosen."""
    for answer in said[-1:]:
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

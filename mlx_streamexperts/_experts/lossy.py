"""Lossy layers: leave experts out, if the user asked for it (`_cache/lossy.py` has the ways).

A `LossySwitch` stands where an exact run has a `StreamedSwitch`. mlx-lm's blocks call their experts
with indices alone, and multiply the outputs by the router's weights afterwards. So a lossy layer
returns an `Unweighted`, which runs the experts when it is multiplied: only then are the weights
known by which experts are left out and the others scaled up.

This never runs in a model that was loaded without `lossy`, and a family whose weights cannot be
seen is refused by name when it is loaded.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .._cache.lossy import LayerWays, LossyStats, Ways, keep
from .._errors import StreamError, UnsupportedModelError
from .._hooks import intercept
from .bank import numbers
from .layer import ExpertLayer, StopForward, StreamedSwitch, probe
from .prefetch import gate_of

_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "softmax": lambda z: np.exp(z - z.max(-1, keepdims=True)),
    "sigmoid": lambda z: 1 / (1 + np.exp(-z)),
    "square root of softplus": lambda z: np.sqrt(np.logaddexp(0, z)),
}
"""A router's weights by its logits, up to a factor of each token's."""

_AGREES = 0.05  # largest relative difference of weights that come from such a function


class LossyRun:
    """What one model's lossy layers do at present; its layers share it.

    Args:
        stated: the ways that the model was loaded with.

    Attributes:
        stated: those.
        now: the ways in force; None while passes are exact.
        switches: the model's lossy layers, in its order.
    """

    def __init__(self, stated: Ways) -> None:
        self.stated = stated
        self.now: Ways | None = stated
        self.switches: list[LossySwitch] = []
        self.trying = False

    def use(self, ways: Ways | None) -> None:
        """Run later passes with these ways; None for exact ones."""
        if ways == self.now:
            return
        self.now = ways
        for i, switch in enumerate(self.switches):
            switch.use(None if ways is None else ways.of(i))

    def use_level(self, level: int | None) -> None:
        """Run later passes at a level, or as stated; None is as stated too.

        Args:
            level: 0 for exact passes; others as `Ways.allows` says.
        """
        if level is None or level == self.stated.level:
            self.use(self.stated)
        else:
            self.use(Ways.parse(level))

    @contextmanager
    def using(self, ways: Ways | None) -> Iterator[None]:
        """Run the passes of the `with` block with these ways; None for exact ones."""
        before = self.now
        self.use(ways)
        try:
            yield
        finally:
            self.use(before)

    def stats(self) -> LossyStats:
        """Counters since the last `reset`."""
        total = LossyStats()
        for switch in self.switches:
            total.add(switch.stats)
        return total

    def reset(self) -> None:
        """Set every counter to zero."""
        for switch in self.switches:
            switch.stats = LossyStats()

    def wrap(self, layer: ExpertLayer) -> LossySwitch:
        """Make the module that stands for this layer's experts; call it in the model's order.

        Raises:
            UnsupportedModelError: the layer has experts that every token uses.
        """
        if layer.traits.pinned:
            raise unsupported(layer, "its shared expert is one of its routed ones")
        made = LossySwitch(layer, self)
        made.use(self.stated.of(len(self.switches)))
        self.switches.append(made)
        return made

    def try_out(self, model: nn.Module, language: nn.Module) -> None:
        """Build a short pass without running an expert: is every router's weight seen?

        Args:
            model: the whole model; blocks are found in it by their experts' paths.
            language: what takes tokens.

        Raises:
            UnsupportedModelError: names the layer whose router's weights cannot be had.
        """
        if self.stated.prefer:
            for switch in self.switches:
                switch.listen(gate_of(model, switch.layer))
        self.trying = True
        try:
            language(mx.arange(8)[None])
            for switch in self.switches:
                switch.learn()
        except UnsupportedModelError:
            raise
        except Exception as e:
            if type(e) in (RuntimeError, MemoryError):
                raise
            raise unsupported(self.switches[0].layer, f"{type(e).__name__}: {e}") from e
        finally:
            self.trying = False


def unsupported(layer: ExpertLayer, why: str) -> UnsupportedModelError:
    """The refusal of a family whose router's weights cannot be had."""
    return UnsupportedModelError(
        f"{layer.name}: lossy does not work with this model's blocks, because the weights that "
        f"their router gives to experts cannot be had ({why}). Run it exact, without lossy"
    )


class LossySwitch(StreamedSwitch):
    """A `StreamedSwitch` that leaves experts out while its run is lossy.

    Args:
        layer: the layer that runs the experts.
        run: what is in force.

    Attributes:
        stats: what was left out.
    """

    def __init__(self, layer: ExpertLayer, run: LossyRun) -> None:
        super().__init__(layer)
        self.run, self.stats = run, LossyStats()
        self._ways: LayerWays | None = None
        self._gate: Gate | None = None
        self._tried: tuple[mx.array, mx.array] | None = None
        self._score: Callable[[np.ndarray], np.ndarray] | None = None

    def use(self, ways: LayerWays | None) -> None:
        """Run later calls with these ways; None for exact calls."""
        self._ways = ways

    def listen(self, gate: nn.Module | None) -> None:
        """Hear the logits of this router, for `prefer`.

        Raises:
            UnsupportedModelError: there is no such module.
        """
        if gate is None:
            raise unsupported(self.layer, "prefer: its router is not beside its experts")
        self._gate = Gate(gate, self.layer.experts)

    def learn(self) -> None:
        """Find out how the router's weights follow from its logits, after a trial pass.

        Raises:
            UnsupportedModelError: no weights, or no logits, were seen in it.
        """
        tried, self._tried = self._tried, None
        if tried is None:
            raise unsupported(self.layer, "nothing multiplies the experts' outputs")
        if self._gate is None:
            return
        logits = self._gate.heard()
        if logits is None:
            raise unsupported(self.layer, "prefer: its router gives no logits")
        chosen, weights = (numbers(a) for a in tried)
        found = np.take_along_axis(numbers(logits).reshape(len(chosen), -1), chosen, -1)
        weights = weights / np.abs(weights).sum(-1, keepdims=True)
        errors = {}
        for name, score in _SCORES.items():
            theirs = score(found.astype(np.float64))
            theirs /= theirs.sum(-1, keepdims=True)
            errors[name] = float(np.abs(weights / theirs - 1).max())
        best = min(errors, key=lambda name: errors[name])
        if not errors[best] <= _AGREES:
            raise unsupported(
                self.layer, f"prefer: its weights come from logits by none of {', '.join(errors)}"
            )
        self._score = _SCORES[best]

    def __call__(self, x: mx.array, indices: mx.array, weights: mx.array | None = None) -> Any:
        """See `ExpertLayer.__call__`; while lossy, the result still has to be weighted."""
        if self._ways is None or probe.layer is not None:
            if probe.layer is self.layer:
                raise StopForward(indices)
            return super().__call__(x, indices, weights)
        if weights is not None:
            return self._run_given(x, indices, weights)
        return Unweighted(self, x, indices)

    def weighted(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        """Run the experts that stay.

        Args:
            x: [..., D] tokens.
            indices: [..., K].
            weights: [..., K, 1], the router's weights.

        Returns:
            [..., J, D], J at most K: each expert's output times its new weight.
        """
        if weights.shape != (*indices.shape, 1):
            raise unsupported(self.layer, f"weights {weights.shape} of indices {indices.shape}")
        if self.run.trying:
            return self._try(x, indices, weights)
        if (runner := self.layer.runner()) is not None:
            return runner.forward(self.layer, x, indices, None, Weighing(self, weights))
        kept = self.keep(indices, weights[..., 0])
        if kept is None:
            return super().__call__(x, indices) * weights
        return super().__call__(x, kept[0]) * kept[1][..., None]

    def _run_given(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        """The same for a module that multiplies by the weights itself."""
        if self.run.trying:
            return self._try(x, indices, mx.ones_like(weights)[..., None])
        kept = self.keep(indices, weights)
        return super().__call__(x, *(kept or (indices, weights)))

    def keep(self, indices: mx.array, weights: mx.array) -> tuple[mx.array, mx.array] | None:
        """Experts [..., J] that stay and their weights; None if all of [..., K] do.

        Waits for the device, unless nothing can be left out.
        """
        layer, ways = self.layer, self._ways
        assert ways is not None
        if layer.resident and not ways.top:
            self.stats.chosen += indices.size
            self.stats.tokens += indices.size // indices.shape[-1]
            return None
        wide = weights.astype(mx.float32)
        logits = None if self._gate is None else self._gate.heard()
        mx.eval(indices, wide, *(() if logits is None else (logits,)))
        scores = None
        if logits is not None and self._score is not None and ways.prefer:
            scores = self._score(np.array(logits))
        here = layer.cache.slot_of >= 0
        kept = keep(ways, np.array(indices), np.array(wide), here, scores, self.stats)
        if kept is None:
            return None
        new = mx.array(kept.weights).astype(weights.dtype)
        return mx.array(kept.experts.astype(np.uint32)), new

    def ways(self) -> LayerWays:
        """What is in force; only while calls are lossy."""
        assert self._ways is not None
        return self._ways

    def _try(self, x: mx.array, indices: mx.array, weights: mx.array) -> mx.array:
        """Zeros in the place of all experts but one, which a block has to take as well."""
        self._tried = (
            indices.reshape(-1, indices.shape[-1]),
            weights.astype(mx.float32).reshape(-1, indices.shape[-1]),
        )
        return mx.zeros((*indices.shape[:-1], 1, x.shape[-1]), x.dtype) * weights[..., :1, :]


class Weighing:
    """One lossy call within a run-ahead step, which may speculate on it.

    Args:
        switch: the layer's.
        weights: [..., K, 1], the router's.

    Attributes:
        weights: those; after `choose`, [..., J, 1] of the experts that stay.
    """

    def __init__(self, switch: LossySwitch, weights: mx.array) -> None:
        self._switch, self.weights = switch, weights
        self._ways = switch.ways()
        self._left_out = LossyStats()

    def synced(self, indices: mx.array) -> mx.array:
        """Wait for the experts [..., K], and choose; returns those that stay, [..., J]."""
        kept = self._switch.keep(indices, self.weights[..., 0])
        if kept is None:
            return indices
        self.weights = kept[1][..., None]
        return kept[0]

    def on_device(self, y: mx.array, absent: mx.array) -> mx.array:
        """Weight outputs [..., K, D] without those that are absent, or too many.

        That is the layer's result if `choose` finds that no other expert is left out.

        Args:
            y: outputs.
            absent: [..., K], more than 0 where an expert has no slot.
        """
        gone, weights = absent[..., None] > 0, self.weights
        if self._ways.top:
            w = weights[..., 0].astype(mx.float32)
            number = mx.arange(w.shape[-1])
            before = (w[..., None, :] == w[..., None]) & (number < number[:, None])
            rank = ((w[..., None, :] > w[..., None]) | before).sum(-1, keepdims=True)
            gone = gone | (rank >= self._ways.top)
        left = mx.where(gone, 0, weights)  # [..., K, 1]
        total, rest = (a.sum(-2, keepdims=True).astype(mx.float32) for a in (weights, left))
        left = left * (total / mx.maximum(rest, 1e-30)).astype(left.dtype)
        return mx.where(gone, 0, y) * left

    def choose(self, experts: np.ndarray, here: np.ndarray) -> np.ndarray:
        """Choose once the experts [..., K] are known; returns those that stay, [..., J].

        Args:
            experts: int [..., K].
            here: bool [experts], those that had a slot.
        """
        self._left_out = LossyStats()
        wide = numbers(self.weights[..., 0].astype(mx.float32))
        kept = keep(self._ways, experts, wide, here, None, self._left_out)
        if kept is None:
            return experts
        self.weights = mx.array(kept.weights).astype(self.weights.dtype)[..., None]
        return kept.experts

    def count(self) -> None:
        """Count what `choose` left out: the experts were no prediction."""
        self._switch.stats.add(self._left_out)


class Unweighted(mx.array):
    """A lossy layer's output [..., K, D] before it is multiplied by the router's weights.

    It knows nothing but that multiplication, and a block that asks for anything else is refused. It
    is an array only so that Python lets it answer first in `weights * outputs` (Gemma 4); its own
    content is NaN, so that nobody can compute with it unnoticed.
    """

    def __init__(self, switch: LossySwitch, x: mx.array, indices: mx.array) -> None:
        super().__init__(math.nan)
        self._switch, self._x, self._indices = switch, x, indices
        self._wanted: mx.Dtype | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the outputs."""
        return (*self._indices.shape, self._x.shape[-1])

    @property
    def ndim(self) -> int:
        """Of the outputs."""
        return self._indices.ndim + 1

    @property
    def dtype(self) -> mx.Dtype:
        """Of the outputs."""
        return self._wanted or self._x.dtype

    def __mul__(self, weights: Any) -> mx.array:
        y = self._switch.weighted(self._x, self._indices, weights)
        return y if self._wanted is None else y.astype(self._wanted)

    __rmul__ = __mul__

    def astype(self, dtype: mx.Dtype, stream: Any = None) -> Unweighted:
        """The same, to be converted after the multiplication."""
        self._wanted = dtype
        return self

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("_") and name not in ("shape", "ndim", "dtype", "astype"):
            raise unsupported(
                self._switch.layer, f"its block asks for .{name} of the experts' outputs"
            )
        return super().__getattribute__(name)


class Gate:
    """Hears what a router says of all experts.

    Args:
        gate: the module; it keeps doing what it did.
        experts: how many it chooses from.
    """

    def __init__(self, gate: nn.Module, experts: int) -> None:
        self._experts, self._last = experts, threading.local()
        kind: Any = type(gate)

        def call(module: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            answer = kind.__call__(module, x, *args, **kwargs)
            if probe.layer is None:
                self._last.logits = self._logits(module, x, answer)
            return answer

        intercept(gate, call)

    def heard(self) -> mx.array | None:
        """The last logits [..., experts] in this thread, once; None if there were none."""
        logits: mx.array | None = getattr(self._last, "logits", None)
        self._last.logits = None
        return logits

    def _logits(self, gate: nn.Module, x: mx.array, answer: Any) -> mx.array | None:
        """A router that answers with its choice has a row of weights for each expert."""
        if isinstance(answer, mx.array) and answer.shape[-1] == self._experts:
            return answer.astype(mx.float32)
        weight = gate.get("weight")
        if isinstance(weight, mx.array) and weight.shape == (self._experts, x.shape[-1]):
            return x.astype(mx.float32) @ weight.astype(mx.float32).T
        return None


def refuse_lossy(lossy: int | str | None, what: str) -> None:
    """Refuse what works with exact models only.

    Args:
        lossy: the option.
        what: what was asked for, for the message.

    Raises:
        StreamError: the option asks for anything but level 0.
    """
    if Ways.parse(lossy) is not None:
        raise StreamError(f"{what} must be exact: leave lossy={lossy!r} out")


def first_line(ways: Ways) -> str:
    """What a lossy run says before anything else."""
    return (
        f"lossy: {ways}. Results differ from the model's, and depend on which experts are resident"
    )


def last_line(run: LossyRun) -> str:
    """What a lossy run says after everything else."""
    stats = run.stats()
    return (
        f"{run.stated}: left out {stats.share_left_out:.1%} of the experts chosen, with "
        f"{stats.mass_left_out:.2%} of the router's mass; results differ from the model's"
    )

"""Which layers a run-ahead step should trust to hold every expert that it will want.

Pure NumPy. A layer that is trusted saves the host a wait for the device; one that turns out to lack
an expert costs the pass. Both are measured, and how often each layer lacks one is remembered.
"""

from __future__ import annotations

import numpy as np

from .trial import Trial

# Until measured: a layer of a large model on a fast GPU, and what waiting for its indices adds.
_LAYER_SECONDS, _WAIT_SECONDS = 0.4e-3, 0.5e-3

_RATE = 0.05
"""Of the moving averages."""


class Trust:
    """Learns from every step and chooses for the next one.

    Args:
        layers: how many there are.

    Attributes:
        lacking: float [layers], how often each lacked an expert when its turn came.
        lacking_again: the same of layers whose experts a wrong pass had foretold.
    """

    def __init__(self, layers: int) -> None:
        self.lacking = np.ones(layers)
        self.lacking_again = 0.5
        self._seen = np.zeros(layers)
        self._trusting: float | None = None  # seconds a layer in steps that trust nearly all
        self._asking: float | None = None  # and in those that ask nearly all
        self._trial: Trial[bool] = Trial((False, True), False)

    @property
    def scout(self) -> bool:
        """Should a step begin with a pass that is only to tell what the token will want?

        Decided by trial. Makes no sense where little is missing.
        """
        return self._trial.way and float(self.lacking.sum()) >= 1

    @property
    def layer_seconds(self) -> float:
        """A layer's share of a pass that trusts everything."""
        if self._trusting is not None:
            return self._trusting
        return _LAYER_SECONDS if self._asking is None else self._asking / 2

    @property
    def wait_seconds(self) -> float:
        """What asking a layer adds."""
        if self._asking is None:
            return _WAIT_SECONDS
        return max(0.0, self._asking - self.layer_seconds)

    def choose(self, lacking: np.ndarray) -> np.ndarray:
        """The layers to trust: those for which the expected time is least.

        Args:
            lacking: float [N], the probability that each layer lacks an expert.

        Returns:
            bool [N].
        """
        order = np.argsort(lacking)
        # Trusting the n least likely to fail: that all are right, n = 0 to N.
        right = np.concatenate([[1.0], np.cumprod(1 - lacking[order])])  # [N + 1]
        asked = np.arange(len(lacking), -1, -1)
        again = len(self.lacking) * self.layer_seconds  # a pass in vain
        count = int(np.argmin(asked * self.wait_seconds + (1 - right) * again))
        trusted = np.zeros(len(lacking), bool)
        trusted[order[:count]] = True
        return trusted

    def note(self, layer: int, lacked: bool, again: bool) -> None:
        """A layer's turn came; it lacked an expert or did not."""
        if again:
            self.lacking_again += _RATE * (lacked - self.lacking_again)
            return
        self._seen[layer] += 1
        rate = max(_RATE, 1 / self._seen[layer])
        self.lacking[layer] += rate * (lacked - self.lacking[layer])

    def timed(self, seconds: float, waited: float, trusted: int, passes: int) -> None:
        """A step is over.

        Args:
            seconds: it took.
            waited: of those, for reads.
            trusted: layers of its first pass.
            passes: that it took.
        """
        if float(self.lacking.sum()) >= 1:
            self._trial.note(seconds)
        if passes > 1:
            return
        layers = len(self.lacking)
        each = (seconds - waited) / layers
        if trusted >= 0.9 * layers:
            self._trusting = _averaged(self._trusting, each)
        elif trusted <= 0.1 * layers:
            self._asking = _averaged(self._asking, each)


def _averaged(before: float | None, new: float) -> float:
    return new if before is None else before + _RATE * (new - before)

"""Which layers a run-ahead step should trust to hold every expert that it will want.

Pure NumPy. A layer that is trusted saves the host a wait for the device; one that turns out to lack
an expert costs the pass. Both are measured, and how often each layer lacks one is remembered.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

import numpy as np

from ..autotune import Trial

# Until measured: a layer of a large model on a fast GPU, and what waiting for its indices adds.
_LAYER_SECONDS, _WAIT_SECONDS = 0.4e-3, 0.5e-3

# Of the moving averages.
_RATE = 0.05

WAYS = ("trust", "at once", "ask", "scout")
"""Ways to begin a step: trust the layers that it pays to trust, checked in a few groups or all at
once; ask every layer; or trust all of them in a pass that is only to tell what the token will
want, so that it is read in one go.
"""


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
        # Seconds a layer, of steps that trusted nearly all and of those that asked nearly all.
        self._trusting: deque[float] = deque(maxlen=15)
        self._asking: deque[float] = deque(maxlen=15)
        self._trial: Trial[str] = Trial(WAYS, WAYS[0])

    @property
    def way(self) -> str:
        """How to begin the next step, decided by trial; see `WAYS`."""
        if self._trial.way == "scout" and float(self.lacking.sum()) < 1:
            return "trust"  # there is nothing to find out
        return self._trial.way

    @property
    def layer_seconds(self) -> float:
        """A layer's share of a pass that trusts everything."""
        if self._trusting:
            return statistics.median(self._trusting)
        return _LAYER_SECONDS if not self._asking else statistics.median(self._asking) / 2

    @property
    def wait_seconds(self) -> float:
        """What asking a layer adds; no less than a tenth of the layer: few steps tell little."""
        least = 0.1 * self.layer_seconds
        if not self._asking:
            return max(least, _WAIT_SECONDS)
        return max(least, statistics.median(self._asking) - self.layer_seconds)

    def choose(self, lacking: np.ndarray, again: bool = False) -> np.ndarray:
        """The layers to trust: those for which the expected time is least.

        Args:
            lacking: float [layers], the probability that each lacks an expert.
            again: a pass of this step was in vain already.

        Returns:
            bool [layers].
        """
        order = np.argsort(lacking)
        count = int(np.argmin(self._seconds(lacking[order], self.in_vain_seconds(again))))
        trusted = np.zeros(len(lacking), bool)
        trusted[order[:count]] = True
        return trusted

    def in_vain_seconds(self, again: bool) -> float:
        """What a pass costs that turns out to be wrong: itself and what follows.

        Args:
            again: asking every layer follows. Otherwise a second pass, which trusts as it pays.
        """
        layers = len(self.lacking)
        pass_seconds = layers * self.layer_seconds
        if again:
            return pass_seconds + layers * self.wait_seconds
        lacking = np.full(layers, self.lacking_again)
        return pass_seconds + float(self._seconds(lacking, self.in_vain_seconds(True)).min())

    def _seconds(self, lacking: np.ndarray, in_vain: float) -> np.ndarray:
        """Seconds that trusting the first n layers adds to a pass, float [N + 1] for n = 0 to N."""
        right = np.concatenate([[1.0], np.cumprod(1 - lacking)])
        asked = np.arange(len(lacking), -1, -1)
        return asked * self.wait_seconds + (1 - right) * in_vain

    def note(self, layers: Sequence[int], lacked: bool, again: bool) -> None:
        """The turns of these layers came; they lacked an expert or did not.

        Args:
            layers: one, or several of the same outcome.
            again: a wrong pass of this step had foretold their experts.
        """
        if again:
            kept = (1 - _RATE) ** len(layers)
            self.lacking_again = lacked + kept * (self.lacking_again - lacked)
            return
        self._seen[layers] += 1
        rate = np.maximum(_RATE, 1 / self._seen[layers])
        self.lacking[layers] += rate * (lacked - self.lacking[layers])

    def timed(self, seconds: float, waited: float, trusted: int, passes: int) -> None:
        """A step is over.

        Args:
            seconds: it took.
            waited: of those, for reads.
            trusted: layers of its first pass.
            passes: that it took.
        """
        self._trial.note(seconds)
        if passes > 1:
            return
        layers = len(self.lacking)
        each = (seconds - waited) / layers
        if trusted >= 0.9 * layers:
            self._trusting.append(each)
        elif trusted <= 0.1 * layers:
            self._asking.append(each)

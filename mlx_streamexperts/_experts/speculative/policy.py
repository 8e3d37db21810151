"""Decides which layers a run-ahead step speculates on.

Pure NumPy. A step speculates that a layer holds every expert that it will need. If that is right,
the host saves a wait for the device; if a layer lacks an expert, the pass is lost. Both costs are
measured, and so is how often each layer lacks one.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

import numpy as np

from ..autotune import AutoTuner

# Until measured: a layer of a large model on a fast GPU, and the extra cost of waiting for its
# indices.
_LAYER_SECONDS, _WAIT_SECONDS = 0.4e-3, 0.5e-3

_RATE = 0.05  # of the moving averages

STARTS = ("speculate", "at once", "sync", "predict")
"""Ways to start a step.

    speculate   on the layers for which that pays, checked in a few groups
    at once     the same, checked all at once
    sync        wait for every layer's indices
    predict     speculate on every layer in a first pass that only predicts the token's experts, so
                that they are read together
"""


class SpeculationPolicy:
    """Learns from every step and chooses for the next one.

    Args:
        layers: how many there are.

    Attributes:
        lacking: float [layers], how often each lacked an expert when its turn came.
        lacking_again: the same for layers whose experts a wrong pass had predicted.
    """

    def __init__(self, layers: int) -> None:
        self.lacking = np.ones(layers)
        self.lacking_again = 0.5
        self._seen = np.zeros(layers)
        # Seconds per layer, of steps that speculated on nearly all layers or on nearly none.
        self._speculated: deque[float] = deque(maxlen=15)
        self._synced: deque[float] = deque(maxlen=15)
        self._tuner: AutoTuner[str] = AutoTuner(STARTS, STARTS[0])

    @property
    def start(self) -> str:
        """How to start the next step, chosen by measured times; one of `STARTS`."""
        if self._tuner.choice == "predict" and float(self.lacking.sum()) < 1:
            return "speculate"  # there is nothing to find out
        return self._tuner.choice

    @property
    def layer_seconds(self) -> float:
        """A layer's share of a pass that speculates on everything."""
        if self._speculated:
            return statistics.median(self._speculated)
        return _LAYER_SECONDS if not self._synced else statistics.median(self._synced) / 2

    @property
    def wait_seconds(self) -> float:
        """The extra seconds of waiting for a layer's indices.

        At least a tenth of the layer: a few steps do not measure it well.
        """
        least = 0.1 * self.layer_seconds
        if not self._synced:
            return max(least, _WAIT_SECONDS)
        return max(least, statistics.median(self._synced) - self.layer_seconds)

    def choose(self, lacking: np.ndarray, again: bool = False) -> np.ndarray:
        """Choose the layers to speculate on, so that the expected time is least.

        Args:
            lacking: float [layers], the probability that each lacks an expert.
            again: a pass of this step was wrong already.

        Returns:
            bool [layers].
        """
        order = np.argsort(lacking)
        count = int(np.argmin(self._seconds(lacking[order], self.wrong_pass_seconds(again))))
        chosen = np.zeros(len(lacking), bool)
        chosen[order[:count]] = True
        return chosen

    def wrong_pass_seconds(self, again: bool) -> float:
        """The cost of a wrong pass: itself, and the pass that follows.

        Args:
            again: the pass that follows waits for every layer. Otherwise it speculates as it pays.
        """
        layers = len(self.lacking)
        pass_seconds = layers * self.layer_seconds
        if again:
            return pass_seconds + layers * self.wait_seconds
        lacking = np.full(layers, self.lacking_again)
        return pass_seconds + float(self._seconds(lacking, self.wrong_pass_seconds(True)).min())

    def _seconds(self, lacking: np.ndarray, wrong: float) -> np.ndarray:
        """Expected extra seconds of speculating on the first n layers, [N + 1] for n = 0 to N."""
        right = np.concatenate([[1.0], np.cumprod(1 - lacking)])
        synced = np.arange(len(lacking), -1, -1)
        return synced * self.wait_seconds + (1 - right) * wrong

    def record_layers(self, layers: Sequence[int], lacked: bool, again: bool) -> None:
        """Record whether layers lacked an expert when their turn came.

        Args:
            layers: one, or several with the same outcome.
            lacked: that outcome.
            again: a wrong pass of this step had predicted their experts.
        """
        if again:
            kept = (1 - _RATE) ** len(layers)
            self.lacking_again = lacked + kept * (self.lacking_again - lacked)
            return
        self._seen[layers] += 1
        rate = np.maximum(_RATE, 1 / self._seen[layers])
        self.lacking[layers] += rate * (lacked - self.lacking[layers])

    def record_step(self, seconds: float, waited: float, speculated: int, passes: int) -> None:
        """Record a step's time.

        Args:
            seconds: of the step.
            waited: of those, seconds of waiting for reads.
            speculated: layers that its first pass speculated on.
            passes: that it took.
        """
        self._tuner.record(seconds)
        if passes > 1:
            return
        layers = len(self.lacking)
        each = (seconds - waited) / layers
        if speculated >= 0.9 * layers:
            self._speculated.append(each)
        elif speculated <= 0.1 * layers:
            self._synced.append(each)

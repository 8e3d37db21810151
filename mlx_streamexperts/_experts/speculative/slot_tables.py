"""Every layer's expert -> slot table in the device's memory, kept up to date by the host.

The host writes a table only after every graph that was built with it has run, because the device
reads the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..._cache.expert_map import ExpertCache
from ..bank import byte_view
from ..layer import ExpertLayer


class SlotTables:
    """The tables of a model's layers.

    One array holds all of them: a GPU whose memory moves by pages fetches it at once.

    Args:
        layers: the model's expert layers.
    """

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self._layers = layers
        most = max(x.experts for x in layers)
        self._array = mx.zeros((len(layers), 2, most), mx.uint32)  # slot; 1 if it has none
        mx.eval(self._array)
        self._memory = np.frombuffer(byte_view(self._array), np.uint32).reshape(self._array.shape)
        # A copy for the host: if memory moves by pages, reading the device's costs 36 us a layer.
        self._absent = np.ones((len(layers), most), bool)
        self._views = [(self._array[i, 0], self._array[i, 1]) for i in range(len(layers))]
        mx.eval(self._views)  # the same memory
        self._made_of: list[tuple[ExpertCache, int] | None] = [None] * len(layers)
        self._partial = [False] * len(layers)  # some of the map's experts were in flight

    def of(self, i: int) -> tuple[mx.array, mx.array]:
        """A layer's table as of now: its experts' slots, and 1 for each that has none.

        The caller must hold the layer's lock.

        Returns:
            Two arrays, uint32 [experts].
        """
        slots = self._layers[i].slots
        cache = slots.cache
        if self._partial[i] or self._made_of[i] != (cache, cache.version):
            slots.bank.flush_readers()  # graphs that read the table must have run
            here = slots.arrived()  # bool [experts]
            count = len(here)
            self._memory[i, 0, :count] = np.where(here, cache.slot_of, 0)
            self._memory[i, 1, :count] = self._absent[i, :count] = ~here
            self._made_of[i] = (cache, cache.version)
            self._partial[i] = not np.array_equal(here, cache.slot_of >= 0)
        return self._views[i]

    def present(self, i: int) -> np.ndarray:
        """The experts that had a slot when a layer's table was made, bool [experts]."""
        return ~self._absent[i, : self._layers[i].experts]

    def held(self, layers: Sequence[int], chosen: Sequence[np.ndarray]) -> bool:
        """Did the layers' tables name a slot for every chosen expert, and is it still there?

        Args:
            layers: their numbers.
            chosen: int [..., K] of each.
        """
        for i, experts in zip(layers, chosen, strict=True):
            cache = self._layers[i].cache
            if self._made_of[i] != (cache, cache.version) or self._absent[i, experts].any():
                return False
        return True

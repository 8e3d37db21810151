"""Every layer's expert -> slot table in the device's memory, kept up to date by the host.

The host writes where the device reads: only after everything that was built with a table has run.
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

    One array holds all of them: on a GPU whose memory moves by pages it is fetched at once.

    Args:
        layers: the model's expert layers.
    """

    def __init__(self, layers: Sequence[ExpertLayer]) -> None:
        self._layers = layers
        most = max(x.experts for x in layers)
        self._array = mx.zeros((len(layers), 2, most), mx.uint32)  # slot; 1 where there is none
        mx.eval(self._array)
        self._memory = np.frombuffer(byte_view(self._array), np.uint32).reshape(self._array.shape)
        # Looked at here: where memory moves by pages, looking at the device's costs 36 us a layer.
        self._absent = np.ones((len(layers), most), bool)
        self._views = [(self._array[i, 0], self._array[i, 1]) for i in range(len(layers))]
        mx.eval(self._views)  # the same memory
        self._made_of: list[tuple[ExpertCache, int] | None] = [None] * len(layers)
        self._partial = [False] * len(layers)  # some of the map's experts were on their way

    def of(self, i: int) -> tuple[mx.array, mx.array]:
        """A layer's slots and whether they are missing, uint32 [experts] each, as things are now.

        To be called with the layer's lock.
        """
        slots = self._layers[i].slots
        cache = slots.cache
        if self._partial[i] or self._made_of[i] != (cache, cache.version):
            slots.bank.flush_readers()  # whatever was built with the table as it is has run
            here = slots.arrived()  # bool [experts]
            count = len(here)
            self._memory[i, 0, :count] = np.where(here, cache.slot_of, 0)
            self._memory[i, 1, :count] = self._absent[i, :count] = ~here
            self._made_of[i] = (cache, cache.version)
            self._partial[i] = not np.array_equal(here, cache.slot_of >= 0)
        return self._views[i]

    def held(self, i: int, experts: np.ndarray) -> bool:
        """Did a layer's table name the slots of all these, and are they there still?"""
        return self.all_held([i], [experts])

    def all_held(self, layers: Sequence[int], chosen: Sequence[np.ndarray]) -> bool:
        """The same of several layers at once: experts [..., K] of each."""
        for i, experts in zip(layers, chosen, strict=True):
            cache = self._layers[i].cache
            if self._made_of[i] != (cache, cache.version) or self._absent[i, experts].any():
                return False
        return True

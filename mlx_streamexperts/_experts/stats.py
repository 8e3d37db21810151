"""A stream's counters, summed over its layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .._cache.expert_map import CacheStats
from .._cache.lossy import LossyStats
from .._io.reader import ReadStats
from .rows import RowStats
from .slots import PrefetchStats
from .speculative.runahead import RunAheadStats


@dataclass(frozen=True)
class StreamStats:
    """Counters since the last `reset`.

    Attributes:
        cache: hits and misses over all layers.
        read: bytes, reads and seconds of the reader.
        layer_hit_rates: hit rate by layer name, 0 to 1.
        prefetch: outcomes of prefetched experts.
        prefetching_layers: layers that prefetch at present.
        seconds: the caller's seconds in expert layers by phase: `sync` waits for routers' indices
            and includes the device's own work; `map` maps experts to slots and queues reads; `wait`
            waits for reads; `build` builds the graph.
        calls: of expert layers, summed over layers; wholly resident layers count none.
        waves: extra passes of calls that needed more experts than a layer has slots.
        overlapped: calls that ran resident experts while missing ones were read.
        resident_layers: layers whose experts are all in memory; they count no hits.
        run_ahead: outcomes of steps that did not wait for every layer's indices.
        rows: rows of tables that are looked up by token; `read` includes their reads.
        beats: pieces of small work that kept the GPU awake; see the option `keep_awake`.
        given_back: bytes of the planned expert cache that other programs have now; see `pressure`.
        lossy: experts that lossy passes left out; all zero if the model is exact.
    """

    cache: CacheStats
    read: ReadStats
    layer_hit_rates: dict[str, float]
    prefetch: PrefetchStats
    prefetching_layers: int
    seconds: dict[str, float]
    calls: int
    waves: int
    overlapped: int
    resident_layers: int
    run_ahead: RunAheadStats
    rows: RowStats
    beats: int = 0
    given_back: int = 0
    lossy: LossyStats = field(default_factory=LossyStats)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers, for JSON."""
        return {
            **asdict(self),
            "misses": self.cache.misses,
            "hit_rate": self.cache.hit_rate,
        }

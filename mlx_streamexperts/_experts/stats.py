"""A stream's counters, summed over its layers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .._cache.expert_map import CacheStats
from .._cache.lossy import LossyStats
from .._config import format_size
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

    def __str__(self) -> str:
        """The lines that a command prints at its end."""
        return "\n".join(f"{label}: {text}" for label, text in self.lines())

    def lines(self, resident: str = "", waiting: str = "") -> list[tuple[str, str]]:
        """What a summary says about the cache and the reads: labels and texts.

        Args:
            resident: goes after the hit rate, such as " with 25% resident".
            waiting: goes after the seconds that were waited, such as ", 4% of the time".
        """
        if self.layer_hit_rates and self.resident_layers == len(self.layer_hit_rates):
            return [("Experts", "all resident, nothing was streamed")]
        used = (
            f"{self.cache.hit_rate:.1%} hit rate{resident} ({self.cache.compulsory} first uses, "
            f"{self.cache.capacity} misses after eviction)"
        )
        lines = [
            ("Experts", used if self.calls else "none was used: the model was not run"),
            (
                "Read",
                f"{format_size(self.read.bytes)} in {self.read.reads} reads, "
                f"waited {self.read.wait_seconds:.3f} s{waiting}",
            ),
        ]
        if drives := self.read.drive_bytes:
            total = max(1, sum(drives.values()))
            parts = [f"{format_size(n)} ({n / total:.0%}) from {d}" for d, n in drives.items()]
            if self.read.moved:
                parts.append(f"{self.read.moved} reads moved from a drive that failed or hung")
            lines.append(("Drives", ", ".join(parts)))
        if (ran := self.run_ahead).steps:
            lines.append(
                (
                    "Run-ahead",
                    f"saved {ran.speculated} waits for the device, {ran.synced} were left; "
                    f"{ran.exact_at_once} of {ran.steps} steps exact at once, "
                    f"{ran.passes / ran.steps:.2f} passes per step",
                )
            )
        if self.prefetch.issued:
            lines.append(
                (
                    "Prefetch",
                    f"{self.prefetch.issued} experts, {self.cache.prefetched} used "
                    f"({self.prefetch.late} of them late), {self.cache.wasted} wasted, "
                    f"{self.prefetch.cancelled} cancelled; delayed demand reads by "
                    f"{self.read.delay_seconds:.3f} s; {self.prefetching_layers} of "
                    f"{len(self.layer_hit_rates)} layers prefetch",
                )
            )
        if self.beats:
            what = f"by {self.beats} small matmuls while nothing else ran"
            lines.append(("Kept awake", what))
        return lines

    def as_dict(self) -> dict[str, Any]:
        """The same as plain numbers, for JSON."""
        return {
            **asdict(self),
            "misses": self.cache.misses,
            "hit_rate": self.cache.hit_rate,
        }

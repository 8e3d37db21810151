"""A server's figures, for its live page and for Prometheus.

Figures are read when they are asked for; nothing is kept. The Prometheus form needs the `server`
extra (prometheus_client) and a registry of its own, which leaves a host program's alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from .._memory.budget import Plan
from .._osinfo import resident_bytes
from ._generation import GenerationThread
from ._refusals import Refused
from ._request_counters import FIRST_TOKEN_BOUNDS, RequestStats

_PREFIX = "streamexperts_"


def memory_bytes(plan: Plan | None) -> dict[str, int | None]:
    """Memory by kind, in bytes.

    MLX's: `active` now, `peak` so far, `reusable` (freed and kept for reuse). The process's:
    `resident`. The plan's: `budget` (None without one), `trunk`, `expert_cache` and `kv`.
    """
    return {
        "active": mx.get_active_memory(),
        "peak": mx.get_peak_memory(),
        "reusable": mx.get_cache_memory(),
        "resident": resident_bytes(),
        "budget": plan.memory if plan else None,
        "trunk": plan.trunk if plan else 0,
        "expert_cache": plan.cache if plan else 0,
        "kv": plan.kv if plan else 0,
    }


def live(generator: GenerationThread) -> dict[str, Any]:
    """The live page's figures: counters since loading, bytes, seconds.

    The page takes rates from the differences of two readings.
    """
    provider = generator.model_provider
    expert_stream = provider.expert_stream
    plan = expert_stream.plan if expert_stream is not None else None
    answer: dict[str, Any] = {
        "model": next((n for n in provider.listed if provider.is_loaded(n)), None),
        "traffic": asdict(generator.counters.stats()),
        "memory": memory_bytes(plan),
        "prompt": None,
        "prefixes": None,
        "experts": None,
    }
    if (kept := provider.prefixes) is not None:
        names = (
            "read_tokens",
            "read_bytes",
            "read_seconds",
            "written_bytes",
            "write_seconds",
            "evicted",
        )
        answer["prefixes"] = {name: getattr(kept, name) for name in names}
    if (now := generator.progress()) is not None:
        answer["prompt"] = {
            **asdict(now),
            "tokens_per_second": now.tokens_per_second,
            "seconds_left": now.seconds_left,
        }
    if expert_stream is not None:
        stats = expert_stream.stats().as_dict()
        stats["read"]["drive_bytes"] = [*stats["read"]["drive_bytes"].values()]  # no paths
        answer["experts"] = {
            **stats,
            "resident_share": expert_stream.plan.resident_share,
            "layers": [
                {
                    "name": x.name,
                    "resident": x.resident,
                    "hits": x.cache.stats.hits,
                    "needed": x.cache.stats.hits + x.cache.stats.prefetched + x.cache.stats.misses,
                }
                for x in expert_stream.layers
            ],
        }
    return answer


def prometheus(generator: GenerationThread) -> tuple[bytes, str]:
    """The figures in Prometheus's text format, and its content type.

    Raises:
        Refused: prometheus_client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.exposition import CONTENT_TYPE_LATEST
    except ImportError as e:
        raise Refused(501, "/metrics needs prometheus_client: pip install prometheus_client") from e
    registry = CollectorRegistry()
    registry.register(_Collector(generator))
    return generate_latest(registry), CONTENT_TYPE_LATEST


class _Collector:
    """Turns one reading of the figures into metric families."""

    def __init__(self, generator: GenerationThread) -> None:
        self._generator = generator

    def describe(self) -> list[Any]:
        return []  # otherwise registering would collect once

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        def counter(name: str, text: str, value: float | dict[str, float], label: str = "") -> Any:
            return _family(CounterMetricFamily, name, text, value, label)

        def gauge(name: str, text: str, value: float | dict[str, float], label: str = "") -> Any:
            return _family(GaugeMetricFamily, name, text, value, label)

        generator = self._generator
        t = generator.counters.stats()
        yield counter("requests", "Requests by how they ended", {**t.requests}, "outcome")
        yield gauge("requests_active", "Requests being answered or waiting", t.active)
        yield counter("prompt_tokens", "Tokens of prompts", t.prompt_tokens)
        yield counter(
            "prompt_tokens_cached", "Prompt tokens found in the prompt cache", t.cached_tokens
        )
        yield counter("generated_tokens", "Tokens generated", t.tokens)
        yield gauge(
            "generated_tokens_per_second",
            "Tokens per second over the last ten seconds, all clients together",
            t.tokens_per_second,
        )
        now = generator.progress()
        done, total = (now.tokens, now.total or 0) if now else (0, 0)
        tokens: dict[str, float] = {"done": done, "all": total}
        yield gauge("prompt_under_way_tokens", "Tokens of prompts under way", tokens, "kind")
        yield gauge(
            "prompt_under_way_read_bytes",
            "Bytes read since the oldest prompt under way began",
            now.read_bytes if now else 0,
        )
        yield gauge(
            "prompt_under_way_seconds",
            "Seconds since the oldest prompt under way began, and left by the rate so far",
            {"past": now.seconds, "left": now.seconds_left or 0.0} if now else {"past": 0.0},
            "kind",
        )
        yield HistogramMetricFamily(
            _PREFIX + "time_to_first_token_seconds",
            "Time from a request's arrival to its first token",
            buckets=_cumulative(t),
            sum_value=t.first_token_seconds,
        )
        expert_stream = generator.model_provider.expert_stream
        plan = expert_stream.plan if expert_stream is not None else None
        memory = {k: float(v) for k, v in memory_bytes(plan).items() if v is not None}
        yield GaugeMetricFamily(
            "process_resident_memory_bytes", "Resident memory", memory.pop("resident")
        )
        yield gauge("memory_bytes", "MLX's memory and the plan's parts, by kind", memory, "kind")
        if (kept := generator.model_provider.prefixes) is not None:
            yield counter(
                "prefix_read_tokens", "Prompt tokens read from a folder", kept.read_tokens
            )
            yield counter("prefix_read_bytes", "Bytes read for them", kept.read_bytes)
            yield counter("prefix_written_bytes", "Bytes of prompts written", kept.written_bytes)
            yield counter("prefix_evictions", "Prompts deleted to make room", kept.evicted)
        if expert_stream is None:
            return
        s = expert_stream.stats()
        yield gauge(
            "expert_cache_given_back_bytes",
            "Part of the planned expert cache that other programs have while memory is short",
            s.given_back,
        )
        yield gauge(
            "layer_hit_rate",
            "Share of needed experts that were resident",
            s.layer_hit_rates,
            "layer",
        )
        yield gauge("layers_looking_ahead", "Layers that prefetch now", s.prefetching_layers)
        yield counter("expert_hits", "Needed experts that were resident", s.cache.hits)
        yield counter(
            "expert_misses",
            "Needed experts that were not resident: first uses, and uses after eviction",
            {"compulsory": s.cache.compulsory, "capacity": s.cache.capacity},
            "kind",
        )
        yield counter("expert_evictions", "Experts evicted", s.cache.evictions)
        yield counter("read_bytes", "Bytes read into expert memory", s.read.bytes)
        if s.read.drive_bytes:
            yield counter(
                "drive_read_bytes",
                "Bytes read by drive: 0 is the model's own, then its mirrors in their order",
                {str(n): size for n, size in enumerate(s.read.drive_bytes.values())},
                "drive",
            )
            yield counter(
                "reads_moved", "Reads that failed or hung at a drive and went to another",
                s.read.moved,
            )  # fmt: skip
        yield counter("reads", "System calls that read", s.read.reads)
        yield counter(
            "read_seconds", "Time spent reading, summed over threads", s.read.read_seconds
        )
        yield counter("read_wait_seconds", "Time spent waiting for reads", s.read.wait_seconds)
        yield counter("read_errors", "Reads that failed", s.read.errors)
        yield counter(
            "read_ahead",
            "Prefetched experts: issued; used; late (of those used); evicted unused (wasted); "
            "cancelled; failed",
            {
                "issued": s.prefetch.issued,
                "used": s.cache.prefetched,
                "late": s.prefetch.late,
                "wasted": s.cache.wasted,
                "cancelled": s.prefetch.cancelled,
                "failed": s.prefetch.failed,
            },
            "outcome",
        )
        yield counter("read_ahead_bytes", "Bytes prefetched", s.read.speculative_bytes)
        yield counter(
            "read_delay_seconds", "Time demand reads waited behind prefetches", s.read.delay_seconds
        )
        yield counter("lossy_experts_chosen", "Experts chosen in lossy layers", s.lossy.chosen)
        yield counter("lossy_experts_left_out", "Of those, experts left out", s.lossy.left_out)
        yield gauge(
            "lossy_mass_left_out",
            "Share of the router's mass in lossy layers that was left out",
            s.lossy.mass_left_out,
        )
        yield counter("layer_seconds", "Time in expert layers, by phase", {**s.seconds}, "phase")


def _family(kind: Any, name: str, text: str, value: float | dict[str, float], label: str) -> Any:
    if not isinstance(value, dict):
        return kind(_PREFIX + name, text, value=value)
    family = kind(_PREFIX + name, text, labels=[label])
    for key, amount in value.items():
        family.add_metric([key], amount)
    return family


def _cumulative(t: RequestStats) -> list[tuple[str, int]]:
    """Prometheus's buckets: each counts every request below its bound."""
    buckets, total = [], 0
    for bound, count in zip((*FIRST_TOKEN_BOUNDS, "+Inf"), t.first_token, strict=True):
        total += count
        buckets.append((str(bound), total))
    return buckets

"""Method: machine, versions, checkpoint, options and prompts. Nothing in it names a user."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform as host
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._analysis.quality import DATA
from .._experts.stream import ExpertStream, expert_files
from .._io.checkpoint import header_identity, read_checkpoint
from .._io.files import direct_works
from .._osinfo import processor_name, total_memory_bytes
from ._report import Host, Kind, Method, Model, PromptSize, Settings

_PACKAGES = ("mlx-streamexperts", "mlx", "mlx-lm", "numpy", "transformers", "matplotlib")


class Prompt(Kind):
    tokens: list[int]  # of the model's own tokenizer


def report_prompts(tokenizer: Any, count: int | None = None) -> list[Prompt]:
    """The shipped prompts, at most `count` of them, spread over tasks and languages."""
    texts = json.loads((DATA / "report-prompts.json").read_text())
    if count is not None:
        count = max(1, min(count, len(texts)))
        texts = [texts[i * len(texts) // count] for i in range(count)]
    return [Prompt(t["task"], t["language"], tokenizer.encode(t["text"])) for t in texts]


def method(
    folder: Path, name: str, expert_stream: ExpertStream, settings: Settings,
    prompts: list[Prompt], load: float | None,
) -> Method:  # fmt: skip
    """How a report is made; `name` is the model's on the page, `load` of before the run."""
    bypass, device = expert_stream.bypasses_page_cache, mx.device_info().items()
    cached = "in use and warm after the first passes: misses are mostly served from memory"
    if not bypass and direct_works(Path(expert_files(expert_stream.layers)[0])):
        cached += " (--bypass-page-cache on measures the drive)"
    return Method(
        machine=Host(
            system=f"{host.system()} {host.release()}",
            architecture=host.machine(),
            processor=processor_name(),
            cores=os.cpu_count() or 0,
            memory_bytes=total_memory_bytes(),
            mlx_device=str(mx.default_device()),
            device={k: v for k, v in device if isinstance(v, (int, str)) and k != "uuid"},
        ),
        load_average=load,
        versions=_versions(),
        model=_model(folder, name, expert_stream),
        options=_options(expert_stream),
        resident_share=expert_stream.plan.resident_share,
        cache_bytes=expert_stream.plan.cache,
        page_cache="bypassed: every miss goes to the drive" if bypass else cached,
        bypasses_page_cache=bypass,
        settings=settings,
        prompts=[PromptSize(p.task, p.language, len(p.tokens)) for p in prompts],
        sampling="greedy",
        warm_up="every prompt, length and batch once, untimed",
    )


def load_average() -> float | None:
    """Runnable threads over the last minute; None if the system does not say."""
    with suppress(OSError):
        return os.getloadavg()[0]
    return None


def _versions() -> dict[str, str]:
    found = {"python": host.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _model(folder: Path, name: str, expert_stream: ExpertStream) -> Model:
    """A checkpoint's sizes and identity, without reading its weights."""
    shards = sorted({t.file for t in read_checkpoint(folder).tensors.values()})
    identity = {
        "config": json.loads((folder / "config.json").read_text()),
        "shards": {f.name: header_identity(f) for f in shards},
    }
    plan, layers = expert_stream.plan, expert_stream.layers
    return Model(
        name=name,
        model_type=plan.model_type,
        sha256=hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest(),
        bytes=plan.disk,
        expert_layers=len(layers),
        experts=max(plan.layer_experts),
        top_k=plan.top_k,
        expert_bytes=max(x.expert_bytes for x in layers),
        experts_bytes=plan.experts,
        trunk_bytes=plan.trunk,
        cold_bytes_per_token=plan.cold_bytes_per_token,
    )


def _options(expert_stream: ExpertStream) -> dict[str, Any]:
    """Every option, without a user's paths."""
    options = asdict(expert_stream.config)
    options |= {name: bool(options[name]) for name in ("store", "hot_set")}
    del options["about"]
    return options

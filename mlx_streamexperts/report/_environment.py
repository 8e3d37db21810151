"""What a report was made on and with: machine, versions, checkpoint. Nothing that names a user."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform as host
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from .._experts.stream import ExpertStream, expert_files
from .._io.checkpoint import header_identity, read_checkpoint
from .._io.files import direct_works
from .._osinfo import processor_name, total_memory_bytes

_PACKAGES = ("mlx-streamexperts", "mlx", "mlx-lm", "numpy", "transformers", "matplotlib")


def machine() -> dict[str, Any]:
    """Hardware and operating system."""
    device = {
        k: v for k, v in mx.device_info().items() if isinstance(v, (int, str)) and k != "uuid"
    }
    return {
        "system": f"{host.system()} {host.release()}",
        "architecture": host.machine(),
        "processor": processor_name(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": total_memory_bytes(),
        "mlx_device": str(mx.default_device()),
        "device": device,
    }


def load_average() -> float | None:
    """Of the last minute: how many threads wanted to run. None where the system does not say."""
    try:
        return os.getloadavg()[0]
    except OSError:
        return None


def versions() -> dict[str, str]:
    """Python and the libraries that decide a result."""
    found = {"python": host.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def checkpoint(folder: Path, name: str, expert_stream: ExpertStream) -> dict[str, Any]:
    """What tells a checkpoint from others, without reading its weights.

    `sha256` is of the configuration and of every shard's name, size and header: two fine-tunes of
    one model may share the latter.
    """
    shards = sorted({entry.file for entry in read_checkpoint(folder).tensors.values()})
    identity = {
        "config": json.loads((folder / "config.json").read_text()),
        "shards": {f.name: header_identity(f) for f in shards},
    }
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    plan, layers = expert_stream.plan, expert_stream.layers
    return {
        "name": name,
        "model_type": plan.model_type,
        "sha256": digest,
        "bytes": plan.disk,
        "expert_layers": len(layers),
        "experts": max(plan.layer_experts),
        "top_k": plan.top_k,
        "expert_bytes": max(x.expert_bytes for x in layers),
        "experts_bytes": plan.experts,
        "trunk_bytes": plan.trunk,
        "cold_bytes_per_token": plan.cold_bytes_per_token,
    }


def page_cache(expert_stream: ExpertStream) -> str:
    """How reads go by the page cache, for people."""
    if expert_stream.bypasses_page_cache:
        return "bypassed: every miss goes to the drive"
    files: Sequence[str] = expert_files(expert_stream.layers)
    can = direct_works(Path(files[0]))
    return "in use and warm after the first passes: misses are mostly served from memory" + (
        " (--bypass-page-cache on measures the drive)" if can else ""
    )

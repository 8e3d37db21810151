"""The model, machine and budget that settings were tuned for, and a warning if they are others now.

The notes go into `StreamConfig.about` and with it into a settings file. They never stop a load and
never change an option: settings that were tuned elsewhere may be slow, but not wrong.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from .._config import StreamConfig, parse_size
from .._distributed.ranks import libraries
from .._experts.hot_set import identity
from .._experts.layer import ExpertLayer
from .._osinfo import total_memory_bytes


def tuned_for(layers: Sequence[ExpertLayer], config: StreamConfig) -> dict[str, Any]:
    """Notes on a model, this machine, a budget and versions, without a user's or a host's name.

    Raises:
        CheckpointError: a file of experts cannot be read.
    """
    device = mx.default_device()
    info = mx.device_info() if device == mx.gpu else {}
    return {
        "experts": identity(layers),
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "memory": total_memory_bytes(),
            "device": str(info.get("device_name") or device),
        },
        "budget": {
            name: None if (size := getattr(config, name)) is None else parse_size(size)
            for name in ("memory", "cache")
        },
        "libraries": libraries(),
    }


def warn_if_elsewhere(layers: Sequence[ExpertLayer], config: StreamConfig) -> None:
    """Warn if `config` comes from a settings file for another model, machine or budget.

    Raises:
        CheckpointError: a file of experts cannot be read.
    """
    if not config.about:
        return
    found, about = [], config.about
    for part, here in tuned_for(layers, config).items():
        there = about.get(part)
        if part == "experts" and there not in (None, here):
            found.append(f"for another model, {about.get('model')}")
        if isinstance(here, dict) and isinstance(there, dict):
            for key, value in here.items():
                if there.get(key) not in (None, value):
                    found.append(f"{part} {key}: {there[key]}, here {value}")
    if found:
        warnings.warn(
            f"these settings were tuned elsewhere ({'; '.join(found)}). They change no result, but "
            "may be slower than the defaults: tune again, or load without them",
            stacklevel=2,
        )

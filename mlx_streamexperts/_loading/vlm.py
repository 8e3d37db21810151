"""Loads models through mlx-vlm, which has families that mlx-lm lacks, and pictures for others.

mlx-vlm has a loader, expert modules and caches of its own. Its `load_model` runs lazily here, with
a record of where its arrays come from; nothing of it is changed otherwise. mlx-vlm is optional:
this module imports it only in functions.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .._errors import CheckpointError, StreamError
from .._hooks import swapped_in_thread
from .._io.checkpoint import MOVED, shard_files
from .._io.files import allow_open
from .lazy_load import LoadRecord, recording_stacks

# Expert modules that compute every (token, expert) row on its own, from their switch linears alone.
_SWITCHES = (
    ("switch_layers", "SwitchGLU"),
    ("switch_layers", "SwitchMLP"),
    ("hy_v4.fused_switch_glu", "FusedSwitchGLU"),
    ("laguna.language", "LagunaPackedSwitchGLU"),
    ("minimax_m3_vl.language", "MiniMaxPackedSwitchGLU"),
    ("diffusion_gemma.language", "Experts"),
)
_PROJECTIONS = (("switch_layers", "SwitchLinear"), ("switch_layers", "QuantizedSwitchLinear"))
Classes = tuple[type[nn.Module], ...]


@cache
def expert_classes() -> tuple[Classes, Classes]:
    """mlx-vlm's expert modules, and the switch linears that they own."""
    return tuple(_class(*n) for n in _SWITCHES), tuple(_class(*n) for n in _PROJECTIONS)


def _class(module: str, name: str) -> type[nn.Module]:
    kind: type[nn.Module] = getattr(importlib.import_module(f"mlx_vlm.models.{module}"), name)
    return kind


def load_recorded(
    load: Callable[..., nn.Module], folder: Path, arguments: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any], LoadRecord]:
    """Run mlx-vlm's `load_model` lazily and record where its arrays come from.

    Args:
        load: mlx-vlm's own `load_model`.
        folder: the model folder.
        arguments: further arguments of `load_model`.

    Raises:
        CheckpointError: mlx-vlm cannot load the checkpoint.
        StreamError: the checkpoint has more files than this process may open.
    """
    allow_open(len(shard_files(folder)), str(folder))  # MLX holds each open until it is read
    utils: Any = importlib.import_module("mlx_vlm.utils")
    record = LoadRecord()
    files: dict[str, list[str]] = {}  # names in each shard

    def load_shard(path: str) -> dict[str, mx.array]:
        moved = Path(path).name == MOVED  # a note without tensors
        weights: dict[str, mx.array] = {} if moved else load_original(path)
        files[path] = list(weights)
        record.stored.update(weights)
        return weights

    load_original = utils._load_safetensors
    try:
        with (
            swapped_in_thread(utils, _load_safetensors=load_shard),
            recording_stacks(record),
        ):
            model = load(folder, lazy=True, **arguments)
    except StreamError:
        raise
    except Exception as e:  # config.json may hold anything, and mlx-vlm trusts it
        reason = f"{type(e).__name__}: {e}"[:2000]
        raise CheckpointError(f"{folder}: mlx-vlm cannot load this checkpoint: {reason}") from e

    def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        made: list[dict[str, mx.array]] = []
        with swapped_in_thread(
            utils,
            _load_safetensors=lambda path: {name: weights[name] for name in files[path]},
            load_model_weights=lambda model, config, weights, *_, **__: made.append(weights),
        ):
            load(folder, lazy=True, **arguments)
        return made[0]

    record.sanitize = sanitize
    language = getattr(model, "language_model", None)
    record.language = language if isinstance(language, nn.Module) else model
    record.switches, record.projections = expert_classes()
    return model, utils.load_config(folder), record

"""Chooses the library that loads a model folder: mlx-lm or mlx-vlm.

No weight is read, and no model file that a checkpoint brings is run here.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import mlx_lm.utils

from .._config import StreamConfig
from .._errors import StreamError, UnsupportedModelError
from .._hooks import random_state_kept
from .._io.checkpoint import (
    check_model_folder,
    is_shard,
    is_weights,
    read_checkpoint,
    read_index,
    read_model_config,
)
from .._io.moved import read_moved
from . import vlm
from .lazy_load import MLX_LM, MLX_VLM, load_recorded


def library(folder: Path, config: StreamConfig) -> str:
    """The library that loads this model: `config.loader`, or the one that can.

    What both libraries can load goes to mlx-lm, but for a model whose experts mlx-vlm has moved
    into a packed store: the layers there have its names. mlx-lm cannot load shards that have other
    names than `model*.safetensors`.

    Args:
        folder: the model folder; the headers of its weights are enough.
        config: the options.

    Returns:
        `MLX_LM` or `MLX_VLM`.

    Raises:
        CheckpointError: the files are damaged or incomplete.
    """
    if config.loader != "auto":
        return config.loader
    check_model_folder(folder)
    moved = read_moved(folder)
    if moved is not None and moved.loader in (MLX_LM, MLX_VLM):
        return moved.loader
    model_config = read_model_config(folder)
    if "model_file" in model_config:  # both would run it; mlx-lm asks for permission first
        return MLX_LM
    installed = importlib.util.find_spec("mlx_vlm") is not None
    try:
        _, arguments = mlx_lm.utils._get_classes(model_config)
    except ValueError:  # no such family
        return MLX_VLM
    except Exception:  # config.json may hold anything: mlx-lm's loader will say what is wrong
        return MLX_LM
    try:
        arguments.from_dict(model_config)
    except ValueError:  # DeepSeek V4.1 with engram, for example: mlx-lm has only the rest
        return MLX_VLM if installed else MLX_LM
    except Exception:
        return MLX_LM
    if installed and _has_other_shards(folder) and _mlx_vlm_has(folder):
        return MLX_VLM
    # mlx-vlm's conversions have this prefix. mlx-lm knows it in the families that mlx-vlm has
    # with a vision tower, but not all of those have the same tensors.
    prefixed = any("language_model." in name for name in read_checkpoint(folder).tensors)
    if prefixed and installed:
        try:
            with random_state_kept():
                load_recorded(folder, {})
        except StreamError:
            return MLX_VLM
    return MLX_LM


def _has_other_shards(folder: Path) -> bool:
    """Are there shards, here or in the index, and none with a name that mlx-lm reads?"""
    names = {f.name for f in folder.iterdir()} | set(read_index(folder).values())
    shards = [name for name in names if is_weights(name)]
    return bool(shards) and not any(is_shard(name) for name in shards)


def _mlx_vlm_has(folder: Path) -> bool:
    """Does mlx-vlm, which is installed, have this model's family?"""
    kind = vlm.require(folder).get_model_type(read_model_config(folder))
    return importlib.util.find_spec(f"mlx_vlm.models.{kind}") is not None


def require_mlx_lm(folder: str | Path, config: StreamConfig, what: str, instead: str) -> None:
    """Refuse models that load through mlx-vlm.

    Args:
        folder: the model folder.
        config: the options.
        what: what works with models of mlx-lm only.
        instead: a sentence that says what to do instead.

    Raises:
        UnsupportedModelError: the model loads through mlx-vlm.
        CheckpointError: the files are damaged or incomplete.
    """
    if library(Path(folder), config) == MLX_VLM:
        raise UnsupportedModelError(
            f"{folder}: {what} works with models of mlx-lm only, and this one loads through "
            f"mlx-vlm. {instead}"
        )

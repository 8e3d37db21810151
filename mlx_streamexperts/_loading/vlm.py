"""Loads models through mlx-vlm, which has families that mlx-lm lacks, and pictures for others.

mlx-vlm has a loader, expert modules and caches of its own. Its `load_model` runs lazily here, with
a record of where its arrays come from; nothing of it is changed otherwise. mlx-vlm is optional:
this module imports it only in functions.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from .._errors import CheckpointError, StreamError, UnsupportedModelError
from .._experts.layer import Traits
from .._hooks import intercept, swapped_in_thread
from .._io.checkpoint import (
    MOVED,
    Checkpoint,
    add_shard,
    read_checkpoint,
    read_model_config,
)
from .._io.files import allow_open
from .lazy_load import MLX_VLM, LoadRecord, recording_stacks

# Expert modules that compute every (token, expert) row on its own, from their switch linears alone.
_SWITCHES = (
    ("switch_layers", "SwitchGLU"),
    ("switch_layers", "SwitchMLP"),
    ("deepseek_v41.language", "DeepseekV41SwitchGLU"),
    ("hy_v4.fused_switch_glu", "FusedSwitchGLU"),
    ("laguna.language", "LagunaPackedSwitchGLU"),
    ("minimax_m3_vl.language", "MiniMaxPackedSwitchGLU"),
    ("diffusion_gemma.language", "Experts"),
    ("inkling.language", "InklingSwitchGLU"),
    ("openai_privacy_filter.openai_privacy_filter", "Experts"),
)
_PROJECTIONS = (
    ("mlx_vlm.models.switch_layers", "SwitchLinear"),
    ("mlx_vlm.models.switch_layers", "QuantizedSwitchLinear"),
    ("mlx_vlm.quantization.nvfp4", "ScaledQuantizedSwitchLinear"),
)
_OFFLOADED = "offload_index.json"  # mlx_vlm.moe_offload writes it
_JOINED = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
Classes = tuple[type[nn.Module], ...]


@cache
def expert_classes() -> tuple[Classes, Classes]:
    """mlx-vlm's expert modules, and the switch linears that they own."""
    switches = tuple(_class(f"mlx_vlm.models.{module}", name) for module, name in _SWITCHES)
    return switches, tuple(_class(*names) for names in _PROJECTIONS)


def _class(module: str, name: str) -> type[nn.Module]:
    kind: type[nn.Module] = getattr(importlib.import_module(module), name)
    return kind


def refuse_drafters(model: nn.Module) -> None:
    """Refuse a model of mlx-vlm that only drafts for others, if it has experts.

    Raises:
        UnsupportedModelError: it has.
    """
    if not type(model).__module__.startswith("mlx_vlm.speculative.drafters."):
        return
    _, projections = expert_classes()
    for path, module in model.named_modules():
        if isinstance(module, projections):
            raise UnsupportedModelError(
                f"{type(model).__module__.split('.')[3]}: this draft model has experts of its own "
                f"({path}), which mlx-vlm would load in whole: generate without a draft model"
            )


def require(folder: Path) -> Any:
    """The module `mlx_vlm.utils`, for this model.

    Raises:
        StreamError: mlx-vlm is not installed.
    """
    try:
        return importlib.import_module("mlx_vlm.utils")
    except ModuleNotFoundError as e:
        if (e.name or "").partition(".")[0] != "mlx_vlm":
            raise
        raise StreamError(
            f"{folder}: this mlx-lm has no family {read_model_config(folder).get('model_type')!r}, "
            "or not all of it. mlx-vlm may have it: pip install 'mlx-vlm>=0.7.8,<0.8'"
        ) from e


@cache
def original_load_model() -> Callable[..., nn.Module]:
    """mlx-vlm's own `load_model`, which patching.py asks for before it replaces that.

    `mlx_vlm.utils` must be imported: an import here could wait for ever.
    """
    load: Callable[..., nn.Module] = sys.modules["mlx_vlm.utils"].load_model
    return load


def _refuse_drafts(language: nn.Module, folder: Path) -> None:
    """Let Gemma 4's check of drafts raise: mlx-vlm 0.7.10 leaves the experts out of it."""
    kind: Any = type(language)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("speculative_verify"):
            raise UnsupportedModelError(
                f"{folder}: mlx-vlm's check of a draft (exact_speculative_verify in config.json) "
                "computes this model without its experts: generate without a draft model"
            )
        return kind.__call__(self, *args, **kwargs)

    intercept(language, call)


def traits(switch: nn.Module) -> Traits:
    """What sets an expert module of mlx-vlm apart.

    - `SwitchGLU` runs a few tokens one by one, with the kernels of decoding.
    - Inkling's has two scales for each expert beside its projections, unless all are 1. It finds
      that out once, from the whole tables: a few numbers are evaluated here.
    - MiniMax M3's has the shared expert in its last row.
    """
    kind = type(switch).__name__
    if kind == "SwitchGLU":
        linear = importlib.import_module("mlx_vlm.models.linear")
        return Traits(tokenwise=linear.tokenwise, most=linear.DECODE_BLOCK_SIZE)
    if kind == "InklingSwitchGLU" and not cast(Any, switch).scales_trivial():
        own = tuple(name for name, value in switch.items() if isinstance(value, mx.array))
        return Traits(own_tables=own)
    if kind == "MiniMaxPackedSwitchGLU":
        return Traits(pinned=(switch["down_proj"].weight.shape[0] - 1,))
    return Traits()


def decode_copies(model: nn.Module) -> int:
    """Bytes of the second copies of weights that a model makes when it decodes its first token.

    mlx-vlm joins the four projections of linear attention that have the same form
    (`_decode_quantized_linears_fused` in speculative/ops/linear.py, 0.7.10), in models that decode
    by `_batch_invariant_decode`: qwen4_exp, if its output matrix is of a form for that.
    """
    modules = [m for _, m in model.named_modules()]
    decides = (getattr(m, "_supports_batch_invariant_decode", None) for m in modules)
    if not any(supports() for supports in decides if supports is not None):
        return 0
    total = 0
    for m in modules:
        joined = [m.get(name) for name in _JOINED]
        if all(isinstance(p, nn.QuantizedLinear) and p.get("biases") is not None for p in joined):
            forms = {(p.bits, p.group_size, p.mode) for p in joined if p is not None}
            if len(forms) == 1:
                total += sum(a.nbytes for p in joined if p is not None for a in p.values())
    return total


def load_recorded(
    folder: Path, arguments: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any], LoadRecord]:
    """Run mlx-vlm's `load_model` lazily and record where its arrays come from.

    Args:
        folder: the model folder.
        arguments: further arguments of `load_model`.

    Raises:
        CheckpointError: mlx-vlm cannot load the checkpoint, or a file is damaged or not in its
            folder.
        UnsupportedModelError: the checkpoint brings model code, and `arguments` do not trust it, or
            mlx-vlm's own offloading has written it.
        StreamError: mlx-vlm is not installed, or the checkpoint has more files than this process
            may open.
    """
    utils = require(folder)
    load = original_load_model()
    if (folder / _OFFLOADED).exists():
        raise UnsupportedModelError(
            f"{folder}: mlx-vlm's own offloading has taken this model apart (mlx_vlm.moe_offload): "
            "stream the folder that it was made from"
        )
    count = sum(1 for _ in folder.glob("*.safetensors"))
    if not count:
        read_checkpoint(folder)  # says what is missing
    allow_open(count, str(folder))  # MLX holds each open until it is read
    # mlx-vlm runs such a file without asking; so would `doctor`, on whatever it is shown.
    file = read_model_config(folder).get("model_file")
    if file is not None and not arguments.get("trust_remote_code"):
        raise UnsupportedModelError(
            f"{folder}: its config.json names model code to run, {file}. If you trust it, pass "
            "trust_remote_code=True (--trust-remote-code)"
        )
    checkpoint = Checkpoint(folder, {})
    record = LoadRecord(library=MLX_VLM, checkpoint=checkpoint)
    files: dict[str, list[str]] = {}  # names in each shard

    def load_shard(path: str) -> dict[str, mx.array]:
        weights: dict[str, mx.array] = {}
        if Path(path).name != MOVED:  # a note without tensors
            if not Path(path).parent.samefile(folder):  # what is packed must be the model's own
                raise CheckpointError(
                    f"{folder}: mlx-vlm reads {path}, which is not in this folder"
                )
            add_shard(checkpoint.tensors, folder, Path(path))
            weights = load_original(path)
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
    if getattr(getattr(record.language, "config", None), "exact_speculative_verify", False):
        _refuse_drafts(record.language, folder)
    record.switches, record.projections = expert_classes()
    record.traits = traits
    return model, utils.load_config(folder), record

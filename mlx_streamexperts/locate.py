"""Find a model's expert layers and tie their tables to bytes on disk.

A module's weights are tied to bytes by identity, not by name: the arrays that mlx-lm hands to the
model's `sanitize` are remembered, and an expert table is streamed only if the array that ends up in
the module is one of them, untouched. A table that mlx-lm computes from others (stacked, split,
scaled) is refused rather than guessed at. Nothing is evaluated here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from mlx_lm.models.switch_layers import (
    QuantizedSwitchLinear,
    SwitchGLU,
    SwitchLinear,
    SwitchMLP,
)

from .bank import SlotTensor
from .checkpoint import Checkpoint, TensorEntry, read_checkpoint
from .config import StreamConfig
from .errors import CheckpointError, UnsupportedModelError
from .layer import ExpertLayer, ExpertTensor
from .planner import Plan, Sizes, divide, text_config
from .store import use_store
from .stream import flatten, layer_needs

# Looked up before anything can be patched.
original_load_model = mlx_lm.utils.load_model

_SWITCHES = (SwitchGLU, SwitchMLP)
_PROJECTIONS = (SwitchLinear, QuantizedSwitchLinear)


@dataclass(frozen=True)
class Prepared:
    """A lazily loaded model, nothing evaluated, and what streaming it needs."""

    model: nn.Module
    model_config: dict[str, Any]
    layers: list[ExpertLayer]
    plan: Plan


def prepare(folder: Path, config: StreamConfig, arguments: dict[str, Any]) -> Prepared:
    """Check the checkpoint, build the model without evaluating it, and divide the budget."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder / 'config.json'} is missing: not a model folder")
    checkpoint = read_checkpoint(folder)
    as_stored: dict[str, mx.array] = {}
    arguments = dict(arguments)
    get_classes = arguments.pop("get_model_classes", mlx_lm.utils._get_classes)
    arguments["get_model_classes"] = lambda config: _remembering(get_classes(config), as_stored)
    try:
        overrides, custom = _custom_classes(folder, arguments)
        if custom is not None:
            arguments["model_config"] = overrides
            arguments["get_model_classes"] = lambda config: _remembering(custom, as_stored)
        model, model_config = original_load_model(folder, True, **arguments)
    except (ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{folder}: mlx-lm cannot load this checkpoint: {e}") from e
    layers = _find_layers(model, checkpoint, as_stored)
    if not layers:
        raise UnsupportedModelError(_nothing_found(folder, model, model_config))
    if config.store is not None:
        use_store(layers, Path(config.store))
    expert_bytes = sum(x.experts * x.expert_bytes for x in layers)
    parameters = [array for _, array in flatten(model)]
    sizes = Sizes(
        trunk=sum(a.nbytes for a in parameters) - expert_bytes,
        looked_up=_embedding_bytes(model, model_config),
        disk=checkpoint.nbytes,
    )
    item_bytes = max(a.dtype.size for a in parameters if mx.issubdtype(a.dtype, mx.floating))
    needs = layer_needs(layers, model_config)
    return Prepared(
        model, model_config, layers, divide(sizes, needs, item_bytes, model_config, config)
    )


def _remembering(
    classes: tuple[Callable[..., nn.Module], type], as_stored: dict[str, mx.array]
) -> tuple[Callable[..., nn.Module], type]:
    """Model classes whose model copies the loaded weights into `as_stored` before sanitizing."""
    model_class, arguments_class = classes

    def build(arguments: Any) -> nn.Module:
        model = model_class(arguments)
        sanitize = getattr(model, "sanitize", None)

        def remember(weights: dict[str, mx.array]) -> dict[str, mx.array]:
            as_stored.update(weights)
            object.__delattr__(model, "sanitize")
            return sanitize(weights) if sanitize is not None else weights

        object.__setattr__(model, "sanitize", remember)
        return model

    return build, arguments_class


def _custom_classes(
    folder: Path, arguments: dict[str, Any]
) -> tuple[dict[str, Any], tuple[Callable[..., nn.Module], type] | None]:
    """A checkpoint's own model file, which mlx-lm would import past `get_model_classes`.

    Only with `trust_remote_code`; without it mlx-lm refuses such a checkpoint itself.
    """
    overrides = dict(arguments.get("model_config") or {})
    model_file = {**mlx_lm.utils.load_config(folder), **overrides}.get("model_file")
    if model_file is None or not arguments.get("trust_remote_code"):
        return overrides, None
    spec = importlib.util.spec_from_file_location("custom_model", folder / model_file)
    if spec is None or spec.loader is None:
        raise CheckpointError(f"{folder / model_file}: not a Python module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {**overrides, "model_file": None}, (module.Model, module.ModelArgs)


def _find_layers(
    model: nn.Module, checkpoint: Checkpoint, as_stored: dict[str, mx.array]
) -> list[ExpertLayer]:
    """Every expert module of the model with its tables' places on disk, in model order."""
    names = {id(array): name for name, array in as_stored.items()}
    layers = []
    for path, switch in model.named_modules():
        if not isinstance(switch, _SWITCHES):
            continue
        tensors = {}
        for part, projection in switch.children().items():
            if not isinstance(projection, _PROJECTIONS):
                continue
            for attribute, table in flatten(projection):
                where = f"{path}.{part}.{attribute}"
                if id(table) not in names:
                    raise UnsupportedModelError(_rewritten(where, as_stored, checkpoint))
                stored = checkpoint.tensors[names[id(table)]]
                _check_table(where, table, stored)
                slot = SlotTensor(projection, attribute, tuple(table.shape[1:]), table.dtype)
                tensors[f"{part}.{attribute}"] = ExpertTensor(slot, stored)
        counts = {t.stored.shape[0]: t.stored for t in tensors.values()}
        if len(counts) != 1:
            (a, first), (b, second), *_ = counts.items()
            raise CheckpointError(
                f"{path}: {first.name} in {first.file} has {a} experts, but {second.name} in "
                f"{second.file} has {b}"
            )
        layers.append(ExpertLayer(path, switch, tensors, next(iter(counts))))
    return sorted(layers, key=lambda x: [int(p) if p.isdigit() else -1 for p in x.name.split(".")])


def _check_table(where: str, table: mx.array, stored: TensorEntry) -> None:
    if tuple(table.shape) != stored.shape or table.nbytes != stored.nbytes or table.ndim < 1:
        raise CheckpointError(
            f"{stored.file}: tensor {stored.name} is {stored.dtype} {list(stored.shape)}, but "
            f"mlx-lm reads it as {table.dtype} {list(table.shape)} for {where}"
        )


def _rewritten(where: str, as_stored: dict[str, mx.array], checkpoint: Checkpoint) -> str:
    """Why a table that is not stored as such cannot be streamed, and what to do."""
    layer = where[: where.find(".", where.find("layers.") + len("layers.")) + 1]
    alike = sorted(n for n in as_stored if "expert" in n and layer in n)
    seen = f" (it holds {alike[0]}, for example)" if alike else ""
    return (
        f"{checkpoint.folder} does not store {where} as one table of experts{seen}; mlx-lm "
        "computes it while loading, which would need all experts in memory. Convert the "
        "checkpoint once: mlx_lm.convert --hf-path <this checkpoint> -q"
    )


def _nothing_found(folder: Path, model: nn.Module, model_config: dict[str, Any]) -> str:
    """What was found instead of SwitchGLU and SwitchMLP modules."""
    kinds = sorted(
        {type(m).__name__ for path, m in model.named_modules() if "expert" in path.split(".")[-1]}
    )
    kind = model_config.get("model_type")
    if kinds:
        found = f"its experts are {', '.join(kinds)} modules, a layout not supported yet"
    else:
        found = "it has no routed experts, and loads with mlx_lm.load as it is"
    return (
        f"{folder} ({kind}) cannot be streamed: no SwitchGLU or SwitchMLP module in the model; "
        + found
    )


def _embedding_bytes(model: nn.Module, model_config: dict[str, Any]) -> int:
    """Bytes of embeddings that only look up; a tied one is the output matrix too."""
    if text_config(model_config).get("tie_word_embeddings"):
        return 0
    return sum(
        array.nbytes
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))
        for _, array in flatten(module)
    )


def mentions_experts(folder: Path) -> bool:
    return any("expert" in name for name in read_checkpoint(folder).tensors)

"""Loads a checkpoint lazily through mlx-lm and records where the model's arrays come from.

The record identifies arrays by `id`: those that mlx-lm passes to the model's `sanitize`, and those
that `sanitize` stacks from them. Nothing is evaluated here, and mlx-lm's functions and classes are
back in place when a load returns.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
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

from .._errors import CheckpointError, StreamError, UnsupportedModelError
from .._experts.layer import Traits
from .._experts.stream import flatten
from .._hooks import swapped_in_thread
from .._io.checkpoint import (
    MOVED,
    Checkpoint,
    read_checkpoint,
    read_model_config,
    shard_files,
    whereabouts,
)
from .._io.files import allow_open
from .provenance import Stored, trace

SWITCHES: tuple[type[nn.Module], ...] = (SwitchGLU, SwitchMLP)
PROJECTIONS: tuple[type[nn.Module], ...] = (SwitchLinear, QuantizedSwitchLinear)

MLX_LM, MLX_VLM = "mlx-lm", "mlx-vlm"  # the libraries that load models

# Bound before any patch is installed.
original_load_model = mlx_lm.utils.load_model


@dataclass
class LoadRecord:
    """Where the arrays of a lazily loaded model come from.

    Attributes:
        stored: arrays of the checkpoint, by name.
        stacks: by `id` of the result: the result, which keeps the `id` in use, and its parts.
        build_empty: builds another such model without weights.
        filled: names of the parameters for which mlx-lm had an array of the right shape.
        sanitize: makes the model's arrays of stored ones, by name; leaves the model alone.
        language: the part of the model whose calls are passes; None for the model itself.
        switches, projections: classes of expert modules, and of the switch linears they own.
        library: the library that loaded it.
        traits: tells what sets an expert module apart.
        checkpoint: the files that it read, if they are not those that mlx-lm reads.
    """

    stored: dict[str, mx.array] = field(default_factory=dict)
    stacks: dict[int, tuple[mx.array, list[mx.array]]] = field(default_factory=dict)
    build_empty: Callable[[], nn.Module] = nn.Module
    filled: set[str] = field(default_factory=set)
    sanitize: Callable[[dict[str, mx.array]], dict[str, mx.array]] = dict
    language: nn.Module | None = None
    switches: tuple[type[nn.Module], ...] = SWITCHES
    projections: tuple[type[nn.Module], ...] = PROJECTIONS
    library: str = MLX_LM
    traits: Callable[[nn.Module], Traits] = lambda _: Traits()
    checkpoint: Checkpoint | None = None

    @functools.cached_property
    def traced(self) -> dict[str, Stored]:
        """Arrays that `sanitize` takes or cuts from stored ones unchanged, by name in the model.

        Empty if it cannot be traced.
        """
        return trace(self.sanitize, self.stored)


def load_recorded(
    folder: Path, arguments: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any], LoadRecord]:
    """Run mlx-lm's `load_model` lazily and record where its arrays come from.

    Raises:
        CheckpointError: mlx-lm cannot load the checkpoint.
        StreamError: the checkpoint has more files than this process may open.
    """
    # MLX holds each file open until its last array is evaluated.
    allow_open(len(shard_files(folder)), str(folder))
    record = LoadRecord()
    arguments = dict(arguments)
    get_classes = arguments.pop("get_model_classes", mlx_lm.utils._get_classes)
    arguments["get_model_classes"] = lambda config: _recording_classes(get_classes(config), record)
    try:
        overrides, custom = _custom_classes(folder, arguments)
        if custom is not None:
            arguments["model_config"] = overrides
            arguments["get_model_classes"] = lambda config: _recording_classes(custom, record)
        with swapped_in_thread(mx, quantize=_checked_quantize, load=_load):
            return *original_load_model(folder, True, **arguments), record
    except StreamError:
        raise
    except Exception as e:  # config.json may hold anything, and mlx-lm trusts it
        raise _not_loaded(folder, e) from e


def _not_loaded(folder: Path, error: Exception) -> StreamError:
    """The error for a checkpoint that mlx-lm cannot load; it names foreign quantization."""
    method = _quantized_by(folder)
    # AutoAWQ and GPTQ store `qweight`, which mlx-lm rewrites too late for experts to be joined.
    checkpoint = read_checkpoint(folder)
    if alien := [n for n in checkpoint.tensors if re.search(r"\.experts\..*\.qw", n)]:
        found = f"its experts are quantized with {method or 'AWQ or GPTQ'} (tensor {alien[0]})"
    elif method and "not in model" in str(error):
        found = f"it is quantized with {method}, which mlx-lm does not read for this kind of model"
    else:
        lines = str(error).splitlines()  # possibly one for each of thousands of tensors
        rest = f" (and {len(lines) - 4} more)" if len(lines) > 4 else ""
        reason = " ".join(lines[:4])[:2000] + rest
        if not isinstance(error, ValueError):
            reason = f"{type(error).__name__}: {reason}"
        known = whereabouts(checkpoint) if _lacks_weights(error, checkpoint) else ""
        known = f". {known}" if known else ""
        if reason.startswith("Model type ") or "engram" in reason:  # "... not supported."
            known += (
                " mlx-vlm may have it (extra `vlm`): load it with mlx_streamexperts.load, or with "
                "mlx_vlm.load under patch()"
            )
        return CheckpointError(f"{folder}: mlx-lm cannot load this checkpoint: {reason}{known}")
    return UnsupportedModelError(
        f"{folder}: {found}. mlx-lm cannot load such a checkpoint, so it can be neither "
        "streamed nor converted. Use an MLX conversion (mlx-community), or convert the original "
        "that it was quantized from: python -m mlx_streamexperts.convert -q --model <original> "
        "--out <folder>"
    )


def _lacks_weights(error: Exception, checkpoint: Checkpoint) -> bool:
    """Did mlx-lm, or a model's `sanitize`, fail for lack of weights?"""
    if isinstance(error, KeyError):
        return bool(error.args) and error.args[0] in checkpoint.absent
    return str(error).startswith(("Missing ", "Received ", "Expected shape "))


def _quantized_by(folder: Path) -> str | None:
    """The quantization method in config.json, if it is not MLX's."""
    config = read_model_config(folder)
    for place in (config, config.get("text_config")):
        found = place.get("quantization_config") if isinstance(place, dict) else None
        if isinstance(found, dict):
            return found.get("quant_method")
    return None


_quantize, _stack, _load_array = mx.quantize, mx.stack, mx.load


def _load(file: Any, *args: Any, **kwargs: Any) -> Any:
    """`mx.load`, to which the note of moved experts is a shard without tensors."""
    if isinstance(file, str | Path) and Path(file).name == MOVED:
        return {}
    return _load_array(file, *args, **kwargs)


def _checked_quantize(
    w: mx.array, group_size: int | None = None, bits: int | None = None, **kwargs: Any
) -> Any:
    """Refuse a group size of 0, by which MLX 0.32 would divide: SIGFPE ends the process.

    mlx-lm derives it from the widths in config.json, which are untrusted.
    """
    if not all(n is None or n > 0 for n in (group_size, bits)):
        raise ValueError(f"no table has groups of {group_size} with {bits} bits each")
    return _quantize(w, group_size, bits, **kwargs)


def recording_stacks(record: LoadRecord) -> AbstractContextManager[None]:
    """Record this thread's calls of `mx.stack`, with which mlx-lm joins single experts."""

    def stack(arrays: list[mx.array], *args: Any, **kwargs: Any) -> mx.array:
        result = _stack(arrays, *args, **kwargs)
        if not args and not kwargs:
            record.stacks[id(result)] = (result, list(arrays))
        return result

    return swapped_in_thread(mx, stack=stack)


def _recording_classes(
    classes: tuple[Callable[..., nn.Module], type], record: LoadRecord
) -> tuple[Callable[..., nn.Module], type]:
    """The same classes, but a model they build writes its weights into `record`."""
    model_class, arguments_class = classes

    def build(arguments: Any) -> nn.Module:
        fresh = copy.deepcopy(arguments)  # some classes change their arguments

        def build_empty() -> nn.Module:
            return model_class(copy.deepcopy(fresh))

        # Neither refers to the record: a cycle would keep its files open until it is collected.
        record.build_empty = build_empty
        # Of another model: some change themselves.
        record.sanitize = lambda w: getattr(build_empty(), "sanitize", dict)(w)
        model = model_class(arguments)
        sanitize = getattr(model, "sanitize", None)

        def sanitize_recorded(weights: dict[str, mx.array]) -> dict[str, mx.array]:
            record.stored.update(weights)
            object.__delattr__(model, "sanitize")
            with recording_stacks(record):
                return sanitize(weights) if sanitize is not None else weights

        def load_recorded_weights(
            weights: list[tuple[str, mx.array]], strict: bool = True
        ) -> nn.Module:
            object.__delattr__(model, "load_weights")
            shapes = {name: array.shape for name, array in flatten(model)}
            record.filled.update(n for n, array in weights if shapes.get(n) == array.shape)
            return model.load_weights(weights, strict=strict)

        object.__setattr__(model, "sanitize", sanitize_recorded)
        object.__setattr__(model, "load_weights", load_recorded_weights)
        return model

    return build, arguments_class


def _custom_classes(
    folder: Path, arguments: dict[str, Any]
) -> tuple[dict[str, Any], tuple[Callable[..., nn.Module], type] | None]:
    """Classes of the checkpoint's own model file; mlx-lm would import them without our hook.

    Only with `trust_remote_code`; without it mlx-lm itself refuses such a checkpoint.
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

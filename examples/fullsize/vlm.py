"""Builds the stand-ins that only mlx-vlm loads, quantized as its converter quantizes them.

The README says where each configuration comes from and what of it was inferred.
"""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

from mlx_streamexperts import StreamError

MODELS = ("deepseek-v4-flash", "glm-5.3-flash", "qwen3.8-flash-next")
MODEL_TYPES = ("deepseek_v4", "glm5_next", "qwen4_exp")


def build(config: dict[str, Any], quantization: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The quantized model as mlx-vlm makes it, nothing evaluated, and its configuration.

    Args:
        config: a config.json without quantization.
        quantization: group size, bits and mode of what the family does not choose itself.

    Raises:
        StreamError: mlx-vlm is not installed.
    """
    try:
        from mlx_vlm import utils
        from mlx_vlm.quant_utils import quantize_model
    except ImportError as e:
        raise StreamError("mlx-vlm is not installed: it is the extra `vlm`") from e
    package, _ = utils.get_model_and_args(config)
    made = copy.deepcopy(config)
    for part in ("text_config", "vision_config", "audio_config"):
        made.setdefault(part, {})
    arguments = package.ModelConfig.from_dict(made)
    parts = ["text", "vision", "perceiver", "projector", "audio"]
    model = package.Model(utils.update_module_configs(arguments, package, made, parts))
    predicates = (model, model.language_model)  # of DeepSeek V4 only the language model has them
    keep = _of_either(predicates, "cast_predicate", lambda _: True)
    quantized = _of_either(predicates, "quant_predicate", lambda path, module: True)

    def cast(path: str, array: mx.array) -> mx.array:
        floating = mx.issubdtype(array.dtype, mx.floating)
        return array.astype(mx.bfloat16) if floating and keep(path) else array

    model.update(tree_map_with_path(cast, model.parameters()))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits per weight
        model, config = quantize_model(
            model,
            config,
            **quantization,
            quant_predicate=lambda path, module: (
                not utils.skip_multimodal_module(path) and quantized(path, module)
            ),
        )
    return model, config


def _of_either(models: tuple[nn.Module, ...], name: str, otherwise: Any) -> Any:
    return next((p for m in models if (p := getattr(m, name, None)) is not None), otherwise)

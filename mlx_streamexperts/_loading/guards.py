"""Refuses what would silently leave out streamed experts, of mlx-lm and mlx-vlm.

Streamed experts are not parameters of the model: code that walks the parameters (to save, quantize
or train) would skip them. While a patch is installed, such functions of mlx-lm refuse streamed
models. refusals.py does the same for the model's own methods, and programs.py for whole programs.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

import mlx_lm.tuner.trainer
import mlx_lm.utils

from .._errors import UnsupportedModelError
from .._experts.refusals import SAVE, TRAIN
from .._experts.stream import is_streamed


def _guarded(original: Callable[..., Any], reason: str) -> Callable[..., Any]:
    """The same function, but it refuses a streamed `model`."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        model = signature.bind(*args, **kwargs).arguments["model"]
        if is_streamed(model):
            raise UnsupportedModelError(f"{original.__module__}.{original.__name__}: {reason}")
        return original(*args, **kwargs)

    return guarded


GUARDS: tuple[tuple[Callable[..., Any], Callable[..., Any]], ...] = tuple(
    (original, _guarded(original, reason))
    for original, reason in (
        (mlx_lm.utils.save_model, SAVE),
        (mlx_lm.utils.quantize_model, SAVE),
        (mlx_lm.utils.dequantize_model, SAVE),
        (mlx_lm.tuner.trainer.train, TRAIN),
    )
)
"""Functions of mlx-lm, each with its replacement while a patch is installed."""


@functools.cache
def vlm_guard() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """mlx-vlm's function that writes a model, and its replacement. mlx-vlm must be imported."""
    original = sys.modules["mlx_vlm.utils"].save_weights
    return original, _guarded(original, SAVE)

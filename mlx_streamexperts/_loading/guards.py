"""Refuses what would silently leave out streamed experts, of mlx-lm and mlx-vlm.

Streamed experts are not parameters of the model: code that walks the parameters (to save, quantize
or train) would skip them. While a patch is installed, such functions of mlx-lm refuse streamed
models, and `mlx_streamexperts.run` refuses whole programs before they start. refusals.py does the
same for the model's own methods.
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

_CONVERT = "python -m mlx_streamexperts.convert --quantize does it in the memory of a few experts"
_QUANTIZER = (
    "it runs calibration data through every expert and writes the model, which needs them in "
    f"memory. {_CONVERT} (by rounding, as mlx_lm.convert), or run the program itself on a machine "
    "that holds the model"
)

REFUSED_PROGRAMS: dict[str, str] = {
    "mlx_lm.convert": f"it needs all experts in memory. {_CONVERT}, and without --quantize too",
    "mlx_lm.fuse": "it writes the model, which needs all experts in memory. A streamed model takes "
    "the adapter as it is (--adapter-path); to fuse it run mlx_lm.fuse on a machine that holds the "
    "model",
    "mlx_lm.quant.awq": _QUANTIZER,
    "mlx_lm.quant.dwq": _QUANTIZER
    + ". With --targets-only it runs streamed: the model then is the "
    "teacher",
    "mlx_lm.quant.dynamic_quant": _QUANTIZER,
    "mlx_lm.quant.gptq": _QUANTIZER,
    "mlx_vlm.convert": "it writes the model, which needs all experts in memory. Run it without "
    "streaming, on a machine that holds the model",
    "mlx_vlm.train": "training needs all experts in memory. Run it without streaming, on a machine "
    "that holds the model",
}
"""Why a program of mlx-lm or mlx-vlm cannot run on a streamed model, by module."""


def check_program(module: str, arguments: list[str]) -> None:
    """Refuse a program that would train or write a model without its experts.

    Raises:
        UnsupportedModelError: the program is one of these; the message says what to do instead.
    """
    if module == "mlx_vlm" and arguments:
        module = f"mlx_vlm.{arguments[0]}"
    if module == "mlx_lm.quant.dwq" and "--targets-only" in arguments:
        return
    if module == "mlx_lm.lora" and "--train" in arguments:
        raise UnsupportedModelError(f"{module} --train: {TRAIN} --test runs streamed.")
    if module in REFUSED_PROGRAMS:
        raise UnsupportedModelError(
            f"{module} does not run on a streamed model: {REFUSED_PROGRAMS[module]}."
        )


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

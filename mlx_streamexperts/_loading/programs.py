"""Programs of mlx-lm and mlx-vlm that would train or write a model without its streamed experts.

`mlx_streamexperts.run` refuses them before they start.
"""

from __future__ import annotations

from .._errors import UnsupportedModelError
from .._experts.refusals import TRAIN

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

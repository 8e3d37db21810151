"""The embedded demonstration model."""

from __future__ import annotations

from pathlib import Path

DEMO_PROMPT = "In the beginning God created the heaven and the earth. And"
"""A prompt in one of the topics that the model was trained on."""

_FOLDER = Path(__file__).parent.parent / "data" / "demo"


def demo_model() -> Path:
    """Folder of the small trained MoE model that comes with the package.

    An ordinary mlx-lm checkpoint (`qwen3_moe`, 64 experts a layer, top-8, 4-bit): `mlx_lm.load`
    takes it too. Its model card is README.md in the folder.

    Returns:
        The folder, 45 MB.
    """
    return _FOLDER

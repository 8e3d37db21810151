"""The embedded demonstration model."""

from __future__ import annotations

from pathlib import Path

DEMO_PROMPT = "In the beginning God created the heaven and the earth. And"
"""A prompt on a topic of the model's training data."""

_FOLDER = Path(__file__).parent.parent / "data" / "demo"


def demo_model() -> Path:
    """Folder of the small trained MoE model in this package.

    It is an ordinary mlx-lm checkpoint (`qwen3_moe`, 64 experts a layer, top-8, 4-bit), so
    `mlx_lm.load` loads it too. README.md in the folder is its model card.

    Returns:
        The folder, 45 MB.
    """
    return _FOLDER

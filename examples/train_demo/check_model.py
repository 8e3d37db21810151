"""Checks, before any GPU time is spent, that model.py computes what mlx-lm computes.

Writes a random model through export.py, loads it with mlx_lm and compares the
logits; compares `fake_quantize` with `mx.quantize` too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from export import write_checkpoint
from mlx_lm.utils import load_model
from model import DemoConfig, DemoModel, fake_quantize

LIMIT = 1e-3


def logit_difference(config: DemoConfig, tokenizer: Path) -> float:
    torch.manual_seed(0)
    model = DemoModel(config)
    with torch.no_grad():
        for p in model.parameters():
            # Larger than at initialisation, so that every part shows in the logits.
            p.add_(torch.randn_like(p) * (0.2 if p.dim() == 1 else 0.05))
    tokens = torch.randint(config.vocab_size, (2, 96))
    with torch.no_grad():
        ours = model(tokens)[0].numpy()
    state = {k: v.detach().numpy() for k, v in model.named_parameters()}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(state, config.to_hugging_face(0), tokenizer, Path(folder))
        theirs_model, _ = load_model(Path(folder))
        theirs = np.array(theirs_model(mx.array(tokens.numpy())))
    print(f"  logits: std {ours.std():.3f}, largest difference {np.abs(ours - theirs).max():.2e}")
    return float(np.abs(ours - theirs).max())


def quantize_difference() -> float:
    w = np.random.default_rng(0).standard_normal((512, 320), dtype=np.float32) * 0.02
    theirs = np.array(mx.dequantize(*mx.quantize(mx.array(w), 64, 4), 64, 4))
    ours = fake_quantize(torch.from_numpy(w)).numpy()
    print(f"  quantised weights: largest difference {np.abs(ours - theirs).max():.2e}")
    return float(np.abs(ours - theirs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder tokenizer.py wrote")
    args = parser.parse_args()
    for layers in (2, 8):
        print(f"{layers} layers")
        assert logit_difference(DemoConfig(num_hidden_layers=layers), args.tokenizer) < LIMIT
    assert quantize_difference() < 1e-6


if __name__ == "__main__":
    main()

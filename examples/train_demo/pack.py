"""Packs a training checkpoint into a few small float16 files, and back.

For machines that return only small files. Each tensor is float16 with its two
byte planes kept apart and deflated, which saves about a seventh.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np


def pack(state: dict[str, np.ndarray], folder: Path, part_bytes: int) -> int:
    """Writes `part-XX.npz` files of at most about `part_bytes` each; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, np.ndarray]] = [{}]
    size = 0.0
    for name, w in state.items():
        half = np.ascontiguousarray(w, np.float16)
        for first in range(0, len(half), max(1, len(half) // 8)):  # slices along the first axis
            piece = half[first : first + max(1, len(half) // 8)]
            if size + piece.nbytes > part_bytes / 0.93:
                parts.append({})
                size = 0.0
            planes = piece.view(np.uint8).reshape(-1, 2).T
            parts[-1][f"{name}|{first}|{','.join(map(str, piece.shape))}"] = planes
            size += piece.nbytes
    for i, part in enumerate(parts):
        np.savez_compressed(folder / f"part-{i:02d}.npz", **part)
    return len(parts)


def unpack(folder: Path) -> dict[str, np.ndarray]:
    pieces: dict[str, list[tuple[int, np.ndarray]]] = {}
    for path in sorted(folder.glob("part-*.npz")):
        with np.load(path) as part:
            for key in part.files:
                name, first, shape = key.split("|")
                half = np.ascontiguousarray(part[key].T).view(np.float16)
                w = half.reshape([int(n) for n in shape.split(",")]).astype(np.float32)
                pieces.setdefault(name, []).append((int(first), w))
    return {
        name: np.concatenate([w for _, w in sorted(parts, key=lambda p: p[0])])
        for name, parts in pieces.items()
    }


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="best.pt")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part-bytes", type=int, default=15_500_000)
    args = parser.parse_args()
    state = {k: v.numpy() for k, v in torch.load(args.state, weights_only=True).items()}
    print("parts:", pack(state, args.out, args.part_bytes))


if __name__ == "__main__":
    main()

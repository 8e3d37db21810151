"""Turns a training checkpoint into the shipped 4-bit folder.

`write_checkpoint` writes a Hugging Face style `qwen3_moe` checkpoint in
float32; mlx-lm's own `convert` quantises it; `split_shards` rewrites the
weights as several files with an index.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm import convert


def hugging_face_weights(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Training names -> Hugging Face names, one tensor per expert and projection."""
    out = {}
    for name, w in state.items():
        base = "model." + name
        if name.endswith("mlp.gate_up"):  # [E, 2, I, D]
            prefix = base.removesuffix("gate_up")
            for e, (gate, up) in enumerate(w):
                out[f"{prefix}experts.{e}.gate_proj.weight"] = gate
                out[f"{prefix}experts.{e}.up_proj.weight"] = up
        elif name.endswith("mlp.down"):  # [E, D, I]
            prefix = base.removesuffix("down")
            for e, down in enumerate(w):
                out[f"{prefix}experts.{e}.down_proj.weight"] = down
        else:
            out[base if base.endswith(".weight") else base + ".weight"] = w
    return out


def write_checkpoint(
    state: dict[str, np.ndarray], config: dict, tokenizer: Path, folder: Path
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        k: mx.array(np.ascontiguousarray(v, np.float32))
        for k, v in hugging_face_weights(state).items()
    }
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)


def split_shards(folder: Path, count: int) -> None:
    """Rewrites `model.safetensors` as `count` files of about the same size and an index."""
    single = folder / "model.safetensors"
    weights = dict(sorted(mx.load(str(single)).items(), key=lambda item: natural_key(item[0])))
    total = sum(w.nbytes for w in weights.values())
    shards: list[dict[str, mx.array]] = [{} for _ in range(count)]
    done = 0
    for name, w in weights.items():
        shards[min(count - 1, done * count // total)][name] = w
        done += w.nbytes
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        mx.save_safetensors(str(folder / file), shard, metadata={"format": "mlx"})
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    single.unlink()


def natural_key(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(p)) if p.isdigit() else (1, p) for p in name.split(".")]


def load_state(path: Path) -> dict[str, np.ndarray]:
    """A folder of .npz parts (see pack.py) or a torch checkpoint."""
    if path.is_dir():
        from pack import unpack

        return unpack(path)
    import torch

    return {k: v.numpy() for k, v in torch.load(path, weights_only=True).items()}


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, required=True, help="best.pt, or packed parts")
    parser.add_argument("--config", type=Path, required=True, help="config.json train.py wrote")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder tokenizer.py wrote")
    parser.add_argument("--float-out", type=Path, required=True, help="unquantised checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="4-bit checkpoint (new folder)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shards", type=int, default=2)
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    config = json.loads(args.config.read_text())
    write_checkpoint(load_state(args.state), config, args.tokenizer, args.float_out)
    convert(
        str(args.float_out), str(args.out), quantize=True,
        q_group_size=64, q_bits=4, dtype=args.dtype,
    )  # fmt: skip
    split_shards(args.out, args.shards)
    print("bytes:", sum(p.stat().st_size for p in args.out.iterdir()))


if __name__ == "__main__":
    main()

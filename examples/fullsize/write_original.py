"""Write the headline models as their makers publish them, at full size, as sparse files.

What `python -m mlx_streamexperts.convert` has to cope with: tensor names, shapes and element types
of the original repositories, with a tensor or two for a vision tower and a draft layer, which are
to be left out. All of it is holes, which read as zeros, but for the first and last expert of the
first and last expert layer, whose values `check_convert.py` follows into the converted checkpoint.

    python examples/fullsize/write_original.py kimi-k2.5-int4 FOLDER
    python examples/fullsize/write_original.py qwen3.5-397b-bf16 FOLDER --layers 2
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
from layout import HERE, shard_sizes
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear

from mlx_streamexperts import StreamError, demo_model
from mlx_streamexperts._io.output import write_json

FORMS = {
    "kimi-k2.5-int4": "kimi-k2.5",  # compressed-tensors, packed, expert by expert
    "kimi-k2-fp8": "kimi-k2.5",  # DeepSeek's FP8 in blocks of 128 x 128, expert by expert
    "qwen3.5-397b-bf16": "qwen3.5-397b",  # gate and up of all experts in one table
}
_BYTES = {"BF16": 2, "F32": 4, "I32": 4, "F8_E4M3": 1}
_SHARD_BYTES = 10 << 30
_BLOCK = 128  # side of an FP8 block
_GROUP = 32  # of packed int4

Tensor = tuple[str, tuple[int, ...]]  # element type, shape


def tensors_of(
    form: str, layers: int | None = None, changes: dict[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Element type and shape of every tensor, in the model's order; and config.json.

    Args:
        form: one of `FORMS`.
        layers: cut down to so many layers; default: all.
        changes: to the language model's configuration, for other sizes.

    Raises:
        StreamError: too few layers to have experts.
    """
    config = json.loads((HERE / f"{FORMS[form]}.config.json").read_text())
    del config["quantization"]
    text = config["text_config"]
    if layers is not None:
        if layers <= text.get("first_k_dense_replace", 0):
            raise StreamError(f"layers={layers}: no layer of them has experts")
        text["num_hidden_layers"] = layers
    text.update(changes or {})
    if form == "kimi-k2-fp8":
        config = text  # published without a vision tower
        blocks = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [_BLOCK, _BLOCK]}
        config["quantization_config"] = blocks
    elif form == "kimi-k2.5-int4":
        packed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        text["quantization_config"] = packed
    model_class, arguments = mlx_lm.utils._get_classes(config)
    model = model_class(arguments.from_dict(json.loads(json.dumps(config))))
    experts = {p for p, m in model.named_modules() if isinstance(m, SwitchLinear)}
    found: dict[str, Tensor] = {}
    for name, array in tree_flatten(model.parameters()):
        path = name.rpartition(".")[0]
        shape = tuple(array.shape)
        if path in experts:
            found.update(_experts(form, path, shape))
        else:
            found.update(_trunk(form, name, shape, text))
    if form == "kimi-k2.5-int4":
        found["vision_tower.encoder.blocks.0.wqkv.weight"] = ("BF16", (3456, 1152))
        found["mm_projector.proj.0.weight"] = ("BF16", (4608, 4608))
    elif form == "qwen3.5-397b-bf16":
        found["model.visual.blocks.0.attn.qkv.weight"] = ("BF16", (3456, 1152))
        found["mtp.layers.0.mlp.experts.gate_up_proj"] = ("BF16", (512, 2048, 4096))
    return found, config


def _experts(form: str, path: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """What the original has for one projection [experts, rows, columns] of a layer."""
    experts, rows, columns = shape
    mlp, part = path.replace(".switch_mlp", "").rsplit(".", 1)
    if form == "qwen3.5-397b-bf16":
        mlp = mlp.replace("language_model.model", "model.language_model")
        if part == "gate_proj":
            return {f"{mlp}.experts.gate_up_proj": ("BF16", (experts, 2 * rows, columns))}
        return {} if part == "up_proj" else {f"{mlp}.experts.{part}": ("BF16", shape)}
    found: dict[str, Tensor] = {}
    for e in range(experts):
        name = f"{mlp}.experts.{e}.{part}"
        if form == "kimi-k2-fp8":
            found.update(_blocks(f"{name}.weight", (rows, columns)))
        else:
            found[f"{name}.weight_packed"] = ("I32", (rows, columns // 8))
            found[f"{name}.weight_scale"] = ("BF16", (rows, columns // _GROUP))
            found[f"{name}.weight_shape"] = ("I32", (2,))
    return found


def _blocks(name: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    rows, columns = shape
    scales = (-(-rows // _BLOCK), -(-columns // _BLOCK))
    return {name: ("F8_E4M3", shape), f"{name}_scale_inv": ("F32", scales)}


def _trunk(form: str, name: str, shape: tuple[int, ...], text: dict[str, Any]) -> dict[str, Tensor]:
    """What the original has for a tensor outside the experts."""
    if name.endswith("unembed_out.weight"):
        return {}
    if name.endswith("embed_q.weight"):  # with unembed_out one projection
        rows = text["num_attention_heads"] * (text["qk_nope_head_dim"] + text["v_head_dim"])
        name, shape = name.replace("embed_q", "kv_b_proj"), (rows, text["kv_lora_rank"])
    if form == "kimi-k2-fp8" and name.endswith("_proj.weight"):
        return _blocks(name, shape)
    if form == "qwen3.5-397b-bf16":
        name = name.replace("language_model.model", "model.language_model")
        name = name.replace("language_model.lm_head", "lm_head")
        if name.endswith("conv1d.weight"):
            shape = (shape[0], shape[2], shape[1])
    kept = name.endswith(("A_log", "e_score_correction_bias"))
    return {name: ("F32" if kept else "BF16", shape)}


def write(
    form: str,
    folder: Path,
    *,
    layers: int | None = None,
    seed: int = 0,
    changes: dict[str, Any] | None = None,
) -> None:
    """Write an original.

    Args:
        form: one of `FORMS`.
        folder: where to; created.
        layers: cut down to so many layers.
        seed: of what the filled experts hold.
        changes: to the language model's configuration, for other sizes.

    Raises:
        StreamError: `folder` holds a checkpoint already, or too few layers.
    """
    tensors, config = tensors_of(form, layers, changes)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("model*.safetensors")):
        raise StreamError(f"{folder} holds a checkpoint already: remove it or choose another")
    shards = _shards(tensors)
    names = {}
    rng = np.random.default_rng(seed)
    filled = _filled(form, tensors)
    try:
        for i, shard in enumerate(shards, 1):
            file = folder / f"model-{i:05d}-of-{len(shards):06d}.safetensors"
            names.update(dict.fromkeys(shard, file.name))
            _write_shard(file, {n: tensors[n] for n in shard}, filled, rng)
    except BaseException:
        for file in folder.glob("model*.safetensors"):
            file.unlink()
        raise
    for file in demo_model().glob("token*"):
        shutil.copy(file, folder)
    write_json(folder / "filled.json", {"form": form, "experts": _corners(tensors)})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    write_json(folder / "config.json", config)  # last: complete


def _nbytes(tensor: Tensor) -> int:
    return _BYTES[tensor[0]] * math.prod(tensor[1])


def _shards(tensors: dict[str, Tensor]) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = _SHARD_BYTES
    for name, tensor in tensors.items():
        if _nbytes(tensor) > room and shards[-1]:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(name)
        room -= _nbytes(tensor)
    return shards


def _layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _corners(tensors: dict[str, Tensor]) -> list[tuple[int, int]]:
    """(layer, expert) of those that are filled: first and last of the first and last layer."""
    routed = [n for n in tensors if ".experts." in n and not n.startswith("mtp")]
    layers = sorted({_layer_of(n) for n in routed})
    first = tensors[routed[0]]
    fused = len(first[1]) == 3
    count = (
        first[1][0]
        if fused
        else 1 + max(int(n.split(".experts.")[1].split(".")[0]) for n in routed)
    )
    return [(x, e) for x in dict.fromkeys((layers[0], layers[-1])) for e in (0, count - 1)]


def _filled(form: str, tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """Rows of each tensor to be filled; a tensor of one expert's own has row 0 only."""
    found: dict[str, list[int]] = {}
    for layer, expert in _corners(tensors):
        for name in tensors:
            if ".experts." not in name or name.startswith("mtp") or _layer_of(name) != layer:
                continue
            if form == "qwen3.5-397b-bf16":
                found.setdefault(name, []).append(expert)
            elif f".experts.{expert}." in name:
                found[name] = [0]
    return found


def contents(tensor: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Values for one expert's part, as bytes: finite in every element type."""
    dtype, shape = tensor
    if dtype == "I32" and shape != (2,):
        return rng.integers(0, 256, 4 * math.prod(shape), np.uint8)
    if dtype == "F8_E4M3":
        return (rng.integers(0, 2, shape, np.uint8) << 7) | rng.integers(0, 0x7E, shape, np.uint8)
    values = mx.array(rng.uniform(0.5, 2, shape).astype(np.float32))
    if dtype == "F32":
        return np.array(values).view(np.uint8)
    return np.array(values.astype(mx.bfloat16).view(mx.uint8))


def _write_shard(
    file: Path, tensors: dict[str, Tensor], filled: dict[str, list[int]], rng: np.random.Generator
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + _nbytes(tensor)
        header[name] = {"dtype": tensor[0], "shape": tensor[1], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(f.tell() + end)
        start = 8 + len(text)
        for name, rows in filled.items():
            if name not in tensors:
                continue
            dtype, shape = tensors[name]
            one = (dtype, shape[1:] if len(shape) == 3 else shape)
            for row in rows:
                f.seek(start + header[name]["data_offsets"][0] + row * _nbytes(one))
                values = (
                    np.array(one[1], np.int32) if name.endswith("_shape") else contents(one, rng)
                )
                f.write(values.tobytes())


def setup_arg_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("form", choices=FORMS)
    parser.add_argument("folder", type=Path, help="where to write the checkpoint")
    parser.add_argument("--layers", type=int, help="cut down to the first so many layers")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = setup_arg_parser().parse_args(argv)
    try:
        write(args.form, args.folder, layers=args.layers, seed=args.seed)
    except (StreamError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(shard_sizes(args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())

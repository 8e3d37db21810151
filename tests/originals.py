"""Tiny checkpoints in the forms that models are published in, made from those of `families`.

Each function takes the tensors of an MLX checkpoint without quantization and returns those that an
original would have. What they mean is up to mlx-lm: tests compare with what it makes of them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx

from mlx_streamexperts import demo_model

Weights = dict[str, mx.array]
_TABLE = re.compile(r"^(.*)\.switch_mlp\.(gate_proj|up_proj|down_proj)\.(\w+)$")
_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
_PACKED = {"weight": "weight_packed", "scales": "weight_scale"}


def single(weights: Weights) -> Weights:
    """Experts one by one."""
    out = {}
    for name, array in weights.items():
        if match := _TABLE.match(name):
            mlp, part, kind = match.groups()
            part = _MIXTRAL[part] if "block_sparse_moe" in mlp else part
            for e in range(array.shape[0]):
                out[f"{mlp}.experts.{e}.{part}.{kind}"] = array[e]
        else:
            out[name] = array
    return out


def fused(weights: Weights) -> Weights:
    """Qwen3.5: gate and up in one table, other names, convolutions the other way round."""
    out = {}
    for name, array in weights.items():
        new = name.replace("language_model.model", "model.language_model")
        new = new.replace("language_model.lm_head", "lm_head")
        if match := _TABLE.match(new):
            mlp, part, _ = match.groups()
            if part == "gate_proj":
                up = weights[name.replace("gate_proj", "up_proj")]
                out[f"{mlp}.experts.gate_up_proj"] = mx.concatenate([array, up], axis=-2)
            elif part == "down_proj":
                out[f"{mlp}.experts.down_proj"] = array
        else:
            out[new] = array.moveaxis(2, 1) if "conv1d.weight" in name else array
    return out


def kv_b(weights: Weights) -> Weights:
    """DeepSeek's one projection where mlx-lm has two."""
    out = {}
    for name, array in weights.items():
        if name.endswith("embed_q.weight"):
            v = weights[name.replace("embed_q", "unembed_out")]
            both = mx.concatenate([array.swapaxes(-1, -2), v], axis=1)
            out[name.replace("embed_q", "kv_b_proj")] = both.reshape(-1, both.shape[-1])
        elif not name.endswith("unembed_out.weight"):
            out[name] = array
    return out


def fp8(weights: Weights) -> Weights:
    """DeepSeek V3: every projection in F8_E4M3 (here uint8) with a scale for 128 x 128 blocks."""
    out = {}
    for name, array in single(kv_b(weights)).items():
        out[name] = array
        if name.endswith("_proj.weight"):
            m, n = array.shape
            scale = mx.random.uniform(0.5, 2, (-(-m // 128), -(-n // 128)), key=mx.random.key(m))
            out[name] = mx.to_fp8(array)
            out[name + "_scale_inv"] = scale
    return out


def int4(weights: Weights) -> Weights:
    """Kimi: experts packed by compressed-tensors, with scales and no biases."""
    out = {}
    for name, array in kv_b(weights).items():
        if match := _TABLE.match(name):
            mlp, part, _ = match.groups()
            packed, scales, _ = mx.quantize(array, 32, 4)
            for e in range(array.shape[0]):
                prefix = f"{mlp}.experts.{e}.{part}"
                out[f"{prefix}.weight_packed"] = packed[e].view(mx.int32)
                out[f"{prefix}.weight_scale"] = mx.abs(scales[e])
                out[f"{prefix}.weight_shape"] = mx.array(array.shape[1:], mx.int32)
        else:
            out[name] = array
    return out


def minimax_m3(weights: Weights) -> Weights:
    """Single experts, gate and up apart, and the shared one, which mlx-vlm makes the last."""
    out = {}
    for name, array in weights.items():
        mlp, found, part = name.partition(".switch_mlp.")
        if not found:
            out[name] = array
            continue
        *routed, shared = [[x] if part == "down_proj.weight" else mx.split(x, 2) for x in array]
        names = {"down_proj.weight": ["w2"], "gate_up_proj.weight": ["w1", "w3"]}[part]
        whole = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
        for i, kind in enumerate(names):
            out[f"{mlp}.shared_experts.{whole[kind]}.weight"] = shared[i]
            for e, expert in enumerate(routed):
                out[f"{mlp}.experts.{e}.{kind}.weight"] = expert[i]
    return out


def nvfp4(weights: Weights) -> Weights:
    """ModelOpt: single experts in NVFP4, each projection with a scale of the whole beside."""
    out = {}
    for name, array in weights.items():
        if match := _TABLE.match(name):
            mlp, part, _ = match.groups()
            for e in range(array.shape[0]):
                prefix, scale = f"{mlp}.experts.{e}.{part}", 0.5 + 0.1 * e
                codes, scales = mx.quantize(array[e] / scale, 16, 4, mode="nvfp4")
                out[f"{prefix}.weight"] = codes.view(mx.uint8)
                out[f"{prefix}.weight_scale"] = scales
                out[f"{prefix}.weight_scale_2"] = mx.array(scale)
                out[f"{prefix}.input_scale"] = mx.array(1.0)
        else:
            out[name.removeprefix("language_model.")] = array
    return {name.removeprefix("language_model."): array for name, array in out.items()}


def nvfp4_packed(weights: Weights) -> Weights:
    """compressed-tensors: the same, with other names, and the scale of the whole as a divisor."""
    out = {}
    for name, array in nvfp4(weights).items():
        path, _, kind = name.rpartition(".")
        if kind == "input_scale":
            continue
        if kind == "weight" and ".experts." in path:
            out[f"{path}.weight_packed"] = array
        elif kind == "weight_scale_2":
            out[f"{path}.weight_global_scale"] = (1 / array).reshape(1)
        else:
            out[name] = array
    return out


def nvfp4_fused(weights: Weights) -> Weights:
    """ModelOpt: gate and up of all experts in one NVFP4 table, with one scale for each expert."""
    out = {}
    for name, array in fused(weights).items():
        if ".experts." in name and array.ndim == 3:
            scale = 0.5 + 0.1 * mx.arange(array.shape[0])
            codes, scales = mx.quantize(array / scale[:, None, None], 16, 4, mode="nvfp4")
            out[f"{name}.weight"] = codes.view(mx.uint8)
            out[f"{name}.weight_scale"] = scales
            out[f"{name}.weight_scale_2"] = scale
        else:
            out[name] = array
    return out


def awq(weights: Weights) -> Weights:
    """AutoAWQ: transposed codes, eight to an int32, in groups of 64."""
    out = {}
    for name, array in single(weights).items():
        path = name.removesuffix(".weight")
        if path.endswith("_proj"):
            rows, columns = array.shape
            key = mx.random.key(rows)
            for kind, length in (("qweight", columns), ("qzeros", columns // 64)):
                codes = mx.random.randint(0, 1 << 30, (length, rows // 8), key=key)
                out[f"{path}.{kind}"] = codes.astype(mx.int32)
            out[f"{path}.scales"] = mx.ones((columns // 64, rows), mx.float16)
        else:
            out[name] = array
    return out


def gptq(weights: Weights) -> Weights:
    """GPTQ: as AWQ, with the group of every column."""
    out = awq(weights)
    for name, array in awq(weights).items():
        if name.endswith(".qweight"):
            out[name.replace("qweight", "g_idx")] = mx.arange(array.shape[0]) // 64
    return out


def gpt_oss(weights: Weights) -> Weights:
    """gpt-oss: mxfp4 blocks, gate and up interleaved row by row."""
    out = {}
    for name, array in weights.items():
        path, _, kind = name.rpartition(".")
        if ".experts." not in name:
            out[name] = array
            continue
        kind = {"weight": "_blocks", "scales": "_scales", "bias": "_bias"}[kind]
        if path.endswith("gate_proj"):
            up = weights[name.replace("gate_proj", "up_proj")]
            shape = (array.shape[0], 2 * array.shape[1], *array.shape[2:])
            array = mx.stack([array, up], axis=2).reshape(shape)
            path = path.replace("gate_proj", "gate_up_proj")
        elif path.endswith("up_proj"):
            continue
        if kind == "_blocks":
            array = array.view(mx.uint8)
            array = array.reshape(*array.shape[:2], -1, 16)
        out[path + kind] = array
    return out


def stacked(weights: Weights) -> Weights:
    """As mlx-lm has it."""
    return weights


def seeing(form: Callable[[Weights], Weights]) -> Callable[[Weights], Weights]:
    """With the vision tower that the published checkpoints have, and Qwen3.5's draft layer.

    Some of its tensors look like a layer's expert tables: numbered as it, with a row an expert.
    """

    def add(weights: Weights) -> Weights:
        out = form(weights)
        experts = next(a.shape[0] for n, a in weights.items() if _TABLE.match(n))
        prefixes = ["vision_tower.blocks.1."]
        if not any("linear_attn" in n for n in out):
            prefixes.append("mm_projector.linear_1.")
        if any(n.startswith("model.language_model") for n in out):
            prefixes = ["model.visual.blocks.1.", "model.visual.merger.", "mtp.layers.0."]
            draft = next(n for n in out if n.endswith("layers.0.mlp.experts.gate_up_proj"))
            out["mtp.layers.0.mlp.experts.gate_up_proj"] = out[draft] + 1
        for prefix in prefixes:
            for name in ("proj.weight", "proj.bias", "experts.gate_up_proj"):
                shape = (experts,) if name.endswith("bias") else (experts, 64, 32)
                out[prefix + name] = mx.random.normal(shape, key=mx.random.key(7))
        return out

    return add


def write(
    built: Path, folder: Path, form: Callable[[Weights], Weights], shards: int = 3, **config: object
) -> Path:
    """Put the checkpoint in `built` into another form, with a tokenizer, in several files."""
    weights: Weights = {}
    for file in built.glob("model*.safetensors"):
        weights.update(mx.load(str(file)))  # type: ignore[arg-type]
    weights = dict(sorted(form(weights).items()))
    folder.mkdir(parents=True, exist_ok=True)
    settings = {**json.loads((built / "config.json").read_text()), **config}
    if any(n.endswith("weight_packed") for n in weights) and "quantization_config" not in config:
        packed = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        settings.setdefault("text_config", settings)["quantization_config"] = packed
    (folder / "config.json").write_text(json.dumps(settings))
    names = list(weights)
    for i in range(shards):
        part = {n: mx.contiguous(weights[n]) for n in names[i::shards]}
        file = folder / f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        mx.save_safetensors(str(file), part, metadata={"format": "pt"})
        if form is fp8:
            _name_fp8(file)
    for file in demo_model().glob("*token*"):
        shutil.copy(file, folder)
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def edit(folder: Path, change: Callable[[Weights], None]) -> None:
    """Change a shard's tensors in place, wherever `change` finds what it looks for."""
    for file in folder.glob("model*.safetensors"):
        weights = {n: mx.array(a) for n, a in mx.load(str(file)).items()}  # type: ignore[union-attr]
        mx.eval(list(weights.values()))
        change(weights)
        mx.save_safetensors(str(file), weights)


def _name_fp8(file: Path) -> None:
    """MLX writes the bytes as U8; their real name differs in the header alone."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b'"U8"', b'"F8_E4M3"')
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])

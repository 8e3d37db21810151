"""Write a large random-weight `qwen3_moe` checkpoint, layer by layer, in flat memory.

Random routers spread their choices almost evenly, so hit rates on such a model are a floor: a
trained model does better. The tokenizer is the embedded model's.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx

from .._loading.demo import demo_model


def write_random_model(
    folder: Path,
    *,
    layers: int = 8,
    experts: int = 64,
    top_k: int = 8,
    hidden: int = 1024,
    inner: int = 768,
    bits: int = 0,
    vocab: int = 16384,
    heads: int | None = None,
    dtype: mx.Dtype = mx.float32,
) -> Path:
    """Write the checkpoint; does nothing if `folder` already holds the same configuration.

    Args:
        folder: destination; anything else in it is removed.
        bits: 0 for unquantized experts, else affine with group size 64.
        vocab: tokens; the default exceeds the embedded tokenizer's.
        heads: of 64 elements each in a layer's attention; None: `hidden` elements together. More
            make the trunk heavier beside the same experts.
    """
    heads = heads or hidden // 64
    quantization = {"group_size": 64, "bits": bits, "mode": "affine"}
    config = {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": 2 * hidden,
        "moe_intermediate_size": inner, "num_hidden_layers": layers, "num_experts": experts,
        "num_experts_per_tok": top_k, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "num_attention_heads": heads, "num_key_value_heads": 2,
        "head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True,
        "max_position_embeddings": 32768,
    }  # fmt: skip
    if bits:
        # Stated, since not every reader infers from missing scales that the rest is float.
        whole = ["model.embed_tokens"]
        for i in range(layers):
            names = [f"self_attn.{x}_proj" for x in "qkvo"] + ["mlp.gate"]
            whole += [f"model.layers.{i}.{name}" for name in names]
        config["quantization"] = quantization | dict.fromkeys(whole, False)
    text = json.dumps(config, indent=1)
    if (folder / "config.json").exists() and (folder / "config.json").read_text() == text:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mx.random.seed(0)
    index: dict[str, str] = {}

    def save(number: int, tensors: dict[str, mx.array]) -> None:
        name = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        mx.save_safetensors(str(folder / name), tensors, metadata={"format": "mlx"})
        index.update(dict.fromkeys(tensors, name))

    def matrix(*shape: int) -> mx.array:
        return (mx.random.normal(shape) * shape[-1] ** -0.5).astype(dtype)

    queries, kv = heads * 64, 2 * 64
    for i in range(layers):
        at = f"model.layers.{i}."
        tensors = {
            at + "input_layernorm.weight": mx.ones(hidden, dtype),
            at + "post_attention_layernorm.weight": mx.ones(hidden, dtype),
            at + "self_attn.q_proj.weight": matrix(queries, hidden),
            at + "self_attn.k_proj.weight": matrix(kv, hidden),
            at + "self_attn.v_proj.weight": matrix(kv, hidden),
            at + "self_attn.o_proj.weight": matrix(hidden, queries),
            at + "self_attn.q_norm.weight": mx.ones(64, dtype),
            at + "self_attn.k_norm.weight": mx.ones(64, dtype),
            at + "mlp.gate.weight": matrix(experts, hidden),
        }
        shapes = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden)}
        for name, shape in {**shapes, "down_proj": (hidden, inner)}.items():
            table = matrix(experts, *shape)
            where = f"{at}mlp.switch_mlp.{name}."
            if bits:
                parts = mx.quantize(table, group_size=64, bits=bits)
                kinds = ("weight", "scales", "biases")
                tensors.update({where + n: p for n, p in zip(kinds, parts, strict=True)})
            else:
                tensors[where + "weight"] = table
        save(i + 1, tensors)
    # Large, so that the token and not the context decides the routing: with elements near 1/32 the
    # layers' outputs drowned it, and half of the experts served 97 % of the choices.
    embedding = (2 * mx.random.normal((vocab, hidden))).astype(dtype)
    top = {"model.embed_tokens.weight": embedding, "model.norm.weight": mx.ones(hidden, dtype)}
    save(layers + 1, top)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for file in demo_model().glob("*token*"):
        shutil.copy(file, folder)
    (folder / "config.json").write_text(text)  # last: it marks the checkpoint as complete
    return folder

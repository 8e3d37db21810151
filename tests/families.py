"""Tiny random checkpoints for every mixture-of-experts family of mlx-lm.

This module owns the configurations and writes ordinary MLX-format checkpoints of them, made by
mlx-lm's own model classes, so that ``mlx_lm.utils.load_model`` loads each one strictly and
unmodified. It must never import the package under test: it says what stock mlx-lm does.

A family is named by its ``model_type``, or by the module of mlx-lm that implements it where one
type has two; a suffix marks a variant.
"""

import contextlib
import copy
import inspect
import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU, SwitchMLP
from mlx_lm.utils import _get_classes, quantize_model

PROJECTIONS = ("gate_proj", "up_proj", "down_proj", "fc1", "fc2")


@dataclass(frozen=True)
class Quantize:
    """How ``build`` quantizes a model; everything but ``affine`` has one legal bits/group pair.

    ``per_projection`` maps an expert projection, by last name or whole path, to what it has instead
    of the default (``None`` = unquantized); ``global_scale`` is nvfp4's one float per expert.
    """

    bits: int = 4
    group_size: int = 64
    mode: str = "affine"
    per_projection: dict[str, dict[str, Any] | None] | None = None
    experts_only: bool = False
    global_scale: bool = False

    def params(self) -> dict[str, Any]:
        """The ``to_quantized`` arguments of the default."""
        if self.mode == "affine":
            return {"group_size": self.group_size, "bits": self.bits, "mode": "affine"}
        group_size, bits = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[self.mode]
        return {"group_size": group_size, "bits": bits, "mode": self.mode}


FOUR_BITS = Quantize()
GLOBAL_SCALE = Quantize(mode="nvfp4", experts_only=True, global_scale=True)
HAS_GLOBAL_SCALE = "global_scale" in inspect.signature(QuantizedSwitchLinear).parameters

# One size for all, with three different widths (hidden, expert, dense), so that a transposed
# tensor or a swapped projection cannot pass unseen.
HIDDEN, EXPERT, DENSE, VOCAB, EXPERTS, TOP_K = 64, 128, 192, 128, 8, 3

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE,
    "moe_intermediate_size": EXPERT,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "num_experts_per_tok": TOP_K,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "norm_topk_prob": True,
}

# Multi-head latent attention, and DeepSeek's router and its one leading dense layer.
_MLA: dict[str, Any] = {
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
}
_ROUTED: dict[str, Any] = {
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "num_hidden_layers": 3,
}
_DEEPSEEK: dict[str, Any] = {**_MLA, **_ROUTED}
_YARN: dict[str, Any] = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.7,
    "mscale_all_dim": 0.7,
}
_MISTRAL4_ROPE: dict[str, Any] = {
    **_YARN,
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.1,
}

_QWEN3_NEXT: dict[str, Any] = {
    "num_experts": EXPERTS,
    "shared_expert_intermediate_size": 64,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 2,
    "partial_rotary_factor": 0.5,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_QWEN3_MOE: dict[str, Any] = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [0],
    "num_hidden_layers": 3,
}
_MINIMAX: dict[str, Any] = {
    "intermediate_size": EXPERT,
    "num_local_experts": EXPERTS,
    "shared_intermediate_size": 0,
    "rotary_dim": 16,
}
_GEMMA4: dict[str, Any] = {
    "global_head_dim": 64,
    "num_key_value_heads": 2,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": VOCAB,
    "use_double_wide_mlp": False,
    "enable_moe_block": True,
    "num_experts": EXPERTS,
    "top_k_experts": TOP_K,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}
_NEMOTRON: dict[str, Any] = {
    "hybrid_override_pattern": ["M", "E", "*", "E", "-", "E"],
    "num_hidden_layers": 6,
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "mamba_proj_bias": False,
    "ssm_state_size": 16,
    "conv_kernel": 4,
    "n_groups": 2,
    "mlp_bias": False,
    "layer_norm_epsilon": 1e-5,
    "use_bias": False,
    "use_conv_bias": True,
    "moe_shared_expert_intermediate_size": 64,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 2.5,
}
_BAILING: dict[str, Any] = {
    "num_experts": EXPERTS,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "use_qk_norm": True,
    "partial_rotary_factor": 0.5,
    "layer_group_size": 2,
    "group_norm_size": 2,
    "num_key_value_heads": 2,
}
_GRANITE: dict[str, Any] = {
    "intermediate_size": EXPERT,
    "num_local_experts": EXPERTS,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "tie_word_embeddings": True,
}
_LONGCAT: dict[str, Any] = {
    **_MLA,
    "num_layers": 2,
    "attention_method": "MLA",
    "ffn_hidden_size": DENSE,
    "expert_ffn_hidden_size": EXPERT,
    "moe_topk": TOP_K,
    "n_routed_experts": EXPERTS,
    "zero_expert_num": 4,
    "zero_expert_type": "identity",
    "routed_scaling_factor": 2.0,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "norm_topk_prob": False,
    "router_bias": False,
}
_KIMI_LINEAR: dict[str, Any] = {
    "num_key_value_heads": 2,
    "model_max_length": 512,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "mla_use_nope": True,
    "linear_attn_config": {
        "kda_layers": [1, 2],
        "full_attn_layers": [3],
        "num_heads": 2,
        "head_dim": 32,
        "short_conv_kernel_size": 4,
    },
    "num_experts": EXPERTS,
    "num_experts_per_token": TOP_K,
    "num_shared_experts": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
}


def _config(model_type: str, *parts: dict[str, Any], **own: Any) -> dict[str, Any]:
    """A flat config.json: the common fields, then ``parts``, then the family's own."""
    config = {"model_type": model_type, **_COMMON}
    for part in (*parts, own):
        config.update(part)
    return config


def _nested(model_type: str, text: dict[str, Any], **own: Any) -> dict[str, Any]:
    """A config.json whose language model sits in ``text_config``."""
    return {"model_type": model_type, "text_config": text, **own}


FAMILIES: dict[str, dict[str, Any]] = {
    # What must be perfect first.
    "qwen3_moe": _config("qwen3_moe", _QWEN3_MOE),
    "qwen3_5_moe": _nested("qwen3_5_moe", _config("qwen3_5_moe_text", _QWEN3_NEXT)),
    "kimi_k25": _nested("kimi_k25", _config("kimi_k2", _DEEPSEEK)),
    "deepseek_v3": _config("deepseek_v3", _DEEPSEEK),
    "gpt_oss": _config(
        "gpt_oss",
        intermediate_size=EXPERT,
        num_local_experts=EXPERTS,
        sliding_window=8,
        rope_scaling=None,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mixtral": _config("mixtral", intermediate_size=EXPERT, num_local_experts=EXPERTS),
    "nemotron_h": _config("nemotron_h", _NEMOTRON),
    "gemma4": _nested("gemma4", _config("gemma4_text", _GEMMA4), vocab_size=VOCAB),
    "llama4": _nested(
        "llama4",
        _config(
            "llama4_text",
            attention_chunk_size=8,
            interleave_moe_layer_step=2,
            intermediate_size=EXPERT,
            intermediate_size_mlp=DENSE,
            num_experts_per_tok=1,
            num_hidden_layers=4,
            num_local_experts=EXPERTS,
            rope_scaling=None,
            use_qk_norm=True,
        ),
    ),
    "glm4_moe": _config(
        "glm4_moe", _ROUTED, rope_scaling=None, use_qk_norm=True, partial_rotary_factor=0.5
    ),
    "granitemoe": _config("granitemoe", _GRANITE),
    # All others.
    "Klear": _config(
        "Klear",
        num_experts=EXPERTS,
        n_shared_experts=1,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    ),
    "afmoe": _config(
        "afmoe",
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        num_hidden_layers=3,
        num_experts=EXPERTS,
        num_shared_experts=1,
        num_dense_layers=1,
        n_group=4,
        topk_group=2,
        sliding_window=8,
    ),
    "bailing_hybrid": _config("bailing_hybrid", _MLA, _BAILING),
    "bailing_moe": _config("bailing_moe", _BAILING, use_bias=True),
    "bailing_moe_linear": _config("bailing_moe_linear", _BAILING),
    "bailing_moe_v3": _config(
        "bailing_hybrid",
        _MLA,
        _BAILING,
        architectures=["BailingMoeV3ForCausalLM"],
        moe_shared_expert_intermediate_size=64,
        short_conv_kernel_size=4,
    ),
    "deepseek": _config("deepseek", _ROUTED),
    "deepseek_v2": _config(
        "deepseek_v2", _DEEPSEEK, topk_method="group_limited_greedy", rope_scaling=_YARN
    ),
    "deepseek_v32": _config(
        "deepseek_v32", _DEEPSEEK, index_head_dim=32, index_n_heads=2, index_topk=8
    ),
    "deepseek_v41": _config(
        "deepseek_v41",
        head_dim=64,
        q_lora_rank=64,
        qk_rope_head_dim=32,
        o_groups=2,
        o_lora_rank=64,
        n_routed_experts=EXPERTS,
        routed_scaling_factor=1.5,
        sliding_window=8,
        compress_ratios=[4, 4, 0],
        kv_source_layer_ids=[0],
        index_source_layer_ids=[0],
        index_n_heads=2,
        index_head_dim=32,
        index_topk=4,
        num_hidden_layers=3,
    ),
    "dots1": _config("dots1", _ROUTED),
    "ernie4_5_moe": _config(
        "ernie4_5_moe",
        use_bias=True,
        moe_num_experts=EXPERTS,
        moe_k=TOP_K,
        moe_layer_start_index=1,
        moe_num_shared_experts=1,
        num_hidden_layers=3,
    ),
    "exaone_moe": _config(
        "exaone_moe",
        num_experts=EXPERTS,
        num_shared_experts=1,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        is_moe_layer=[False, True, True],
        n_group=4,
        topk_group=2,
        num_hidden_layers=3,
    ),
    "gemma4_text": _config("gemma4_text", _GEMMA4),
    "gemma4_unified": _nested("gemma4_unified", _config("gemma4_text", _GEMMA4), vocab_size=VOCAB),
    "glm4_moe_lite": _config("glm4_moe_lite", _DEEPSEEK),
    "glm_moe_dsa": _config(
        "glm_moe_dsa",
        _DEEPSEEK,
        index_head_dim=32,
        index_n_heads=2,
        index_topk=8,
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    ),
    "granitemoehybrid": _config(
        "granitemoehybrid",
        _GRANITE,
        layer_types=["mamba", "attention", "mamba"],
        num_hidden_layers=3,
        shared_intermediate_size=DENSE,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_proj_bias=False,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_n_groups=1,
        mamba_conv_bias=True,
    ),
    "hunyuan": _config(
        "hunyuan",
        moe_topk=TOP_K,
        num_experts=EXPERTS,
        num_shared_expert=1,
        use_mixed_mlp_moe=True,
        use_qk_norm=True,
        use_cla=True,
        cla_share_factor=2,
        rope_scaling={"factor": 1.0, "type": "dynamic", "alpha": 1000.0},
        head_dim=HIDDEN // 2,
    ),
    "jamba": _config(
        "jamba",
        intermediate_size=EXPERT,
        num_hidden_layers=3,
        attn_layer_offset=1,
        attn_layer_period=2,
        expert_layer_offset=0,
        expert_layer_period=2,
        mamba_d_conv=4,
        mamba_d_state=16,
        mamba_expand=2,
        num_experts=EXPERTS,
    ),
    "joyai_llm_flash": _config("joyai_llm_flash", _DEEPSEEK),
    "kimi_k2": _config("kimi_k2", _DEEPSEEK),
    "kimi_k3": _nested(
        "kimi_k3",
        _config(
            "kimi_linear",
            _KIMI_LINEAR,
            q_lora_rank=64,
            attn_res_block_size=2,
            activation_situ_beta=4.0,
            activation_situ_linear_beta=25.0,
            mla_use_output_gate=True,
            routed_expert_hidden_size=64,
            latent_moe_use_norm=True,
        ),
    ),
    "kimi_linear": _config("kimi_linear", _KIMI_LINEAR),
    "kimi_vl": _nested("kimi_vl", _config("deepseek_v3", _DEEPSEEK)),
    "laguna": _config(
        "laguna",
        num_experts=EXPERTS,
        shared_expert_intermediate_size=64,
        moe_routed_scaling_factor=2.5,
        num_hidden_layers=3,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
            for kind in ("full_attention", "sliding_attention")
        },
    ),
    "lfm2_moe": _config(
        "lfm2_moe",
        num_experts=EXPERTS,
        use_expert_bias=True,
        num_dense_layers=1,
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        num_hidden_layers=3,
        layer_types=["conv", "full_attention", "conv"],
    ),
    "longcat_flash": _config("longcat_flash", _LONGCAT),
    "longcat_flash_ngram": _config(
        "longcat_flash_ngram",
        _LONGCAT,
        ngram_vocab_size_ratio=2,
        emb_neighbor_num=3,
        emb_split_num=1,  # embeddings 32 wide, [n, 16] cannot become nvfp4
    ),
    "mellum": _config(
        "mellum",
        num_experts=EXPERTS,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        },
    ),
    "mimo_v2_flash": _config(
        "mimo_v2_flash",
        _ROUTED,
        hybrid_layer_pattern=[0, 1, 0],
        moe_layer_freq=[0, 1, 1],
        add_swa_attention_sink_bias=True,
        add_full_attention_sink_bias=False,
        sliding_window_size=8,
        layernorm_epsilon=1e-5,
        swa_rope_theta=10000.0,
        swa_num_attention_heads=2,
        swa_num_key_value_heads=1,
        swa_head_dim=32,
        swa_v_head_dim=32,
        v_head_dim=32,
        partial_rotary_factor=0.5,
    ),
    "minimax": _config("minimax", _MINIMAX),
    "minimax_m2": _config("minimax_m2", _MINIMAX),
    "minimax_m3_vl": _nested(
        "minimax_m3_vl",
        _config(
            "minimax_m3_text",
            intermediate_size=EXPERT,
            dense_intermediate_size=DENSE,
            shared_intermediate_size=EXPERT,
            num_local_experts=EXPERTS,
            moe_layer_freq=[0, 1, 1],
            num_hidden_layers=3,
            sparse_attention_config={
                "sparse_num_index_heads": 1,
                "sparse_index_dim": 32,
                "sparse_block_size": 4,
                "sparse_topk_blocks": 2,
                "sparse_local_block": 1,
                "sparse_attention_freq": [0, 1, 1],
            },
        ),
    ),
    "mistral3": _nested("mistral3", _config("mistral4", _DEEPSEEK, rope_parameters=_MISTRAL4_ROPE)),
    "mistral4": _config("mistral4", _DEEPSEEK, rope_parameters=_MISTRAL4_ROPE),
    "nemotron_h_latent": _config(
        "nemotron_h", _NEMOTRON, moe_latent_size=128, moe_intermediate_size=64
    ),
    "olmoe": _config("olmoe", intermediate_size=EXPERT, num_experts=EXPERTS, mlp_bias=True),
    "phimoe": _config(
        "phimoe",
        intermediate_size=EXPERT,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        original_max_position_embeddings=512,
        rope_scaling={
            "type": "longrope",
            "short_factor": [1.0] * 16,
            "long_factor": [1.0] * 16,
            "short_mscale": 1.0,
            "long_mscale": 1.0,
        },
    ),
    "phixtral": {
        "model_type": "phixtral",
        "num_vocab": VOCAB,
        "model_dim": HIDDEN,
        "num_heads": 2,
        "num_layers": 2,
        "rotary_dim": 16,
        "num_experts_per_tok": 2,
        "num_local_experts": EXPERTS,
    },
    "qwen2_moe": _config("qwen2_moe", num_experts=EXPERTS, shared_expert_intermediate_size=64),
    "qwen3_5": _nested("qwen3_5", _config("qwen3_5_text", _QWEN3_NEXT)),
    "qwen3_next": _config("qwen3_next", _QWEN3_NEXT),
    "qwen3_vl_moe": _nested("qwen3_vl_moe", _config("qwen3_vl_moe_text", _QWEN3_MOE)),
    "solar_open": _config("solar_open", _ROUTED, partial_rotary_factor=1.0),
    "step3p5": _config(
        "step3p5",
        num_attention_groups=1,
        moe_num_experts=EXPERTS,
        moe_top_k=TOP_K,
        share_expert_dim=64,
        num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
        swiglu_limits=[0.0, 7.0, 0.0],
        swiglu_limits_shared=[0.0, 0.0, 7.0],
    ),
}

# Without experts: what streams is the table of per-layer embeddings.
DENSE_FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3n": {
        "model_type": "gemma3n",
        "text_config": {
            "model_type": "gemma3n_text",
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "head_dim": 32,
            "rms_norm_eps": 1e-6,
            "vocab_size": VOCAB,
            "num_key_value_heads": 1,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCAB - 8,
            "sliding_window": 8,
            "max_position_embeddings": 1024,
            "rope_local_base_freq": 10000.0,
            "rope_theta": 1e6,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 32,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 8,
        },
    },
    "gemma4_dense": _config(
        "gemma4_text",
        _GEMMA4 | {"hidden_size_per_layer_input": 32, "enable_moe_block": False},
    ),
}

# Families whose forward pass calls Metal kernels that have no fallback: ``build`` writes them and
# stock mlx-lm loads them anywhere, but they run on Metal only. In ``FAMILIES`` where they run.
METAL_FAMILIES: dict[str, dict[str, Any]] = {
    "muse_spark": _nested(
        "muse_spark",
        _config(
            "muse_spark_text",
            num_hidden_layers=4,
            post_norm_eps=1e-5,
            rope_parameters={"rope_theta": 10000.0},
            layer_rope_theta=[10000.0, 0.0, 10000.0, 0.0],
            layer_types=["sliding_attention", "full_attention"] * 2,
            sliding_window=8,
            final_logit_softcapping=30.0,
            output_multiplier=1.0,
            num_local_experts=EXPERTS,
            moe_hidden_size=64,
            moe_intermediate_size=64,
        ),
    ),
}

# Families of mlx-lm with experts that have no checkpoint to run here, and why.
NOT_BUILT: dict[str, str] = {
    "dbrx": "its experts are a list of plain MLPs, it has no SwitchGLU or SwitchMLP",
    "prism_hadamard_qwen35": "qwen3_5 with a manifest of 2-bit modules that may name only "
    "nn.Linear and nn.Embedding: it cannot pack experts, and without them it is qwen3_5",
}
if mx.metal.is_available():
    FAMILIES.update(METAL_FAMILIES)
else:
    NOT_BUILT.update(
        (family, "mlx_lm.kernels has Metal kernels only: 'RuntimeError: No Metal back-end'")
        for family in METAL_FAMILIES
    )

# How the published checkpoints of a family are quantized, where it is not plain affine.
NATIVE: dict[str, Quantize] = {
    "deepseek_v41": Quantize(mode="mxfp4"),
    "gpt_oss": Quantize(mode="mxfp4", experts_only=True),
    "kimi_k25": Quantize(group_size=32, experts_only=True),
    "muse_spark": Quantize(mode="nvfp4", experts_only=True, global_scale=True),
}


def build(
    family: str,
    folder: Path,
    *,
    dtype: mx.Dtype = mx.float32,
    quantize: Quantize | None = FOUR_BITS,
    seed: int = 0,
    shards: int = 2,
) -> Path:
    """Write a random checkpoint of ``family`` into ``folder`` and return the folder."""
    config = copy.deepcopy({**METAL_FAMILIES, **FAMILIES, **DENSE_FAMILIES}[family])
    model_class, args_class = _get_classes(config)
    # The argument classes write into the dictionaries they are given.
    model = model_class(args_class.from_dict(copy.deepcopy(config)))
    _randomize(model, seed)
    _cast(model, dtype)
    if quantize is not None:
        config = _quantize(model, config, quantize)
    return write(folder, config, model, shards)


def write(folder: Path, config: dict[str, Any], model: nn.Module, shards: int) -> Path:
    """Write a model's parameters and config.json as a checkpoint; returns the folder."""
    weights: dict[str, mx.array] = dict(sorted(tree_flatten(model.parameters())))
    mx.eval(weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    # Round robin by tensor: the parts of one expert lie in different files.
    weight_map = {
        name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors"
        for i, name in enumerate(weights)
    }
    for shard in sorted(set(weight_map.values())):
        part = {name: weights[name] for name, where in weight_map.items() if where == shard}
        mx.save_safetensors(str(folder / shard), part, metadata={"format": "mlx"})
    index = {
        "metadata": {"total_size": sum(w.nbytes for w in weights.values())},
        "weight_map": weight_map,
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return folder


def unsupported(family: str, dtype: mx.Dtype, quantize: Quantize | None) -> str | None:
    """Why stock mlx-lm can load but not run such a checkpoint on this device, or None."""
    if family in METAL_FAMILIES and family not in FAMILIES:
        return NOT_BUILT[family]
    if mx.default_device() == mx.gpu:
        return None
    if quantize is not None and quantize.global_scale:
        return "gather_qmm takes a global scale on a GPU only"
    # deepseek_v41 has a SwitchLinear outside its experts; muse_spark keeps two layers' experts.
    plain = (
        quantize is None
        or None in (quantize.per_projection or {}).values()
        or quantize.params()["group_size"] > HIDDEN  # too wide a group: left unquantized
        or (quantize.experts_only and family == "deepseek_v41")
        or family == "muse_spark"
    )
    if plain and dtype != mx.float32:
        return "gather_mm takes float32 only on the CPU"
    return None


def switches(model: nn.Module) -> dict[str, nn.Module]:
    """The expert modules of ``model`` by path, first layer first."""
    found = {p: m for p, m in model.named_modules() if isinstance(m, SwitchGLU | SwitchMLP)}
    return dict(sorted(found.items(), key=lambda item: [int(n) for n in _NUMBER.findall(item[0])]))


def token_stream(vocab: int, n: int, seed: int) -> np.ndarray:
    """``n`` token ids [n] in which no id follows itself."""
    rng = np.random.default_rng(seed)
    steps = rng.integers(1, vocab, size=n)
    return np.cumsum(steps) % vocab


def run(model: nn.Module, tokens: np.ndarray, prefill: int) -> list[np.ndarray]:
    """Float32 logits of a cached run that is fed ``tokens``, whatever the model predicts.

    The first entry is the prefill of ``tokens[:prefill]`` in one call, [prefill, vocab]; each
    further one is one token's decode, [1, vocab].
    """
    cache = make_prompt_cache(model)
    calls = [tokens[:prefill]] + [tokens[i : i + 1] for i in range(prefill, len(tokens))]
    logits = []
    for ids in calls:
        out = model(mx.array(ids)[None], cache=cache)[0].astype(mx.float32)  # [T, V]
        mx.eval(out)
        logits.append(np.array(out))
    return logits


_NUMBER = re.compile(r"\d+")
# A router by any of the families' names; its weight sits on it or one module below.
_ROUTER = re.compile(
    r"(^|\.)(gate|router|classifier)(\.(gate|proj|wg|layer|gate_proj|classifier))?$"
)
_SELECTION_BIAS = re.compile(r"(e_score_correction_bias|expert_bias|router_bias)$")


def _randomize(model: nn.Module, seed: int) -> None:
    """Give every parameter a seeded random value of a size that keeps activations near 1."""
    embeddings = {path for path, m in model.named_modules() if isinstance(m, nn.Embedding)}

    def value(name: str, old: mx.array) -> mx.array:
        # By name, so that a tensor keeps its values when others come or go.
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        noise = rng.standard_normal(old.shape).astype(np.float32)
        parent, _, leaf = name.rpartition(".")
        if leaf == "weight" and old.ndim >= 2:
            fan_in = old.shape[1] if "conv" in parent else old.shape[-1]
            fan_in = 1 if parent in embeddings else fan_in
            # Router logits of deviation 3: the chosen experts differ from token to token, and
            # scores are seldom so close that a rounding could swap them.
            gain = 3.0 if _ROUTER.search(parent) else 1.0
            new = noise * (gain * fan_in**-0.5)
        elif _SELECTION_BIAS.search(name):
            new = noise * 0.05
        elif leaf == "bias":
            new = noise * 0.1
        elif leaf == "A_log":
            new = np.log(rng.uniform(1.0, 16.0, old.shape))
        else:  # norms and scales stay near 1, Mamba's D and dt near where they start
            new = np.array(old.astype(mx.float32)) + 0.1 * noise
        return mx.array(new).astype(old.dtype)

    model.update(tree_map_with_path(value, model.parameters()))


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast as ``mlx_lm.convert`` does: a family names what it keeps in float32."""
    keep: Callable[[str], bool] = getattr(model, "cast_predicate", None) or (lambda _: True)

    def cast(name: str, w: mx.array) -> mx.array:
        return w.astype(dtype) if keep(name) and mx.issubdtype(w.dtype, mx.floating) else w

    model.update(tree_map_with_path(cast, model.parameters()))


def _quantize(model: nn.Module, config: dict[str, Any], quantize: Quantize) -> dict[str, Any]:
    """Quantize ``model`` in place through mlx-lm; returns the config that says so."""
    default = quantize.params()
    overrides = quantize.per_projection or {}
    experts = {f"{path}.{p}" for path in switches(model) for p in PROJECTIONS}
    family: Callable[[str, nn.Module], Any] = getattr(model, "quant_predicate", None) or (
        lambda path, module: True
    )

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        projection = path.rpartition(".")[2]
        if path not in experts:
            return False if quantize.experts_only else family(path, module)
        if path not in overrides and projection not in overrides:
            return family(path, module)
        own = overrides.get(path, overrides.get(projection))
        return False if own is None else {**default, **own}

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits per weight
        _, config = quantize_model(
            model,
            config,
            default["group_size"],
            default["bits"],
            mode=default["mode"],
            quant_predicate=predicate,
            # Named only where used: older mlx-lm has no such option.
            **({"global_scale": True} if quantize.global_scale else {}),
        )
    return config

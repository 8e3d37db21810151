"""Tiny random checkpoints for every mixture-of-experts family of mlx-vlm.

This module does for mlx-vlm what ``families`` does for mlx-lm: it owns the configurations, writes
ordinary MLX-format checkpoints that stock ``mlx_vlm.utils.load_model`` loads strictly, and records
how each family calls its experts. It must never import the package under test.
"""

import contextlib
import copy
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import families as lm
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from families import DENSE, EXPERT, EXPERTS, HIDDEN, VOCAB
from mlx.utils import tree_flatten, tree_unflatten

VERSION = (0, 7, 10)
TEXT = VOCAB - 8  # ids of text: those above stand for pictures, films and sounds


@dataclass(frozen=True)
class Family:
    """A tiny config.json and how stock mlx-vlm runs it.

    ``switches`` are the classes that own the switch linears and ``call`` what a layer passes to
    them. ``forward`` is the module that a generation step calls, by path in the model ("" if the
    family has no such step), with token ids and embeddings under the names ``ids`` and
    ``embeddings``; a prompt's chunks come as ``inputs=`` in every family. ``outsiders`` use a
    switch's projections from outside. ``tables`` are embeddings looked up by token, by path, and
    where their row ids come from. ``draws`` says what a forward draws at random, if anything.
    """

    config: dict[str, Any]
    switches: tuple[str, ...] = ("SwitchGLU",)
    call: tuple[str, ...] = ("x", "indices")
    forward: str = "language_model"
    ids: str = "inputs"
    embeddings: str = "inputs_embeds"
    outsiders: str = ""
    tables: dict[str, str] = field(default_factory=dict)
    draws: str = ""


# One vision tower for all: every family drops the names that it does not know.
_VISION: dict[str, Any] = {
    "depth": 1,
    "layers": 1,
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "embed_dim": 64,
    "width": 64,
    "intermediate_size": 96,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "heads": 2,
    "head_dim": 32,
    "image_size": 28,
    "patch_size": 14,
    "num_channels": 3,
    "in_channels": 3,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": HIDDEN,
    "num_position_embeddings": 16,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [],
}


def _flat(model_type: str, *parts: dict[str, Any], **own: Any) -> dict[str, Any]:
    return lm._config(model_type, *parts, **own)


def _vl(
    model_type: str, text: dict[str, Any], vision: dict[str, Any] | None = None, **own: Any
) -> dict[str, Any]:
    """A config.json with the language model in ``text_config`` and a vision tower."""
    vision = {**_VISION, **(vision or {})}
    return {
        "model_type": model_type,
        "text_config": text,
        "vision_config": vision,
        "vocab_size": VOCAB,
        "image_token_id": VOCAB - 1,
        "image_token_index": VOCAB - 1,
        "video_token_id": VOCAB - 2,
        "video_token_index": VOCAB - 2,
        **own,
    }


def _flat_vl(
    text: dict[str, Any], vision: dict[str, Any] | None = None, **own: Any
) -> dict[str, Any]:
    """A config.json with the language model's fields at its root, beside a vision tower."""
    config = {**text, **_vl(text["model_type"], {}, vision, **own)}
    del config["text_config"]
    return config


def _text(family: str) -> dict[str, Any]:
    """The language model's config of an mlx-lm family."""
    config = lm.FAMILIES.get(family) or lm.METAL_FAMILIES[family]
    return copy.deepcopy(config.get("text_config", config))


# Families of mlx-lm that mlx-vlm lacks, or builds from a config with a vision tower.
_ONLY_MLX_LM = {"bailing_hybrid", "bailing_moe_v3", "mistral4", "qwen3_5"}
_WITH_VISION = {
    "deepseek_v41",
    "gemma4",
    "gemma4_unified",
    "kimi_k25",
    "kimi_k3",
    "kimi_vl",
    "llama4",
    "minimax_m3_vl",
    "mistral3",
    "muse_spark",
    "qwen3_5_moe",
    "qwen3_vl_moe",
}
_CONFIGS: dict[str, dict[str, Any]] = {
    family: copy.deepcopy(config)
    for family, config in lm.FAMILIES.items()
    if family not in _ONLY_MLX_LM | _WITH_VISION
}

_QWEN_ROPE = {
    "type": "default",
    "mrope_section": [3, 3, 2],
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.5,
}
_QWEN_IDS = {"vision_start_token_id": VOCAB - 3, "vision_end_token_id": VOCAB - 4}
_QWEN3_5 = _text("qwen3_5_moe") | {"rope_parameters": _QWEN_ROPE, "eos_token_id": 0}
_MROPE = {"type": "default", "rope_type": "default", "mrope_section": [6, 5, 5]}
_GEMMA4_VISION = {
    "position_embedding_size": 64,
    "default_output_length": 4,
    "pooling_kernel_size": 2,
}
_V41_VISION = {
    "vision_num_layers": 1,
    "vision_hidden_size": 64,
    "vision_num_heads": 2,
    "vision_intermediate_size": 96,
    "hc_sinkhorn_iters": 1,
}
_DEEPSEEK_V4 = _flat(
    "deepseek_v4",
    head_dim=64,
    q_lora_rank=64,
    qk_rope_head_dim=32,
    o_groups=2,
    o_lora_rank=64,
    n_routed_experts=EXPERTS,
    n_shared_experts=1,
    routed_scaling_factor=1.5,
    sliding_window=8,
    compress_ratios=[0, 4, 0, 4],
    num_hash_layers=1,
    index_n_heads=2,
    index_head_dim=32,
    index_topk=4,
    num_hidden_layers=4,
    hc_sinkhorn_iters=1,
)
_OMNI = {
    "model_type": "qwen3_omni_moe",
    "enable_audio_output": False,
    "thinker_config": _vl(
        "qwen3_omni_moe_thinker",
        _text("qwen3_vl_moe") | {"rope_scaling": _MROPE},
        audio_config={
            "d_model": 64,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "num_hidden_layers": 1,
            "num_mel_bins": 16,
            "output_dim": HIDDEN,
            "downsample_hidden_size": 16,
        },
    ),
    "talker_config": {
        "text_config": _text("qwen3_vl_moe")
        | {"rope_scaling": _MROPE, "shared_expert_intermediate_size": 64},
        "code_predictor_config": {
            "num_hidden_layers": 1,
            "hidden_size": HIDDEN,
            "intermediate_size": DENSE,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "vocab_size": VOCAB,
            "num_code_groups": 2,
        },
        "num_code_groups": 2,
        "thinker_hidden_size": HIDDEN,
    },
    "code2wav_config": {"hidden_size": 64, "num_hidden_layers": 1},
}
_OCR_TEXT = _text("deepseek_v2") | {"topk_method": "greedy", "scoring_func": "softmax"}
_OCR = {
    "projector_config": {
        "projector_type": "linear",
        "input_dim": 128,
        "n_embed": HIDDEN,
        "depth": 1,
        "mlp_ratio": 1,
        "downsample_ratio": 2,
    },
}

_CONFIGS |= {
    "cohere2_moe": _flat(
        "cohere2_moe",
        intermediate_size=EXPERT,
        num_experts=EXPERTS,
        moe_num_shared_experts=1,
        first_k_dense_replace=1,
        prefix_dense_intermediate_size=DENSE,
        num_hidden_layers=4,
        sliding_window=8,
        sliding_window_pattern=2,
        logit_scale=0.5,
        layer_norm_eps=1e-5,
    ),
    "deepseek_v4": _DEEPSEEK_V4,
    "deepseek_v41": _text("deepseek_v41")
    | _V41_VISION
    | {"engram_layer_ids": [], "engram_num_embeddings": []},
    "deepseek_v41_engram": _text("deepseek_v41")
    | _V41_VISION
    | {
        "engram_layer_ids": [1, 2],
        "engram_num_embeddings": [640, 640],
        "engram_max_ngram_size": 3,
        "engram_vocab_size": 100,
        "engram_n_heads": 2,
        "engram_head_dim": 64,
        "engram_compressed_vocab_size": VOCAB,
    },
    "deepseek_v4_vision": _DEEPSEEK_V4
    | {
        "vision_n_layers": 1,
        "vision_dim": 64,
        "vision_n_heads": 2,
        "vision_inter_dim": 96,
    },
    "deepseek_vl_v2": _vl("deepseek_vl_v2", _OCR_TEXT, {"model_type": "vision"}, **_OCR),
    "deepseekocr": _vl("deepseekocr", _OCR_TEXT, {"model_type": "vision"}, **_OCR),
    "deepseekocr_2": _vl("deepseekocr_2", _OCR_TEXT, {"model_type": "vision", "width": {}}, **_OCR),
    "unlimited_ocr": _vl("unlimited-ocr", _OCR_TEXT, {"model_type": "vision"}, **_OCR),
    "diffusion_gemma": _vl("diffusion_gemma", _text("gemma4"), canvas_length=8),
    "ernie4_5_moe_vl": _flat_vl(
        _text("ernie4_5_moe")
        | {
            "model_type": "ernie4_5_moe_vl",
            "rope_parameters": {"rope_theta": 10000.0, "mrope_section": [6, 6, 4]},
            "moe_num_experts": [EXPERTS, EXPERTS],
            "moe_intermediate_size": [EXPERT, 64],
            "moe_layer_start_index": [1, 1],
            "moe_layer_end_index": [2, 2],
            "moe_num_shared_experts": 1,
        },
        pixel_hidden_size=64,
        im_patch_id=VOCAB - 1,
    ),
    "flint": _flat(
        "flint",
        num_experts=EXPERTS,
        shared_expert_intermediate_size=64,
        mlp_only_layers=[0],
        num_hidden_layers=3,
        sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
    "gemma4": _vl("gemma4", _text("gemma4"), _GEMMA4_VISION, audio_config=None),
    "gemma4_ple": _vl(
        "gemma4",
        _text("gemma4") | {"hidden_size_per_layer_input": 32},
        _GEMMA4_VISION,
        audio_config=None,
    ),
    "gemma4_unified": _vl(
        "gemma4_unified",
        _text("gemma4_unified"),
        {"mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64, "model_patch_size": 28},
        audio_config={
            "audio_samples_per_token": 64,
            "audio_embed_dim": 64,
            "hidden_size": 64,
            "output_proj_dims": 64,
        },
    ),
    "glm4v_moe": _vl(
        "glm4v_moe",
        _text("glm4_moe")
        | {
            "rope_parameters": {"rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "rope_scaling": {"mrope_section": [4, 2, 2]},
        },
        {"model_type": "glm4v_moe"},
    ),
    "glm5_next": _vl(
        "glm5_next",
        _flat(
            "glm5_next_text",
            lm._DEEPSEEK,
            num_hidden_layers=4,
            qk_rope_head_dim=0,
            qk_nope_head_dim=32,
            qk_head_dim=32,
            n_group=1,
            topk_group=1,
            index_topk=8,
            index_head_dim=32,
            index_n_heads=2,
            index_kpool=2,
            linear_head_dim=32,
            linear_num_heads=2,
            hc_sinkhorn_iters=2,
        ),
        {"projection_intermediate_size": 96},
    ),
    "hy_v4": _flat(
        "hy_v4",
        lm._DEEPSEEK,
        n_group=1,
        topk_group=1,
        index_head_dim=32,
        index_n_heads=2,
        index_topk=8,
        indexer_types=["full", "full", "shared"],
    ),
    "inkling": _vl(
        "inkling",
        _flat(
            "inkling",
            swa_num_attention_heads=2,
            swa_num_key_value_heads=1,
            swa_head_dim=32,
            sliding_window_size=8,
            layer_types=["hybrid_sliding", "hybrid", "hybrid_sliding"],
            mlp_layer_types=["dense", "sparse", "sparse"],
            num_hidden_layers=3,
            d_rel=8,
            rel_extent=16,
            intermediate_size=EXPERT,
            dense_intermediate_size=DENSE,
            n_routed_experts=EXPERTS,
            n_shared_experts=2,
            route_scale=2.0,
        ),
        {"n_layers": 1, "patch_size": 4},
    ),
    "kimi_k25": _vl("kimi_k25", _text("kimi_k25") | {"model_type": "deepseek_v3"}),
    "kimi_k3": _vl(
        "kimi_k3",
        _text("kimi_k3"),
        {
            "vt_num_attention_heads": 2,
            "vt_num_hidden_layers": 1,
            "vt_hidden_size": 64,
            "vt_intermediate_size": 96,
            "qkv_hidden_size": 64,
            "mm_hidden_size": 64,
            "text_hidden_size": HIDDEN,
            "init_pos_emb_height": 4,
            "init_pos_emb_width": 4,
        },
    ),
    "kimi_vl": _vl("kimi_vl", _text("kimi_vl")),
    "kolibri1": _flat(
        "kolibri1",
        num_experts=EXPERTS,
        shared_expert_intermediate_size=64,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "llada2_moe": _flat(
        "llada2_moe",
        num_experts=EXPERTS,
        num_shared_experts=1,
        first_k_dense_replace=1,
        num_hidden_layers=3,
        n_group=4,
        topk_group=2,
        pad_token_id=0,
        mask_token_id=VOCAB - 1,
    ),
    "llama4": _vl(
        "llama4",
        _text("llama4"),
        {
            "model_type": "llama4_vision_model",
            "intermediate_size": 256,
            "initializer_range": 0.02,
            "norm_eps": 1e-5,
            "pixel_shuffle_ratio": 0.5,
            "projector_dropout": 0.0,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
            "rope_theta": 10000.0,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "default",
            "vision_output_dim": 64,
        },
    ),
    "longcat_flash_sparse": _flat(
        "longcat_flash_sparse",
        lm._LONGCAT,
        index_n_heads=2,
        index_head_dim=32,
        index_topk=8,
        index_init_tokens=1,
        index_local_tokens=2,
        oe_vocab_size_ratio=2,
        oe_neighbor_num=3,
        oe_split_num=1,
    ),
    "mimo_v2": _vl(
        "mimo_v2",
        _text("mimo_v2_flash") | {"model_type": "mimo_v2"},
        audio_config={
            "out_hidden_size": HIDDEN,
            "audio_channels": 2,
            "input_local_attn_heads": 2,
            "input_local_dim": 64,
            "input_local_head_dim": 32,
            "input_local_intermediate_size": 96,
            "input_local_layers": 1,
            "projection_layers": 1,
            "speech_vocab_size": 32,
            "speech_zeroemb_idx": 0,
        },
    ),
    "minicpmv4_7": _vl("minicpmv4_7", dict(_QWEN3_5)),
    "minimax_m3": _text("minimax_m3_vl") | {"model_type": "minimax_m3"},
    "minimax_m3_vl": _vl("minimax_m3_vl", _text("minimax_m3_vl")),
    "mistral3": _vl("mistral3", _text("mistral3")),
    "mistral_large3": _vl("mistral_large3", _text("mistral4") | {"model_type": "mistral_large3"}),
    "moondream3": _vl(
        "moondream3",
        _flat(
            "moondream3",
            intermediate_size=DENSE,
            num_key_value_heads=2,
            rope_dim=16,
            num_experts=EXPERTS,
            moe_start_layer=1,
            num_hidden_layers=3,
            attention_bias=True,
            prefix_attn=4,
        ),
        {"crop_size": 28, "proj_inner_dim": 64, "proj_out_dim": HIDDEN},
    ),
    "muse_spark": _vl("muse_spark", _text("muse_spark")),
    "nemotron_h_nano_omni": _vl(
        "nemotron_h_nano_omni",
        _text("nemotron_h"),
        {"max_resolution": 56},
        projector_hidden_size=64,
        vit_hidden_size=64,
        img_context_token_id=VOCAB - 1,
    ),
    "openai_privacy_filter": _flat(
        "openai_privacy_filter",
        intermediate_size=EXPERT,
        num_local_experts=EXPERTS,
        sliding_window=8,
        num_labels=5,
        attention_bias=True,
    ),
    "qwen3_5_moe": _vl("qwen3_5_moe", dict(_QWEN3_5), **_QWEN_IDS),
    "qwen3_5_moe_text": dict(_QWEN3_5),
    "qwen3_omni_moe": _OMNI,
    "qwen3_omni_moe_talker": _OMNI | {"enable_audio_output": True},
    "qwen3_vl_moe": _vl(
        "qwen3_vl_moe", _text("qwen3_vl_moe") | {"rope_scaling": _MROPE}, **_QWEN_IDS
    ),
    "qwen4_exp": _vl(
        "qwen4_exp",
        _QWEN3_5
        | {
            "model_type": "qwen4_exp_text",
            "num_hidden_layers": 4,
            "full_attention_interval": 2,
            "hc_count": 2,
            "hc_lowrank": 16,
            "ple_layer_ids": [1, 3],
            "ple_embed_dim": 256,
            "ngram_size": 3,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 100,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 3,
            "indexer_n_heads": 2,
            "indexer_head_dim": 32,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
        },
        **_QWEN_IDS,
    ),
    "step3p7": _vl(
        "step3p7",
        _text("step3p5") | {"moe_layers_enum": "1,2", "use_head_wise_attn_gate": True},
    ),
    "xing4_0": _text("deepseek_v3") | {"model_type": "xing4_0", "hc_sinkhorn_iters": 2},
    "youtu_vl": _flat_vl(
        _text("deepseek_v3") | {"model_type": "youtu_vl"},
        {"model_type": "siglip2_vision_model"},
        **_QWEN_IDS,
    ),
    "zaya1_vl": _flat_vl(
        _flat(
            "zaya1_vl",
            ffn_hidden_size=256,
            num_hidden_layers=4,
            num_experts=EXPERTS,
            num_query_groups=1,
            zaya_mlp_expansion=32,
            vision_lora_rank_attn=4,
            vision_lora_rank_mlp=8,
        ),
        {"model_type": "qwen2_5_vl"},
    ),
}

_COMBINED = {"call": ("x", "indices", "weights", "shared", "residual")}
_PACKED = {"switches": ("MiniMaxPackedSwitchGLU",)}
_MLP = {
    "switches": ("SwitchMLP",),
    "outsiders": "nemotron_h's speculative verifier calls fc1 and fc2, always",
}
_VERIFIED = {
    "outsiders": "qwen3_5's speculative verifier calls the projections of a switch that has them"
}
_V41 = {
    "switches": ("DeepseekV41SwitchGLU",),
    "call": ("x", "inds", "weights"),
    "ids": "input_ids",
}
_PER_LAYER = "the token's id; a prompt's rows in Model.get_input_embeddings, pictures as id 0"
_NGRAMS = "NgramEmbedding.__call__, from the last tokens in cache[0]"

# What is not as the defaults of ``Family`` say. Each is read from mlx-vlm's source, and what can
# be seen in a model is tested.
_FACTS: dict[str, dict[str, Any]] = {
    "deepseek_v4": _COMBINED,
    "deepseek_v4_vision": _COMBINED,
    "deepseek_v41": _V41,
    "deepseek_v41_engram": {
        **_V41,
        "tables": {
            "language_model.layers.*.engram.embed": "language_model.engram_hash at pass entry, "
            "from all ids so far in cache[0].engram"
        },
    },
    "diffusion_gemma": {
        "switches": ("Experts",),
        "call": ("x", "top_k_indices"),
        "forward": "",
        "draws": "the canvas, unless canvas_ids are given",
    },
    "gemma4_ple": {"tables": {"language_model.model.embed_tokens_per_layer": _PER_LAYER}},
    "gemma4_text": {"embeddings": "input_embeddings"},
    "glm5_next": _COMBINED,
    "hy_v4": {"switches": ("FusedSwitchGLU",)},
    "inkling": {
        "switches": ("InklingSwitchGLU",),
        "outsiders": "InklingSparseMoE reads down_proj's attributes in every pass, and on Metal "
        "runs up to 8 tokens of a 4-bit layer in a kernel of its own",
    },
    "laguna": {"switches": ("LagunaPackedSwitchGLU",)},
    "lfm2_moe": {
        "outsiders": "lfm2's speculative verifier calls the projections, always",
    },
    "longcat_flash_ngram": {
        "tables": {
            "language_model.model.ngram_embeddings.embedders.*": _NGRAMS
            + "; a prompt's rows in Model.get_input_embeddings, without the cache"
        },
    },
    "longcat_flash_sparse": {
        "tables": {"language_model.model.ngram_embeddings.embedders.*": _NGRAMS},
    },
    "minicpmv4_7": _VERIFIED,
    "minimax_m3": _PACKED,
    "minimax_m3_vl": _PACKED,
    "moondream3": {"switches": ("MoEMLP",), "call": ("x",), "forward": "text"},
    "muse_spark": {"outsiders": "MuseSparkMoE reads post_expert_norm, a child of the switch"},
    "nemotron_h": _MLP,
    "nemotron_h_latent": _MLP,
    "nemotron_h_nano_omni": _MLP,
    "openai_privacy_filter": {"switches": ("Experts",), "forward": ""},
    "phixtral": {"switches": ("SwitchMLP",), "ids": "x"},
    "qwen3_5_moe": _VERIFIED,
    "qwen3_5_moe_text": _VERIFIED,
    "qwen3_omni_moe": {"forward": "thinker.language_model"},
    "qwen3_omni_moe_talker": {"forward": "thinker.language_model"},
    "qwen4_exp": {
        **_VERIFIED,
        "tables": {
            "language_model.model.layers.*.ple.ple_embedding.ngram_embedding.shards.*": "hash in "
            "ple_embedding.__call__, from the last tokens in the layer's cache[3]"
        },
    },
    "step3p7": {"ids": "input_ids"},
    "zaya1_vl": {
        "switches": ("ZayaSwitchMLP",),
        "call": ("hidden_states", "expert_choice", "route_prob", "image_mask"),
        "ids": "input_ids",
    },
}
FAMILIES: dict[str, Family] = {
    name: Family(config, **_FACTS.get(name, {})) for name, config in sorted(_CONFIGS.items())
}

# Families with a kernel for Metal and no other way: stock mlx-vlm loads them anywhere.
METAL_FAMILIES = {"muse_spark": "kernels.qk_norm_rope is a Metal kernel and has no fallback"}

# Families of mlx-vlm with experts that have no checkpoint here, by package, and why.
NOT_BUILT: dict[str, str] = {
    "dbrx": "its experts are a list of plain MLPs: it has no switch linear",
    "gemma3n": "no experts, but per-layer embeddings: its vision tower (MobileNetV5) has no size "
    "in the config, and its sanitize needs that tower's weights",
    "llada_image": "it is an image generator with its own loader, not mlx_vlm.utils.load_model; "
    "its text encoder calls a switch's projections itself",
    "ming_image": "it is an image generator with its own loader, not mlx_vlm.utils.load_model",
    "nemotron_voicechat": "needs mlx-audio, and runs in a session of its own: no language_model",
    "prism_hadamard_qwen35": "qwen3_5 without experts: its manifest names plain linears only",
}

# Top-level modules whose size no configuration can reduce: their weights stay out of the
# checkpoint, and mlx-vlm drops a module that has none.
OMITTED: dict[str, tuple[str, ...]] = {
    "deepseekocr": ("sam_model", "vision_model"),
    "deepseekocr_2": ("sam_model", "vision_model"),
    "unlimited_ocr": ("sam_model", "vision_model"),
}


def construct(config: dict[str, Any]) -> nn.Module:
    """The model of a config.json, made as ``mlx_vlm.utils.load_model`` makes it."""
    from mlx_vlm import utils

    config = copy.deepcopy(config)
    package, _ = utils.get_model_and_args(config)
    for part in ("text_config", "vision_config", "audio_config"):
        config.setdefault(part, {})
    arguments = package.ModelConfig.from_dict(config)
    parts = ["text", "vision", "perceiver", "projector", "audio"]
    arguments = utils.update_module_configs(arguments, package, config, parts)
    arguments = utils.apply_generation_config_defaults(arguments, config)
    return package.Model(arguments)


def make_vlm_checkpoint(
    folder: Path,
    family: str,
    *,
    dtype: mx.Dtype = mx.float32,
    bits: int | str | None = None,
    seed: int = 0,
    shards: int = 2,
) -> Path:
    """Write a random checkpoint of ``family`` into ``folder`` and return the folder.

    ``bits`` quantizes the language model in groups of 64: a number, a mode by name ("mxfp4"), or
    "mixed", which is 4 bits with each expert's last projection at 8.
    """
    config = copy.deepcopy(FAMILIES[family].config)
    model = construct(config)
    for module in OMITTED.get(family, ()):
        setattr(model, module, None)
    _randomize(model, seed)
    _cast(model, dtype)
    if bits is not None:
        config = _quantize(model, config, bits)
    lm.write(folder, config, model, shards)
    if config.get("engram_layer_ids"):
        token_map = list(range(config["engram_compressed_vocab_size"]))
        (folder / "engram_token_map.json").write_text(json.dumps(token_map))
    return folder


def _randomize(model: nn.Module, seed: int) -> None:
    """Random floats as mlx-lm's families have them; tables of integers stay, or are valid ids."""
    whole = [
        (name, array)
        for name, array in tree_flatten(model.parameters())
        if not mx.issubdtype(array.dtype, mx.floating)
    ]
    lm._randomize(model, seed)
    rng = np.random.default_rng(seed)
    for i, (name, array) in enumerate(whole):
        if name.endswith("tid2eid"):  # [vocab, top_k]: each token's experts, none twice
            ids = rng.permuted(np.tile(np.arange(EXPERTS), (array.shape[0], 1)), axis=1)
            whole[i] = name, mx.array(ids[:, : array.shape[1]]).astype(array.dtype)
    model.update(tree_unflatten(whole))


def _cast(model: nn.Module, dtype: mx.Dtype) -> None:
    """Cast as ``mlx_vlm.convert`` does, which needs each family's predicate to work."""
    try:
        lm._cast(model, dtype)
    except TypeError:  # glm_moe_dsa calls a property
        model.set_dtype(dtype)


def _quantize(model: nn.Module, config: dict[str, Any], bits: int | str) -> dict[str, Any]:
    """Quantize ``model`` in place as ``mlx_vlm.convert`` does; returns the config that says so."""
    from mlx_vlm.quant_utils import quantize_model
    from mlx_vlm.utils import skip_multimodal_module

    if isinstance(bits, int) or bits == "mixed":
        default = lm.Quantize(bits=4 if bits == "mixed" else int(bits)).params()
    else:
        default = lm.Quantize(mode=bits).params()
    last = {f"{path}.{projections(names)[-1]}" for path, names in switches(model).items()}
    family: Callable[[str, nn.Module], Any] = (
        getattr(model, "quant_predicate", None)
        # kimi_k3's own converter does not see it, and quantizes what the model reads as a vector.
        or getattr(getattr(model, "language_model", None), "quant_predicate", None)
        or (lambda path, module: True)
    )

    def predicate(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if skip_multimodal_module(path):
            return False
        if isinstance(module, nn.Embedding) and module.weight.shape[-1] % default["group_size"]:
            return {"fallback_group_size": 32}  # tables of narrow rows
        chosen = family(path, module)
        return {**default, "bits": 8} if bits == "mixed" and path in last and chosen else chosen

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits per weight
        _, config = quantize_model(
            model,
            config,
            default["group_size"],
            default["bits"],
            mode=default["mode"],
            quant_predicate=predicate,
        )
    return config


def switches(model: nn.Module) -> dict[str, list[str]]:
    """The modules of ``model`` that own switch linears, by path, with the names of those."""
    from mlx_vlm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    found = {}
    for path, module in model.named_modules():
        children = tree_flatten(module.children(), is_leaf=nn.Module.is_module)
        own = [
            name
            for name, child in children
            if isinstance(child, SwitchLinear | QuantizedSwitchLinear)
        ]
        if own:
            found[path] = own
    return found


def projections(names: list[str]) -> list[str]:
    """Those of a switch's linears that are its own, and not an adapter's in a list."""
    return [name for name in names if "." not in name]


def picture(family: str, seed: int = 0) -> tuple[list[int], dict[str, mx.array]] | None:
    """A random picture: the ids that stand for it in a prompt, and what ``run`` takes beside.

    None if the family has no vision tower, or one whose input only its own processor makes.
    """
    rng = np.random.default_rng(seed)

    def pixels(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32))

    grid, side = mx.array([[1, 4, 4]]), 14  # 4 by 4 patches, 14 pixels wide
    if family in _GRIDS:  # two frames a patch
        given = {"pixel_values": pixels(16, 3 * 2 * side * side), "image_grid_thw": grid}
    elif family in _PATCHES:
        given = {"pixel_values": pixels(16, 3, side, side), "grid_thws": grid}
        given["image_grid_hws"] = grid[:, 1:]
    elif family == "ernie4_5_moe_vl":
        given = {"pixel_values": pixels(16, 3 * side * side), "image_grid_thw": grid}
    elif family == "youtu_vl":
        given = {"pixel_values": pixels(1, 16, 3 * side * side), "spatial_shapes": grid[:, 1:]}
    elif family == "diffusion_gemma":
        given = {"pixel_values": pixels(1, 3, 4 * side, 4 * side)}
    elif family in _IMAGES:  # 2 by 2 patches
        given = {"pixel_values": pixels(1, 3, 2 * side, 2 * side)}
        if family.startswith("mistral"):
            given["image_sizes"] = mx.array([[2 * side, 2 * side]])
        return [VOCAB - 1], given
    elif family == "inkling":
        return [VOCAB - 1], {"pixel_values": pixels(1, 2, 4, 4, 3)}
    elif family == "gemma4_unified":
        size = {"pixel_values": pixels(1, 1, 3 * 4 * side * side)}
        return [VOCAB - 1], size | {"image_position_ids": mx.array([[[0, 0]]])}
    else:
        return None
    return [VOCAB - 1] * 4, given


def add_processor(folder: Path) -> None:
    """Give a qwen3_vl_moe checkpoint a processor: letters as tokens, pictures and films."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    special = {VOCAB - 1: "<|image_pad|>", VOCAB - 2: "<|video_pad|>"}
    special |= {VOCAB - 3: "<|vision_start|>", VOCAB - 4: "<|vision_end|>"}
    words = ["<eos>", *(chr(n) for n in range(32, 127)), "\n"]
    words += [f"<unused{n}>" for n in range(len(words), VOCAB - 4)]
    words += [special[n] for n in range(VOCAB - 4, VOCAB)]
    tokenizer = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(w) for w in special.values()])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{% if part.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}"
        "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}{% endif %}{% endfor %}"
    )
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    about |= {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    sizes = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(sizes))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(sizes))


_GRIDS = {
    "glm4v_moe",
    "glm5_next",
    "mimo_v2",
    "minimax_m3_vl",
    "qwen3_5_moe",
    "qwen3_omni_moe",
    "qwen3_omni_moe_talker",
    "qwen3_vl_moe",
    "qwen4_exp",
    "zaya1_vl",
}
_PATCHES = {"kimi_k25", "kimi_k3", "kimi_vl"}
_IMAGES = {
    "gemma4",
    "gemma4_ple",
    "llama4",
    "mistral3",
    "mistral_large3",
    "muse_spark",
    "nemotron_h_nano_omni",
    "step3p7",
}


def run(
    model: nn.Module, tokens: np.ndarray, prefill: int, block: int = 1, **picture: mx.array
) -> list[np.ndarray]:
    """Float32 logits of a cached run as ``mlx_vlm.generate`` makes it, fed ``tokens`` regardless.

    The first entry is the prefill of ``tokens[:prefill]`` in one call, [prefill, vocab]; each
    further one decodes the next ``block`` tokens, [block, vocab]. ``picture`` goes with the prompt.
    """
    from mlx_vlm.models.cache import make_prompt_cache

    parts = np.split(tokens, range(prefill, len(tokens), block))
    calls = [mx.array(part)[None] for part in parts if len(part)]
    if not hasattr(model, "language_model"):  # it classifies tokens, each call on its own
        results = (model(ids).logits for ids in calls)
    elif hasattr(model.config, "canvas_length"):
        cache = model.make_cache()
        canvas = mx.arange(model.config.canvas_length)[None]  # drawn at random unless given
        results = (
            model(
                ids, cache=cache, canvas_ids=canvas, **(picture if ids is calls[0] else {})
            ).logits
            for ids in calls
        )
    else:
        language = model.language_model
        cache = make_prompt_cache(language)
        pixels = picture.pop("pixel_values", None)
        extra = model.get_input_embeddings(calls[0], pixels, mask=None, **picture).to_dict()
        extra = {name: value for name, value in extra.items() if value is not None}
        given = [extra] + [{"inputs_embeds": None}] * (len(calls) - 1)
        results = (
            language(ids, cache=cache, **more).logits
            for ids, more in zip(calls, given, strict=True)
        )
    logits = []
    for out in results:
        out = out[0].astype(mx.float32)
        mx.eval(out)
        logits.append(np.array(out))
    return logits

"""The `qwen3_moe` architecture in PyTorch, for training only.

Computes what `mlx_lm/models/qwen3_moe.py` computes (`check_model.py` compares
the two), with the experts of a layer as two stacked tensors and one grouped
matrix product each. Shapes: T tokens, D hidden, E experts, K experts per
token, I expert width, H heads, C head width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class DemoConfig:
    vocab_size: int = 12288
    hidden_size: int = 320
    num_hidden_layers: int = 8
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    num_experts: int = 64
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 128
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 1024

    def to_hugging_face(self, eos_token_id: int) -> dict[str, Any]:
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            **asdict(self),
            "intermediate_size": self.moe_intermediate_size * self.num_experts_per_tok,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
            "attention_bias": False,
            "hidden_act": "silu",
            "bos_token_id": None,
            "eos_token_id": eos_token_id,
            "torch_dtype": "float32",
        }


class _Permute(torch.autograd.Function):
    """Rows of `x` in `order`; the gradient is a gather too, never a scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x[order // copies]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = grad[inverse]
        if ctx.copies > 1:
            rows = rows.view(-1, ctx.copies, grad.shape[-1]).sum(1)
        return rows, None, None, None


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [T*K, in] sorted by expert, weight [E, out, in] -> [T*K, out]."""
    if x.is_cuda:
        return torch._grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    sizes = torch.diff(ends, prepend=ends.new_zeros(1)).tolist()
    return torch.cat([part @ w.T for part, w in zip(x.split(sizes), weight, strict=True)])


class Attention(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)
        self.q_norm = nn.Parameter(torch.ones(c.head_dim))
        self.k_norm = nn.Parameter(torch.ones(c.head_dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, L, D]
        b, n, _ = x.shape
        c = self.c
        q = self.q_proj(x).view(b, n, c.num_attention_heads, c.head_dim)
        k = self.k_proj(x).view(b, n, c.num_key_value_heads, c.head_dim)
        v = self.v_proj(x).view(b, n, c.num_key_value_heads, c.head_dim)
        q = rotate(rms_norm(q, self.q_norm, c.rms_norm_eps), cos, sin)
        k = rotate(rms_norm(k, self.k_norm, c.rms_norm_eps), cos, sin)
        out = functional.scaled_dot_product_attention(  # [B, H, L, C]
            *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
        )
        return self.o_proj(out.transpose(1, 2).reshape(b, n, -1))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:  # x [B, L, H, C], cos [L, 1, C/2]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Experts(nn.Module):
    """Router and experts of one layer; returns the output and the two router losses."""

    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c = c
        e, d, i = c.num_experts, c.hidden_size, c.moe_intermediate_size
        self.gate = nn.Parameter(torch.empty(e, d))
        self.gate_up = nn.Parameter(torch.empty(e, 2, i, d))
        self.down = nn.Parameter(torch.empty(e, d, i))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # x [T, D]
        c = self.c
        e, k = c.num_experts, c.num_experts_per_tok
        logits = x.float() @ self.gate.T  # [T, E], never bfloat16
        probs = logits.softmax(-1)
        scores, chosen = probs.topk(k, dim=-1)  # [T, K]
        scores = scores / scores.sum(-1, keepdim=True)

        flat = chosen.flatten()  # [T*K]
        ranked, order = torch.sort(flat, stable=True)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel(), device=order.device)
        ends = torch.searchsorted(ranked, torch.arange(e, device=x.device), right=True)
        ends = ends.to(torch.int32)

        rows = _Permute.apply(x, order, inverse, k)  # [T*K, D], by expert
        gate, up = grouped_linear(rows, self.gate_up.flatten(1, 2), ends).chunk(2, dim=-1)
        y = grouped_linear(functional.silu(gate) * up, self.down, ends)  # [T*K, D]
        y = _Permute.apply(y, inverse, order, 1).view(-1, k, c.hidden_size)  # by token
        out = (y * scores.unsqueeze(-1)).sum(1)  # [T, D], float32

        load = torch.diff(ends, prepend=ends.new_zeros(1)) / flat.numel()  # [E]
        balance = e * (load * probs.mean(0)).sum()
        z = logits.logsumexp(-1).square().mean()
        return out, balance, z, load


class Layer(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.eps = c.rms_norm_eps
        self.input_layernorm = nn.Parameter(torch.ones(c.hidden_size))
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.Parameter(torch.ones(c.hidden_size))
        self.mlp = Experts(c)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        low = self.mlp.down.dtype  # the residual stream stays float32
        h = rms_norm(x, self.input_layernorm, self.eps).to(low)
        x = x + self.self_attn(h, cos, sin)
        h = rms_norm(x, self.post_attention_layernorm, self.eps).to(low)
        y, balance, z, load = self.mlp(h.flatten(0, 1))
        return x + y.view_as(x), balance, z, load


class DemoModel(nn.Module):
    def __init__(self, c: DemoConfig) -> None:
        super().__init__()
        self.c = c
        self.embed_tokens = nn.Parameter(torch.empty(c.vocab_size, c.hidden_size))
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(c.hidden_size))
        half = torch.arange(0, c.head_dim, 2).float() / c.head_dim
        angles = torch.outer(torch.arange(c.max_position_embeddings).float(), c.rope_theta**-half)
        self.register_buffer("cos", angles.cos().unsqueeze(1), persistent=False)
        self.register_buffer("sin", angles.sin().unsqueeze(1), persistent=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        out_std = 0.02 / (2 * self.c.num_hidden_layers) ** 0.5
        for name, p in self.named_parameters():
            if p.dim() > 1:
                last = name.endswith(("o_proj.weight", "mlp.down"))
                p.normal_(std=out_std if last else 0.02)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """tokens [B, L] -> logits [B, L, V], mean balance and z losses, load [layers, E]."""
        n = tokens.shape[1]
        x = functional.embedding(tokens, self.embed_tokens).float()  # [B, L, D]
        balances, zs, loads = [], [], []
        for layer in self.layers:
            x, balance, z, load = layer(x, self.cos[:n], self.sin[:n])
            balances.append(balance)
            zs.append(z)
            loads.append(load)
        h = rms_norm(x, self.norm, self.c.rms_norm_eps).to(self.embed_tokens.dtype)
        logits = h @ self.embed_tokens.T
        return logits, torch.stack(balances).mean(), torch.stack(zs).mean(), torch.stack(loads)


def fake_quantize(w: Tensor, group: int = 64, bits: int = 4) -> Tensor:
    """`w` after MLX's affine quantisation and back, group by group along the last axis."""
    top = 2**bits - 1
    g = w.float().unflatten(-1, (-1, group))
    low, high = g.amin(-1, keepdim=True), g.amax(-1, keepdim=True)
    scale = ((high - low) / top).clamp_min(1e-7)
    from_low = low.abs() > high.abs()
    scale = torch.where(from_low, scale, -scale)
    edge = torch.where(from_low, low, high)
    steps = torch.round(edge / scale)
    scale = torch.where(steps != 0, edge / steps, scale)
    bias = torch.where(steps != 0, edge, torch.zeros_like(edge))
    q = torch.round((g - bias) / scale).clamp(0, top)
    return (q * scale + bias).flatten(-2)

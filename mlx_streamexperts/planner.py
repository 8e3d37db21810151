"""How a memory budget is divided, from sizes alone, before anything is allocated.

    memory = trunk + expert cache + KV cache + work space + the process itself

The trunk and the experts are exact sums over the checkpoint; KV cache and work space are upper
estimates from the model's configuration, for `context_tokens` and `prefill_tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .cache import LayerNeed, share_slots
from .config import StreamConfig, format_size, parse_size
from .errors import BudgetError
from .platform import device_memory_bytes

_WORK_FLOOR_BYTES = 16 << 20  # sampling, masks, small arrays
# What a process holds besides MLX's memory: interpreter, MLX, mlx-lm, transformers and a tokenizer
# were 0.3 GB. A small budget (of a test, say) cannot mean that too: there it is a 50th.
_PROCESS_BYTES = 512 << 20
_PROCESS_SHARE = 50
_DEFAULT_SHARE = 0.85  # of what the device recommends; the rest is the host program's

# A sweep of a prompt chunk reads nearly every expert that is not resident. With a tenth of the room
# as work space a chunk of Kimi K2.5 within 96 GB is 7k tokens long instead of 2k.
_PREFILL_SHARE = 10
_LEAST_PREFILL_TOKENS = 256

_STATE_ITEM_BYTES = 4  # mlx-lm keeps the states of linear attention in float32

_TOP_K_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k",
    "moe_k", "num_selected_experts", "experts_per_token", "top_k",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What loading a model within a budget comes to. All sizes in bytes.

    Attributes:
        memory: the bound for everything, or None where only the cache is bounded.
        trunk: weights that stay resident: everything but routed experts.
        experts: all routed experts on disk.
        cache: what the slots take.
        kv: room for the KV cache of `context_tokens` tokens, `state` included.
        state: of that, what a sequence keeps whatever its length (linear attention does).
        work: room for activations of `prefill_tokens` tokens.
        slots: slots of each expert layer, in model order.
        layer_experts: routed experts of each layer.
        top_k: experts that a router picks for a token.
        prefill_tokens: tokens of a prompt chunk that `work` is for.
        context_tokens: tokens that `kv` is for.
        disk: the checkpoint's tensors.
        active_bytes_per_token: weights that computing one token reads.
        cold_bytes_per_token: what one token reads from the drive if no expert is resident.
        minimum: the smallest `memory` that works with these options.
        conversion: disk that `convert` takes beside the checkpoint before the model can be
            streamed; 0 where it streams as it is.
        model_type: the checkpoint's.
        resident_share: part of all expert bytes that fits into the cache, 0 to 1.
    """

    memory: int | None
    trunk: int
    experts: int
    cache: int
    kv: int
    work: int
    slots: tuple[int, ...]
    layer_experts: tuple[int, ...]
    top_k: int
    prefill_tokens: int
    context_tokens: int
    disk: int
    active_bytes_per_token: int
    cold_bytes_per_token: int
    minimum: int
    model_type: str
    conversion: int = 0
    state: int = 0

    @property
    def resident_share(self) -> float:
        return self.cache / self.experts

    def __str__(self) -> str:
        bound = "" if self.memory is None else f"{format_size(self.memory)} = "
        return (
            f"{bound}trunk {format_size(self.trunk)} + expert cache {format_size(self.cache)} + "
            f"KV {format_size(self.kv)} + work space {format_size(self.work)}; "
            f"{self.resident_share:.0%} of {format_size(self.experts)} of experts resident, "
            f"{min(self.slots)} to {max(self.slots)} slots a layer"
        )


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts.

    Attributes:
        trunk: weights that stay resident.
        looked_up: the part of the trunk of which a token uses one row (an input embedding).
        disk: the checkpoint's tensors, used or not.
        conversion: what `convert` has to write before the model streams; 0 where it need not.
    """

    trunk: int
    looked_up: int
    disk: int
    conversion: int = 0


def divide(
    sizes: Sizes,
    layers: Sequence[LayerNeed],
    item_bytes: int,
    model_config: dict[str, Any],
    config: StreamConfig,
    held: int = 0,
) -> Plan:
    """Divide the budget that `config` states over a model.

    Args:
        sizes: bytes of the model's parts.
        layers: what each expert layer needs.
        item_bytes: bytes of one activation (2 for bfloat16 and float16, 4 for float32).
        model_config: the checkpoint's config.json.
        config: states `memory` or `cache`, or neither.
        held: bytes of `memory` that other models of this process have.

    Raises:
        BudgetError: it is too small; says the smallest that works.
    """
    experts = sum(n.experts * n.expert_bytes for n in layers)
    state = _STATE_ITEM_BYTES * state_items(model_config)
    kv = item_bytes * config.context_tokens * kv_items_per_token(model_config) + state
    reserve = held + (0 if config.reserve is None else parse_size(config.reserve))
    memory = default_memory(held) if config.memory is None else parse_size(config.memory)
    process = min(memory // _PROCESS_SHARE, _PROCESS_BYTES)
    fewest = sum(n.minimum * n.expert_bytes for n in layers)
    room = memory - process - sizes.trunk - kv - reserve

    def work_bytes(tokens: int) -> int:
        return item_bytes * work_items(model_config, tokens) + _WORK_FLOOR_BYTES

    shortest = config.prefill_tokens or min(_LEAST_PREFILL_TOKENS, config.context_tokens)
    prefill = config.prefill_tokens or _longest(
        work_bytes, min(room // _PREFILL_SHARE, room - fewest), shortest, config.context_tokens
    )
    work = work_bytes(prefill)
    fixed = sizes.trunk + kv + work + reserve
    parts = _parts(sizes.trunk, kv, work, reserve - held, held)
    least = _with_process(fixed - work + work_bytes(shortest) + fewest)
    if config.cache is not None:
        cache = parse_size(config.cache)
        needed = _with_process(fixed + cache)
        if config.memory is not None and needed > memory:
            raise BudgetError(
                f"memory={format_size(memory)} cannot hold cache={format_size(cache)} beside "
                f"{parts}; the smallest memory that works with this cache "
                f"is {needed:,} bytes ({format_size(needed)})",
                needed_bytes=needed,
            )
    else:
        if memory < least:
            raise BudgetError(
                f"memory={format_size(memory)} is too small: {parts} and "
                f"the fewest experts that {len(layers)} layers work with need {least:,} bytes "
                f"({format_size(least)}). Smaller --context-tokens or --prefill-tokens need less.",
                needed_bytes=least,
            )
        cache = memory - fixed - process
    slots = share_slots(cache, layers)
    used = sum(s * n.expert_bytes for s, n in zip(slots, layers, strict=True))
    cold = sum(n.top_k * n.expert_bytes for n in layers)
    return Plan(
        memory=None if config.memory is None and config.cache is not None else memory,
        trunk=sizes.trunk,
        experts=experts,
        cache=used,
        kv=kv,
        work=work,
        slots=tuple(slots),
        layer_experts=tuple(n.experts for n in layers),
        top_k=max(n.top_k for n in layers),
        prefill_tokens=prefill,
        context_tokens=config.context_tokens,
        disk=sizes.disk,
        active_bytes_per_token=sizes.trunk - sizes.looked_up + cold,
        cold_bytes_per_token=cold,
        minimum=least,
        model_type=str(model_config.get("model_type", "")),
        conversion=sizes.conversion,
        state=state,
    )


def default_memory(held: int = 0) -> int:
    """The budget where none is stated, in bytes; `held` of them other models have already."""
    return int(_DEFAULT_SHARE * device_memory_bytes(held))


def _longest(work_bytes: Callable[[int], int], room_bytes: int, shortest: int, longest: int) -> int:
    """The most tokens whose work space fits, in steps of 64; at least the shortest."""
    none = work_bytes(0)
    fitting = (room_bytes - none) // (work_bytes(1) - none)
    return min(longest, max(shortest, fitting // 64 * 64))


def text_config(model_config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration (multimodal ones nest it)."""
    inner = model_config.get("text_config")
    return {**model_config, **inner} if isinstance(inner, dict) else model_config


def experts_per_token(model_config: dict[str, Any], experts: int) -> int:
    """Experts that a router picks for one token, at most `experts`; 8 where no key tells."""
    known = text_config(model_config)
    for key in _TOP_K_KEYS:
        value = known.get(key)
        if isinstance(value, list) and value:
            value = max(value)
        if isinstance(value, int) and value > 0:
            return min(value, experts)
    return min(8, experts)


def kv_items_per_token(model_config: dict[str, Any]) -> int:
    """Upper estimate of the numbers that the KV cache keeps per token.

    Full attention in all layers but those that `full_attention_interval` makes linear.
    """
    c = text_config(model_config)
    layers = _number(c, "num_hidden_layers", "n_layers", default=1)
    interval = _number(c, "full_attention_interval", default=1)
    if c.get("kv_lora_rank"):  # multi-head latent attention
        width = c["kv_lora_rank"] + _number(c, "qk_rope_head_dim", default=64)
    else:
        heads = _number(c, "num_attention_heads", "n_heads", default=1)
        hidden = _number(c, "hidden_size", "d_model", default=1)
        head_dim = _number(c, "head_dim", default=max(1, hidden // heads))
        width = 2 * _number(c, "num_key_value_heads", default=heads) * head_dim
    return width * -(-layers // interval)


def state_items(model_config: dict[str, Any]) -> int:
    """Numbers that a sequence keeps whatever its length: the states of gated linear attention.

    0.19 GB a sequence of Qwen3.5-397B, more than its KV cache of 4,096 tokens.
    """
    c = text_config(model_config)
    heads = _number(c, "linear_num_value_heads", default=0)
    layers = _number(c, "num_hidden_layers", default=1)
    full = layers // _number(c, "full_attention_interval", default=4)
    key = _number(c, "linear_key_head_dim", default=0)
    value = _number(c, "linear_value_head_dim", default=0)
    channels = 2 * key * _number(c, "linear_num_key_heads", default=heads) + heads * value
    convolved = _number(c, "linear_conv_kernel_dim", default=1) * channels
    return (layers - full) * (heads * key * value + convolved) if heads else 0


def work_items(model_config: dict[str, Any], tokens: int) -> int:
    """Upper estimate of the numbers that a forward pass over `tokens` tokens holds at once.

    The routed rows dominate: tokens x top-k rows, each with input, gate, up, activation and output
    (a wave computes while the one before is collected); then the residual stream, attention inputs,
    and the logits of the last token with the sampler's copies.
    """
    c = text_config(model_config)
    hidden = _number(c, "hidden_size", "d_model", default=1)
    inner = _number(c, "moe_intermediate_size", "intermediate_size", "ffn_dim", default=hidden)
    dense = _number(c, "intermediate_size", default=inner)
    heads = _number(c, "num_attention_heads", default=1) * _number(c, "head_dim", default=0)
    rows = tokens * experts_per_token(model_config, 1 << 30) * (4 * hidden + 4 * inner)
    stream = tokens * (12 * hidden + 3 * dense + 6 * heads)
    return rows + stream + 8 * _number(c, "vocab_size", default=1)


def _number(config: dict[str, Any], *keys: str, default: int) -> int:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and value > 0:
            return value
    return default


def check_resize(plan: Plan, cache: int, reserve: int, others: int) -> None:
    """Does a memory promise still hold with another cache?

    Args:
        plan: of the model; one without `memory` allows anything.
        cache: bytes that its slots shall take.
        reserve: bytes kept free for other models.
        others: bytes that other streamed models hold, out of the reserve where there is one.

    Raises:
        BudgetError: no; says the smallest memory that would do.
    """
    if plan.memory is None:
        return
    fixed = plan.trunk + plan.kv + plan.work + max(reserve, others)
    needed = _with_process(fixed + cache)
    if needed > plan.memory:
        raise BudgetError(
            f"a cache of {format_size(cache)} would break the promise of "
            f"memory={format_size(plan.memory)}, of which trunk, KV cache, work space and other "
            f"models take {format_size(fixed)}; it needs {needed:,} bytes ({format_size(needed)})",
            needed_bytes=needed,
        )


def _with_process(nbytes: int) -> int:
    """The smallest memory of which `nbytes` are left beside the process itself."""
    return min(nbytes + _PROCESS_BYTES, -(-nbytes * _PROCESS_SHARE // (_PROCESS_SHARE - 1)))


def _parts(trunk: int, kv: int, work: int, reserve: int, held: int) -> str:
    return (
        f"the trunk ({format_size(trunk)}), KV cache ({format_size(kv)}), "
        f"work space ({format_size(work)})"
        + (f", the reserve ({format_size(reserve)})" if reserve else "")
        + (
            f", the other streamed models of this process ({format_size(held)}: free or resize "
            "them, or load them with a reserve)"
            if held
            else ""
        )
    )

"""Divides a memory budget, from sizes alone, before anything is allocated.

    memory = trunk + expert cache + row cache + KV cache + work space + the process itself

Trunk and experts are exact sums over the checkpoint. KV cache and work space are upper estimates
from the graph of the model's own forward pass (footprint.py). Attention needs work space for each
pair of a new token and a token of the context, so chunks get shorter as the context grows: the work
space stays as planned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .._cache.expert_map import LayerNeed, share_slots
from .._config import DEFAULT_CONTEXT, StreamConfig, format_size, parse_size
from .._errors import BudgetError
from .._osinfo import DeviceLimit, device_memory_bytes, on_metal
from .footprint import STEP, Footprint

# Memory of the process besides MLX's: interpreter, MLX, mlx-lm, transformers and a tokenizer took
# 0.3 GB. A small budget (of a test, say) cannot include that; there it is a 50th.
_PROCESS_BYTES = 512 << 20
_PROCESS_SHARE = 50
_DEFAULT_SHARE = 0.85  # of the recommended memory; the rest is for the host program

# A prompt chunk reads nearly every expert that is not resident, so chunks should be long. With a
# tenth of the room as work space, a chunk of Kimi K2.5 within 96 GB has 7k tokens instead of 2k.
_PREFILL_SHARE = 10
_EVEN = 32  # longer chunks are a multiple of this many tokens
_LEAST_PREFILL_TOKENS = 32  # at the end of the longest context

# macOS ends GPU commands that take too long. One attention kernel covers all keys: with 2,048 new
# tokens it was ended somewhere between 65k and 128k keys (MLX issue 3302).
_METAL_PAIRS = 1 << 27

_TOP_K_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k",
    "moe_k", "num_selected_experts", "experts_per_token", "top_k",
)  # fmt: skip


@dataclass(frozen=True, repr=False)
class Plan:
    """Division of a memory budget over a model. All sizes in bytes.

    Attributes:
        memory: stated bound for everything, or None if only the cache's bound was stated.
        bound: bound for everything in effect: `memory`, else the device's default.
        trunk: weights that stay resident: everything but routed experts.
        experts: all routed experts on disk.
        cache: expert slots.
        kv: KV cache of `context_tokens` tokens, `state` included.
        state: part of `kv` that a sequence takes at any length (linear attention).
        work: work space of a forward pass.
        slots: slots of each expert layer, in model order.
        layer_experts: routed experts of each layer.
        top_k: experts that a router picks for a token; 0 if there are none.
        prefill_tokens: tokens of the longest pass, the first chunk of a prompt.
        context_tokens: tokens that `kv` has room for.
        disk: the checkpoint's tensors.
        active_bytes_per_token: weights read from memory to compute one token.
        cold_bytes_per_token: bytes that one token reads from the drive if no expert is resident.
        minimum: the smallest `memory` that works with these options.
        conversion: disk space that `convert` needs before the model can be streamed; 0 if it
            streams as it is.
        model_type: the checkpoint's.
        footprint: memory of the model's passes; None in a plan made without a model.
        others: MLX's memory before the load that belongs to no streamed model. It is not part of
            the bound, since its purpose is unknown.
        reserve: memory that other models of this process have or will have.
        context_stated: `context_tokens` is a limit that the user set.
        pass_bytes: work space for dividing passes if several machines share the model: the least of
            all ranks. Else 0.
        tables: tables looked up by token that stay on the drive; not part of `trunk`.
        row_cache: memory for rows of them. It is not MLX's.
        weight_bits: bits of a weight with its share of scales, as config.json states them.
        resident_share: fraction of all expert bytes that fits into the cache, 0 to 1; 1 if there
            are none.
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
    bound: int = field(default=0, compare=False)  # may depend on the memory available now
    footprint: Footprint | None = field(default=None, repr=False)
    pass_bytes: int = 0
    reserve: int = 0
    others: int = field(default=0, compare=False)
    context_stated: bool = False
    tables: int = 0
    row_cache: int = 0
    weight_bits: float = 4.5

    @property
    def longest_context(self) -> int:
        """Tokens that one sequence may have."""
        if self.context_stated or not self.kv_token:
            return self.context_tokens
        return max(self.context_tokens, (self.kv_room - self.state) // self.kv_token - STEP)

    @property
    def resident_share(self) -> float:
        return self.cache / self.experts if self.experts else 1.0

    @property
    def kv_room(self) -> int:
        """Memory for all KV caches: `kv`, and unplanned memory too if no context was stated."""
        if self.context_stated:
            return self.kv
        left = self.mlx_bound - self.trunk - self.cache - self.work - self.reserve
        return max(self.kv, left)

    @property
    def kv_token(self) -> int:
        """KV cache that each token adds to a sequence."""
        if self.footprint is not None:
            return self.footprint.token
        return (self.kv - self.state) // max(1, self.context_tokens)

    @property
    def mlx_bound(self) -> int:
        """The part of `bound` that is MLX's: all but the process itself and the row cache."""
        return self.bound - min(self.bound // _PROCESS_SHARE, _PROCESS_BYTES) - self.row_cache

    def bound_with(self, nbytes: int) -> int:
        """The smallest bound, in bytes, that leaves MLX more memory than this plan does.

        Args:
            nbytes: how much more.
        """
        return _with_process(self.mlx_bound + self.row_cache + nbytes)

    def as_dict(self) -> dict[str, Any]:
        """The figures as JSON values."""
        figures = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "footprint"}
        return {**figures, "resident_share": self.resident_share, "text": str(self)}

    @property
    def spare(self) -> int:
        """Unplanned memory; prompts may use it while it is free."""
        if self.pass_bytes:  # all ranks must divide a pass alike
            return 0
        taken = self.trunk + self.cache + self.kv + self.work + self.reserve
        return max(0, self.mlx_bound - taken)

    def next_pass(
        self,
        tokens: int,
        past: int = 0,
        sequences: int = 1,
        quantized: bool = False,
        free: int | None = None,
    ) -> int:
        """Length of the next chunk of a prompt, in tokens of each sequence.

        Args:
            tokens: tokens of each sequence still to process.
            past: tokens of the context before them.
            sequences: batch size.
            quantized: keys and values are quantized.
            free: free bytes; None if all planned memory is free.
        """
        sequences = max(1, sequences)
        longest = max(1, min(tokens, self.prefill_tokens // sequences))
        if self.footprint is None or tokens == 1:
            return longest
        if on_metal():
            longest = max(1, min(longest, _METAL_PAIRS // (sequences * (past + longest))))
        work = self.pass_bytes or self.work
        if free is None or free >= work + self.spare:
            work += self.spare
        fitting = self.footprint.longest_chunk(work, past, longest, sequences, quantized)
        if fitting in (tokens, longest) or fitting < _EVEN:
            return fitting
        return fitting // _EVEN * _EVEN

    def passes(self, tokens: int) -> list[int]:
        """Chunks of a prompt.

        Args:
            tokens: length of the prompt.

        Returns:
            Tokens of each chunk.
        """
        chunks: list[int] = []
        past = 0
        while past < tokens:
            chunks.append(self.next_pass(tokens - past, past))
            past += chunks[-1]
        return chunks

    def pass_bytes_of(
        self,
        tokens: int,
        past: int,
        sequences: int,
        quantized: bool = False,
        added: int = 0,
        windows_full: bool = False,
    ) -> int:
        """Work space of a pass and the KV cache that it adds, in bytes.

        Args:
            tokens: tokens of each sequence in the pass.
            past, sequences, quantized: as for `next_pass`.
            added: tokens that the caches allocate for the pass.
            windows_full: the windows among them grow no more.
        """
        if self.footprint is None:
            return 0
        grown = self.footprint.grown(added, tokens, windows_full)
        grown += 0 if past else self.footprint.state
        work = self.footprint.work(tokens, past + tokens, sequences, quantized)
        return work + sequences * grown

    def __str__(self) -> str:
        bound = "" if self.memory is None else f"{format_size(self.memory)} = "
        return (
            f"{bound}trunk {format_size(self.trunk)} + "
            + (f"expert cache {format_size(self.cache)} + " if self.experts else "")
            + (f"row cache {format_size(self.row_cache)} + " if self.tables else "")
            + f"KV {format_size(self.kv)} + work space {format_size(self.work)}{self._rest()}"
            + (
                f"; {self.resident_share:.0%} of {format_size(self.experts)} of experts resident, "
                f"{self._slots_text()} slots a layer"
                if self.experts
                else ""
            )
            + (f"; {format_size(self.tables)} of tables stay on the drive" if self.tables else "")
        )

    def _slots_text(self) -> str:
        least, most = min(self.slots), max(self.slots)
        return str(most) if least == most else f"{least} to {most}"

    def __repr__(self) -> str:
        return f"<Plan: {self}>"

    def _rest(self) -> str:
        """What else a stated budget is for, so that its parts add up."""
        if self.memory is None:
            return ""
        rest = self.memory - self.trunk - self.cache - self.row_cache - self.kv - self.work
        process = self.bound - self.mlx_bound - self.row_cache
        parts = {"other models": self.reserve, "Python": process}
        parts["unplanned"] = rest - sum(parts.values())
        return "".join(f" + {what} {format_size(n)}" for what, n in parts.items() if n >= 1000)


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model's parts.

    Attributes:
        trunk: weights that stay resident.
        looked_up: part of the trunk that a token does not read: all but a row of an input
            embedding, and second copies of weights.
        disk: the checkpoint's tensors, used or not.
        conversion: bytes that `convert` must write before the model can be streamed, or 0.
        tables: tables of which rows are streamed; no part of the trunk.
        row_cache: memory for those rows.
    """

    trunk: int
    looked_up: int
    disk: int
    conversion: int = 0
    tables: int = 0
    row_cache: int = 0


def divide(
    sizes: Sizes,
    layers: Sequence[LayerNeed],
    model_config: dict[str, Any],
    config: StreamConfig,
    footprint: Footprint,
    held: int = 0,
) -> Plan:
    """Divide the budget that `config` states over a model's parts.

    Args:
        sizes: bytes of the model's parts.
        layers: the needs of each expert layer.
        model_config: the checkpoint's config.json.
        config: states `memory` or `cache`, or neither.
        footprint: memory of the model's passes.
        held: bytes of `memory` that other models of this process hold.

    Raises:
        BudgetError: the budget is too small; the message states the smallest that works.
    """
    experts = sum(n.experts * n.expert_bytes for n in layers)
    context = config.context_tokens or DEFAULT_CONTEXT
    memory = default_memory(held) if config.memory is None else parse_size(config.memory)
    kv = footprint.kv(context)
    reserve = held + (0 if config.reserve is None else parse_size(config.reserve))
    process = min(memory // _PROCESS_SHARE, _PROCESS_BYTES)
    fewest = sum(n.minimum * n.expert_bytes for n in layers)
    room = memory - process - sizes.trunk - sizes.row_cache - kv - reserve
    longest = min(config.prefill_tokens or context, context)
    least_work = footprint.work(min(_LEAST_PREFILL_TOKENS, longest), context)
    most_work = footprint.work(longest, context)
    share = room // _PREFILL_SHARE + footprint.unfinished
    work = max(least_work, min(most_work, share, room - fewest))
    fixed = sizes.trunk + sizes.row_cache + kv + work + reserve
    parts = _parts(sizes.trunk, kv, work, reserve - held, held, sizes.row_cache)
    least = _with_process(fixed - work + least_work + fewest)
    bound = memory
    if config.cache is not None:
        cache = parse_size(config.cache)
        needed = _with_process(fixed + min(cache, experts))
        if config.memory is not None and needed > memory:
            raise BudgetError(
                f"memory={format_size(memory)} cannot hold cache={format_size(cache)} beside "
                f"{parts}; the smallest memory that works with this cache "
                f"is {needed:,} bytes ({format_size(needed)})",
                needed_bytes=needed,
            )
        bound = max(memory, needed)
    else:
        if memory < least:
            raise BudgetError(
                f"memory={format_size(memory)} is too small: {parts}"
                + (f" and the fewest experts that {len(layers)} layers work with" if layers else "")
                + f" need {least:,} bytes ({format_size(least)}). Smaller context_tokens or "
                "prefill_tokens need less.",
                needed_bytes=least,
            )
        cache = memory - fixed - process
    slots = share_slots(cache, layers)
    used = sum(s * n.expert_bytes for s, n in zip(slots, layers, strict=True))
    cold = sum(n.top_k * n.expert_bytes for n in layers)
    spare = max(0, bound - process - fixed - used)
    return Plan(
        memory=None if config.memory is None and config.cache is not None else memory,
        trunk=sizes.trunk,
        experts=experts,
        cache=used,
        kv=kv,
        work=work,
        slots=tuple(slots),
        layer_experts=tuple(n.experts for n in layers),
        top_k=max((n.top_k for n in layers), default=0),
        prefill_tokens=footprint.longest_chunk(work + spare, 0, longest),
        context_tokens=context,
        disk=sizes.disk,
        active_bytes_per_token=sizes.trunk - sizes.looked_up + cold,
        cold_bytes_per_token=cold,
        minimum=least,
        model_type=str(model_config.get("model_type", "")),
        conversion=sizes.conversion,
        state=footprint.state,
        bound=bound,
        footprint=footprint,
        reserve=reserve,
        context_stated=config.context_tokens is not None,
        tables=sizes.tables,
        row_cache=sizes.row_cache,
        weight_bits=weight_bits(model_config),
    )


def default_memory(held: int = 0) -> int:
    """The budget if none is stated, in bytes; other models hold `held` of them already."""
    return int(_DEFAULT_SHARE * device_memory_bytes(held))


def text_config(model_config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration (multimodal ones nest it)."""
    inner = model_config.get("text_config")
    return {**model_config, **inner} if isinstance(inner, dict) else model_config


def weight_bits(model_config: dict[str, Any]) -> float:
    """Bits of a weight with its share of scales and biases, as config.json states them."""
    stated = model_config.get("quantization")
    if isinstance(stated, dict) and isinstance(bits := stated.get("bits"), int) and bits > 0:
        group = stated.get("group_size")
        extra = 32 if stated.get("mode", "affine") == "affine" else 8
        return bits + extra / (group if isinstance(group, int) and group > 0 else 64)
    return 32.0 if "32" in str(text_config(model_config).get("torch_dtype")) else 16.0


def experts_per_token(model_config: dict[str, Any], experts: int) -> int:
    """Experts that a router picks for one token, at most `experts`; 8 if config.json is silent."""
    known = text_config(model_config)
    for key in _TOP_K_KEYS:
        value = known.get(key)
        if isinstance(value, list) and value:
            value = max(value)
        if isinstance(value, int) and value > 0:
            return min(value, experts)
    return min(8, experts)


def check_device(plan: Plan, limit: DeviceLimit, oversubscribe: bool = False) -> None:
    """Refuse a budget that exceeds the device: the system would swap, or end the process.

    Args:
        plan: the division of the budget.
        limit: the most that the device can hold.
        oversubscribe: accept any budget.

    Raises:
        BudgetError: the budget exceeds the limit; the message says how to raise the limit.
    """
    if oversubscribe or plan.bound <= limit.nbytes:
        return
    raised = f" To raise that until the next restart: {limit.command}." if limit.command else ""
    stated = (
        "memory" if plan.memory is not None else "this cache, with everything else that it needs,"
    )
    raise BudgetError(
        f"{stated} of {format_size(plan.bound)} is more than the device can hold, "
        f"{format_size(limit.nbytes)}: {limit.why}.{raised} State at most {limit.nbytes:,} bytes, "
        "or oversubscribe=True (--force) to try anyway",
        needed_bytes=plan.minimum,
    )


def check_resize(plan: Plan, cache: int, reserve: int, others: int) -> int:
    """Check that the memory promise holds with another cache size.

    Args:
        plan: the model's plan.
        cache: the new size of the slots, in bytes.
        reserve: bytes kept free for other models.
        others: bytes that other streamed models hold; they come out of the reserve.

    Returns:
        The bound for everything: the plan's, or a larger one if only the cache was stated.

    Raises:
        BudgetError: it would break the promise; the message states the smallest sufficient memory.
    """
    fixed = plan.trunk + plan.row_cache + plan.kv + plan.work + max(reserve, others)
    needed = _with_process(fixed + cache)
    if plan.memory is None:
        return max(plan.bound, needed)
    if needed > plan.memory:
        raise BudgetError(
            f"a cache of {format_size(cache)} would break the promise of "
            f"memory={format_size(plan.memory)}, of which trunk, KV cache, work space and other "
            f"models take {format_size(fixed)}; it needs {needed:,} bytes ({format_size(needed)})",
            needed_bytes=needed,
        )
    return plan.bound


def _with_process(nbytes: int) -> int:
    """The smallest memory that leaves `nbytes` besides the process itself."""
    return min(nbytes + _PROCESS_BYTES, -(-nbytes * _PROCESS_SHARE // (_PROCESS_SHARE - 1)))


def _parts(trunk: int, kv: int, work: int, reserve: int, held: int, rows: int) -> str:
    return (
        f"the trunk ({format_size(trunk)}), KV cache ({format_size(kv)}), "
        f"work space ({format_size(work)})"
        + (f", the row cache ({format_size(rows)})" if rows else "")
        + (f", the reserve ({format_size(reserve)})" if reserve else "")
        + (
            f", the other streamed models of this process ({format_size(held)}: free or resize "
            "them, or load them with a reserve)"
            if held
            else ""
        )
    )

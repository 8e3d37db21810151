"""Sizes of models that people ask about, so that a plan needs neither the model nor a network.

Sizes follow from public configurations. `plan()` with the real headers is exact; this is not.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._errors import BudgetError
from .._memory.budget import Plan

_CONTEXT = 4096
_GB = 10**9


@dataclass(frozen=True)
class KnownModel:
    """A checkpoint's sizes. All in bytes but counts.

    Attributes:
        name: for people.
        repo: on the Hugging Face Hub.
        model_type: as in config.json.
        trunk: weights that stay resident.
        looked_up: part of the trunk of which a token reads one row.
        layers, experts, top_k: expert layers, experts of each, experts of a token.
        expert_bytes: of one expert.
        kv: KV cache of 4096 tokens.
        work_token: work space of one token of a prompt.
        exact: the sizes are a checkpoint's own; else they follow from its configuration.
    """

    name: str
    repo: str
    model_type: str
    trunk: int
    looked_up: int
    layers: int
    experts: int
    top_k: int
    expert_bytes: int
    kv: int
    work_token: int
    exact: bool = False

    @property
    def disk(self) -> int:
        """Bytes to download."""
        return self.trunk + self.layers * self.experts * self.expert_bytes

    def plan(self, memory: int, top_k: int | None = None) -> Plan:
        """Divide a budget as `divide` does: a tenth of what the trunk leaves is work space.

        Args:
            memory: the budget in bytes.
            top_k: experts of a token, if not the model's own number.

        Raises:
            BudgetError: less than two tokens' experts fit.
        """
        chosen = top_k or self.top_k
        layer = self.layers * self.expert_bytes  # one expert of every layer
        process = min(memory // 50, 512 << 20)
        room = memory - process - self.trunk - self.kv
        work = min(room // 10, _CONTEXT * self.work_token)
        slots = min(self.experts, (room - work) // layer)
        least = self.trunk + self.kv + (512 << 20) + (chosen + 1) * layer * 10 // 9
        if slots <= chosen:
            raise BudgetError(f"{self.name} needs {least / _GB:.0f} GB", least)
        cold = chosen * layer
        return Plan(
            memory=memory,
            trunk=self.trunk,
            experts=self.experts * layer,
            cache=slots * layer,
            kv=self.kv,
            work=work,
            slots=(slots,) * self.layers,
            layer_experts=(self.experts,) * self.layers,
            top_k=chosen,
            prefill_tokens=max(64, min(_CONTEXT, work // self.work_token)),
            context_tokens=_CONTEXT,
            disk=self.disk,
            active_bytes_per_token=self.trunk - self.looked_up + cold,
            cold_bytes_per_token=cold,
            minimum=least,
            model_type=self.model_type,
            bound=memory,
        )


def _affine(hidden: int, width: int, bits: float, group: int = 64) -> int:
    """Bytes of an expert of three matrices, with a scale and a bias of 2 bytes for each group."""
    return int(3 * hidden * width * (bits / 8 + 4 / group))


# Trunks of the first two are those of the full-size stand-ins; the others are what a published
# checkpoint's size leaves beside its experts.
KNOWN_MODELS: tuple[KnownModel, ...] = (
    KnownModel(
        "Kimi K2.5 (4-bit)", "mlx-community/Kimi-K2.5", "kimi_k25",
        7_554_924_544, 734_003_200, 60, 384, 8, 27_525_120, 305_753_472, 2_400_000,
        exact=True,
    ),
    KnownModel(
        "Qwen3.5-397B-A17B (4-bit)", "mlx-community/Qwen3.5-397B-A17B-4bit", "qwen3_5_moe",
        5_579_065_472, 572_129_280, 60, 512, 10, _affine(4096, 1024, 4), 325_724_160, 6_480_000,
        exact=True,
    ),
    KnownModel(
        "DeepSeek V3.2 (4-bit)", "mlx-community/DeepSeek-V3.2-4bit", "deepseek_v32",
        10 * _GB, 521_000_000, 58, 256, 8, _affine(7168, 2048, 4), 350_000_000, 2_400_000,
    ),
    KnownModel(
        "Qwen3-235B-A22B (4-bit)", "mlx-community/Qwen3-235B-A22B-4bit", "qwen3_moe",
        4_500_000_000, 350_000_000, 94, 128, 8, _affine(4096, 1536, 4), 788_529_152, 3_000_000,
    ),
    KnownModel(
        "GLM-4.5-Air (4-bit)", "mlx-community/GLM-4.5-Air-4bit", "glm4_moe",
        4_100_000_000, 349_000_000, 45, 128, 8, _affine(4096, 1408, 4), 771_751_936, 3_000_000,
    ),
    KnownModel(
        "gpt-oss-120b (mxfp4)", "mlx-community/gpt-oss-120b-MXFP4-Q8", "gpt_oss",
        2_400_000_000, 616_000_000, 36, 128, 4, 3 * 2880 * 2880 * 17 // 32 + 17_280,
        170_000_000, 3_000_000,
    ),
    KnownModel(
        "Qwen3-Next-80B-A3B (4-bit)", "mlx-community/Qwen3-Next-80B-A3B-Instruct-4bit",
        "qwen3_next", 1_400_000_000, 175_000_000, 48, 512, 10, _affine(2048, 512, 4),
        180_000_000, 4_000_000,
    ),
    KnownModel(
        "Qwen3-30B-A3B (4-bit)", "mlx-community/Qwen3-30B-A3B-4bit", "qwen3_moe",
        900_000_000, 175_000_000, 48, 128, 8, _affine(2048, 768, 4), 402_653_184, 2_000_000,
    ),
)  # fmt: skip
"""Largest first."""


def known_model(model_type: str, layers: int) -> KnownModel | None:
    """The model of `KNOWN_MODELS` with this type and number of expert layers."""
    found = (m for m in KNOWN_MODELS if (m.model_type, m.layers) == (model_type, layers))
    return next(found, None)

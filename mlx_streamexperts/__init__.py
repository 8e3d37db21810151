"""Run Mixture-of-Experts models larger than memory: mlx-lm with experts streamed from disk."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._lazy import lazy_names
from ._open_files import keep_limits

if TYPE_CHECKING:
    from ._analysis.machines import RankPlan, plan_ranks
    from ._config import StreamConfig
    from ._errors import (
        BudgetError,
        CheckpointError,
        ExpertReadError,
        OtherThreadError,
        PassStoppedError,
        RankError,
        StreamError,
        TokenError,
        UnsupportedModelError,
    )
    from ._experts.stats import StreamStats
    from ._experts.stream import ExpertStream, stream
    from ._experts.trace import read_trace
    from ._loading.demo import demo_model
    from ._loading.load import load, patch, plan
    from ._memory.budget import Plan
    from ._prefixes.remembered import PrefixCache, prefill
    from ._progress import Progress

keep_limits()

__version__ = "0.2.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ExpertReadError",
    "ExpertStream",
    "OtherThreadError",
    "PassStoppedError",
    "Plan",
    "PrefixCache",
    "Progress",
    "RankError",
    "RankPlan",
    "StreamConfig",
    "StreamError",
    "StreamStats",
    "TokenError",
    "UnsupportedModelError",
    "demo_model",
    "load",
    "patch",
    "plan",
    "plan_ranks",
    "prefill",
    "read_trace",
    "stream",
]

_HOME = {
    "._analysis.machines": "RankPlan plan_ranks",
    "._config": "StreamConfig",
    "._errors": "BudgetError CheckpointError ExpertReadError OtherThreadError PassStoppedError "
    "RankError StreamError TokenError UnsupportedModelError",
    "._experts.stats": "StreamStats",
    "._experts.stream": "ExpertStream stream",
    "._experts.trace": "read_trace",
    "._loading.demo": "demo_model",
    "._loading.load": "load patch plan",
    "._memory.budget": "Plan",
    "._prefixes.remembered": "PrefixCache prefill",
    "._progress": "Progress",
}
"""Where each public name comes from."""


__getattr__, __dir__ = lazy_names(__name__, _HOME, "__version__")

"""Run Mixture-of-Experts models larger than memory: mlx-lm with experts streamed from disk."""

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

__version__ = "0.1.0"

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


def __dir__() -> list[str]:
    """The public names; modules of commands are imported by name."""
    return [*__all__, "__version__"]

"""Run Mixture-of-Experts models larger than memory: mlx-lm with experts streamed from disk."""

from .config import StreamConfig
from .demo import demo_model
from .errors import (
    BudgetError,
    CheckpointError,
    ExpertReadError,
    OtherThreadError,
    RankError,
    StreamError,
    TokenError,
    UnsupportedModelError,
)
from .machines import RankPlan, plan_ranks
from .patching import load, patch, plan
from .planner import Plan
from .stats import StreamStats
from .stream import ExpertStream, stream

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CheckpointError",
    "ExpertReadError",
    "ExpertStream",
    "OtherThreadError",
    "Plan",
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
    "stream",
]

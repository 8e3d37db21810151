"""Kept for scripts written for version 0.1: this now comes from `mlx_streamexperts.simulate`."""

from ._memory.hardware import NAMED_MACHINES

__all__ = ["NAMED_MACHINES"]

"""Kept for scripts written for version 0.1: `read_trace` now comes from `mlx_streamexperts`."""

from ._experts.trace import read_trace

__all__ = ["read_trace"]

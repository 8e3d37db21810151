"""Find the fastest settings for a model on this machine and your prompts."""

from __future__ import annotations

from .._lazy import lazy_names
from ._options import setup_arg_parser

__all__ = ["Runner", "Tuner", "Workload", "main", "setup_arg_parser", "space"]

__getattr__, __dir__ = lazy_names(
    __name__, {"._command": "Runner Tuner Workload space"}, "main setup_arg_parser"
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    setup_arg_parser().parse_args(argv)  # first: what follows imports mlx-lm, which takes a second
    from ._command import main as run

    return run(argv)

"""Find the fastest settings for a model on this machine and your prompts."""

from __future__ import annotations

from typing import Any

from ._options import setup_arg_parser

__all__ = ["Runner", "Tuner", "Workload", "main", "setup_arg_parser", "space"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    setup_arg_parser().parse_args(argv)  # first: what follows imports mlx-lm, which takes a second
    from ._command import main as run

    return run(argv)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from . import _command

    return getattr(_command, name)

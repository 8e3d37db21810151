"""Rewrites an original checkpoint once, into the form that this package streams."""

from __future__ import annotations

from .._lazy import lazy_names
from ._options import setup_arg_parser

__all__ = ["Options", "convert", "main", "setup_arg_parser"]

__getattr__, __dir__ = lazy_names(
    __name__, {"._command": "Options convert"}, "main setup_arg_parser"
)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    setup_arg_parser().parse_args(argv)  # first: what follows imports mlx-lm, which takes a second
    from ._command import main as run

    return run(argv)

"""Serve streamed models over HTTP."""

from __future__ import annotations

from ._options import setup_arg_parser

__all__ = ["main", "setup_arg_parser"]


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    setup_arg_parser().parse_args(argv)  # first: what follows imports mlx-lm, which takes a second
    from ._command import main as run

    return run(argv)

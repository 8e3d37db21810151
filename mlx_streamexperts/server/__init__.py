"""Serve streamed models over HTTP."""

from ._command import main, setup_arg_parser

__all__ = ["main", "setup_arg_parser"]

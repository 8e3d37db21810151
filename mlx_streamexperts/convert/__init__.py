"""Rewrites an original checkpoint once, into the form that this package streams."""

from ._command import convert, main, setup_arg_parser
from ._rewrite import Options

__all__ = ["Options", "convert", "main", "setup_arg_parser"]

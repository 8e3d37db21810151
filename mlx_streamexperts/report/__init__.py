"""Measure how a streamed model runs here, and write a page and a JSON file about it."""

from ._command import main, setup_arg_parser

__all__ = ["main", "setup_arg_parser"]

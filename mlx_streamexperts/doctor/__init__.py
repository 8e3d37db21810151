"""Will a model run on this machine, how fast, and what limits it?"""

from ._command import examine, main, setup_arg_parser

__all__ = ["examine", "main", "setup_arg_parser"]

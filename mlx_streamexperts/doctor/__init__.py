"""Will a model run on this machine, how fast, and what limits it?"""

from ._command import main, setup_arg_parser
from ._examination import examine

__all__ = ["examine", "main", "setup_arg_parser"]

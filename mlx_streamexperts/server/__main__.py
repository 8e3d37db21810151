"""Run the command: `python -m mlx_streamexperts.server`."""

import sys

from .._cli.options import ended
from . import main

if __name__ == "__main__":
    sys.exit(ended(main))

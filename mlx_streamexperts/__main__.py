"""The `streamexperts` command: finds the subcommand and runs it.

Each subcommand is a module or package beside this one, imported only when it is called.
"""

from __future__ import annotations

import difflib
import importlib
import sys

from ._cli.commands import COMMANDS

_HELP = """usage: streamexperts COMMAND [options]

Run Mixture-of-Experts models that are larger than memory: mlx-lm, with the experts on the drive.

commands:
{commands}

examples:
  streamexperts generate                 try the embedded model; nothing is downloaded
  streamexperts doctor --model ORG/MODEL --memory 90GB    before a download: will it fit, how fast
  streamexperts chat --model ORG/MODEL --memory 90GB      mlx_lm.chat with a memory budget
  streamexperts run --memory 90GB mlx_lm.perplexity --model ORG/MODEL    any other mlx-lm program

--memory limits everything that MLX holds, --cache only the experts in memory.
streamexperts COMMAND --help shows a command's options, streamexperts --version the version.
python -m mlx_streamexperts.COMMAND is the same as streamexperts COMMAND."""


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Returns its exit status, or 2 if there is no such command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "help"):
        lines = (f"  {name:12} {text}" for name, text in COMMANDS.items())
        print(_HELP.format(commands="\n".join(lines)))
        return 0
    if name in ("-V", "--version"):
        from . import __version__

        print(f"mlx-streamexperts {__version__}")
        return 0
    if name not in COMMANDS:
        alike = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {alike[0]}?" if alike else f"commands: {', '.join(COMMANDS)}"
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    try:
        from ._cli.options import ended
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        return 130
    return ended(lambda: int(importlib.import_module(f"{__package__}.{name}").main(rest) or 0))


if __name__ == "__main__":
    sys.exit(main())

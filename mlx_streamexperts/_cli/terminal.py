"""Prints the closing lines of a command: rows of a label and a text.

In a terminal they are a small table, if `rich` is installed (the `cli` extra; mlx-lm usually
brings it). In a file, a pipe or a dumb terminal, or with NO_COLOR set, they are plain lines.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TextIO

Row = tuple[str, str]

_BAR_WIDTH = 30


def print_rows(rows: Iterable[Row], title: str, file: TextIO | None = None) -> None:
    """Print rows to `file`, by default standard output. Only a table has the title."""
    file = sys.stdout if file is None else file
    if _draws(file):
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for label, text in rows:
            table.add_row(Text(label), Text(text))  # as Text: a name in brackets is not markup
        Console(file=file).print(table)
    else:
        print("\n".join(f"{label}: {text}" for label, text in rows), file=file, flush=True)


def bar(share: float) -> str:
    """A share between 0 and 1 as a percentage and a bar."""
    return f"{share:6.1%} " + "#" * round(_BAR_WIDTH * share)


def _draws(file: TextIO) -> bool:
    """Whether `file` is a terminal that shows more than plain text, and `rich` is installed."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not file.isatty():
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True

"""What command lines print at their end: rows of a label and a text.

A small table where a terminal is there and `rich` is installed (the `cli` extra; mlx-lm usually
brings it); plain lines in a file, a pipe, a dumb terminal, or where NO_COLOR is set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TextIO

Row = tuple[str, str]

_BAR_WIDTH = 30


def print_rows(rows: Iterable[Row], title: str, file: TextIO | None = None) -> None:
    """Print rows to `file`, standard output by default. Plain lines carry no title."""
    file = sys.stdout if file is None else file
    if draws(file):
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(title=title, title_justify="left", show_header=False, box=box.SIMPLE)
        table.add_column(style="bold", no_wrap=True)
        table.add_column()
        for label, text in rows:
            table.add_row(Text(label), Text(text))  # as Text: a name in brackets is no markup
        Console(file=file).print(table)
    else:
        print(plain(rows), file=file, flush=True)


def plain(rows: Iterable[Row]) -> str:
    """The rows as lines of text."""
    return "\n".join(f"{label}: {text}" for label, text in rows)


def bar(share: float) -> str:
    """A share of 0 to 1 as percentage and bar."""
    return f"{share:6.1%} " + "#" * round(_BAR_WIDTH * share)


def draws(file: TextIO) -> bool:
    """Is there a terminal that wants more than plain text, and something to draw with?"""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not file.isatty():
        return False
    try:
        import rich  # noqa: F401
    except ImportError:
        return False
    return True

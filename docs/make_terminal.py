"""Write docs/terminal.svg: two commands as they ran, line by line.

    python docs/make_terminal.py

The output is what the commands print here, wrapped at 100 columns. Nothing is typed by hand.
"""

from __future__ import annotations

import subprocess
import sys
import textwrap
from html import escape
from pathlib import Path

COMMANDS = (
    ("doctor", "--machine", "m4 pro 48"),
    ("generate", "--prompt", "In the beginning God created", "--max-tokens", "24"),
)
_WIDTH, _LINE, _CHAR = 100, 17, 7.8


def main() -> int:
    """Run the commands and draw what they print."""
    lines: list[tuple[str, bool]] = []
    for command in COMMANDS:
        words = [f'"{w}"' if " " in w else w for w in command]
        lines.append((f"$ streamexperts {' '.join(words)}", True))
        module = [sys.executable, "-m", f"mlx_streamexperts.{command[0]}", *command[1:]]
        out = subprocess.run(module, capture_output=True, text=True, check=True).stdout
        for line in out.splitlines():
            indent = " " * (len(line) - len(line.lstrip()) + 4)
            wrapped = textwrap.wrap(line, _WIDTH, subsequent_indent=indent) or [""]
            lines += [(part, False) for part in wrapped]
        lines.append(("", False))
    lines.pop()
    width, height = int(_WIDTH * _CHAR) + 32, _LINE * len(lines) + 28
    text = "\n".join(
        f'<text x="16" y="{24 + i * _LINE}" fill="{"#7ee787" if typed else "#e6edf3"}" '
        f'xml:space="preserve">{escape(line)}</text>'
        for i, (line, typed) in enumerate(lines)
    )
    (Path(__file__).parent / "terminal.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'font-family="ui-monospace, Menlo, Consolas, monospace" font-size="13">\n'
        f'<rect width="{width}" height="{height}" rx="8" fill="#0d1117"/>\n{text}\n</svg>\n'
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

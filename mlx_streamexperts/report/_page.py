"""A report's page and JSON file. The page loads nothing: styles and figures are in it."""

from __future__ import annotations

import io
import os
import re
from pathlib import Path
from typing import Any

from .._analysis.plots import pyplot
from .._config import format_size
from .._errors import StreamError
from .._io.output import whole, write_json
from ._captions import sentence
from ._figures import COLOURS, PANELS, STYLE, Panel, drawable, figure, measured

_TEMPLATE = Path(__file__).parent.parent / "data" / "report.html"
SECTIONS = {
    "speed": "Speed",
    "ssd": "The drive",
    "locality": "Locality",
    "power": "Power and heat",
    "quality": "Quality",
}
"""Sections with figures, and their titles; the method comes before, the limits after."""

UNFINISHED = "unfinished"
"""Name of what an ended run leaves, so that an earlier, whole report stays as it is."""


def check_libraries() -> None:
    """Find out before measuring whether a page can be made.

    Raises:
        StreamError: matplotlib or Jinja is missing.
    """
    pyplot()
    _template()


def write_page(report: dict[str, Any], folder: Path, name: str = "report") -> Path:
    """Write `report.json` and `report.html` into a folder, each whole or not at all.

    Returns:
        The page.

    Raises:
        StreamError: the folder cannot be written, or a library is missing.
    """
    page = folder / f"{name}.html"
    text = render(report)
    write_data(report, folder, name)
    try:
        with whole(page) as partial, partial.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise StreamError(f"{folder}: cannot write the report: {e.strerror}") from e
    return page


def write_data(report: dict[str, Any], folder: Path, name: str) -> None:
    """Only the JSON file.

    Raises:
        StreamError: the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{name}.json", report, indent=1)
    except OSError as e:
        raise StreamError(f"{folder}: cannot write the report: {e.strerror}") from e


def render(report: dict[str, Any]) -> str:
    """The page's HTML."""
    from markupsafe import Markup

    sections = []
    for key, title in SECTIONS.items():
        panels = [
            {
                "key": p.key,
                "title": p.title,
                "sentence": sentence(p.key, report)
                if measured(p, report)
                else "Not measured: the run ended before.",
                "svg": Markup(svg(p, report))
                if measured(p, report) and drawable(p, report)
                else None,
            }
            for p in PANELS
            if p.section == key
        ]
        sections.append({"key": key, "title": title, "panels": panels})
    return str(_template().render(report=report, sections=sections, size=format_size))


def svg(panel: Panel, report: dict[str, Any]) -> str:
    """One figure, in the page's colours, with identifiers of its own."""
    buffer = io.StringIO()
    with pyplot().rc_context(STYLE):  # saving makes ticks, and decides what becomes of text
        drawn = figure(panel, report)
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    pyplot().close(drawn)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.S)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{panel.key}-", text)
    for stand_in, colour in COLOURS.items():
        text = text.replace(stand_in, colour)
    label = sentence(panel.key, report).replace("&", "&amp;").replace('"', "&quot;")
    label = label.replace("<", "&lt;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _template() -> Any:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as e:
        raise StreamError("pages need jinja2: pip install 'mlx-streamexperts[report]'") from e
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    environment.filters["g"] = lambda x, digits=3: f"{x:.{digits}g}"
    return environment.from_string(_TEMPLATE.read_text())

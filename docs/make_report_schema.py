"""Write docs/report-schema.md from the JSON schema of reports: `python docs/make_report_schema.py`.

A test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx_streamexperts

PAGE = Path(__file__).parent / "report-schema.md"
SCHEMA = Path(mlx_streamexperts.__file__).parent / "data" / "report-schema.json"
_HEAD = """# The report's JSON

`python -m mlx_streamexperts.report` writes `report.json` beside its page; this is what each field
holds. The [JSON schema](../mlx_streamexperts/data/report-schema.json) says the same to programs,
and this page is written from it by [make_report_schema.py](make_report_schema.py). Sizes are bytes,
times seconds, shares 0 to 1. `version` rises when a field goes or changes its meaning; new ones may
come without. *Repeats* are `median`, `low`, `high` and `values`, each repeat in order. Nothing in
it names a user, a path or a host.

| field | type | what |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    return _HEAD + "".join(_rows(json.loads(SCHEMA.read_text()), "")) + _TAIL


_TAIL = """
Reports made with this version are in [report/](report/README.md).
"""


def _rows(schema: dict[str, Any], path: str) -> Iterator[str]:
    for name, field in schema.get("properties", {}).items():
        here = f"{path}{name}"
        text = field.get("description", "").replace("|", "&#124;")
        yield f"| `{here}` | {_kind(field)} | {text} |\n"
        inner = next((x for x in field.get("anyOf", ()) if "properties" in x), field)
        if inner.get("type") == "array":
            inner, here = inner["items"], here + "[]"
        yield from _rows(inner, here + ".")


def _kind(field: dict[str, Any]) -> str:
    if "allOf" in field:
        return "repeats"
    if "anyOf" in field:
        return " or ".join(_kind(x) for x in field["anyOf"])
    if "const" in field:
        return f"`{json.dumps(field['const'])}`"
    if "enum" in field:
        return " or ".join(f"`{x}`" for x in field["enum"])
    if field["type"] == "array":
        return f"list of {_kind(field['items'])}"
    return str(field["type"])


if __name__ == "__main__":
    PAGE.write_text(page())

"""The prompts of a report: shipped, so that machines can be compared.

They cover several tasks and languages.
"""

from __future__ import annotations

import json
from typing import Any

from .._analysis.quality import DATA
from ._report import Kind


class Prompt(Kind):
    tokens: list[int]  # of the model's own tokenizer


def report_prompts(tokenizer: Any, count: int | None = None) -> list[Prompt]:
    """The shipped prompts, at most `count` of them, spread over tasks and languages."""
    texts = json.loads((DATA / "report-prompts.json").read_text())
    if count is not None:
        count = max(1, min(count, len(texts)))
        texts = [texts[i * len(texts) // count] for i in range(count)]
    return [Prompt(t["task"], t["language"], tokenizer.encode(t["text"])) for t in texts]

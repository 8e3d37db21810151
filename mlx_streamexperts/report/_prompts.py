"""The prompts and the small task of a report: shipped, so that machines can be compared.

The prompts cover several tasks and languages. Each item of the task is a context and two ways to go
on, one of them right; the model's answer is the one that it finds likelier.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ._report import Kind, Record

DATA = Path(__file__).parent.parent / "data"


class Prompt(Kind):
    tokens: list[int]  # of the model's own tokenizer


class Choice(Record):
    """One item of the task, as tokens; `right` is an index into `choices`."""

    context: list[int]
    choices: list[list[int]]
    right: int


def report_prompts(tokenizer: Any, count: int | None = None) -> list[Prompt]:
    """The shipped prompts, at most `count` of them, spread over tasks and languages."""
    texts = json.loads((DATA / "report-prompts.json").read_text())
    if count is not None:
        count = max(1, min(count, len(texts)))
        texts = [texts[i * len(texts) // count] for i in range(count)]
    return [Prompt(t["task"], t["language"], tokenizer.encode(t["text"])) for t in texts]


def report_choices(tokenizer: Any, count: int | None = None) -> list[Choice]:
    """The shipped task, at most its first `count` items."""
    items = []
    for x in json.loads((DATA / "report-tasks.json").read_text())[:count]:
        choices = [list(tokenizer.encode(t, add_special_tokens=False)) for t in x["choices"]]
        items.append(Choice(tokenizer.encode(x["context"]), choices, x["right"]))
    return items

"""The prompts and the small task that a report uses: shipped, so that machines can be compared.

The prompts are of several tasks and languages and were written for this. Each item of the task is a
context and two ways to go on, of which one is right; whatever the model finds likelier is its
answer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_DATA = Path(__file__).parent.parent / "data"


@dataclass(frozen=True)
class Prompt:
    """A text to go on with.

    Attributes:
        task: "prose", "code" and so on.
        language: "English", "Python" and so on.
        tokens: of the text, by the model's own tokenizer.
    """

    task: str
    language: str
    tokens: list[int]

    @property
    def name(self) -> str:
        return f"{self.task}, {self.language}"


@dataclass(frozen=True)
class Choice:
    """One item of the task: tokens of a context, and of what might follow."""

    task: str
    context: list[int]
    choices: list[list[int]]
    right: int


def report_prompts(tokenizer: Any, count: int | None = None) -> list[Prompt]:
    """The shipped prompts, at most `count` of them, spread over tasks and languages."""
    texts = json.loads((_DATA / "report-prompts.json").read_text())
    if count is not None:
        count = max(1, min(count, len(texts)))
        texts = [texts[i * len(texts) // count] for i in range(count)]
    return [Prompt(t["task"], t["language"], tokenizer.encode(t["text"])) for t in texts]


def report_choices(tokenizer: Any, count: int | None = None) -> list[Choice]:
    """The shipped task, at most its first `count` items."""
    items = json.loads((_DATA / "report-tasks.json").read_text())[:count]

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    return [
        Choice(x["task"], tokenizer.encode(x["context"]), [*map(encode, x["choices"])], x["right"])
        for x in items
    ]

"""Tool calls: what a model has written between the markers of one, as name and arguments.

mlx-lm's parsers read them. Some take half a call for a whole one, so what they are given is looked
at first. Nothing here looks for markers in a reply.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# What begins a part of a call, and what ends it, by the name of the parser that drops such a part,
# or calls without it, if its end is missing.
_PARTS = {
    "glm47": ("<arg_key>", "</arg_value>"),
    "kimi_k2": ("<|tool_call_begin|>", "<|tool_call_end|>"),
    "kimi_k3": ("<|open|>call", "<|close|>call"),
    "longcat": ("<longcat_arg_key>", "</longcat_arg_value>"),
    "minicpm5": ("<param ", "</param>"),
    "minimax_m2": ("<invoke ", "</invoke>"),
    "muse_spark": ("<atem:parameter ", "</atem:parameter>"),
    "qwen3_coder": ("<parameter=", "</parameter>"),
}

# How calls begin after their marker and white space, for parsers that look for one anywhere. What
# begins otherwise is a text about the marker.
_BEGINNINGS = {
    "function_gemma": ("call:",),
    "gemma4": ("call:",),
    "json_tools": ("{", "["),
    "kimi_k2": ("<|tool_call_begin|>", "functions."),
    "kimi_k3": ("<|open|>call",),
    "minimax_m2": ("<invoke ",),
    "muse_spark": ("<atem:invoke ",),
    "pythonic": ("[",),
    "qwen3_coder": ("<function=",),
}


@dataclass(frozen=True)
class Call:
    """A tool call that the model has made.

    Attributes:
        id: the model's own if its calls have one, else a new one.
        name: of the function.
        arguments: a JSON object; NaN and infinities, which JSON has not, make a call text.
    """

    id: str
    name: str
    arguments: str


class CallParser:
    """Reads the calls of a request's replies.

    Args:
        parser: mlx-lm's, of the model.
        tools: the request's, from which parsers take the types of arguments.
        end: the marker that ends a call; "" if only the reply's end does.
    """

    def __init__(self, parser: Callable[[str, Any], Any], tools: list[Any], end: str) -> None:
        self._parser, self._tools, self.end = parser, tools, end
        self._names = {t["function"]["name"] for t in tools}
        name = parser.__module__.rpartition(".")[2]
        self._part, self._beginnings = _PARTS.get(name), _BEGINNINGS.get(name, ("",))

    def begins(self, text: str) -> bool | None:
        """Whether a text begins as calls do, between their markers; None: too short to tell."""
        text = text.lstrip()
        if text.startswith(self._beginnings):
            return True
        return None if any(b.startswith(text) for b in self._beginnings) else False

    def parse(self, text: str, ended: bool) -> list[Call]:
        """The calls in a text; none if it is not a whole call, and nothing but that.

        Args:
            text: what stands between the markers.
            ended: whether the marker that ends a call has come.
        """
        if self._part is not None and text.rfind(self._part[0]) > text.rfind(self._part[1]):
            return []
        try:
            parsed: Any = self._parser(text, self._tools)
            found = parsed if isinstance(parsed, list) else [parsed]
            calls = [_call(f, self._names) for f in found]
        except Exception:  # whatever a parser meets in text that a model wrote
            return []
        if self.end and not ended:  # GLM's parser takes any words for a call
            return calls if all(c.name in self._names for c in calls) else []
        return calls


def _call(found: dict[str, Any], names: set[str]) -> Call:
    """What a parser has found, given the names of tools; raises for what is no call."""
    name, arguments = found["name"], found["arguments"]
    if name not in names and not re.fullmatch(r"[\w.:-]+", name):
        raise ValueError("names are single words")
    if isinstance(arguments, str):  # models write JSON within JSON; Kimi's parser gives broken JSON
        arguments = json.loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise TypeError("arguments are an object")
    return Call(
        id=str(found.get("id") or f"call_{uuid.uuid4().hex[:24]}"),
        name=name,
        arguments=json.dumps(arguments, ensure_ascii=False, allow_nan=False),
    )

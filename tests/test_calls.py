"""Tool calls in the words of mlx-lm's parsers: whole ones are calls, and nothing else is."""

from __future__ import annotations

import importlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm.generate import TextStateMachine

from mlx_streamexperts.server._replies import Piece, Reply

PROPERTIES = {"path": {"type": "string"}, "content": {"type": "string"}}
PARAMETERS = {"type": "object", "properties": PROPERTIES, "required": ["path", "content"]}
TOOLS = [{"type": "function", "function": {"name": "write", "parameters": PARAMETERS}}]
JSON = '{"path": "/x", "content": "CONTENT"}'
WRITTEN = {
    "function_gemma": "<start_function_call>call:write{path:<escape>/x<escape>,"
    "content:<escape>CONTENT<escape>}<end_function_call>",
    "gemma4": '<|tool_call>call:write{path:<|"|>/x<|"|>,content:<|"|>CONTENT<|"|>}<tool_call|>',
    "glm47": "<tool_call>write<arg_key>path</arg_key><arg_value>/x</arg_value>"
    "<arg_key>content</arg_key><arg_value>CONTENT</arg_value></tool_call>",
    "json_tools": '<tool_call>\n{"name": "write", "arguments": ' + JSON + "}\n</tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.write:0"
    "<|tool_call_argument_begin|>" + JSON + "<|tool_call_end|><|tool_calls_section_end|>",
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="write" index="1"<|sep|>'
    '<|open|>argument key="path" type="string"<|sep|>/x<|close|>argument<|sep|>'
    '<|open|>argument key="content" type="string"<|sep|>CONTENT<|close|>argument<|sep|>'
    "<|close|>call<|sep|><|close|>tools<|sep|>",
    "longcat": "<longcat_tool_call>write\n<longcat_arg_key>path</longcat_arg_key>\n"
    "<longcat_arg_value>/x</longcat_arg_value>\n<longcat_arg_key>content</longcat_arg_key>\n"
    "<longcat_arg_value>CONTENT</longcat_arg_value>\n</longcat_tool_call>",
    "minicpm5": '<function name="write"><param name="path">/x</param>'
    '<param name="content">CONTENT</param></function>',
    "minimax_m2": '<minimax:tool_call>\n<invoke name="write">\n'
    '<parameter name="path">/x</parameter>\n<parameter name="content">CONTENT</parameter>\n'
    "</invoke>\n</minimax:tool_call>",
    "mistral": "[TOOL_CALLS]write[ARGS]" + JSON,
    "muse_spark": '<atem:function_calls>\n<atem:invoke name="write">\n'
    '<atem:parameter name="path">/x</atem:parameter>\n'
    '<atem:parameter name="content">CONTENT</atem:parameter>\n'
    "</atem:invoke>\n</atem:function_calls>",
    "pythonic": '<|tool_call_start|>[write(path="/x", content="CONTENT")]<|tool_call_end|>',
    "qwen3_coder": "<tool_call>\n<function=write>\n<parameter=path>\n/x\n</parameter>\n"
    "<parameter=content>\nCONTENT\n</parameter>\n</function>\n</tool_call>",
}
WRITTEN["laguna"] = WRITTEN["glm47"]


def replied(
    parser: str, text: str, *, reason: str = "stop", stops: tuple[str, ...] = (), **options: Any
) -> Piece:
    """What this text becomes for a model that thinks and has this parser."""
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    begin, end = module.tool_call_start, module.tool_call_end
    states = {
        "normal": [("<think>", "reasoning"), (begin, "tool")],
        "reasoning": [("</think>", "normal"), (begin, "tool")],
        "tool": [(end, "normal")] if end else [],
    }
    context = SimpleNamespace(
        text_sm=TextStateMachine(states), initial_state="normal", tool_parser=module.parse_tool_call
    )
    found = []
    for texts in (list(text), [text]):  # streamed in single characters, and at once
        responses = [SimpleNamespace(text=t, token=1, finish_reason=None) for t in texts]
        responses.append(SimpleNamespace(text="", token=0, finish_reason=reason))
        total = Piece()
        for piece in Reply(context, stops, None, TOOLS, (begin, end), **options).pieces(responses):
            total += piece
        found.append(total)
    one, other = found
    assert (one.text, one.reasoning, called(one)) == (other.text, other.reasoning, called(other))
    return one


def called(piece: Piece) -> list[tuple[str, Any]]:
    return [(c.name, json.loads(c.arguments)) for c in piece.calls]


def write(content: str) -> tuple[str, Any]:
    return "write", {"path": "/x", "content": content}


@pytest.mark.parametrize("parser", sorted(WRITTEN))
def test_a_call_that_is_cut_is_text(parser: str) -> None:
    """By `max_tokens` or a stop string, wherever; some parsers take half a call for a whole one."""
    text = WRITTEN[parser].replace("CONTENT", "half STOP of it")
    whole = replied(parser, text)
    assert (called(whole), whole.text) == ([write("half STOP of it")], "")
    assert whole.finish_reason == "tool_calls"
    for at in range(1, len(text), 2):
        cut = replied(parser, text[:at], reason="length")
        assert (called(cut), cut.text, cut.finish_reason) == ([], text[:at], "length")
    cut = replied(parser, text, stops=("STOP",))
    assert (called(cut), cut.text, cut.finish_reason) == ([], text[: text.index("STOP")], "stop")

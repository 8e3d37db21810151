"""Requests of the shapes that coding agents send, turn after turn through the official clients.

The shapes follow the clients' public documentation: a system prompt in parts, tools with nested
schemas, calls and their results in the conversation, fields of their own. They are shorter: to the
tiny model a character is a token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import mlx.core as mx
import openai
import pytest
from serving import Running, call, chatting, dictated, prompts, serving

SYSTEM = "You are a coding agent. Prefer small changes. Never guess a path.\n" * 6
NAMES = ("read", "edit", "bash")
SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {
        "path": {"type": "string", "description": "An absolute path, not a relative one."},
        "edits": {
            "type": "array",
            "items": {"type": "object", "properties": {"old": {"type": "string"}}},
        },
        "limit": {"type": ["number", "null"], "default": None},
    },
    "required": ["path"],
    "additionalProperties": False,
}
ABOUT = "Does what its name says. Use it rather than the shell. "
FILE = '1  def f():\n2      return "<tool>"\n'
TURNS = ('I read it.\n' + call("read", path="/a.py"), "It returns a string.")  # fmt: skip


@pytest.fixture(scope="module")
def running(checkpoint: Callable[..., Path]) -> Iterator[Running]:
    mx.disable_compile()
    folder = chatting(checkpoint("qwen3_moe", seed=7))
    with serving("--model", str(folder), "--cache", "4MB", "--context-tokens", "8192") as running:
        yield running
    mx.enable_compile()


@pytest.fixture
def seen(running: Running, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return prompts(running, monkeypatch)


def check_prompts(seen: list[str]) -> None:
    """The second prompt goes on where the first one ended, with the call and its result."""
    first, second = seen[-2:]
    assert all(f'"name": "{name}"' in first for name in NAMES) and SYSTEM.strip() in first
    assert second.startswith(first[: first.rindex("<|im_start|>assistant")])
    assert call("read", path="/a.py") in second and FILE.strip() in second


def test_messages_as_claude_code_sends_them(
    running: Running, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = anthropic.Anthropic(base_url=running.url, api_key="a", max_retries=0, timeout=60)
    kept: Any = {"cache_control": {"type": "ephemeral"}}
    billing = "x-anthropic-billing-header: cc_version=2.0; cch="
    messages: list[Any] = [
        {"role": "user", "content": [
            {"type": "text", "text": "<system-reminder>\nNothing.\n</system-reminder>"},
            {"type": "text", "text": "What does a.py do?", **kept},
        ]},
    ]  # fmt: skip
    cached = []
    for turn, text in enumerate(TURNS):
        dictated(monkeypatch, text)
        with client.messages.stream(
            model="default_model",
            max_tokens=4000,
            system=[
                {"type": "text", "text": f"{billing}{turn}"},
                {"type": "text", "text": SYSTEM, **kept},
            ],
            tools=[{"name": n, "description": ABOUT, "input_schema": SCHEMA} for n in NAMES],
            messages=messages,
            metadata={"user_id": "user_1_account__session_2"},
            thinking={"type": "enabled", "budget_tokens": 3999},
            extra_body={"context_management": {
                "edits": [{"type": "clear_thinking_20251015", "keep": "all"}],
            }},
            extra_query={"beta": "true"},
            extra_headers={"anthropic-beta": "interleaved-thinking-2025-05-14"},
        ) as stream:  # fmt: skip
            said = stream.get_final_message()
        cached.append(said.usage.cache_read_input_tokens or 0)
        content = [block.model_dump(exclude_none=True) for block in said.content]
        messages.append({"role": "assistant", "content": content})
        if turn == 0:
            assert said.stop_reason == "tool_use"
            assert said.content[-1].type == "tool_use"
            assert (said.content[-1].name, said.content[-1].input) == ("read", {"path": "/a.py"})
            result = {"type": "tool_result", "tool_use_id": said.content[-1].id, "content": [
                {"type": "text", "text": FILE},
            ], **kept}  # fmt: skip
            messages.append({"role": "user", "content": [result]})
    assert said.stop_reason == "end_turn" and content[-1]["text"] == TURNS[1]
    assert cached[1] > len(SYSTEM)  # a token is a character
    check_prompts(seen)


def test_chats_as_opencode_sends_them(
    running: Running, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[Any] = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": [{"type": "text", "text": "What does a.py do?"}]},
    ]
    tools: Any = [
        {"type": "function", "function": {"name": n, "description": ABOUT, "parameters": SCHEMA}}
        for n in NAMES
    ]
    for turn, text in enumerate(TURNS):
        dictated(monkeypatch, text)
        content, calls, usage = "", [], None
        for event in running.client().chat.completions.create(
            model="default_model", messages=messages, tools=tools, tool_choice="auto",
            max_tokens=32_000, stream=True, stream_options={"include_usage": True},
        ):  # fmt: skip
            usage = event.usage or usage
            for choice in event.choices:
                content += choice.delta.content or ""
                calls += choice.delta.tool_calls or []
        assert usage is not None and usage.prompt_tokens_details is not None
        if turn == 0:
            (made,) = calls
            assert json.loads(made.function.arguments) == {"path": "/a.py"}
            function = made.function.model_dump()
            messages += [
                {"role": "assistant", "content": content, "tool_calls": [
                    {"id": made.id, "type": "function", "function": function}]},
                {"role": "tool", "tool_call_id": made.id, "content": FILE},
            ]  # fmt: skip
    assert content == TURNS[1] and not calls
    assert (usage.prompt_tokens_details.cached_tokens or 0) > len(SYSTEM)
    check_prompts(seen)


def test_responses_as_codex_sends_them(
    running: Running, seen: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    items: list[Any] = [
        {"type": "message", "role": "user", "content": [
            {"type": "input_text", "text": "What does a.py do?"}]},
    ]  # fmt: skip
    tools: Any = [
        {"type": "function", "name": n, "description": ABOUT, "strict": False, "parameters": SCHEMA}
        for n in NAMES
    ]
    said: openai.types.responses.Response | None = None
    for text in TURNS:
        dictated(monkeypatch, text)
        with running.client().responses.stream(
            model="default_model", instructions=SYSTEM, input=items, tools=tools, store=False,
            tool_choice="auto", parallel_tool_calls=False, prompt_cache_key="a",
            reasoning={"effort": "medium", "summary": "auto"},
            include=["reasoning.encrypted_content"],
        ) as stream:  # fmt: skip
            said = stream.get_final_response()
        items += [item.model_dump(exclude_none=True) for item in said.output]
        if said.output[-1].type == "function_call":
            assert json.loads(said.output[-1].arguments) == {"path": "/a.py"}
            called = said.output[-1].call_id
            items.append({"type": "function_call_output", "call_id": called, "output": FILE})
    assert said is not None and said.output_text == TURNS[1] and said.usage is not None
    assert said.usage.input_tokens_details.cached_tokens > len(SYSTEM)
    check_prompts(seen)

"""Ollama's API through its own client: chats, and what it says of models."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import ollama
import pytest
from serving import Running, call, chatting, dictated, prompts, serving

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
MESSAGES: Any = [{"role": "user", "content": "Weather?"}]
OSLO = call("weather", city="Oslo")


@pytest.fixture(scope="module")
def running(checkpoint: Callable[..., Path]) -> Iterator[Running]:
    mx.disable_compile()
    folder = chatting(checkpoint("qwen3_moe", seed=7))
    with serving("--cache", "4MB", "--model", str(folder)) as running:
        yield running
    mx.enable_compile()


@pytest.fixture(scope="module")
def client(running: Running) -> ollama.Client:
    return ollama.Client(running.url, timeout=60)


def chat(client: ollama.Client, **options: Any) -> Any:
    """A reply; streamed it must be the same."""
    options = {"model": "default_model", "messages": MESSAGES, **options}
    whole = client.chat(**options)
    text = thinking = ""
    calls: list[Any] = []
    for part in client.chat(**options, stream=True):
        text += part.message.content or ""
        thinking += part.message.thinking or ""
        calls += part.message.tool_calls or []
    assert text == whole.message.content
    assert thinking == (whole.message.thinking or "")
    assert [c.function for c in calls] == [c.function for c in whole.message.tool_calls or []]
    assert (part.done, part.done_reason) == (True, whole.done_reason)
    assert (part.eval_count, part.prompt_eval_count) == (whole.eval_count, whole.prompt_eval_count)
    assert min(part.eval_duration, whole.eval_duration) > 0  # clients divide by it
    return whole


def test_text_is_that_of_a_chat(running: Running, client: ollama.Client) -> None:
    said = chat(client, options={"num_predict": 9, "temperature": 0, "num_ctx": 512}, think=False)
    body = {
        "messages": MESSAGES, "max_tokens": 9, "chat_template_kwargs": {"enable_thinking": False}
    }  # fmt: skip
    expected = running.post(body, "/v1/chat/completions")[1]
    assert said.message.content == expected["choices"][0]["message"]["content"]
    assert (said.done_reason, said.eval_count) == ("length", 9)
    assert said.prompt_eval_count == expected["usage"]["prompt_tokens"]


def test_a_conversation_with_thinking_and_tools(
    running: Running, client: ollama.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictated(monkeypatch, f"<think>Hm.</think>I look.{OSLO}")
    said = chat(client, tools=[TOOL]).message
    assert (said.thinking, said.content) == ("Hm.", "I look.")
    assert [c.function.arguments for c in said.tool_calls] == [{"city": "Oslo"}]
    dictated(monkeypatch, "Sun.")
    seen = prompts(running, monkeypatch)
    result = {"role": "tool", "tool_name": "weather", "content": "sunny"}
    assert chat(client, messages=[*MESSAGES, said, result]).message.content == "Sun."
    assert f"<think>\nHm.\n</think>\n\nI look.\n{OSLO}<|im_end|>" in seen[0]
    assert "<tool_response>\nsunny\n</tool_response>" in seen[0]


def test_a_format_is_kept(client: ollama.Client) -> None:
    said = chat(client, format=CITY, think=False, options={"num_predict": 200, "temperature": 0})
    assert json.loads(said.message.content)["city"] in ("Oslo", "Rome")


def test_what_it_says_of_models(running: Running, client: ollama.Client) -> None:
    [model] = client.list().models
    assert model.size > 0
    shown = client.show(f"{model.model}:latest")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert "<|im_start|>" in shown.template
    assert shown.modelinfo == {"general.architecture": "qwen3_moe"}
    assert chat(client, model=f"{model.model}:latest", options={"num_predict": 1}).done
    assert json.loads(running.request("GET", "/api/version")[2])["version"]


def test_errors_have_ollamas_form(running: Running, client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError) as e:
        client.show("other")
    assert e.value.status_code == 404
    wrong: tuple[Any, ...] = (
        {"model": 1}, {"messages": 1}, {"messages": [1]}, {"messages": []},
        {"options": {"tfs_z": 1}},
        {"messages": [{"role": "user", "content": 1}]}, {"format": "xml"}, {"think": 1},
        {"messages": [{"role": "user", "images": [1]}]}, {"logprobs": True}, {"template": "a"},
        {"messages": [{"role": "assistant", "tool_calls": [{}]}]}, {"options": {"seed": "a"}},
        {"options": {"num_predict": "a"}}, {"tools": [1]}, {"options": {"stop": [1]}},
        {"options": {"min_p": 5}}, {"format": {"type": "other"}},
        {"messages": [{"role": "assistant", "tool_calls": [
            {"id": 5, "function": {"name": "a", "arguments": {}}},
        ]}, *MESSAGES]},
        {"messages": [*MESSAGES, {"role": "assistant", "content": "{"}]},
    )  # fmt: skip
    for fields in wrong:
        status, answer = running.post(
            {"model": "default_model", "messages": MESSAGES, **fields}, "/api/chat"
        )
        assert (status, answer.keys()) == (400, {"error"}), fields
        assert next(iter(fields)) in answer["error"]
    for name in (None, 5, ["demo"]):
        assert running.post({"model": name}, "/api/show")[0] == 400

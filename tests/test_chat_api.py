"""Chat completions and completions through OpenAI's client: tools, reasoning, formats, choices."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import mlx.core as mx
import openai
import pytest
from conftest import until
from serving import Running, call, chatting, dictated, prompts, serving

from mlx_streamexperts._structured import constraint
from mlx_streamexperts.server._generation import Client, stock

MESSAGES: Any = [{"role": "user", "content": "Weather?"}]
CITY = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
AT_ONCE = {"chat_template_kwargs": {"enable_thinking": False}}
"""Random weights never end their reasoning."""
OSLO, ROME = (call("weather", city=city, days=2) for city in ("Oslo", "Rome"))
SCHEMA: Any = {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY, "strict": True}}


def tool(name: str) -> Any:
    return {"type": "function", "function": {"name": name, "parameters": CITY}}


@pytest.fixture(scope="module")
def running(checkpoint: Callable[..., Path]) -> Iterator[Running]:
    mx.disable_compile()
    folder = chatting(checkpoint("qwen3_moe", seed=7))
    with serving("--cache", "4MB", "--model", str(folder), "--max-tokens", "400") as running:
        yield running
    mx.enable_compile()


def chat(running: Running, **options: Any) -> Any:
    """The message and finish reason of one reply: whole, which a stream's sum must be."""
    options = {"model": "default_model", "messages": MESSAGES, **options}
    client = running.client()
    whole = client.chat.completions.create(**options).choices[0]
    text = reasoning = ""
    calls: list[dict[str, Any]] = []
    for piece in client.chat.completions.create(**options, stream=True):
        [choice] = piece.choices
        text += choice.delta.content or ""
        reasoning += getattr(choice.delta, "reasoning_content", None) or ""
        for c in choice.delta.tool_calls or []:
            assert c.index == len(calls)  # each comes whole
            assert c.id
            calls.append({"name": c.function.name, "arguments": json.loads(c.function.arguments)})
    message = whole.message
    assert choice.finish_reason == whole.finish_reason
    assert text == (message.content or "")
    assert reasoning == getattr(message, "reasoning_content", "")
    assert calls == [
        {"name": c.function.name, "arguments": json.loads(c.function.arguments)}
        for c in message.tool_calls or []
    ]
    return message, whole.finish_reason, calls


def test_reasoning_text_and_parallel_calls(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictated(
        monkeypatch,
        f"<think>Two.</think>I look.{OSLO}\n{ROME}",
    )
    message, reason, calls = chat(running, tools=[tool("weather")])
    assert (message.reasoning_content, message.content.strip()) == ("Two.", "I look.")
    assert message.reasoning == message.reasoning_content
    assert [c["arguments"]["city"] for c in calls] == ["Oslo", "Rome"]
    assert len({c.id for c in message.tool_calls}) == 2
    assert reason == "tool_calls"
    _, reason, calls = chat(running, tools=[tool("weather")], parallel_tool_calls=False)
    assert ([c["arguments"]["city"] for c in calls], reason) == (["Oslo"], "tool_calls")


def test_a_call_whose_text_breaks_off_is_text(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictated(monkeypatch, OSLO[:40])
    message, reason, calls = chat(running, tools=[tool("weather")])
    assert (message.content, reason, calls) == (
        OSLO[:40],
        "stop",
        [],
    )


def test_a_request_without_tools_gets_no_calls(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictated(monkeypatch, OSLO)
    for options in ({}, {"tools": [tool("weather")], "tool_choice": "none"}):
        message, reason, calls = chat(running, **options)
        assert (message.content, reason, calls) == (OSLO, "stop", [])


def test_a_conversation_with_tools_goes_on(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    dictated(monkeypatch, f"<think>Hm.</think>{OSLO}")
    message, _, _ = chat(running, tools=[tool("weather")])
    dictated(monkeypatch, "Sun.")
    seen = prompts(running, monkeypatch)
    said = message.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    developer = {"role": "developer", "content": "Be brief."}
    chat(running, tools=[tool("weather")], messages=[developer, *MESSAGES, said, result])
    assert "system\nBe brief." in seen[0]
    assert f"<think>\nHm.\n</think>\n\n\n{OSLO}<|im_end|>" in seen[0]
    assert "<tool_response>\nsunny\n</tool_response>" in seen[0]


@pytest.mark.parametrize("sampled", [{}, {"temperature": 2.0, "seed": 3}])
def test_a_call_can_be_required(running: Running, sampled: dict[str, Any]) -> None:
    """The tiny model's weights are random: only the grammar makes its calls."""
    tools = [tool("weather"), tool("news")]
    options = {"tools": tools, "max_tokens": 400, "extra_body": AT_ONCE, **sampled}
    _, reason, calls = chat(running, tool_choice="required", parallel_tool_calls=False, **options)
    assert (len(calls), reason) == (1, "tool_calls")
    for name in ("weather", "news"):
        choice: Any = {"type": "function", "function": {"name": name}}
        message, reason, calls = chat(
            running, tool_choice=choice, parallel_tool_calls=False, **options
        )
        assert (calls[0]["name"], reason) == (name, "tool_calls")
        assert calls[0]["arguments"].keys() == {"city", "days"}
        assert not (message.content or "").strip()


def test_a_reply_has_the_format_that_was_asked_for(running: Running) -> None:
    options = {"max_tokens": 400, "extra_body": AT_ONCE}
    message, reason, _ = chat(running, response_format=SCHEMA, logprobs=True, **options)
    found = json.loads(message.content)
    assert found["city"] in ("Oslo", "Rome")
    assert found["days"] in range(10)
    assert reason == "stop"
    either = {"response_format": SCHEMA, "tools": [tool("weather")], **options}
    message, reason, calls = chat(running, **either)  # an answer or a call
    said = calls[0]["arguments"] if calls else json.loads(message.content)
    assert said.keys() == {"city", "days"}
    message, _, _ = chat(
        running,
        response_format={"type": "json_object"},
        top_logprobs=3,
        logprobs=True,
        **options | {"max_tokens": 20},
    )
    assert message.content.lstrip().startswith("{")


def test_reasoning_comes_before_the_format(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any text, and only there: the script goes on with what the grammar refuses."""
    reasoning = "{x} <b>Oslo</b> <tool_call> </think> x"  # letters: no token ends it there
    script = ["<think>", *reasoning, "</think>\n\n{"]
    tokenizer = running.generator.model_provider.tokenizer

    def make(args: Any, tokenizer: Any) -> Any:
        left = iter([t for part in script for t in tokenizer.encode(part)])

        def sampler(logprobs: mx.array) -> mx.array:
            wanted = next(left, None)
            if wanted is None:
                return mx.argmax(logprobs, axis=-1)
            assert logprobs[0, wanted].item() > -mx.inf
            return mx.array([wanted])

        return sampler

    monkeypatch.setattr(stock, "_make_sampler", make)
    message, reason, _ = chat(running, response_format=SCHEMA, max_tokens=300)
    assert message.reasoning_content == reasoning
    assert json.loads(message.content)["city"] in ("Oslo", "Rome")
    assert reason == "stop"
    assert tokenizer.has_thinking


def test_formats_hold_in_batches_and_change_no_other_reply(running: Running) -> None:
    plain = running.text("The river", 30)
    body = {
        "messages": MESSAGES, "response_format": SCHEMA, "max_tokens": 300,
        **AT_ONCE,
    }  # fmt: skip
    path = "/v1/chat/completions"
    alone = running.post(body, path)[1]["choices"][0]["message"]["content"]
    with ThreadPoolExecutor(4) as pool:
        formed = [pool.submit(running.post, body, path) for _ in range(2)]
        others = [pool.submit(running.text, "The river", 30) for _ in range(2)]
    assert [f.result()[1]["choices"][0]["message"]["content"] for f in formed] == [alone] * 2
    assert [o.result() for o in others] == [plain] * 2


def test_a_format_that_nobody_can_hold_ends_its_own_reply(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Any, count: int) -> Any:
        if self._constraint.error is None:
            self._fail()
        return original(self, count)

    original = constraint.Processor._allowed
    monkeypatch.setattr(constraint.Processor, "_allowed", fails)
    with pytest.raises(openai.BadRequestError) as e:
        chat(running, response_format={"type": "json_object"})
    assert e.value.param == "response_format"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [tool("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
            "response_format",
        ),
    ],
)
def test_what_cannot_be_asked_for(running: Running, options: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as e:
        chat(running, **options)
    assert e.value.param == param


def test_choices_are_what_each_is_alone(running: Running) -> None:
    """With a seed the next choice has the next seed."""
    client = running.client()
    options: Any = {"model": "default_model", "messages": MESSAGES, "max_tokens": 8}
    seeded = options | {"seed": 5, "temperature": 1.0}
    alone = [
        client.chat.completions.create(**seeded | {"seed": s}).choices[0].message.content
        for s in (5, 6, 7)
    ]
    assert len(set(alone)) == 3
    many = client.chat.completions.create(**seeded, n=3)
    assert [c.message.content for c in many.choices] == alone
    one = client.chat.completions.create(**options)
    two = client.chat.completions.create(**options, n=2)
    assert [c.index for c in two.choices] == [0, 1]
    assert {c.message.content for c in two.choices} == {one.choices[0].message.content}
    assert two.usage is not None
    assert one.usage is not None
    assert two.usage.prompt_tokens == one.usage.prompt_tokens
    assert two.usage.completion_tokens == 2 * one.usage.completion_tokens
    texts, reasons = ["", ""], [None, None]
    pieces = list(
        client.chat.completions.create(
            **options, n=2, stream=True, stream_options={"include_usage": True}
        )
    )
    for choice in (c for p in pieces for c in p.choices):
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] = choice.finish_reason
    assert texts == [one.choices[0].message.content] * 2
    assert reasons == ["length"] * 2
    assert pieces[-1].usage == two.usage.model_copy(update=dict(pieces[-1].usage))
    assert all(p.usage is None for p in pieces[:-1])


def test_apis_at_once_give_what_each_gives_alone(running: Running) -> None:
    """Of every kind, whole and streamed, with formats and without, in the same batches."""
    system = [{"role": "system", "content": "Be brief."}]
    schema = {"type": "json_schema", "name": "c", "schema": CITY}
    off = {"type": "disabled"}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": MESSAGES, "n": 2, **AT_ONCE}),
        ("/v1/chat/completions", {"messages": [*system, *MESSAGES], "response_format": SCHEMA}),
        ("/v1/completions", {"prompt": ["The river", "A hill"]}),
        ("/v1/messages", {"messages": MESSAGES, "system": "Be kind.", "thinking": off}),
        ("/v1/responses", {"input": "Weather?", "text": {"format": schema}}),
        ("/api/chat", {"model": "default_model", "messages": MESSAGES, "think": False}),
    ]
    sizes = {"/v1/responses": "max_output_tokens", "/api/chat": "num_predict"}
    for path, body in asked:
        size = {sizes.get(path, "max_tokens"): 25}
        body |= {"options": size} if path == "/api/chat" else size
        body["stream"] = False

    def said(request: tuple[str, dict[str, Any]]) -> str:
        status, answer = running.post(request[1], request[0])
        assert status == 200, answer
        kept = ("choices", "content", "message", "output")
        text = json.dumps({k: answer[k] for k in kept if k in answer})
        return re.sub(r'"(rs|msg|fc|call)_\w+"', "id", text)

    alone = [said(request) for request in asked]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(said, asked * 2)) == alone * 2


@pytest.mark.parametrize("alone", [{}, {"seed": 1}])
def test_a_client_that_leaves_ends_all_its_choices(running: Running, alone: dict[str, int]) -> None:
    before = running.figures()["traffic"]
    stream = running.client().completions.create(
        model="default_model", prompt="a", max_tokens=3000, n=3, stream=True, **alone
    )
    for _, _piece in zip(range(4), stream, strict=False):
        pass
    stream.close()
    until(lambda: running.figures()["traffic"]["active"] == 0)
    until(lambda: not running.generator.admission.running)
    after = running.figures()["traffic"]
    assert after["requests"]["cancelled"] == before["requests"]["cancelled"] + 1
    assert after["tokens"] - before["tokens"] < 3000
    assert running.text("a", 2)


def test_a_sign_of_life_waits_for_the_status_line(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One choice's comes while another's first token begins the reply."""
    clients: list[Client] = []
    start, end_headers = Client.start, BaseHTTPRequestHandler.end_headers

    def started(self: Client, *args: Any) -> Any:
        clients.append(self)
        return start(self, *args)

    def sign(client: Client) -> None:
        assert client.keep_alive is not None
        with suppress(OSError):  # the reply may be over by the time that it may be sent
            client.keep_alive(None)

    def meanwhile(self: BaseHTTPRequestHandler) -> None:
        signs = [threading.Thread(target=sign, args=(c,)) for c in clients if c.keep_alive]
        for thread in signs:
            thread.start()
            thread.join(0.1)  # without the lock it is sent by then
        end_headers(self)

    monkeypatch.setattr(Client, "start", started)
    monkeypatch.setattr(BaseHTTPRequestHandler, "end_headers", meanwhile)
    stream = running.client().completions.create(
        model="default_model", prompt="a", max_tokens=2, n=2, stream=True
    )
    assert {piece.choices[0].index for piece in stream if piece.choices} == {0, 1}
    assert len(clients) == 2


def test_several_prompts_as_text_or_tokens(running: Running) -> None:
    client, prompts = running.client(), ["The river", "A hill"]
    alone = [running.text(p, 6) for p in prompts]
    tokens = [running.generator.model_provider.tokenizer.encode(p) for p in prompts]
    options: Any = {"model": "default_model", "max_tokens": 6}
    for prompt in (prompts, tokens):
        many = client.completions.create(**options, prompt=prompt, n=2)
        assert [c.text for c in many.choices] == [alone[0]] * 2 + [alone[1]] * 2
        assert many.usage is not None
        assert many.usage.prompt_tokens == sum(map(len, tokens))
    assert client.completions.create(**options, prompt=tokens[1]).choices[0].text == alone[1]


def test_effort_goes_to_a_template_that_has_it(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = prompts(running, monkeypatch)
    chat(running, reasoning_effort="low", max_tokens=1)
    assert seen[0].endswith("low effort\n")


def test_without_llguidance_it_says_what_to_install(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "llguidance", None)
    monkeypatch.setattr(running.generator.model_provider, "_vocabulary", None)
    with pytest.raises(openai.BadRequestError, match="pip install llguidance") as e:
        chat(running, response_format={"type": "json_object"})
    assert e.value.param == "response_format"


def test_an_empty_reply_is_text_too(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for text, content in (("", ""), ("<think>Hm.</think>", ""), (OSLO, None)):
        dictated(monkeypatch, text)
        assert chat(running, tools=[tool("weather")])[0].content == content

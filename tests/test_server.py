"""The server through OpenAI's client: its replies are mlx-lm's own, whoever asks at once."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import mlx_lm
import openai
import pytest
from conftest import demo_texts, until
from prometheus_client.parser import text_string_to_metric_families
from serving import Running, serving

from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts import demo_model
from mlx_streamexperts._cli.stock_parsers import stock_parser
from mlx_streamexperts.server import _command as server
from mlx_streamexperts.server._generation import stock

pytestmark = pytest.mark.usefixtures("compiled")  # so random states reach samplers as for users

LENGTH = 6
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}{{ m.content }}\n{% endfor %}{# <tool_call> tool_call.name #}"
)


@pytest.fixture(scope="module")
def original() -> tuple[Any, Any]:
    """The demo model as mlx-lm loads it, and its tokenizer."""
    return mlx_lm.load(str(demo_model()))[:2]


@pytest.fixture(scope="module")
def expected(original: tuple[Any, Any]) -> dict[str, str]:
    """What mlx-lm generates for each of the demo model's prompts, all experts loaded."""
    return {p: mlx_lm.generate(*original, p, max_tokens=LENGTH) for p in demo_texts()[::3]}


@pytest.fixture(scope="module")
def running(expected: dict[str, str]) -> Iterator[Running]:
    with serving("--cache", "10MB", "--chat-template", TEMPLATE) as running:
        yield running


def test_a_reply_is_the_one_of_mlx_lm_with_everything_loaded(
    running: Running, expected: dict[str, str]
) -> None:
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none")
    prompt, text = next(iter(expected.items()))
    reply = client.completions.create(model="demo", prompt=prompt, max_tokens=LENGTH)
    assert reply.choices[0].text == text
    experts = running.figures()["experts"]  # /live.json
    assert experts["resident_share"] < 0.3  # most experts were not in memory
    assert experts["read"]["bytes"] > 0


def test_every_option_of_mlx_lm_and_every_streaming_option_is_there() -> None:
    from test_generate import options, streaming_options

    ours, stocks = (
        options(server.setup_arg_parser()),
        options(stock_parser("mlx_lm.server", "main")),
    )
    assert {"--prompt-cache-bytes", "--decode-concurrency"} <= stocks <= ours
    assert streaming_options() <= ours


def test_completions(running: Running, expected: dict[str, str]) -> None:
    client = running.client()
    prompt, text = next(iter(expected.items()))
    options = {"model": "demo", "prompt": prompt, "max_tokens": LENGTH}
    whole = client.completions.create(**options)
    assert whole.choices[0].text == text
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == LENGTH
    pieces = list(client.completions.create(**options, stream=True))
    assert "".join(p.choices[0].text for p in pieces) == text
    assert len(pieces) > 2
    assert pieces[-1].choices[0].finish_reason == "length"


def test_chat(running: Running) -> None:
    client = running.client()
    messages = [{"role": "user", "content": "The system call"}]
    options = {"model": "default_model", "messages": messages, "max_tokens": LENGTH}
    whole = client.chat.completions.create(**options)
    text = running.text("The system call\n", LENGTH)
    assert whole.choices[0].message.content == text
    pieces = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(p.choices[0].delta.content or "" for p in pieces if p.choices) == text
    assert pieces[-1].usage is not None
    assert pieces[-1].usage.completion_tokens == LENGTH


def test_parallel_clients_get_what_one_at_a_time_gets(
    running: Running, expected: dict[str, str]
) -> None:
    with ThreadPoolExecutor(len(expected)) as pool:
        texts = list(pool.map(lambda p: running.text(p, LENGTH), expected))
    assert texts == list(expected.values())
    # A seed makes mlx-lm serve a request alone: it waits for the batch, and the others for it.
    with ThreadPoolExecutor(4) as pool:
        prompts = list(expected)[:4]
        seeds = ({"seed": 1}, {}, {"seed": 2}, {})
        texts = list(pool.map(lambda p, s: running.text(p, LENGTH, **s), prompts, seeds))
    assert texts == list(expected.values())[:4]


@pytest.mark.parametrize("alone", [{}, {"seed": 1}])
def test_a_reply_can_be_gone_on_with(running: Running, alone: dict[str, int]) -> None:
    """The prompt is then, token for token, what the server has kept of before."""
    prompt = demo_texts()[0]
    both, text = (running.text(prompt, n, **alone) for n in (4, 1))
    rest = running.text(f"{prompt} {text}", 3, **alone)
    assert f"{text} {rest}" == both


def test_conversations_at_once_are_each_what_it_is_alone(
    running: Running, original: tuple[Any, Any]
) -> None:
    """Several turns, each with all that was said before, whose KV cache is fetched again."""

    def alone(begin: str) -> list[str]:
        text, replies = "", []
        for turn in (begin, f"And {begin}"):
            text += f"{turn}\n"
            replies.append(mlx_lm.generate(*original, text, max_tokens=LENGTH))
            text += f"{replies[-1]}\n"
        return replies

    def talk(begin: str) -> list[str]:
        messages, replies = [], []
        for turn in (begin, f"And {begin}"):
            messages.append({"role": "user", "content": turn})
            together.wait(60)
            answer = running.client().chat.completions.create(
                model="demo", messages=messages, max_tokens=LENGTH
            )
            replies.append(answer.choices[0].message.content or "")
            messages.append({"role": "assistant", "content": replies[-1]})
        return replies

    begins = ["The system call", "In the beginning", "Rivers and hills"]
    together = threading.Barrier(len(begins))
    with ThreadPoolExecutor(len(begins)) as pool:
        talks = list(pool.map(talk, begins))
    assert talks == [alone(b) for b in begins]


def test_a_prompt_becomes_tokens_beside_the_replies_of_others(
    running: Running, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenizing 5 MB takes seconds. Nobody else may wait for it."""
    slow, other = list(expected)[:2]
    begun, go_on = threading.Event(), threading.Event()
    original = running.generator._prompt

    def prompt(tokenizer: Any, request: Any, args: Any) -> Any:
        if request.prompt == slow:
            begun.set()
            assert go_on.wait(60)
        return original(tokenizer, request, args)

    monkeypatch.setattr(running.generator, "_prompt", prompt)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(running.text, slow, LENGTH)
        try:
            assert begun.wait(60)
            assert running.text(other, LENGTH) == expected[other]
        finally:
            go_on.set()
        assert waiting.result() == expected[slow]


def test_one_long_prompt_at_a_time_becomes_tokens(
    running: Running, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes 150 times its text's memory meanwhile."""
    at_once, most = [0], [0]
    original = running.generator._prompt

    def prompt(tokenizer: Any, request: Any, args: Any) -> Any:
        at_once[0] += 1
        most[0] = max(most[0], at_once[0])
        time.sleep(0.01)
        at_once[0] -= 1
        return original(tokenizer, request, args)

    monkeypatch.setattr("mlx_streamexperts.server._generation._LONG_PROMPT", 0)
    monkeypatch.setattr(running.generator, "_prompt", prompt)
    some = list(expected)[:4]

    def count(text: str) -> tuple[int, Any]:
        body = {"model": "demo", "messages": [{"role": "user", "content": text}]}
        return running.post(body, "/v1/messages/count_tokens")

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda p: running.text(p, 2), some))
        assert {status for status, _ in pool.map(count, some)} == {200}
        tokenizer = running.generator.model_provider.tokenizer
        monkeypatch.setattr("mlx_streamexperts.server._generation._LONG_PROMPT", 1 << 16)
        monkeypatch.setattr(type(tokenizer._tokenizer), "is_fast", False)  # as if it were Python
        counted = [pool.submit(count, p) for p in some]
        assert running.text(some[0], 2)
        assert {c.result()[0] for c in counted} == {200}
    assert most == [1]


def test_models(running: Running) -> None:
    client = running.client()
    assert [m.id for m in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")
    assert running.request("GET", "/health")[::2] == (200, b'{"status": "ok"}')


def test_a_request_with_tools_is_accepted_and_the_template_sees_them(running: Running) -> None:
    tool = {"type": "function", "function": {"name": "mkdir", "parameters": {"type": "object"}}}
    answer = running.client().chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "NAME"}], tools=[tool], max_tokens=4
    )
    assert answer.choices[0].message.tool_calls is None  # the demo model knows no tools
    assert answer.choices[0].message.content == running.text("mkdir NAME\n", 4)


@pytest.mark.parametrize("streams", [False, True])
def test_a_tool_call_that_a_model_makes_comes_out_as_one(
    running: Running, streams: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokens are dictated, since the demo model makes no calls; parsing is mlx-lm's own."""
    tokenizer = running.generator.model_provider.tokenizer
    call = 'I will. <tool_call>{"name": "mkdir", "arguments": {"path": "a/b"}}</tool_call>'
    script = [*tokenizer.encode(call), next(iter(tokenizer.eos_token_ids))]

    def dictated(args: object, tokenizer: object) -> object:
        left = iter(script)
        return lambda logprobs: mx.array([next(left, script[-1])])

    monkeypatch.setattr(stock, "_make_sampler", dictated)
    options: Any = {"model": "demo", "messages": [{"role": "user", "content": "Make a/b"}]}
    options["tools"] = [{"type": "function", "function": {"name": "mkdir"}}]
    client = running.client()
    if streams:
        text, calls, reason = "", [], None
        for piece in client.chat.completions.create(**options, stream=True):
            text += piece.choices[0].delta.content or ""
            calls += piece.choices[0].delta.tool_calls or []
            reason = piece.choices[0].finish_reason
    else:
        choice = client.chat.completions.create(**options).choices[0]
        text, calls = choice.message.content or "", choice.message.tool_calls or []
        reason = choice.finish_reason
    assert text.strip() == "I will."
    assert [(c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("mkdir", {"path": "a/b"})
    ]
    assert reason == "tool_calls"


@pytest.mark.parametrize("alone", [{}, {"seed": 1}])
def test_a_client_that_leaves_a_stream_stops_the_reads(
    running: Running, alone: dict[str, int]
) -> None:
    before = running.figures()
    stream = running.client().completions.create(
        model="demo", prompt="In the beginning", max_tokens=3000, stream=True, **alone
    )
    for _, _piece in zip(range(3), stream, strict=False):
        pass
    stream.close()
    assert_all_stops(running, before)


def test_a_client_that_leaves_while_it_waits_for_a_whole_reply_stops_the_reads(
    running: Running,
) -> None:
    before = running.figures()
    body = b'{"prompt": "In the beginning", "max_tokens": 3000}'
    with socket.create_connection(("127.0.0.1", running.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        until(lambda: running.figures()["traffic"]["tokens"] > before["traffic"]["tokens"])
    assert_all_stops(running, before)


def assert_all_stops(running: Running, before: dict) -> None:
    until(lambda: running.figures()["traffic"]["active"] == 0)
    after = running.figures()
    assert after["traffic"]["tokens"] - before["traffic"]["tokens"] < 60  # of 3000
    cancelled = [f["traffic"]["requests"]["cancelled"] for f in (before, after)]
    assert cancelled[1] == cancelled[0] + 1
    text = running.text("Anarchists argue", 2)  # the thread is past what it was doing
    until(lambda: running.figures()["traffic"]["active"] == 0)
    reads = running.figures()["experts"]["read"]["bytes"]
    assert running.text("Anarchists argue", 2) == text
    until(lambda: not running.generator.admission.running)
    # Two requests of one prompt later only their own tokens have read.
    assert running.figures()["experts"]["read"]["bytes"] - reads < 60e6


def test_a_failed_read_fails_its_request_and_no_later_one(
    running: Running, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> int:
        raise OSError(5, "Input/output error")

    prompt, text = next(iter(expected.items()))
    for path in ({}, {"seed": 1}):
        with monkeypatch.context() as patched:
            patched.setattr(platform, "read_into", broken)
            status, answer = running.post({"prompt": "Rivers " * 8, "max_tokens": 4, **path})
        assert status == 500
        assert "ExpertReadError" in answer["error"]["message"]
        assert str(demo_model()) not in answer["error"]["message"]
        assert running.text(prompt, LENGTH) == text
    # In the middle of a stream, whose status was sent: as an event that the client understands.
    stream = running.client().completions.create(
        model="demo", prompt="In the beginning", max_tokens=3000, stream=True
    )
    next(iter(stream))
    with monkeypatch.context() as patched, pytest.raises(openai.APIError, match="ExpertReadError"):
        patched.setattr(platform, "read_into", broken)
        list(stream)
    assert running.text(prompt, LENGTH) == text
    assert running.request("GET", "/health")[0] == 200


def test_metrics_without_their_library_say_what_to_install(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    status, _, body = running.request("GET", "/metrics")
    assert status == 501
    assert "pip install prometheus_client" in json.loads(body)["error"]["message"]
    assert running.figures()["model"] == "demo"  # the live page needs none


def test_metrics_are_the_streams_own(running: Running) -> None:
    running.text("The system call", 2)
    until(lambda: running.figures()["traffic"]["active"] == 0)
    status, headers, body = running.request("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain")
    samples = {
        (s.name.removeprefix("streamexperts_"), *s.labels.values()): s.value
        for family in text_string_to_metric_families(body.decode())
        for s in family.samples
    }
    expert_stream = running.generator.model_provider.expert_stream
    assert expert_stream is not None
    stats, counts = expert_stream.stats(), running.generator.counters.stats()
    assert samples["read_bytes_total",] == stats.read.bytes > 0
    assert samples["reads_total",] == stats.read.reads
    assert samples["expert_hits_total",] == stats.cache.hits > 0
    assert samples["expert_misses_total", "capacity"] == stats.cache.capacity
    for layer, rate in stats.layer_hit_rates.items():
        assert samples["layer_hit_rate", layer] == rate
    assert samples["generated_tokens_total",] == counts.tokens > 0
    assert samples["requests_total", "completed"] == counts.requests["completed"] > 0
    answered = samples["time_to_first_token_seconds_count",]
    assert answered == samples["time_to_first_token_seconds_bucket", "+Inf"] > 0
    assert samples["memory_bytes", "expert_cache"] == expert_stream.plan.cache
    assert samples["memory_bytes", "active"] > expert_stream.plan.trunk
    assert samples["process_resident_memory_bytes",] > 1e7

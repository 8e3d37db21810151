"""Runs a server in this process for a test, and sends requests to it."""

from __future__ import annotations

import http.client
import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import openai
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mlx_streamexperts.server import _command as server
from mlx_streamexperts.server._generation import GenerationThread

# A cache that shrinks because this machine is short of memory would change counts.
_QUIET = ("--log-level", "WARNING", "--no-progress", "--pressure", "off")


class Running:
    """A running server, seen from outside (requests) and inside (`generator`)."""

    def __init__(self, port: int, generator: GenerationThread) -> None:
        self.port, self.generator = port, generator
        self.url = f"http://127.0.0.1:{port}"

    def client(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(base_url=self.url + "/v1", **options)

    def request(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers (names in lower case) and body of the answer to one request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def events(self, body: Any, path: str, **headers: str) -> list[tuple[str, Any]]:
        """Name and JSON of each event of a streamed answer, which ends as OpenAI's do, or not."""
        raw = json.dumps(body).encode()
        status, sent, answer = self.request("POST", path, raw, **headers)
        assert status == 200, answer
        assert sent["content-type"] == "text/event-stream"
        found = []
        for lines in answer.decode().split("\n\n"):
            if not lines or lines.startswith(":"):
                continue
            *name, data = lines.split("\n")
            if data != "data: [DONE]":
                named = name[0].removeprefix("event: ") if name else ""
                found.append((named, json.loads(data.removeprefix("data: "))))
        return found

    def post(self, body: Any, path: str = "/v1/completions") -> tuple[int, Any]:
        """Status and JSON of the answer to a JSON body (or to bytes as they are)."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, _, answer = self.request("POST", path, raw)
        return status, json.loads(answer)

    def text(self, prompt: str, max_tokens: int, **options: Any) -> str:
        status, answer = self.post({"prompt": prompt, "max_tokens": max_tokens, **options})
        assert status == 200, answer
        return answer["choices"][0]["text"]

    def figures(self) -> dict[str, Any]:
        return json.loads(self.request("GET", "/live.json")[2])


def dictated(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let the server's model say this text, token for token, to whatever it is asked."""

    def make(args: Any, tokenizer: Any) -> Any:
        ids = tokenizer.encode(text, add_special_tokens=False)
        left = iter([*ids, next(iter(tokenizer.eos_token_ids))])
        return lambda logprobs: mx.array([next(left, 0)])

    monkeypatch.setattr(server.stock, "_make_sampler", make)


def prompts(running: Running, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Will hold the text of each prompt from now on."""
    seen: list[str] = []
    tokenizer = running.generator.model_provider.tokenizer
    original = running.generator._prompt

    def noted(*args: Any) -> Any:
        result = original(*args)
        seen.append(tokenizer.decode(result[0]))
        return result

    monkeypatch.setattr(running.generator, "_prompt", noted)
    return seen


def call(name: str, **arguments: Any) -> str:
    """A tool call in the words of `QWEN_TEMPLATE`."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def letters(folder: Path, words: int) -> Path:
    """Give a checkpoint a tokenizer of single characters: ASCII, then U+0434 and following."""
    if not (folder / "tokenizer.json").exists():
        known = [chr(i) for i in range(32, 127)] + ["\n", "<eos>", "<unk>"]
        known += [f"<x{i}>" for i in range(len(known), min(words, 128))]
        known += [chr(0x434 + i) for i in range(max(0, words - 128))]
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(known)}, "<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>"
        ).save_pretrained(folder)
    return folder


@contextmanager
def serving(*argv: str, at_once: bool = False) -> Iterator[Running]:
    """Run the command at a free port until the block ends; then check that everything is gone.

    The block begins when the model is loaded, or `at_once` when the server accepts connections.
    """
    begun: queue.Queue[Any] = queue.Queue()

    class Told(server.Server):
        def serve_forever(self, poll_interval: float = 0.5) -> None:
            if not at_once:
                self._generator.ready.wait()
            if self._generator.failure is None:  # else it ends, and nobody could shut it down
                begun.put(self)
            super().serve_forever(0.05)

    status: list[int] = []

    def run() -> None:
        status.append(server.main(["--port", "0", *_QUIET, *argv]))
        mx.clear_streams()  # of this thread, which planned: with them left, MLX aborts at exit
        begun.put(None)

    with mock.patch.object(server, "Server", Told):
        thread = threading.Thread(target=run)
        thread.start()
        httpd = begun.get(timeout=60)
    assert httpd is not None, f"the server ended with status {status}"
    try:
        yield Running(httpd.server_address[1], httpd._generator)
    finally:
        opened = httpd._generator.model_provider.expert_stream
        ThreadingHTTPServer.shutdown(httpd)
        thread.join(60)
        assert opened is None or opened._closed
        assert not thread.is_alive()
        assert status == [0]


QWEN_TEMPLATE = r"""
{%- macro turn(role, text) -%}
{{ '<|im_start|>' + role + '\n' + text + '<|im_end|>\n' }}
{%- endmacro -%}
{%- set ns = namespace(system='') -%}
{%- if messages[0].role == 'system' %}{% set ns.system = messages[0].content + '\n' %}{% endif -%}
{%- for tool in tools or [] %}{% set ns.system = ns.system + tool | tojson + '\n' %}{% endfor -%}
{%- if ns.system %}{{ turn('system', ns.system) }}{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{{ turn('user', '<tool_response>\n' + message.content + '\n</tool_response>') }}
{%- elif message.role != 'system' or not loop.first -%}
{%- set said = namespace(text=message.content) -%}
{%- if message.reasoning_content -%}
{%- set said.text = '<think>\n' + message.reasoning_content + '\n</think>\n\n' + said.text -%}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set tool_call = call.function -%}
{%- set said.text = said.text + '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": '
    + tool_call.arguments | tojson + '}\n</tool_call>' -%}
{%- endfor -%}
{{ turn(message.role, said.text) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}
{{ '<think>\n\n</think>\n\n' }}
{%- endif -%}
{%- if reasoning_effort %}{{ reasoning_effort + ' effort\n' }}{% endif -%}
{%- endif -%}"""
"""A chat template of Qwen's kind: reasoning, and tool calls in JSON."""


def chatting(folder: Path) -> Path:
    """Give a checkpoint a tokenizer of bytes with Qwen's markers, and its chat template."""
    if not (folder / "tokenizer.json").exists():
        markers = "<|im_start|>", "<think>", "</think>", "<tool_call>", "</tool_call>"
        text = [chr(i) for i in range(33, 127)] + ["\u0120", "\u010a"]  # space, end of line
        known = {w: i for i, w in enumerate(["<|im_end|>", *text])}
        tokenizer = Tokenizer(models.BPE(known, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens(["<|im_end|>"])
        tokenizer.add_tokens([AddedToken(m, normalized=False) for m in markers])
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
        fast.chat_template = QWEN_TEMPLATE
        fast.save_pretrained(folder)
    return folder

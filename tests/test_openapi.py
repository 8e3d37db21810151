"""docs/openapi.json is true: its fields are the server's, and the server keeps to it."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from schemathesis.core.failures import FailureGroup
from serving import Running, chatting, serving

from mlx_streamexperts.server._apis import anthropic, ollama, responses
from mlx_streamexperts.server._generation import Client
from mlx_streamexperts.server._http import FORMS
from mlx_streamexperts.server._request_checks import CHAT_FIELDS, TEXT_FIELDS

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import fuzz_apis

ROOT = Path(__file__).parents[1]
CHAT = {"messages": [{"role": "user", "content": "a"}]}
SCHEMAS = fuzz_apis.DOCUMENT["components"]["schemas"]


def test_the_document_is_the_one_that_its_script_writes() -> None:
    spec = importlib.util.spec_from_file_location("o", ROOT / "docs" / "make_openapi.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "stale: run python docs/make_openapi.py"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("ChatRequest", CHAT_FIELDS),
        ("CompletionRequest", TEXT_FIELDS),
        ("ResponsesRequest", responses.FIELDS),
        ("MessagesRequest", anthropic.FIELDS),
        ("CountRequest", anthropic.FIELDS),
        ("OllamaRequest", ollama.FIELDS),
    ],
)
def test_its_fields_are_the_servers(name: str, fields: dict[str, Any]) -> None:
    assert SCHEMAS[name]["properties"].keys() == fields.keys()


def test_its_options_and_paths_are_the_servers() -> None:
    stated = SCHEMAS["OllamaRequest"]["properties"]["options"]["properties"]
    assert stated.keys() == ollama._OPTIONS.keys()
    assert FORMS.keys() - fuzz_apis.DOCUMENT["paths"].keys() == {"/chat/completions"}  # a synonym


@pytest.fixture(scope="module")
def running(checkpoint: Callable[..., Path]) -> Iterator[Running]:
    mx.disable_compile()
    folder = chatting(checkpoint("qwen3_moe", seed=7))
    with serving("--model", str(folder), "--cache", "4MB", *fuzz_apis.OPTIONS) as running:
        yield running
    mx.enable_compile()


@pytest.mark.parametrize(("path", "mode"), fuzz_apis.operations())
def test_the_server_keeps_to_it(running: Running, path: str, mode: str) -> None:
    found = fuzz_apis.tried(running.url, path, mode, examples=12)
    assert sum(found.values()) >= (10 if "post" in fuzz_apis.DOCUMENT["paths"][path] else 1)
    if mode == "broken":
        assert found.keys() <= {400, 404}
    else:
        assert found.keys() <= {200, 400, 404} and (200 in found or path == "/v1/models/{model}")


def test_a_failure_an_answer_of_another_form_and_what_is_wrongly_taken_are_noticed(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would prove nothing."""

    def noticed(path: str, mode: str) -> set[str]:
        with pytest.raises(FailureGroup) as caught:
            fuzz_apis.tried(running.url, path, mode, examples=5)
        return {type(failure).__name__ for failure in caught.value.exceptions}

    with monkeypatch.context() as patched:
        patched.setattr(Client, "start", lambda *args: 1 / 0)
        assert noticed("/v1/completions", "good") == {"ServerError"}
    with monkeypatch.context() as patched:
        patched.setattr(anthropic.CountForm, "count", lambda self, tokens: {"tokens": tokens})
        assert noticed("/v1/messages/count_tokens", "good") == {"JsonSchemaError"}
    with monkeypatch.context() as patched:
        patched.setattr(ollama.OllamaForm, "request", lambda self, body: CHAT)
        assert noticed("/api/chat", "broken") == {"AcceptedNegativeData"}

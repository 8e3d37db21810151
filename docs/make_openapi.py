"""Writes docs/openapi.json, the server's APIs as OpenAPI describes them.

    python docs/make_openapi.py

Fields are stated here by hand. `tests/test_openapi.py` compares them with those that the server
knows, and asks a server with requests made of them, good and broken ones.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlx_streamexperts.server._request_checks import MOST_CHOICES

PAGE = Path(__file__).with_name("openapi.json")
MOST = (1 << 31) - 1

Schema = dict[str, Any]


def text(**more: Any) -> Schema:
    return {"type": "string", **more}


def integer(low: int = 0, high: int = MOST) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def number(low: float = -1e30, high: float = 1e30) -> Schema:
    return {"type": "number", "minimum": low, "maximum": high}


def array(items: Schema | None = None, **more: Any) -> Schema:
    return {"type": "array", **({} if items is None else {"items": items}), **more}


def one_of(*values: Any) -> Schema:
    return {"enum": list(values)}


def either(*kinds: Schema) -> Schema:
    return {"anyOf": list(kinds)}


def ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def thing(properties: Schema, *required: str, **more: Any) -> Schema:
    """An object."""
    made: Schema = {"type": "object", "properties": dict(sorted(properties.items()))}
    if required:
        made["required"] = list(required)
    return {**made, **more}


def optional(schema: Schema) -> Schema:
    """Or null."""
    kind = schema.get("type")
    if isinstance(kind, str):
        return {**schema, "type": [kind, "null"]}
    return {"anyOf": [*schema.get("anyOf", [schema]), {"type": "null"}]}


def options(properties: Schema, *required: str) -> Schema:
    """An object whose properties may be null, which is the default, unless they are required.

    It has no further ones, but for some that are null.
    """
    each = {k: s if k in required else optional(s) for k, s in properties.items()}
    return thing(each, *required, additionalProperties=NULL)


NULL: Schema = {"type": "null"}
FLAG: Schema = {"type": "boolean"}
OBJECT: Schema = {"type": "object"}
ANY: Schema = {}  # strings by their API; the server gives them to the model's template
MODEL = ref("ModelName")
TEMPERATURE = either({"const": 0}, number(1e-6))
STOP = either(text(minLength=1), array(text(minLength=1), maxItems=64))
TOKENS = array(integer(), minItems=1)
LAST = "Where a reply is wanted, the last is not the assistant's."
REASON = one_of("stop", "length", "tool_calls")

# Parts of requests.

CALL = thing(
    {
        "function": thing({"name": text(), "arguments": either(text(), OBJECT, NULL)}, "name"),
        "id": ANY,
        "type": ANY,
    },
    "function",
)
TEXT_PART = thing({"type": {"const": "text"}, "text": text()}, "type", "text")
IMAGE_PART = thing(
    {
        "type": {"const": "image_url"},
        "image_url": either(text(), thing({"url": text()}, "url")),
    },
    "type",
    "image_url",
)
CHAT_MESSAGE = thing(
    {
        "role": text(description="system, developer, user, assistant, tool"),
        "content": either(text(), NULL, array(either(TEXT_PART, IMAGE_PART))),
        "name": optional(text()),
        "tool_calls": optional(array(CALL)),
        "tool_call_id": ANY,
        "reasoning": ANY,
        "reasoning_content": ANY,
    },
    "role",
)
TOOL = thing(
    {
        "type": ANY,
        "function": thing(
            {"name": text(), "parameters": optional(OBJECT), "description": ANY}, "name"
        ),
    },
    "function",
)
NAMED = thing({"type": {"const": "function"}, "function": thing({"name": text()}, "name")},
              "type", "function")  # fmt: skip
FORMAT = either(
    thing({"type": one_of("text", "json_object")}, "type"),
    thing(
        {
            "type": {"const": "json_schema"},
            "json_schema": thing({"name": ANY, "schema": OBJECT}, "schema"),
        },
        "type",
        "json_schema",
    ),
)
BLOCK_OF_USER = either(
    TEXT_PART,
    thing({"type": {"const": "image"}, "source": OBJECT}, "type", "source"),
    thing(
        {
            "type": {"const": "tool_result"},
            "tool_use_id": text(),
            "content": either(text(), NULL, array(TEXT_PART)),
            "is_error": optional(FLAG),
        },
        "type",
        "tool_use_id",
    ),
)
BLOCK_OF_ASSISTANT = either(
    TEXT_PART,
    thing({"type": {"const": "thinking"}, "thinking": text()}, "type", "thinking"),
    thing(
        {"type": {"const": "tool_use"}, "id": text(), "name": text(), "input": OBJECT},
        "type",
        "id",
        "name",
        "input",
    ),
)


def said_by(role: Schema, block: Schema) -> Schema:
    """A message of Anthropic's."""
    return thing({"role": role, "content": either(text(), array(block))}, "role", "content")


ANTHROPIC_TOOL = options(
    {
        "allowed_callers": {"const": ["direct"]},
        "cache_control": OBJECT,
        "defer_loading": {"const": False},
        "description": text(),
        "eager_input_streaming": FLAG,
        "input_schema": OBJECT,
        "name": text(),
        "strict": FLAG,
        "type": {"const": "custom"},
    },
    "name",
)
TEXTS = either(
    text(),
    array(
        thing({"type": one_of("input_text", "output_text", "text"), "text": text()}, "type", "text")
    ),
)
ITEM = either(
    thing({"type": {"const": "message"}, "role": one_of("system", "developer", "user", "assistant"),
           "content": TEXTS}, "role", "content"),
    thing({"type": {"const": "function_call"}, "name": text(), "arguments": text(),
           "call_id": text()}, "type", "name", "arguments", "call_id"),
    thing({"type": {"const": "function_call_output"}, "call_id": text(), "output": TEXTS},
          "type", "call_id", "output"),
    thing({"type": {"const": "reasoning"}, "content": optional(array(thing({"text": text()},
           "text")))}, "type"),
)  # fmt: skip
OLLAMA_MESSAGE = options(
    {
        "role": text(),
        "content": text(),
        "thinking": text(),
        "images": array(text()),
        "tool_calls": array(CALL),
        "tool_name": text(),
        "tool_call_id": text(),
    },
    "role",
)

# Requests.

NO_EFFECT = {
    "metadata": OBJECT,
    "prompt_cache_key": text(),
    "prompt_cache_retention": text(),
    "safety_identifier": text(),
    "service_tier": one_of("auto", "default"),
    "store": {"const": False},
    "user": text(),
}
COMMON = {
    **NO_EFFECT,
    "adapters": text(description="The server's own alone."),
    "draft_model": text(description="The server's own alone."),
    "frequency_context_size": integer(),
    "frequency_penalty": number(),
    "logit_bias": {
        "type": "object",
        "patternProperties": {"^-?[0-9]{1,19}$": number()},
        "additionalProperties": False,
    },
    "lossy": integer(0, 3),
    "max_completion_tokens": integer(1),
    "max_tokens": integer(1),
    "min_p": number(0, 1),
    "model": MODEL,
    "n": integer(1, MOST_CHOICES),
    "num_draft_tokens": integer(),
    "presence_context_size": integer(),
    "presence_penalty": number(),
    "repetition_context_size": integer(),
    "repetition_penalty": number(0),
    "seed": integer(0, (1 << 63) - 1),
    "stop": STOP,
    "stream": FLAG,
    "stream_options": options({"include_usage": FLAG, "include_obfuscation": FLAG}),
    "temperature": TEMPERATURE,
    "top_k": integer(),
    "top_logprobs": integer(-1, 11),
    "top_p": number(0, 1),
    "xtc_probability": number(0, 1),
    "xtc_threshold": number(0, 1),
}
CHAT = {
    **COMMON,
    "chat_template_kwargs": {**OBJECT, "properties": {"chat_template": False}},
    "logprobs": FLAG,
    "messages": array(CHAT_MESSAGE, minItems=1),
    "modalities": {"const": ["text"]},
    "parallel_tool_calls": FLAG,
    "reasoning_effort": text(),
    "response_format": FORMAT,
    "role_mapping": {**OBJECT, "additionalProperties": text()},
    "tool_choice": either(one_of("auto", "none", "required"), NAMED),
    "tools": array(TOOL),
}
COMPLETION = {
    **COMMON,
    "best_of": {"const": 1},
    "echo": {"const": False},
    "logprobs": either(FLAG, integer(0, 11)),
    "prompt": either(text(), TOKENS, array(either(text(), TOKENS), minItems=1)),
    "suffix": {"const": ""},
}
RESPONSES = {
    "background": {"const": False},
    "include": one_of([], ["reasoning.encrypted_content"]),
    "input": either(text(), array(ITEM, minItems=1)),
    "instructions": text(),
    "max_output_tokens": integer(1),
    "metadata": OBJECT,
    "model": MODEL,
    "parallel_tool_calls": FLAG,
    "previous_response_id": NULL,
    "prompt_cache_key": text(),
    "prompt_cache_retention": text(),
    "reasoning": options({"effort": text(), "summary": one_of("auto", "concise", "detailed")}),
    "safety_identifier": text(),
    "service_tier": one_of("auto", "default"),
    "store": {"const": False},
    "stream": FLAG,
    "stream_options": options({"include_obfuscation": FLAG}),
    "temperature": TEMPERATURE,
    "text": options({
        "format": thing({"type": one_of("text", "json_object", "json_schema")}),
        "verbosity": {"const": "medium"},
    }),
    "tool_choice": either(
        one_of("auto", "none", "required"),
        options({"type": {"const": "function"}, "name": text()}, "name"),
    ),
    "tools": array(options(
        {
            "description": text(), "name": text(), "parameters": OBJECT, "strict": FLAG,
            "type": {"const": "function"},
        }, "name", "type",
    )),
    "top_p": number(0, 1),
    "truncation": {"const": "disabled"},
    "user": text(),
}  # fmt: skip
MESSAGES = {
    "cache_control": OBJECT,
    "context_management": thing({"edits": array()}),
    "max_tokens": integer(1),
    "messages": array(
        either(
            said_by(one_of("user", "system"), BLOCK_OF_USER),
            said_by({"const": "assistant"}, BLOCK_OF_ASSISTANT),
        ),
        minItems=1, description=LAST,
    ),
    "metadata": OBJECT,
    "model": MODEL,
    "output_config": options({
        "effort": one_of("low", "medium", "high", "xhigh", "max"),
        "format": options({"type": {"const": "json_schema"}, "schema": OBJECT}, "schema"),
    }),
    "service_tier": one_of("auto", "standard_only"),
    "speed": {"const": "standard"},
    "stop_sequences": array(text(minLength=1), maxItems=64),
    "stream": FLAG,
    "system": either(text(), array(TEXT_PART)),
    "temperature": TEMPERATURE,
    "thinking": options(
        {
            "type": one_of("enabled", "adaptive", "disabled"),
            "budget_tokens": integer(),
            "display": one_of("summarized", "omitted"),
        }, "type",
    ),
    "tool_choice": options(
        {
            "type": one_of("auto", "any", "none", "tool"),
            "name": text(),
            "disable_parallel_tool_use": FLAG,
        }, "type",
    ),
    "tools": array(ANTHROPIC_TOOL),
    "top_k": integer(),
    "top_p": number(0, 1),
}  # fmt: skip
_IGNORED = ("num_batch", "num_ctx", "num_gpu", "num_keep", "num_thread", "use_mmap", "main_gpu")
OLLAMA_OPTIONS = {
    **dict.fromkeys(_IGNORED, either({"type": "integer"}, FLAG)),
    "frequency_penalty": number(),
    "min_p": number(0, 1),
    "num_predict": integer(-2),
    "presence_penalty": number(),
    "repeat_last_n": integer(),
    "repeat_penalty": number(0),
    "seed": integer(),
    "stop": STOP,
    "temperature": TEMPERATURE,
    "top_k": integer(),
    "top_p": number(0, 1),
}
OLLAMA = {
    "format": either(one_of("", "json"), OBJECT),
    "keep_alive": either(text(), {"type": "number"}, FLAG),
    "messages": array(OLLAMA_MESSAGE, minItems=1, description=LAST),
    "model": MODEL,
    "options": options(OLLAMA_OPTIONS),
    "stream": FLAG,
    "think": either(FLAG, text()),
    "tools": array(TOOL),
}

# Replies.

SECONDS = {"type": "integer", "minimum": 0}


def counts(*names: str, **more: Schema) -> Schema:
    return thing({**dict.fromkeys(names, integer()), **more}, *names, *more)


OPENAI_USAGE = counts(
    "prompt_tokens", "completion_tokens", "total_tokens",
    prompt_tokens_details=counts("cached_tokens"),
    completion_tokens_details=counts("reasoning_tokens"),
)  # fmt: skip
MADE_CALL = thing(
    {
        "id": text(),
        "type": {"const": "function"},
        "function": thing({"name": text(), "arguments": text()}, "name", "arguments"),
        "index": integer(),
    },
    "id",
    "type",
    "function",
)
LOGPROBS = thing(
    {"content": array(thing({"token": text(), "logprob": {"type": "number"}},
                            "token", "logprob"))}, "content",
)  # fmt: skip
WORDS = {"reasoning": text(), "reasoning_content": text(), "tool_calls": array(MADE_CALL)}


def completion(kind: str, choice: Schema, usage: Schema, *required: str) -> Schema:
    """A reply of OpenAI's, or an event of one."""
    properties = {
        "id": text(), "object": {"const": kind}, "created": SECONDS, "model": text(),
        "system_fingerprint": text(), "choices": array(choice), "usage": usage,
    }  # fmt: skip
    return thing(properties, "id", "object", "created", "model", "choices", *required)


def choice(reason: Schema, **content: Schema) -> Schema:
    properties = {"index": integer(), "finish_reason": reason, **content}
    return thing({**properties, "logprobs": optional(LOGPROBS)}, *properties)


SCHEMAS = {
    "ModelName": text(
        description='A name in /v1/models, or "default_model"; in /api/chat it may end in ":latest"'
    ),
    "ChatRequest": options(CHAT, "messages"),
    "CompletionRequest": options(COMPLETION, "prompt"),
    "ResponsesRequest": options(RESPONSES, "input"),
    "MessagesRequest": options(MESSAGES, "messages", "max_tokens"),
    "CountRequest": options(MESSAGES, "messages"),
    "OllamaRequest": options(OLLAMA, "model", "messages"),
    "ShowRequest": thing({"model": MODEL}, "model"),
    "ChatCompletion": completion(
        "chat.completion",
        choice(
            REASON,
            message=thing(
                {"role": {"const": "assistant"}, "content": optional(text()), **WORDS},
                "role",
                "content",
            ),
        ),
        OPENAI_USAGE,
        "usage",
    ),
    "ChatCompletionChunk": completion(
        "chat.completion.chunk",
        choice(
            optional(REASON),
            delta=thing({"role": {"const": "assistant"}, "content": text(), **WORDS}),
        ),
        optional(OPENAI_USAGE),
    ),
    "Completion": completion(
        "text_completion", choice(optional(one_of("stop", "length")), text=text()),
        optional(OPENAI_USAGE),
    ),
    "Response": thing(
        {
            "id": text(),
            "object": {"const": "response"},
            "created_at": SECONDS,
            "status": one_of("in_progress", "completed", "incomplete", "failed"),
            "model": text(),
            "output": array(thing(
                {
                    "type": one_of("message", "reasoning", "function_call"),
                    "id": text(),
                    "status": one_of("in_progress", "completed", "incomplete"),
                }, "type", "id", "status",
            )),
            "error": optional(thing({"code": text(), "message": text()}, "code", "message")),
            "incomplete_details": optional(
                thing({"reason": {"const": "max_output_tokens"}}, "reason")
            ),
            "usage": optional(counts("input_tokens", "output_tokens", "total_tokens")),
        },
        "id", "object", "created_at", "status", "model", "output", "error", "usage",
    ),
    "ResponseEvent": thing(
        {"type": text(), "sequence_number": integer(), "response": ref("Response")},
        "type", "sequence_number",
    ),
    "Message": thing(
        {
            "id": text(),
            "type": {"const": "message"},
            "role": {"const": "assistant"},
            "model": text(),
            "content": array(thing({"type": one_of("text", "thinking", "tool_use")}, "type")),
            "stop_reason": one_of("end_turn", "max_tokens", "stop_sequence", "tool_use", None),
            "stop_sequence": optional(text()),
            "usage": counts(
                "input_tokens", "output_tokens", "cache_creation_input_tokens",
                "cache_read_input_tokens",
            ),
        },
        "id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage",
    ),
    "MessageEvent": thing(
        {
            "type": one_of(
                "message_start", "content_block_start", "content_block_delta",
                "content_block_stop", "message_delta", "message_stop", "error",
            ),
            "message": ref("Message"),
        }, "type",
    ),
    "Count": counts("input_tokens"),
    "OllamaReply": thing(
        {
            "model": text(),
            "created_at": text(),
            "message": thing(
                {
                    "role": {"const": "assistant"},
                    "content": text(),
                    "thinking": text(),
                    "tool_calls": array(OBJECT),
                }, "role", "content",
            ),
            "done": FLAG,
            "done_reason": one_of("stop", "length"),
            **dict.fromkeys(
                (
                    "total_duration", "load_duration", "prompt_eval_count",
                    "prompt_eval_duration", "eval_count", "eval_duration",
                ), SECONDS,
            ),
        },
        "model", "created_at", "message", "done",
    ),
    "Show": thing(
        {
            "template": text(), "details": OBJECT, "model_info": OBJECT,
            "capabilities": array(text()),
        },
        "template", "details", "model_info", "capabilities",
    ),
    "Model": thing(
        {"id": text(), "object": {"const": "model"}, "created": SECONDS, "owned_by": text()},
        "id", "object", "created", "owned_by",
    ),
    "Error": thing(
        {
            "error": thing(
                {
                    "message": text(minLength=1),
                    "type": one_of("invalid_request_error", "server_error"),
                    "param": optional(text()),
                    "code": optional(text()),
                }, "message", "type", "param", "code",
            )
        }, "error",
    ),
    "AnthropicError": thing(
        {
            "type": {"const": "error"},
            "error": thing({"type": text(), "message": text(minLength=1)}, "type", "message"),
        }, "type", "error",
    ),
    "OllamaError": thing({"error": text(minLength=1)}, "error"),
}  # fmt: skip

EVENTS, LINES = "text/event-stream", "application/x-ndjson"


def answer(schema: Schema, says: str, **streamed: Schema) -> Schema:
    return {"description": says, "content": {"application/json": {"schema": schema}, **streamed}}


def post(
    summary: str, asked: str, reply: str, error: str, item: str = "", kind: str = EVENTS
) -> Schema:
    """A path that takes JSON; `item` is each event, or line, of a streamed reply."""
    streamed = {kind: {"x-item-schema": ref(item)}} if item else {}
    return {
        "post": {
            "summary": summary,
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": ref(asked)}},
            },
            "responses": {
                "200": answer(ref(reply), "The answer", **streamed),
                "4XX": answer(ref(error), "What is wrong, and what to do"),
                "5XX": answer(ref(error), "503: not now; 500: generation failed"),
            },
        }
    }


def get(summary: str, schema: Schema, kind: str = "application/json", **more: Any) -> Schema:
    """A path that only tells something."""
    told = {"description": "The answer", "content": {kind: {"schema": schema}}}
    wrong = answer(ref("Error"), "What is wrong, and what to do")
    return {"get": {"summary": summary, **more, "responses": {"200": told, "4XX": wrong}}}


PATHS = {
    "/v1/chat/completions": post(
        "OpenAI's chat completions", "ChatRequest", "ChatCompletion", "Error", "ChatCompletionChunk"
    ),
    "/v1/completions": post(
        "OpenAI's completions", "CompletionRequest", "Completion", "Error", "Completion"
    ),
    "/v1/responses": post(
        "OpenAI's responses", "ResponsesRequest", "Response", "Error", "ResponseEvent"
    ),
    "/v1/messages": post(
        "Anthropic's messages", "MessagesRequest", "Message", "AnthropicError", "MessageEvent"
    ),
    "/v1/messages/count_tokens": post(
        "Tokens of a prompt", "CountRequest", "Count", "AnthropicError"
    ),
    "/api/chat": post(
        "Ollama's chat; streamed if not told otherwise", "OllamaRequest", "OllamaReply",
        "OllamaError", "OllamaReply", LINES,
    ),
    "/api/show": post("What a model can do", "ShowRequest", "Show", "OllamaError"),
    "/api/tags": get("Ollama's list of models", thing({"models": array(OBJECT)}, "models")),
    "/api/version": get(
        "The version of Ollama whose API this is", thing({"version": text()}, "version"),
        security=[],
    ),
    "/v1/models": get(
        "The models that may be asked for",
        thing({"object": {"const": "list"}, "data": array(ref("Model"))}, "object", "data"),
    ),
    "/v1/models/{model}": get(
        "One of them", ref("Model"),
        parameters=[{"name": "model", "in": "path", "required": True, "schema": MODEL}],
    ),
    "/health": get(
        "Whether the model is loaded (else status 503)", thing({"status": text()}, "status"),
        security=[],
    ),
    "/live.json": get("The figures of the page", OBJECT),
    "/metrics": get("The figures for Prometheus", text(), "text/plain"),
}  # fmt: skip


def document() -> Schema:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "The server of mlx-streamexperts",
            "version": "1",
            "description": "A request that breaks its schema is refused, status 400, and the error "
            "names the field. One that keeps it may be refused too: server-api.md says by what.",
        },
        "servers": [{"url": "http://127.0.0.1:8080"}],
        "security": [{}, {"bearer": []}, {"header": []}],
        "paths": PATHS,
        "components": {
            "schemas": SCHEMAS,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            },
        },
    }


def page() -> str:
    """The document; what fits into a line is in one."""
    return _written(document(), "") + "\n"


def _written(value: Any, indent: str) -> str:
    line = json.dumps(value)
    if len(line) + len(indent) <= 96 or not isinstance(value, dict | list):
        return line
    inner = indent + " "
    if isinstance(value, list):
        parts = [_written(v, inner) for v in value]
    else:
        parts = [f"{json.dumps(k)}: {_written(v, inner)}" for k, v in value.items()]
    begin, end = "{}" if isinstance(value, dict) else "[]"
    return f"{begin}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{end}"


if __name__ == "__main__":
    PAGE.write_text(page())

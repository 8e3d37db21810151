"""Checks every field of a request for text.

mlx-lm checks sampling parameters and leaves the rest to its one generation thread, where a failure
ends everyone's requests. A field that is in no table here is refused by name: nothing that a
request asks for is silently ignored.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeGuard

from mlx_lm import server as stock

from ._refusals import Refused

Check = Callable[[Any], str | None]
"""Returns None for a good value, else what is wrong with it ("must be a string")."""

_MOST_TOKENS = (1 << 31) - 1
_LARGEST = 1e30  # below float32's maximum: a penalty must not make logits infinite
_SMALLEST_TEMPERATURE = 1e-6  # logits are divided by it


def check_request(body: dict[str, Any], fetch_images: bool, chat: bool) -> dict[str, Any]:
    """Check a request, and translate it for mlx-lm's handler.

    Args:
        body: the request's JSON object.
        fetch_images: whether it may name images by http(s) URL.
        chat: whether it is for chat completions, or for completions.

    Raises:
        Refused: with status 400, the field, and what is wrong with it.
    """
    # null means the default, except for draft_model.
    body = {k: v for k, v in body.items() if v is not None or k == "draft_model"}
    for path, value in _walk(body):
        if isinstance(value, float) and not math.isfinite(value):
            raise _refused(path, "must be finite")
        if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
            raise _refused(path, "has half of a surrogate pair, for which there are no tokens")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        body["prompt"] = prompt[0]
    fields = CHAT_FIELDS if chat else TEXT_FIELDS
    for key, value in body.items():
        check = fields.get(key)
        if check is None:
            other = TEXT_FIELDS if chat else CHAT_FIELDS
            where = "this path" if key in other else "this server"
            raise _refused(key, f"is not a field that {where} knows; leave it out")
        if value is not None and (must := check(value)) is not None:
            raise _refused(key, must)
    if (needed := "messages" if chat else "prompt") not in body:
        raise _refused(needed, "is required")
    return _for_mlx_lm(body, fetch_images)


def _for_mlx_lm(body: dict[str, Any], fetch_images: bool) -> dict[str, Any]:
    """The checked body in the form that mlx-lm's handler takes."""
    for message in body.get("messages", ()):
        message["content"] = _content(message.get("content"))
    if "messages" in body and not fetch_images:
        for url in _image_urls(body["messages"]):
            if not url.startswith("data:"):
                raise _refused(
                    "messages", "images must be data: URLs (--fetch-images allows others)"
                )
    for key in ("xtc_probability", "xtc_threshold"):
        if key in body:
            body[key] = float(body[key])
    options = body.get("stream_options")
    if options is not None:
        body["stream_options"] = {"include_usage": bool(options.get("include_usage"))}
    if body.get("tool_choice") == "none":
        body.pop("tools", None)
    logprobs = body.get("logprobs")
    if not isinstance(logprobs, bool | None):  # of completions: how many likeliest tokens to return
        body |= {"logprobs": True, "top_logprobs": logprobs}
    if body.get("top_logprobs", -1) >= 0:
        body["logprobs"] = True
    elif body.get("logprobs"):
        body["top_logprobs"] = 0
    return {k: v for k, v in body.items() if k not in NO_EFFECT}


def _refused(path: str, must: str) -> Refused:
    key = path.partition(".")[0].partition("[")[0]
    return Refused(400, f"{path} {must}", "invalid_request", key)


def _walk(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key and plain value in a JSON object, with its path."""
    left: list[tuple[str, Any]] = [("", body)]
    while left:
        path, value = left.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                yield path or "a field's name", key
                left.append((f"{path}.{key}" if path else key, inner))
        elif isinstance(value, list):
            left += [(f"{path}[{i}]", inner) for i, inner in enumerate(value)]
        else:
            yield path, value


def _number(low: float = -_LARGEST, high: float = _LARGEST) -> Check:
    must = f"must be a number from {low:g} to {high:g}"
    return lambda v: None if _is_number(v) and low <= v <= high else must


def _integer(low: int = 0, high: int = _MOST_TOKENS) -> Check:
    must = f"must be an integer from {low} to {high}"
    return lambda v: None if _is_number(v) and isinstance(v, int) and low <= v <= high else must


def _one_of(*values: Any) -> Check:
    """One of these values, and of its type: true is not 1."""
    must = "must be " + " or ".join(repr(v) for v in values)
    if values == (True, False):
        must = "must be true or false"
    return lambda v: None if any(type(v) is type(w) and v == w for w in values) else must


def _unless(good: Callable[[Any], bool], wrong: str) -> Check:
    return lambda value: None if good(value) else wrong


_text = _unless(lambda v: isinstance(v, str), "must be a string")
_object = _unless(lambda v: isinstance(v, dict), "must be an object")
_flag = _one_of(True, False)


def _temperature(value: Any) -> str | None:
    if _is_number(value) and (value == 0 or _SMALLEST_TEMPERATURE <= value <= _LARGEST):
        return None
    return f"must be 0, or a number from {_SMALLEST_TEMPERATURE:g} to {_LARGEST:g}"


def _stop(value: Any) -> str | None:
    stops = [value] if isinstance(value, str) else value
    if not _are(stops, str) or "" in stops:
        return "must be a non-empty string or a list of them"
    return "has more than 64 strings" if len(stops) > 64 else None


def _logit_bias(value: Any) -> str | None:
    good = isinstance(value, dict) and all(
        re.fullmatch(r"-?[0-9]{1,19}", key) and _number()(bias) is None
        for key, bias in value.items()
    )
    return None if good else "must be an object of token (integer) to bias (float)"


def _logprobs(value: Any) -> str | None:
    good = isinstance(value, bool) or _integer(0, 11)(value) is None
    return None if good else "must be true or false, or an integer from 0 to 11"


def _stream_options(value: Any) -> str | None:
    known = ("include_usage", "include_obfuscation")
    good = isinstance(value, dict) and all(
        k in known and isinstance(v, bool | None) for k, v in value.items()
    )
    return None if good else f"must be an object of {' and '.join(known)}, true or false"


def _messages(value: Any) -> str | None:
    if not value or not _are(value, dict) or not all(isinstance(m.get("role"), str) for m in value):
        return "must be a list of objects with a role"
    for message in value:
        if not isinstance(message.get("name"), str | None):
            return "have a name that is not a string"
        calls = message.get("tool_calls")
        if calls is not None and not (_are(calls, dict) and all(map(_is_call, calls))):
            return "have tool_calls that are not a list of functions with a name and arguments"
    return None


def _is_call(call: dict[str, Any]) -> bool:
    function = call.get("function")
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str | dict | None)
    )


def _tools(value: Any) -> str | None:
    good = _are(value, dict) and all(
        isinstance(f := t.get("function"), dict) and isinstance(f.get("name"), str) for t in value
    )
    return None if good else "must be a list of objects with a function that has a name"


def _roles(value: Any) -> str | None:
    good = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    return None if good else "must be an object of strings"


NO_EFFECT: dict[str, Check] = {
    "metadata": _object,
    "prompt_cache_key": _text,
    "prompt_cache_retention": _text,
    "safety_identifier": _text,
    "service_tier": _one_of("auto", "default"),
    "store": _one_of(False),
    "user": _text,
}
"""Fields that are accepted and ignored, because they change no reply."""

_FIELDS: dict[str, Check] = {
    **NO_EFFECT,
    "adapters": _text,
    "draft_model": _text,
    "frequency_context_size": _integer(),
    "frequency_penalty": _number(),
    "logit_bias": _logit_bias,
    "logprobs": _logprobs,
    "lossy": _integer(0, 3),
    "max_completion_tokens": _integer(1),
    "max_tokens": _integer(1),
    "min_p": _number(0, 1),
    "model": _text,
    "n": _one_of(1),
    "num_draft_tokens": _integer(),
    "presence_context_size": _integer(),
    "presence_penalty": _number(),
    "repetition_context_size": _integer(),
    "repetition_penalty": _number(0),
    "seed": _integer(0, (1 << 63) - 1),
    "stop": _stop,
    "stream": _flag,
    "stream_options": _stream_options,
    "temperature": _temperature,
    "top_k": _integer(),
    "top_logprobs": _integer(-1, 11),
    "top_p": _number(0, 1),
    "xtc_probability": _number(0, 1),
    "xtc_threshold": _number(0, 1),
}

CHAT_FIELDS: dict[str, Check] = {
    **_FIELDS,
    "chat_template_kwargs": _unless(
        lambda v: isinstance(v, dict) and "chat_template" not in v,
        "must be an object, without a template of its own",
    ),
    "logprobs": _flag,
    "messages": _messages,
    "modalities": _unless(lambda v: v == ["text"], "must be ['text']"),
    "parallel_tool_calls": _one_of(True),
    "reasoning_effort": lambda v: "depends on the model's template: set it in chat_template_kwargs",
    "response_format": _unless(
        lambda v: v == {"type": "text"},
        "must be {'type': 'text'}: this server cannot constrain a reply to a format",
    ),
    "role_mapping": _roles,
    "tool_choice": _unless(
        lambda v: v in ("auto", "none"),
        "must be 'auto' or 'none': this server cannot force a model to call a tool",
    ),
    "tools": _tools,
}
"""Fields of a chat completion, OpenAI's and mlx-lm's."""

TEXT_FIELDS: dict[str, Check] = {
    **_FIELDS,
    "best_of": _one_of(1),
    "echo": _one_of(False),
    "prompt": _unless(lambda v: isinstance(v, str), "must be one string"),
    "suffix": _one_of(""),
}
"""Fields of a completion."""


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are(values: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(isinstance(v, kind) for v in values)


def _content(content: Any) -> Any:
    """A message's content. Text parts alone are joined: chat templates expect one string."""
    parts = (
        [{"type": "text", "text": content or ""}] if isinstance(content, str | None) else content
    )
    if not _are(parts, dict) or not all(
        isinstance(p.get("text"), str)
        if p.get("type") == "text"
        else isinstance(stock._image_url(p), str)
        for p in parts
    ):
        raise _refused(
            "messages", "have content that is neither text nor a list of texts and images"
        )
    images = any(p["type"] != "text" for p in parts)
    return parts if images else "".join(p["text"] for p in parts)


def _image_urls(messages: list[dict[str, Any]]) -> list[str]:
    return [str(stock._image_url(p)) for p in stock._image_parts(messages)]

"""Checks every field of a request for text.

mlx-lm checks sampling parameters and leaves the rest to its one generation thread, where a failure
ends everyone's requests. A field that is in no table here is refused by name: nothing that a
request asks for is silently ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from mlx_lm import server as stock

from .._structured.shape import Shape
from ._field_checks import (
    LARGEST,
    Check,
    a_flag,
    a_text,
    an_object,
    are,
    integer,
    is_number,
    number,
    one_of,
    unless,
    wrong,
)

MOST_CHOICES = 16
"""Replies that one request may ask for: `n` to each of its prompts."""

_DEEPEST = 200  # Python copies and writes lists and objects one within another to about 450
_SMALLEST_TEMPERATURE = 1e-6  # logits are divided by it
_FRACTIONS = (
    "frequency_penalty", "min_p", "presence_penalty", "repetition_penalty", "temperature", "top_p",
    "xtc_probability", "xtc_threshold",
)  # fmt: skip


def check_values(body: dict[str, Any]) -> None:
    """Check what no field of any API may have: half a character, no number, too deep a nesting.

    Raises:
        Refused: with status 400, the field, and what is wrong with it.
    """
    for path, value in _walk(body):
        if isinstance(value, float) and not math.isfinite(value):
            raise wrong(path, "must be finite")
        if isinstance(value, str) and not _encodes(value):
            raise wrong(path, "has half of a surrogate pair, for which there are no tokens")


def check_request(body: dict[str, Any], fetch_images: bool, chat: bool) -> dict[str, Any]:
    """Check a request, and translate it for mlx-lm's handler.

    Args:
        body: the request's JSON object, after `check_values`.
        fetch_images: whether it may name images by http(s) URL.
        chat: whether it is for chat completions, or for completions.

    Raises:
        Refused: with status 400, the field, and what is wrong with it.
    """
    # null means the default, except for draft_model.
    body = {k: v for k, v in body.items() if v is not None or k == "draft_model"}
    fields = CHAT_FIELDS if chat else TEXT_FIELDS
    for key, value in body.items():
        check = fields.get(key)
        if check is None:
            other = TEXT_FIELDS if chat else CHAT_FIELDS
            where = "this path" if key in other else "this server"
            raise wrong(key, f"is not a field that {where} knows; leave it out")
        if value is not None and (must := check(value)) is not None:
            raise wrong(key, must)
    if (needed := "messages" if chat else "prompt") not in body:
        raise wrong(needed, "is required")
    return _for_mlx_lm(body, fetch_images)


def shape_of(body: dict[str, Any]) -> Shape | None:
    """What a checked request wants its reply to look like; None if any text will do.

    Raises:
        Refused: its fields contradict each other.
    """
    form, choice = body.get("response_format", {}), body.get("tool_choice", "auto")
    schema = {"json_object": {"type": "object"}}.get(form.get("type"))
    if form.get("type") == "json_schema":
        schema = form["json_schema"].get("schema", {})
    tools = tuple(body.get("tools") or ())
    many = body.get("parallel_tool_calls", True)
    if choice in ("auto", "none"):
        if schema is None:
            return None
        return Shape(schema, tools if choice == "auto" else (), many, "response_format")
    if not tools:
        raise wrong("tool_choice", "forces a call, but there are no tools")
    if isinstance(choice, dict):
        name = choice["function"]["name"]
        tools = tuple(t for t in tools if t["function"]["name"] == name)
        if not tools:
            raise wrong("tool_choice", f"names {name!r}, which is not among the tools")
    return Shape(None, tools, many, "tool_choice")


def _for_mlx_lm(body: dict[str, Any], fetch_images: bool) -> dict[str, Any]:
    """The checked body in the form that mlx-lm's handler takes."""
    for message in body.get("messages", ()):
        message["content"] = _content(message.get("content"))
        if message["role"] == "developer":
            message["role"] = "system"  # OpenAI's newer name for it, which templates do not know
        if "reasoning" in message:  # our replies' name for it, beside the one of templates
            message.setdefault("reasoning_content", message["reasoning"])
    if "prompt" in body:
        body["prompt"] = _prompts(body["prompt"])
    choices = body.get("n", 1) * len(body.get("prompt", [0]))
    if choices > MOST_CHOICES:
        many = "n" if body.get("n", 1) > 1 else "prompt"
        raise wrong(many, f"asks for {choices} replies; {MOST_CHOICES} are allowed")
    if "messages" in body and not fetch_images:
        for url in _image_urls(body["messages"]):
            if not url.startswith("data:"):
                raise wrong("messages", "images must be data: URLs (--fetch-images allows others)")
    for key in _FRACTIONS:  # mlx-lm takes no integers for some, and MLX none above 64 bits
        if key in body:
            body[key] = float(body[key])
    options = body.get("stream_options")
    if options is not None:
        body["stream_options"] = {"include_usage": bool(options.get("include_usage"))}
    if body.get("tool_choice") == "none":
        body.pop("tools", None)
    if (effort := body.get("reasoning_effort")) is not None:
        settings = body.get("chat_template_kwargs", {})
        body["chat_template_kwargs"] = {"reasoning_effort": effort, **settings}
    logprobs = body.get("logprobs")
    if not isinstance(logprobs, bool | None):  # of completions: how many likeliest tokens to return
        body |= {"logprobs": True, "top_logprobs": logprobs}
    if body.get("top_logprobs", -1) >= 0:
        body["logprobs"] = True
    elif body.get("logprobs"):
        body["top_logprobs"] = 0
    return {k: v for k, v in body.items() if k not in NO_EFFECT}


def _encodes(value: str) -> bool:
    """Whether a string is text: all its surrogates come in pairs."""
    try:
        value.encode()  # 1,000 times as fast as a look at each character
    except UnicodeEncodeError:
        return False
    return True


def _walk(body: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every key and plain value in a JSON object, with its path.

    Raises:
        Refused: it is nested too deeply.
    """
    left: list[tuple[str, Any, int]] = [("", body, 0)]
    while left:
        path, value, depth = left.pop()
        if depth > _DEEPEST:
            field = path.partition(".")[0].partition("[")[0]
            raise wrong(field, f"is nested more than {_DEEPEST} deep")
        if isinstance(value, dict):
            for key, inner in value.items():
                yield path or "a field's name", key
                left.append((f"{path}.{key}" if path else key, inner, depth + 1))
        elif isinstance(value, list):
            left += [(f"{path}[{i}]", inner, depth + 1) for i, inner in enumerate(value)]
        else:
            yield path, value


def _temperature(value: Any) -> str | None:
    if is_number(value) and (value == 0 or _SMALLEST_TEMPERATURE <= value <= LARGEST):
        return None
    return f"must be 0, or a number from {_SMALLEST_TEMPERATURE:g} to {LARGEST:g}"


def _stop(value: Any) -> str | None:
    stops = [value] if isinstance(value, str) else value
    if not are(stops, str) or "" in stops:
        return "must be a non-empty string or a list of them"
    return "has more than 64 strings" if len(stops) > 64 else None


def _logit_bias(value: Any) -> str | None:
    good = isinstance(value, dict) and all(
        re.fullmatch(r"-?[0-9]{1,19}", key) and number()(bias) is None
        for key, bias in value.items()
    )
    return None if good else "must be an object of token (integer) to bias (float)"


def _logprobs(value: Any) -> str | None:
    good = isinstance(value, bool) or integer(0, 11)(value) is None
    return None if good else "must be true or false, or an integer from 0 to 11"


def _stream_options(value: Any) -> str | None:
    known = ("include_usage", "include_obfuscation")
    good = isinstance(value, dict) and all(
        k in known and isinstance(v, bool | None) for k, v in value.items()
    )
    return None if good else f"must be an object of {' and '.join(known)}, true or false"


def _messages(value: Any) -> str | None:
    if not value or not are(value, dict) or not all(isinstance(m.get("role"), str) for m in value):
        return "must be a list of objects with a role"
    for message in value:
        for key in ("name", "reasoning", "reasoning_content", "tool_call_id"):
            if not isinstance(message.get(key), str | None):
                return f"have a {key} that is not a string"
        calls = message.get("tool_calls")
        if calls is not None and not (are(calls, dict) and all(map(_is_call, calls))):
            return "have tool_calls that are not a list of functions with a name and arguments"
        if not all(_is_json(call["function"].get("arguments")) for call in calls or ()):
            return "have tool_calls whose arguments are not JSON"
    return None


def _is_call(call: dict[str, Any]) -> bool:
    function = call.get("function")
    return (
        isinstance(function, dict)
        and isinstance(function.get("name"), str)
        and isinstance(function.get("arguments"), str | dict | None)
        and isinstance(call.get("id"), str | None)
    )


def _is_json(arguments: Any) -> bool:
    """Whether arguments of a call can be given to a template: JSON in a string, or nothing."""
    if not isinstance(arguments, str) or not arguments:
        return True
    try:
        json.loads(arguments)
    except (ValueError, RecursionError):
        return False
    return True


def _tools(value: Any) -> str | None:
    good = are(value, dict) and all(
        t.get("type") in ("function", None)
        and isinstance(f := t.get("function"), dict)
        and isinstance(f.get("name"), str)
        and isinstance(f.get("description"), str | None)
        and isinstance(f.get("parameters"), dict | None)
        and isinstance(f.get("strict"), bool | None)
        for t in value
    )
    if good:
        return None
    return (
        "must be a list of objects of type 'function', with a function that has a name, a "
        "description as text and parameters as a schema"
    )


def _tool_choice(value: Any) -> str | None:
    if value in ("auto", "none", "required") and isinstance(value, str):
        return None
    named = isinstance(value, dict) and value.get("type") == "function"
    if named and isinstance(f := value.get("function"), dict) and isinstance(f.get("name"), str):
        return None
    return "must be 'auto', 'none', 'required' or {'type': 'function', 'function': {'name': ...}}"


def _response_format(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind in ("text", "json_object"):
        return None
    if kind != "json_schema":
        return "must be of type 'text', 'json_object' or 'json_schema'"
    stated = value.get("json_schema")
    good = isinstance(stated, dict) and isinstance(stated.get("schema"), dict)
    return None if good else "must have a json_schema with a schema"


def _prompt(value: Any) -> str | None:
    prompts = value if isinstance(value, list) and not are(value, int) else [value]
    one = all(isinstance(p, str) or _is_tokens(p) for p in prompts)
    must = "must be a string, a list of tokens, or a list of either"
    return None if prompts and one else must


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(integer()(t) is None for t in value)


def _prompts(value: Any) -> list[Any]:
    """A checked prompt as a list of prompts, each a string or a list of tokens."""
    return [value] if isinstance(value, str) or _is_tokens(value) else value


def _roles(value: Any) -> str | None:
    good = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
    return None if good else "must be an object of strings"


NO_EFFECT: dict[str, Check] = {
    "metadata": an_object,
    "prompt_cache_key": a_text,
    "prompt_cache_retention": a_text,
    "safety_identifier": a_text,
    "service_tier": one_of("auto", "default"),
    "store": one_of(False),
    "user": a_text,
}
"""Fields that are accepted and ignored, because they change no reply."""

_FIELDS: dict[str, Check] = {
    **NO_EFFECT,
    "adapters": a_text,
    "draft_model": a_text,
    "frequency_context_size": integer(),
    "frequency_penalty": number(),
    "logit_bias": _logit_bias,
    "logprobs": _logprobs,
    "lossy": integer(0, 3),
    "max_completion_tokens": integer(1),
    "max_tokens": integer(1),
    "min_p": number(0, 1),
    "model": a_text,
    "n": integer(1, MOST_CHOICES),
    "num_draft_tokens": integer(),
    "presence_context_size": integer(),
    "presence_penalty": number(),
    "repetition_context_size": integer(),
    "repetition_penalty": number(0),
    "seed": integer(0, (1 << 63) - 1),
    "stop": _stop,
    "stream": a_flag,
    "stream_options": _stream_options,
    "temperature": _temperature,
    "top_k": integer(),
    "top_logprobs": integer(-1, 11),
    "top_p": number(0, 1),
    "xtc_probability": number(0, 1),
    "xtc_threshold": number(0, 1),
}

CHAT_FIELDS: dict[str, Check] = {
    **_FIELDS,
    "chat_template_kwargs": unless(
        lambda v: isinstance(v, dict) and "chat_template" not in v,
        "must be an object, without a template of its own",
    ),
    "logprobs": a_flag,
    "messages": _messages,
    "modalities": unless(lambda v: v == ["text"], "must be ['text']"),
    "parallel_tool_calls": a_flag,
    "reasoning_effort": a_text,  # if the model's template has it
    "response_format": _response_format,
    "role_mapping": _roles,
    "tool_choice": _tool_choice,
    "tools": _tools,
}
"""Fields of a chat completion, OpenAI's and mlx-lm's."""

TEXT_FIELDS: dict[str, Check] = {
    **_FIELDS,
    "best_of": one_of(1),
    "echo": one_of(False),
    "prompt": _prompt,
    "suffix": one_of(""),
}
"""Fields of a completion."""


def _content(content: Any) -> Any:
    """A message's content. Text parts alone are joined: chat templates expect one string."""
    parts = (
        [{"type": "text", "text": content or ""}] if isinstance(content, str | None) else content
    )
    if not are(parts, dict) or not all(
        isinstance(p.get("text"), str)
        if p.get("type") == "text"
        else isinstance(stock._image_url(p), str)
        for p in parts
    ):
        raise wrong("messages", "have content that is neither text nor a list of texts and images")
    images = any(p["type"] != "text" for p in parts)
    return parts if images else "".join(p["text"] for p in parts)


def _image_urls(messages: list[dict[str, Any]]) -> list[str]:
    return [str(stock._image_url(p)) for p in stock._image_parts(messages)]

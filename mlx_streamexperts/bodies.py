"""What a request for text may say.

mlx-lm checks sampling parameters and leaves the rest to its one generation thread, which ends when
it fails on something: then the server answers nobody any more. Whatever it does not look at itself
is looked at here first.
"""

from __future__ import annotations

import math
from typing import Any, TypeGuard

from mlx_lm import server as stock

from .serving import Refused


def checked(body: dict[str, Any], fetch_images: bool) -> dict[str, Any]:
    """The body as mlx-lm may have it.

    Args:
        body: the request's JSON object.
        fetch_images: whether it may name images that are elsewhere.

    Raises:
        Refused: with status 400 and what is wrong.
    """

    def check(key: str, good: bool, must: str) -> None:
        if key in body and not good:
            raise Refused(400, f"{key} {must}", "invalid_request")

    # A null means the default, but for draft_model.
    body = {k: v for k, v in body.items() if v is not None or k == "draft_model"}
    for key, value in body.items():
        check(key, not isinstance(value, float) or math.isfinite(value), "must be finite")
    stop = body.get("stop")
    stops = [stop] if isinstance(stop, str) else stop
    check("stop", _are(stops, str) and "" not in stops, "must be a string or a list of them")
    check("stop", not isinstance(stops, list) or len(stops) <= 64, "has more than 64 strings")
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        body["prompt"] = prompt = prompt[0]
    check("prompt", isinstance(prompt, str), "must be one string")
    messages: Any = body.get("messages")
    good = bool(messages) and _are(messages, dict)
    good = good and all(isinstance(m.get("role"), str) for m in messages)
    check("messages", good, "must be a list of objects with a role")
    for message in messages or ():
        message["content"] = _content(message.get("content"))
    check("tools", _are(body.get("tools"), dict), "must be a list of objects")
    options = body.get("stream_options")
    check("stream_options", isinstance(options, dict), "must be an object")
    if isinstance(options, dict):
        body["stream_options"] = {"include_usage": bool(options.get("include_usage"))}
    template = body.get("chat_template_kwargs")
    good = isinstance(template, dict) and "chat_template" not in template
    check("chat_template_kwargs", good, "must be an object, without a template of its own")
    seed = body.get("seed")
    check("seed", isinstance(seed, int) and 0 <= seed < 1 << 64, "must be below 2**64")
    if isinstance(messages, list) and not fetch_images:
        for url in _image_urls(messages):
            if not url.startswith("data:"):
                raise Refused(
                    400, "images must be data: URLs (--fetch-images allows others)",
                    "invalid_request",
                )  # fmt: skip
    return body


def _are(values: Any, kind: type) -> TypeGuard[list[Any]]:
    return isinstance(values, list) and all(isinstance(v, kind) for v in values)


def _content(content: Any) -> Any:
    """A message's content, a list of nothing but texts as one text: templates want that."""
    parts = (
        [{"type": "text", "text": content or ""}] if isinstance(content, str | None) else content
    )
    if not _are(parts, dict) or not all(
        isinstance(p.get("text"), str) if p.get("type") == "text" else stock._image_url(p)
        for p in parts
    ):
        raise Refused(
            400, "content must be a text, or a list of texts and images", "invalid_request"
        )
    images = any(p["type"] != "text" for p in parts)
    return parts if images else "".join(p["text"] for p in parts)


def _image_urls(messages: list[dict[str, Any]]) -> list[str]:
    return [str(stock._image_url(p)) for p in stock._image_parts(messages)]

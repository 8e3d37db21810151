"""Turns a reply's tokens into text up to a stop string, reasoning, tool calls and logprobs.

mlx-lm 0.32.2 matches stop strings token by token, misses those that the model tokenizes another
way, and drops text with them; it also drops a tool call that it cannot parse. Here the text is
searched, and such a call is text. Nothing here knows HTTP or MLX.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine


class StopText:
    """Finds the first stop string in text that comes in pieces.

    The first is the one that ends first; of two that end together, the longer. Where the text is
    cut into pieces makes no difference.

    Args:
        stops: the stop strings.

    Attributes:
        found: whether one has come. The text ends before it.
        string: the one that has come.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = list(stops)
        self._held = ""  # may be the beginning of a stop string
        self.found = False
        self.string: str | None = None

    def feed(self, text: str) -> str:
        """Take the next piece; returns the text that can be sent now."""
        self._held += text
        ends = [(at + len(s), at, s) for s in self._stops if (at := self._held.find(s)) >= 0]
        if ends:
            _, at, self.string = min(ends)
            self.found = True
            out, self._held = self._held[:at], ""
            return out
        send = len(self._held) - self._partial()
        out, self._held = self._held[:send], self._held[send:]
        return out

    def flush(self) -> str:
        """The text held back, once no more comes."""
        out, self._held = self._held, ""
        return out

    def _partial(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max((len(s) for s in self._stops), default=1) - 1
        for n in range(min(longest, len(self._held)), 0, -1):
            if any(s.startswith(self._held[-n:]) for s in self._stops):
                return n
        return 0


@dataclass(frozen=True)
class Call:
    """A tool call that the model has made.

    Attributes:
        id: the model's own if its calls have one, else a new one.
        name: of the function.
        arguments: as JSON text.
    """

    id: str
    name: str
    arguments: str


@dataclass
class Piece:
    """The new part of a reply. Unless pieces are added, it has reasoning, or text, or calls.

    Attributes:
        text, reasoning: new text of either kind.
        calls: complete tool calls.
        logprobs: of its tokens, in the form of OpenAI's chat; None if none were requested.
        finish_reason: "stop", "length" or "tool_calls" in the last piece, else None.
        stop: the stop string that ended the reply, in the last piece.
    """

    text: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: str | None = None
    stop: str | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        return bool(
            self.text or self.reasoning or self.calls or self.logprobs or self.finish_reason
        )

    def __iadd__(self, later: Piece) -> Piece:
        self.text += later.text
        self.reasoning += later.reasoning
        self.calls = [*self.calls, *later.calls]
        if later.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *later.logprobs]
        self.finish_reason, self.stop = later.finish_reason, later.stop
        return self


class Reply:
    """Turns mlx-lm's responses to a request into pieces of a reply.

    Args:
        context: mlx-lm's `GenerationContext` of the request.
        stops: stop strings.
        tokenizer: decodes tokens for logprobs; None if none were requested.
        tools: the request's tools, from which parsers take the types of arguments.
        markers: text that begins a tool call of this model, and text that ends one.
        single: end the reply after its first tool call.

    Attributes:
        tokens: number of tokens generated so far, including one that ended the reply.
        reasoning_tokens: those of them that belong to reasoning.
    """

    def __init__(
        self,
        context: Any,
        stops: Iterable[str],
        tokenizer: Any | None,
        tools: Any = None,
        markers: tuple[str, str] = ("", ""),
        single: bool = False,
    ) -> None:
        self._context, self._stop = context, StopText(stops)
        self._machine = context.text_sm.make_state(context.initial_state)
        self._state = context.initial_state
        self._parser: Callable[[str, Any], Any] | None = context.tool_parser
        self._tools, self._markers, self._single = tools, markers, single
        self._tool = ""  # text of the tool call that is being received
        self._called = False  # whether one is complete
        self._cut = False  # whether the reply ends here, though the model has not ended it
        self._logprobs = None if tokenizer is None else TokenLogprobs(tokenizer)
        self._sent = ""  # text released so far
        self._received = 0  # characters received, sent or held back
        self.tokens = self.reasoning_tokens = 0

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self._context.prompt)

    @property
    def cached(self) -> int:
        """Tokens of the prompt that were in the prompt cache."""
        return max(0, self._context.prompt_cache_count)

    def pieces(self, responses: Iterable[Any]) -> Iterator[Piece]:
        """Yield the pieces, at least one per token.

        The last has a finish reason; no response is taken after it.
        """
        for response in responses:
            self.tokens += 1
            text = self._stop.feed(response.text)
            reason = "stop" if self._stop.found else response.finish_reason
            if reason is not None:
                text += self._stop.flush()
            self._cut = self._stop.found or reason == "length"
            self._sent += text
            self._received += len(response.text)
            *pieces, piece = self._split(text, last=reason is not None)
            self.reasoning_tokens += self._state == "reasoning"
            if self._single and self._called and reason is None:
                reason = "stop"
            if self._logprobs is not None:
                piece.logprobs = self._new_logprobs(response, last=reason is not None)
            if reason is not None:
                called = reason == "stop" and self._called
                piece.finish_reason = "tool_calls" if called else reason
                piece.stop = self._stop.string
            yield from pieces
            yield piece
            if reason is not None:
                return

    def _new_logprobs(self, response: Any, last: bool) -> list[dict[str, Any]]:
        """Logprobs of the tokens whose text is now certain to be in the reply."""
        assert self._logprobs is not None
        if response.finish_reason != "stop":  # an end-of-sequence token has no text
            self._logprobs.add(response, self._received)
        if last:
            return self._logprobs.rest(self._sent if self._stop.found else None)
        return self._logprobs.take(len(self._sent))

    def _split(self, text: str, last: bool) -> list[Piece]:
        """Sort text by mlx-lm's states: normal, reasoning, tool. Returns one piece or more."""
        self._machine, segments = TextStateMachine.split(self._machine, text)
        if last:
            self._machine, rest, state = TextStateMachine.flush(self._machine)
            segments.append((state, rest))
        pieces: list[Piece] = []
        for state, part in segments:
            if state == "tool":
                self._tool += part
            elif state is not None:
                if self._state == "tool":
                    pieces.append(self._end_tool(self._markers[1]))
                    if self._single and self._called:
                        self._state = state
                        return pieces
                if part and state == "reasoning":
                    pieces.append(Piece(reasoning=part))
                elif part and state == "normal":  # others are headers
                    pieces.append(Piece(part))
            self._state = state
        if last and self._state == "tool":
            pieces.append(self._end_tool(""))
        return pieces or [Piece()]

    def _end_tool(self, marker: str) -> Piece:
        """The tool call whose text has ended, or that text if it is cut or cannot be parsed."""
        text, self._tool = self._tool, ""
        # Some of mlx-lm's parsers take half a call for a whole one.
        cut = self._cut and marker != self._markers[1]
        calls = [] if cut else self._parse(text)
        if not calls:
            return Piece(text=f"{self._markers[0]}{text}{marker}")
        self._called = True
        return Piece(calls=calls[:1] if self._single else calls)

    def _parse(self, text: str) -> list[Call]:
        try:
            parsed: Any = self._parser(text, self._tools) if self._parser is not None else []
            found = parsed if isinstance(parsed, list) else [parsed]
            return [
                Call(
                    id=str(f.get("id") or f"call_{uuid.uuid4().hex[:24]}"),
                    name=f["name"],
                    arguments=json.dumps(f["arguments"], ensure_ascii=False),
                )
                for f in found
            ]
        except Exception as e:  # whatever a parser meets in text that a model wrote
            logging.warning(f"a tool call that {type(e).__name__} ended is sent as text")
            return []


class TokenLogprobs:
    """The tokens of a reply's text with their logprobs, each released once its text was sent."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._entries: list[dict[str, Any]] = []
        self._ends: list[int] = []  # length of the text up to and including each token
        self._taken = 0  # entries released so far

    def add(self, response: Any, end: int) -> None:
        """Add a token; `end` is the length of the text with it, whether sent or held back."""
        begin = self._ends[-1] if self._ends else 0
        self._ids.append(response.token)
        self._ends.append(end)
        self._entries.append(
            {
                "id": response.token,
                "text_offset": begin,
                **self._named(response.token, response.logprob),
                "top_logprobs": [
                    {"id": t["id"], **self._named(t["id"], t["logprob"])}
                    for t in response.top_tokens
                ],
            }
        )

    def take(self, sent: int) -> list[dict[str, Any]]:
        """New entries of tokens that lie within the first `sent` characters of the text."""
        end = self._taken
        for i in range(max(1, end), len(self._ends)):
            # If a token brings text, the text of all tokens before it is complete.
            if self._ends[i - 1] < self._ends[i] <= sent:
                end = i
        return self._to(end)

    def rest(self, cut: str | None) -> list[dict[str, Any]]:
        """The last entries; only those within `cut`, the text before a stop string, if given."""
        return self._to(len(self._ids) if cut is None else self._up_to(cut))

    def _to(self, end: int) -> list[dict[str, Any]]:
        new, self._taken = self._entries[self._taken : end], max(self._taken, end)
        return new

    def _up_to(self, text: str) -> int:
        """The number of tokens that cover this text."""
        if not text:
            return 0
        # mlx-lm drops the space before a reply.
        length = len(text) + max(0, self._tokenizer.decode(self._ids).find(text))
        low, high = 1, len(self._ids)
        while low < high:
            middle = (low + high) // 2
            if len(self._tokenizer.decode(self._ids[:middle])) >= length:
                high = middle
            else:
                low = middle + 1
        return low

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        """The token as text, and as bytes if it is whole characters."""
        # Decoded twice: a first token loses the space before it.
        once, twice = (self._tokenizer.decode([token] * n) for n in (1, 2))
        text = twice[len(once) :] if twice.startswith(once) else once
        whole = "\ufffd" not in text
        return {
            "token": text,
            "logprob": logprob,
            "bytes": list(text.encode()) if whole else None,
        }


def completion_logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Logprobs in the form of OpenAI's completions; `content` has the form of a chat, as mlx-lm's.

    Args:
        entries: `Piece.logprobs`.
    """
    likeliest = []
    for entry in entries:
        named: dict[str, float] = {}
        for top in entry["top_logprobs"]:
            named.setdefault(
                top["token"], top["logprob"]
            )  # of two tokens with one text, the likelier
        likeliest.append(named)
    return {
        "tokens": [e["token"] for e in entries],
        "token_logprobs": [e["logprob"] for e in entries],
        "top_logprobs": likeliest,
        "text_offset": [e["text_offset"] for e in entries],
        "content": entries,
    }

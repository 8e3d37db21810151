"""Turns a reply's tokens into text up to a stop string, reasoning, tool calls and logprobs.

mlx-lm 0.32.2 matches stop strings token by token, misses those that the model tokenizes another
way, and drops text with them. Here the text is searched. Nothing here knows HTTP or MLX.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = list(stops)
        self._held = ""  # may be the beginning of a stop string
        self.found = False

    def feed(self, text: str) -> str:
        """Take the next piece; returns the text that can be sent now."""
        self._held += text
        ends = [(at + len(s), at) for s in self._stops if (at := self._held.find(s)) >= 0]
        if ends:
            self.found = True
            out, self._held = self._held[: min(ends)[1]], ""
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


@dataclass
class Piece:
    """The new part of a reply.

    Attributes:
        text, reasoning: new text of either kind.
        tools: texts of complete tool calls.
        logprobs: of its tokens, in the form of OpenAI's chat; None if none were requested.
        finish_reason: "stop", "length" or "tool_calls" in the last piece, else None.
    """

    text: str = ""
    reasoning: str = ""
    tools: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] | None = None
    finish_reason: str | None = None

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        return bool(
            self.text or self.reasoning or self.tools or self.logprobs or self.finish_reason
        )

    def __iadd__(self, later: Piece) -> Piece:
        self.text += later.text
        self.reasoning += later.reasoning
        self.tools += later.tools
        if later.logprobs is not None:
            self.logprobs = [*(self.logprobs or []), *later.logprobs]
        self.finish_reason = later.finish_reason
        return self


class Reply:
    """Turns mlx-lm's responses to a request into pieces of a reply.

    Args:
        context: mlx-lm's `GenerationContext` of the request.
        stops: stop strings.
        tokenizer: decodes tokens for logprobs; None if none were requested.

    Attributes:
        tokens: number of tokens generated so far, including one that ended the reply.
    """

    def __init__(self, context: Any, stops: Iterable[str], tokenizer: Any | None) -> None:
        self._stop = StopText(stops)
        self._machine = context.text_sm.make_state(context.initial_state)
        self._state = context.initial_state
        self._tool = ""  # text of the tool call that is being received
        self._called = False  # whether one is complete
        self._logprobs = None if tokenizer is None else TokenLogprobs(tokenizer)
        self._sent = ""  # text released so far
        self._received = 0  # characters received, sent or held back
        self.tokens = 0

    def pieces(self, responses: Iterable[Any]) -> Iterator[Piece]:
        """Yield a piece per token. The last has a finish reason; no response is taken after it."""
        for response in responses:
            self.tokens += 1
            text = self._stop.feed(response.text)
            reason = "stop" if self._stop.found else response.finish_reason
            if reason is not None:
                text += self._stop.flush()
            self._sent += text
            self._received += len(response.text)
            piece = self._split(text, last=reason is not None)
            if self._logprobs is not None:
                piece.logprobs = self._new_logprobs(response, last=reason is not None)
            if reason is None:
                yield piece
                continue
            called = reason == "stop" and self._called
            piece.finish_reason = "tool_calls" if called else reason
            yield piece
            return

    def _new_logprobs(self, response: Any, last: bool) -> list[dict[str, Any]]:
        """Logprobs of the tokens whose text is now certain to be in the reply."""
        assert self._logprobs is not None
        if response.finish_reason != "stop":  # an end-of-sequence token has no text
            self._logprobs.add(response, self._received)
        if last:
            return self._logprobs.rest(self._sent if self._stop.found else None)
        return self._logprobs.take(len(self._sent))

    def _split(self, text: str, last: bool) -> Piece:
        """Sort text by mlx-lm's states: normal, reasoning, tool."""
        self._machine, segments = TextStateMachine.split(self._machine, text)
        if last:
            self._machine, rest, state = TextStateMachine.flush(self._machine)
            segments.append((state, rest))
        piece = Piece()
        for state, part in segments:
            if state == "reasoning":
                piece.reasoning += part
            elif state == "tool":
                self._tool += part
            elif state == "normal":
                if self._state == "tool":
                    self._end_tool(piece)
                piece.text += part
            self._state = state
        if last and self._state == "tool" and self._tool:
            self._end_tool(piece)
        return piece

    def _end_tool(self, piece: Piece) -> None:
        piece.tools.append(self._tool)
        self._tool, self._called = "", True


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

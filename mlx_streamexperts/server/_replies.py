"""Turns a reply's tokens into text up to a stop string, reasoning, tool calls and logprobs.

mlx-lm 0.32.2 matches stop strings token by token, misses those that the model tokenizes another
way, and drops text with them; it also drops a tool call that it cannot parse. Here the text is
searched, and such a call is text. Nothing here knows HTTP or MLX.
"""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlx_lm.generate import TextStateMachine

from ._calls import Call as Call
from ._calls import CallParser


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


class Sorter:
    """Sorts a reply's text into reasoning, answer and tool calls.

    mlx-lm's `TextStateMachine` finds the markers, and takes every one for what it may be. Here one
    counts only where it belongs: models also write about `<think>` and `<tool_call>`.

    - Reasoning begins before the answer: after text or a call, its marker is text.
    - A call is whole. What is not, is text in the place where it began: its first marker, and all
      that follows. A marker that ends a call may be part of an argument: the call goes on to the
      next one, unless another call begins. Within reasoning, the marker that ends it ends no call.

    Args:
        context: mlx-lm's `GenerationContext` of the request.
        calls: reads tool calls; None if the request wants none: their markers are text then.
        single: there is nothing after the first call.
        answer: text but white space is an answer in a format, and has no markers.
        closing: tokens, and nothing else, end reasoning: `closed` tells when.
        think_end: marker that ends reasoning; "" if this model has none.

    Attributes:
        state: mlx-lm's name of what the text now belongs to: normal, reasoning, tool or another.
        called: whether there was a call.
        closed: whether the tokens that end reasoning have come.
    """

    def __init__(
        self,
        context: Any,
        calls: CallParser | None,
        *,
        single: bool,
        answer: bool,
        closing: bool,
        think_end: str,
    ) -> None:
        self._states, self.state = context.text_sm, context.initial_state
        self._machine = self._states.make_state(self.state)
        self._calls, self._single, self._answer, self._closing = calls, single, answer, closing
        self._think_end = think_end
        self.called = self.closed = False
        self._answering = False  # whether text other than white space has come
        self._held = ""  # text that the machine holds: it may begin a marker
        self._before = self._marker = ""  # of the open call: the state before it, what began it
        self._tool = ""  # its text
        self._began = False  # whether that has begun as calls do
        self._looking: int | None = None  # where its last end marker ends, if that may be its end
        self._pieces: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        """Take the next text; returns what is now certain, one piece for each kind."""
        self._read(text, self._calls)
        return self._take()

    def end(self, cut: bool) -> list[Piece]:
        """The rest, once no more comes; `cut`: not because the model has ended its reply."""
        self._flush()
        if self.state == "tool" and self._calls is not None:
            ended = not self._calls.end
            calls = [] if cut and not ended else self._calls.parse(self._tool, ended)
            if calls:
                self._call(calls)
            else:
                self._give_up(self._tool)
        return self._take()

    def _take(self) -> list[Piece]:
        pieces, self._pieces = self._pieces, []
        return pieces

    def _read(self, text: str, calls: CallParser | None) -> None:
        """Sort text letter by letter: at most one marker ends with a letter."""
        for letter in text:
            if self.called and self._single:
                return
            if self._answer and self._answering and self.state == "normal":
                self._say(letter)
                continue
            self._held += letter
            self._machine, found = TextStateMachine.split(self._machine, letter)
            part = found[0][1]
            marker = self._held[len(part) :] if len(found) > 1 else ""
            self._held = "" if marker else self._held[len(part) :]
            now = self.state
            self._say(part)
            if marker and self.state == now:
                self._enter(found[-1][0], marker, calls)
            elif marker:  # of a call that has just been given up
                self._say(marker)

    def _flush(self) -> None:
        """Take what the machine holds for what it is if no more comes."""
        held, self._held = self._held, ""
        self._go(self.state)
        self._say(held)

    def _go(self, state: str) -> None:
        self.state, self._machine = state, self._states.make_state(state)

    def _enter(self, state: str, marker: str, calls: CallParser | None) -> None:
        """The machine has found a marker, after which a state begins."""
        now = self.state
        if now == "tool":
            self._end_call(marker)
            return
        if state == "tool":
            counts = calls is not None and not (now == "reasoning" and self._closing)
            self._before, self._marker, self._began = now, marker, False
        elif now == "reasoning":
            counts = self.closed or not self._closing
        else:
            begun = now == "normal" and (self._answering or self.called)
            counts = not (begun and state == "reasoning")
        if counts:
            self.state = state
        else:
            self._go("reasoning" if now == "reasoning" else "normal")
            self._say(marker)

    def _say(self, text: str) -> None:
        """Add text to what the state is about."""
        if self.state == "tool":
            self._tool += text
            self._look()
        elif text and self.state == "reasoning":
            if not self._pieces or not self._pieces[-1].reasoning:
                self._pieces.append(Piece())
            self._pieces[-1].reasoning += text
        elif text and self.state == "normal":  # others are headers
            self._answering = self._answering or not text.isspace()
            if not self._pieces or not self._pieces[-1].text:
                self._pieces.append(Piece())
            self._pieces[-1].text += text

    def _end_call(self, marker: str) -> None:
        """A marker that ends calls has come: it ends this one, or is a part of it."""
        assert self._calls is not None
        calls = self._calls.parse(self._tool, True)
        if calls:
            self._call(calls)
        else:
            self._go("tool")
            self._tool += marker
            self._looking = len(self._tool)

    def _call(self, calls: list[Call]) -> None:
        self.called, self._tool, self._looking = True, "", None
        self._pieces.append(Piece(calls=calls[:1] if self._single else calls))
        self._go("normal")

    def _look(self) -> None:
        """Give the open call up as soon as it can be none."""
        assert self._calls is not None
        if self._before == "reasoning" and self._think_end and self._tool.endswith(self._think_end):
            self._give_up(self._tool)
        elif not self._began:
            begins = self._calls.begins(self._tool)
            self._began = bool(begins)
            if begins is False:
                self._give_up(self._tool)
        elif self._looking is not None:
            after = self._tool[self._looking :].lstrip()
            if after == self._marker:
                self._give_up(self._tool.removesuffix(self._marker))
                self._before, self._began = self.state, False
                self._go("tool")
            elif not self._marker.startswith(after):
                self._looking = None

    def _give_up(self, text: str) -> None:
        """The open call is none: sort its text again as what was before it, calls as text."""
        self._tool, self._looking = "", None
        if self._began:
            logging.warning("a tool call that is cut, or that cannot be parsed, is sent as text")
        self._go("reasoning" if self._before == "reasoning" else "normal")
        self._say(self._marker)
        self._read(text, None)
        self._flush()


class Reply:
    """Turns mlx-lm's responses to a request into pieces of a reply.

    Args:
        context: mlx-lm's `GenerationContext` of the request.
        stops: stop strings.
        tokenizer: decodes tokens for logprobs; None if none were requested.
        tools: the request's tools; without any, calls are text.
        call_end: what ends a tool call of this model; "" if only the reply's end does.
        single: end the reply after its first tool call.
        answer: the reply's text is an answer in a format, and has no markers once it has begun.
        closing: the tokens that end reasoning, if a format holds the reply: it counts by them.
        think_end: what ends reasoning of this model; "" if it does not reason.
        plain: everything is text.

    Attributes:
        tokens: number of tokens generated so far, including one that ended the reply.
        reasoning_tokens: those of them that belong to reasoning.
    """

    def __init__(
        self,
        context: Any,
        stops: Iterable[str],
        tokenizer: Any | None,
        tools: list[Any] | None = None,
        call_end: str = "",
        *,
        single: bool = False,
        answer: bool = False,
        closing: Sequence[int] = (),
        think_end: str = "",
        plain: bool = False,
    ) -> None:
        self._context, self._stop = context, StopText(stops)
        calls = None
        if tools and context.tool_parser is not None:
            calls = CallParser(context.tool_parser, tools, call_end)
        self._sorter = Sorter(
            context,
            calls,
            single=single,
            answer=answer,
            closing=bool(closing),
            think_end=think_end,
        )
        self._single, self._plain = single, plain
        self._closing = tuple(closing)
        self._recent: tuple[int, ...] = ()  # the last tokens, as many as those
        self._logprobs = None if tokenizer is None else TokenLogprobs(tokenizer)
        self._sent = ""  # text released so far
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
            self._sent += text
            if self._closing:
                self._recent = (*self._recent, response.token)[-len(self._closing) :]
                self._sorter.closed = self._sorter.closed or self._recent == self._closing
            cut = self._stop.found or reason == "length"
            *pieces, piece = self._split(text, cut if reason is not None else None)
            called = self._sorter.called
            self.reasoning_tokens += self._sorter.state == "reasoning"
            if self._single and called and reason is None:
                reason = "stop"
            if self._logprobs is not None:
                piece.logprobs = self._new_logprobs(response, last=reason is not None)
            if reason is not None:
                piece.finish_reason = "tool_calls" if reason == "stop" and called else reason
                piece.stop = self._stop.string
            yield from pieces
            yield piece
            if reason is not None:
                return

    def _split(self, text: str, cut: bool | None) -> list[Piece]:
        """One piece or more; `cut` is for `Sorter.end`, None before the reply's end."""
        if self._plain:
            return [Piece(text)]
        pieces = self._sorter.feed(text)
        if cut is not None:
            pieces += self._sorter.end(cut)
        return pieces or [Piece()]

    def _new_logprobs(self, response: Any, last: bool) -> list[dict[str, Any]]:
        """Logprobs of the tokens whose text is now certain to be in the reply."""
        assert self._logprobs is not None
        if response.finish_reason != "stop":  # an end-of-sequence token has no text
            self._logprobs.add(response, response.text)
        if last:
            return self._logprobs.rest(self._sent if self._stop.found else None)
        return self._logprobs.take(len(self._sent))


class TokenLogprobs:
    """The tokens of a reply's text with their logprobs, each released once its text was sent."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._entries: list[dict[str, Any]] = []
        self._ends: list[int] = []  # length of the text up to and including each token
        self._taken = 0  # entries released so far
        self._text = ""  # received so far
        # What the tokens say: the same, but for a space before it, and in time.
        self._said, self._decoder = "", codecs.getincrementaldecoder("utf-8")("replace")
        self._dropped = 0  # characters that mlx-lm drops before a reply

    def add(self, response: Any, text: str) -> None:
        """Add a token; `text` has come with it, whether it is sent or held back."""
        token = response.token
        named = self._named(token, response.logprob)
        if not self._ids and named["token"].startswith(" "):
            self._dropped = self._space_dropped(token)
        begin = max(0, len(self._said) - self._dropped)
        self._said += self._decoder.decode(self._bytes(token, named["token"]))
        before, self._text = len(self._text), self._text + text
        said = self._said[self._dropped :]
        if not (said.startswith(self._text) or self._text.startswith(said)):
            begin = before  # a tokenizer that changes spaces: its text may come late
        self._ids.append(token)
        self._ends.append(len(self._text))
        self._entries.append(
            {
                "id": token,
                "text_offset": begin,
                **named,
                "top_logprobs": [
                    {"id": t["id"], **self._named(t["id"], t["logprob"])}
                    for t in response.top_tokens
                ],
            }
        )

    def _space_dropped(self, token: int) -> int:
        """How much mlx-lm leaves out of a reply that begins with this token."""
        detokenizer = self._tokenizer.detokenizer
        for _ in range(2):
            detokenizer.add_token(token)
        detokenizer.finalize()
        return 2 * len(self._named(token, 0.0)["token"]) - len(detokenizer.text)

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
        """The token as text, and as bytes unless it is a special one."""
        # Decoded twice: a first token loses the space before it.
        once, twice = (self._tokenizer.decode([token] * n) for n in (1, 2))
        text = twice[len(once) :] if twice.startswith(once) else once
        return {
            "token": text,
            "logprob": logprob,
            "bytes": None if token in self._special else list(self._bytes(token, text)),
        }

    def _bytes(self, token: int, text: str) -> bytes:
        """The bytes of a token with this text, which may be a part of a character."""
        if "\ufffd" in text:
            name = self._tokenizer.convert_ids_to_tokens(token) or ""
            if byte := re.fullmatch("<0x([0-9A-F]{2})>", name):  # as SentencePiece names it
                return bytes.fromhex(byte[1])
            if name and _BYTES.keys() >= set(name):
                return bytes(_BYTES[letter] for letter in name)
        return text.encode()


def _bytes_by_letter() -> dict[str, int]:
    """The letters that stand for bytes in vocabularies of GPT-2's kind."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(0x100) if b not in own]
    return {chr(b): b for b in own} | {chr(0x100 + i): b for i, b in enumerate(others)}


_BYTES = _bytes_by_letter()


def completion_logprobs(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Logprobs in the form of OpenAI's completions; `content` has the form of a chat, as mlx-lm's.

    Args:
        entries: `Piece.logprobs`.
    """
    likeliest = []
    for entry in entries:
        named: dict[str, float] = {}
        for top in entry["top_logprobs"]:
            named.setdefault(_name(top), top["logprob"])  # of two with one text, the likelier
        likeliest.append(named)
    return {
        "tokens": [_name(e) for e in entries],
        "token_logprobs": [e["logprob"] for e in entries],
        "top_logprobs": likeliest,
        "text_offset": [e["text_offset"] for e in entries],
        "content": entries,
    }


def _name(entry: dict[str, Any]) -> str:
    """A token in completions: as OpenAI's, parts of a character have the names of their bytes."""
    raw = bytes(entry["bytes"] or ())
    if "\ufffd" in entry["token"] and raw and raw != entry["token"].encode():
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
    return str(entry["token"])

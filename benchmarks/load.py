"""64 clients of every API at once for ten minutes: does each get what it would get alone?

    python benchmarks/load.py --minutes 10 --out load.json

Serves the embedded model as `soak.py` does and asks each of some forty requests alone, streamed and
whole: five APIs, plain, with a shared long prompt, with tools, held to a JSON schema or to a call.
Then clients without time to think ask for the same ones, all at once. Some leave in their prompt or
their reply, some read 16 bytes a second. Every greedy reply, streamed or whole, is compared with
the one that its request got alone. The record and the verdict are those of `soak.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import socket
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import soak
from soak_verdict import verdict

from mlx_streamexperts import demo_model

TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    + soak.TEMPLATE
    + "{# <tool_call> tool_call.name: calls are JSON #}"
)
LIMITS = ["--context-tokens", "4096", "--prefill-tokens", "64", "--max-body", "64KiB"]
LENGTHS = (8, 24, 48)
KINDS = {  # how often
    "stream": 40, "whole": 25, "by itself": 2, "sampled": 6, "leaves in its prompt": 6,
    "leaves in its reply": 8, "reads slowly": 10, "malformed": 2, "too large": 1,
}  # fmt: skip
SLOW_BYTES, SLOW_SECONDS = 4, 0.25  # 16 bytes a second
NAME = demo_model().name
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Tom", "Lily"]}, "old": {"type": "boolean"}},
    "required": ["name", "old"],
    "additionalProperties": False,
}
TOOL = {"name": "look", "description": "Look at something.", "parameters": SCHEMA}
FUNCTION = {"type": "function", "function": TOOL}


@dataclass(frozen=True)
class Case:
    """A greedy request: where it goes, and what it says."""

    name: str
    path: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Said:
    """A reply in no API's words: text, calls (name and JSON) and how it ended."""

    text: str
    calls: tuple[tuple[str, str], ...]
    ending: str


def cases(count: int = 5, long: int = 3, lengths: Sequence[int] = LENGTHS) -> list[Case]:
    """`count` plain requests to each API, `long` with a shared prompt, and those with tools.

    Args:
        lengths: of plain replies, in tokens.
    """
    short = soak.prompts(long=0)[::3]
    before = soak.prompts(long=1)[-1].partition("\n\n")[0]
    found = []
    for n, prompt in enumerate([*short[:count], *short[:long]]):
        system, length = before if n >= count else None, lengths[n % len(lengths)]
        name = "plain" if system is None else "shared prompt"
        found += [Case(name, *request) for request in _everywhere(prompt, length, system)]
    chat, _, messages, responses, ollama = _everywhere(short[0], 120, None)
    held, forced = "held to a schema", "forced call"
    stated = {"type": "json_schema", "name": "a", "schema": SCHEMA}
    theirs = {"name": "look", "input_schema": SCHEMA}
    for name, (path, body), more in (
        (held, chat, {"response_format": {"type": "json_schema", "json_schema": stated}}),
        (held, messages, {"output_config": {"format": {**stated, "name": None}}}),
        (held, responses, {"text": {"format": stated}}),
        (held, ollama, {"format": SCHEMA}),
        (forced, chat, {"tools": [FUNCTION], "tool_choice": "required"}),
        (forced, messages, {"tools": [theirs], "tool_choice": {"type": "any"}}),
        (forced, responses, {"tools": [{"type": "function", **TOOL}], "tool_choice": "required"}),
        ("tools", chat, {"tools": [FUNCTION]}),
        ("tools", ollama, {"tools": [FUNCTION]}),
    ):
        found.append(Case(name, path, {**body, **more}))
    return found


def _everywhere(prompt: str, length: int, system: str | None) -> list[tuple[str, dict[str, Any]]]:
    """The same request to each API."""
    user = [{"role": "user", "content": prompt}]
    all_ = [{"role": "system", "content": system}, *user] if system else user
    before = {} if system is None else {"system": system}
    instructed = {} if system is None else {"instructions": system}
    joined = prompt if system is None else f"{system}\n{prompt}"
    return [
        ("/v1/chat/completions", {"messages": all_, "max_tokens": length}),
        ("/v1/completions", {"prompt": joined, "max_tokens": length}),
        ("/v1/messages", {**before, "messages": user, "max_tokens": length}),
        ("/v1/responses", {**instructed, "input": prompt, "max_output_tokens": length}),
        ("/api/chat", {"model": NAME, "messages": all_, "options": {"num_predict": length}}),
    ]


def whole(path: str, answer: dict[str, Any]) -> Said:
    """What a reply that was not streamed says."""
    if path == "/v1/completions":
        choice = answer["choices"][0]
        return Said(choice["text"], (), choice["finish_reason"])
    if path == "/v1/chat/completions":
        choice = answer["choices"][0]
        return Said(
            choice["message"]["content"] or "",
            _calls(choice["message"].get("tool_calls")),
            choice["finish_reason"],
        )
    if path == "/v1/messages":
        blocks = answer["content"]
        calls = [(b["name"], json.dumps(b["input"])) for b in blocks if b["type"] == "tool_use"]
        text = "".join(b["text"] for b in blocks if b["type"] == "text")
        return Said(text, tuple(calls), answer["stop_reason"])
    if path == "/v1/responses":
        items = answer["output"]
        parts = [p for i in items if i["type"] == "message" for p in i["content"]]
        calls = [(i["name"], i["arguments"]) for i in items if i["type"] == "function_call"]
        return Said("".join(p["text"] for p in parts), tuple(calls), answer["status"])
    return _ollama([answer])


def streamed(path: str, events: list[dict[str, Any]]) -> Said:
    """What a streamed reply says, from its parts alone."""
    assert not any("error" in e and e["error"] for e in events), str(events[-1])
    if path == "/api/chat":
        return _ollama(events)
    if path == "/v1/messages":
        text, calls, ending = "", [], ""
        for e in events:
            block, delta = e.get("content_block", {}), e.get("delta", {})
            if block.get("type") == "tool_use":
                calls.append([block["name"], ""])
            if "partial_json" in delta:
                calls[-1][1] += delta["partial_json"]
            text += delta.get("text", "")
            ending = delta.get("stop_reason") or ending
        assert events[-1]["type"] == "message_stop"
        return Said(text, tuple((n, json.dumps(json.loads(a))) for n, a in calls), ending)
    if path == "/v1/responses":
        text = "".join(e["delta"] for e in events if e["type"] == "response.output_text.delta")
        done = "response.function_call_arguments.done"
        made = tuple((e["name"], e["arguments"]) for e in events if e["type"] == done)
        return Said(text, made, events[-1]["response"]["status"])
    choices = [c for e in events for c in e["choices"]]
    parts = [c.get("delta", {"content": c.get("text")}) for c in choices]
    return Said(
        "".join(p.get("content") or "" for p in parts),
        tuple(c for p in parts for c in _calls(p.get("tool_calls"))),
        choices[-1]["finish_reason"],
    )


def _calls(made: list[dict[str, Any]] | None) -> tuple[tuple[str, str], ...]:
    return tuple((c["function"]["name"], c["function"]["arguments"]) for c in made or ())


def _ollama(lines: list[dict[str, Any]]) -> Said:
    calls = [c["function"] for e in lines for c in e["message"].get("tool_calls", ())]
    assert [e["done"] for e in lines] == [False] * (len(lines) - 1) + [True]
    return Said(
        "".join(e["message"]["content"] for e in lines),
        tuple((c["name"], json.dumps(c["arguments"])) for c in calls),
        lines[-1]["done_reason"],
    )


def parsed(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    """The events in the lines of a streamed reply of any API."""
    data = (line.removeprefix(b"data: ").strip() for line in lines)
    return [json.loads(line) for line in data if line.startswith(b"{")]


class Mixed(soak.Load):
    """Clients of all APIs.

    Args:
        url: of the server, which answers nobody else now: each case is asked alone at once.
        asked: what they ask for.
        slow: seconds that a slow reader takes its time.

    Raises:
        AssertionError: a streamed reply is another than the whole one.
    """

    def __init__(
        self, url: str, asked: list[Case], slow: float = 20.0, kinds: dict[str, int] = KINDS
    ) -> None:
        super().__init__(url, {}, think=0, kinds=kinds)
        self._cases, self._slow = asked, slow
        self.alone: list[Said] = []
        for case in asked:
            reply = self._reply_whole(case)
            assert self._reply_streamed(case) == reply, case
            self.alone.append(reply)

    def _request(self, kind: str, rng: random.Random) -> None:
        if kind in ("malformed", "too large"):
            return self._nonsense(kind, rng)
        n = rng.randrange(len(self._cases))
        case = self._cases[n]
        if kind == "stream":
            self._judge(n, self._reply_streamed(case))
        elif kind == "whole":
            self._judge(n, self._reply_whole(case))
        elif kind == "by itself":
            seed = {"/api/chat": {"options": {**case.body.get("options", {}), "seed": 1}}}
            if "v1/messages" in case.path or "responses" in case.path:  # which have no seed
                return self._judge(n, self._reply_whole(case))
            own = {**case.body, **seed.get(case.path, {"seed": 1})}
            self._judge(n, self._reply_whole(Case(case.name, case.path, own)))
        elif kind == "sampled":
            self._reply_whole(_with(case, temperature=0.8, top_p=0.95))
        elif kind == "leaves in its prompt":
            with contextlib.closing(self._ask(_with(case, stream=rng.random() < 0.5))):
                time.sleep(rng.random())
        elif kind == "leaves in its reply":
            with contextlib.closing(self._ask(_with(case, stream=True))) as connection:
                self._opened(connection).read(rng.randrange(1, 2000))
        elif kind == "reads slowly":
            self._judge(n, self._reply_slowly(case))
        return None

    def _judge(self, n: int, got: Said) -> None:
        with self._lock:
            self._tally.compared += 1
            if got != self.alone[n]:
                found = {"prompt": str(self._cases[n]), "got": str(got)}
                self._tally.wrong.append({**found, "expected": str(self.alone[n])})

    def _ask(self, case: Case, buffer: int | None = None) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._address, timeout=600)
        if buffer is not None:
            host, _, port = self._address.partition(":")
            connection.sock = socket.socket()
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
            connection.sock.settimeout(600)
            connection.sock.connect((host, int(port)))
        connection.request("POST", case.path, json.dumps(case.body).encode())
        return connection

    def _opened(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        answer = connection.getresponse()
        assert answer.status == 200, f"status {answer.status}: {answer.read()[:200]!r}"
        return answer

    def _reply_whole(self, case: Case) -> Said:
        with contextlib.closing(self._ask(_with(case, stream=False))) as connection:
            return whole(case.path, json.loads(self._opened(connection).read()))

    def _reply_streamed(self, case: Case) -> Said:
        began, times, lines = time.perf_counter(), [], []
        with contextlib.closing(self._ask(_with(case, stream=True))) as connection:
            for line in self._opened(connection):
                lines.append(line)
                if line.startswith((b"data: ", b"{")):
                    times.append(time.perf_counter())
        with self._lock:
            self._tally.first_token.append(times[0] - began)
            if len(times) >= 8:
                self._tally.rates.append((len(times) - 1) / (times[-1] - times[0]))
        return streamed(case.path, parsed(lines))

    def _reply_slowly(self, case: Case) -> Said:
        """Some bytes a second for a while, and then the rest at once."""
        with contextlib.closing(self._ask(_with(case, stream=True), buffer=1024)) as connection:
            answer, got = self._opened(connection), b""
            end = time.monotonic() + self._slow
            while time.monotonic() < end and (more := answer.read1(SLOW_BYTES)):
                got += more
                self._stop.wait(SLOW_SECONDS)
            got += answer.read()
        return streamed(case.path, parsed(got.split(b"\n")))

    def _nonsense(self, kind: str, rng: random.Random) -> None:
        raw, status = rng.choice(soak.MALFORMED)
        if kind == "too large":
            raw, status = rng.choice((
                (json.dumps({"prompt": "word " * 20_000}).encode(), 413),
                (json.dumps({"prompt": "word " * 8_000}).encode(), 400),
            ))  # fmt: skip
        self._refused(raw, status)


def _with(case: Case, **more: Any) -> Case:
    """The case with further fields, where its API has them."""
    body = dict(case.body)
    if case.path == "/api/chat":
        body["stream"] = more.pop("stream", False)
        body["options"] = {**body.get("options", {}), **more}
    else:
        body |= more
    return Case(case.name, case.path, body)


def main() -> None:
    parser = soak.setup_arg_parser(__doc__, minutes=10, memory="76MB", clients=64)
    args = parser.parse_args()
    args.think, log = 0.0, args.out.with_suffix(".log")
    server = soak.Server(args.memory, log, TEMPLATE, LIMITS)
    record = soak.run(args, server, lambda url: Mixed(url, cases()), log)
    record["limits"] = LIMITS
    record["verdict"] = verdict(record, against="what they got alone")
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(*record["verdict"]["words"], sep="\n")


if __name__ == "__main__":
    main()

"""A server under mixed load for an hour: do memory and latency stay flat, is every text right?

    python benchmarks/soak.py --minutes 60 --out soak.json

Serves the embedded model in a process of its own with a memory promise that holds about a quarter
of the experts. Clients ask at random, with time to think: chat and text, streamed and whole, short
and long, greedy and not; some leave half way, some send nonsense or too much. Every greedy reply is
compared with what stock mlx-lm, in yet another process, says to the same prompt. Each minute what
the server holds and how it answers is written down; the end is a verdict in words, and JSON.

Latency on a machine that others use says little: the processor time of the server per token, and a
fixed piece of work (`yardstick`) beside it, tell a slower server from a busier machine.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

from soak_verdict import verdict

from mlx_streamexperts import demo_model

TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
LENGTHS = (8, 24, 48)
LIMITS = ["--context-tokens", "1024", "--prefill-tokens", "64", "--max-body", "64KiB"]
KINDS = {  # how often
    "stream": 30, "whole": 15, "chat": 15, "chat stream": 10, "alone": 8, "sampled": 8,
    "leaves in a stream": 6, "leaves before the reply": 3, "malformed": 3, "too large": 2,
}  # fmt: skip
MALFORMED: tuple[tuple[bytes, int], ...] = (
    (b'{"prompt": ', 400),
    (b"[1, 2]", 400),
    (b'{"prompt": 7}', 400),
    (b'{"prompt": ""}', 400),
    (b'{"prompt": "x", "max_tokens": "many"}', 400),
    (b'{"prompt": "x", "model": "/etc/passwd"}', 404),
    (b'{"prompt": "x", "temperature": -1}', 400),
    (b"\xff\xfe\x00", 400),
)


def prompts(long: int = 8) -> list[str]:
    """The embedded model's own, of eight topics, and `long` ones of some hundred tokens."""
    folder = demo_model()
    short = [p["prompt"] for p in json.loads((folder / "prompts.json").read_text())]
    texts = json.loads((folder.parent / "report-prompts.json").read_text())
    return short + [f"{p['text']}\n\n{s}" for p, s in zip(texts[:long], short, strict=False)]


def stock_replies(asked: list[str], lengths: tuple[int, ...]) -> dict[str, dict[str, str]]:
    """What mlx-lm generates greedily, all experts loaded: text by prompt and number of tokens."""
    import mlx_lm

    model, tokenizer = mlx_lm.load(str(demo_model()))
    replies: dict[str, dict[str, str]] = {}
    for prompt in asked:
        steps = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=max(lengths))
        tokens = [s.token for s in steps if s.finish_reason != "stop"]
        replies[prompt] = {}
        for length in lengths:
            text = tokenizer.detokenizer
            text.reset()
            for token in tokens[:length]:
                text.add_token(token)
            text.finalize()
            replies[prompt][str(length)] = text.text
    return replies


@dataclass
class Tally:
    """What clients have seen since the last minute. Seconds; tokens a second after the first."""

    kinds: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    wrong: list[dict[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)


class Load:
    """Clients that ask one server.

    Args:
        url: of the server.
        expected: what stock says, by prompt and length.
        think: mean seconds between a client's requests.
        kinds: how often which kind of request is made.
    """

    def __init__(
        self,
        url: str,
        expected: dict[str, dict[str, str]],
        think: float,
        kinds: dict[str, int] = KINDS,
        seed: int = 0,
    ) -> None:
        self._address = urlsplit(url).netloc
        self._expected, self._think, self.kinds, self._seed = expected, think, kinds, seed
        self._stop, self._lock, self._tally = threading.Event(), threading.Lock(), Tally()
        # Prompts that end with the line's end are what the template makes of a message.
        self._texts = [p for p in expected if p + "\n" in expected]
        self._threads: list[threading.Thread] = []

    def start(self, clients: int) -> None:
        for n in range(clients):
            self._threads.append(threading.Thread(target=self._client, args=(self._seed + n,)))
            self._threads[-1].start()

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def take(self) -> Tally:
        """What was seen since the last call."""
        with self._lock:
            taken, self._tally = self._tally, Tally()
        return taken

    def _client(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            self.ask(rng.choices(list(self.kinds), list(self.kinds.values()))[0], rng)
            self._stop.wait(rng.expovariate(1 / self._think) if self._think else 0)

    def ask(self, kind: str, rng: random.Random) -> None:
        """Make one request and count it, whatever comes of it."""
        try:
            self._request(kind, rng)
        except (OSError, http.client.HTTPException, ValueError, AssertionError) as e:
            with self._lock:
                self._tally.errors.append(f"{kind}: {type(e).__name__}: {e}"[:300])
        with self._lock:
            self._tally.kinds[kind] += 1

    def _request(self, kind: str, rng: random.Random) -> None:
        """Make one, and judge the answer.

        Raises:
            AssertionError: another status than there should be.
        """
        prompt, length = rng.choice(self._texts), rng.choice(self._lengths())
        body = {"prompt": prompt, "max_tokens": int(length)}
        if kind == "malformed":
            raw, status = rng.choice(MALFORMED)
            self._refused(raw, status)
        elif kind == "too large":
            much, status = rng.choice((("word " * 20_000, 413), ("word " * 2_000, 400)))
            self._refused(json.dumps({"prompt": much}).encode(), status)
        elif kind == "leaves before the reply":
            self._leave(json.dumps({**body, "max_tokens": 400}).encode(), rng.random())
        elif kind == "leaves in a stream":
            self._streamed({**body, "max_tokens": 400}, leave_after=rng.randrange(1, 12))
        elif kind == "sampled":
            self._whole({**body, "temperature": 0.8, "top_p": 0.95})
        elif kind == "alone":
            self._compare(prompt, length, self._whole({**body, "seed": 1}))
        elif kind == "whole":
            self._compare(prompt, length, self._whole(body))
        elif kind == "stream":
            self._compare(prompt, length, self._streamed(body))
        else:
            del body["prompt"]
            chat = {**body, "messages": [{"role": "user", "content": prompt}]}
            text = self._streamed(chat) if kind == "chat stream" else self._whole(chat)
            self._compare(prompt + "\n", length, text)

    def _lengths(self) -> list[str]:
        return list(next(iter(self._expected.values())))

    def _compare(self, prompt: str, length: str, got: str) -> None:
        expected = self._expected[prompt][length]
        with self._lock:
            self._tally.compared += 1
            if got != expected:
                self._tally.wrong.append({"prompt": prompt, "got": got, "expected": expected})

    def _post(self, raw: bytes, chat: bool = False) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(self._address, timeout=120)
        connection.request("POST", "/v1/chat/completions" if chat else "/v1/completions", raw)
        return connection

    def _refused(self, raw: bytes, status: int) -> None:
        with contextlib.closing(self._post(raw)) as connection:
            answer = connection.getresponse()
            assert answer.status == status, f"status {answer.status}, not {status}, to {raw[:60]!r}"
            assert "message" in json.loads(answer.read())["error"]

    def _leave(self, raw: bytes, seconds: float) -> None:
        with contextlib.closing(self._post(raw)):
            time.sleep(seconds)

    def _whole(self, body: dict[str, Any]) -> str:
        with contextlib.closing(self._post(json.dumps(body).encode(), "messages" in body)) as c:
            answer = c.getresponse()
            raw = answer.read()
            assert answer.status == 200, f"status {answer.status}: {raw[:200]!r}"
            choice = json.loads(raw)["choices"][0]
            return choice["text"] if "text" in choice else choice["message"]["content"] or ""

    def _streamed(self, body: dict[str, Any], leave_after: int | None = None) -> str:
        """The text of a streamed reply, or of its first pieces."""
        chat, text, times = "messages" in body, "", []
        began = time.perf_counter()
        raw = json.dumps({**body, "stream": True}).encode()
        with contextlib.closing(self._post(raw, chat)) as connection:
            answer = connection.getresponse()
            assert answer.status == 200, f"status {answer.status}: {answer.read()[:200]!r}"
            for line in answer:
                if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                    continue
                event = json.loads(line[6:])
                assert "error" not in event, str(event)
                choice = event["choices"][0]
                text += (choice["delta"].get("content") or "") if chat else choice["text"]
                times.append(time.perf_counter())
                if len(times) == leave_after:
                    break
        with self._lock:
            if times:
                self._tally.first_token.append(times[0] - began)
            if len(times) >= 8:
                self._tally.rates.append((len(times) - 1) / (times[-1] - times[0]))
        return text


class Server:
    """The server's process, and what can be seen of it from outside."""

    def __init__(
        self, memory: str, log: Path, template: str = TEMPLATE, limits: Sequence[str] = LIMITS
    ) -> None:
        self._log, self._heap = log.open("w+"), log.with_suffix(".heap")
        self._samples = 0  # taken so far
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("soak_server.py")), str(self._heap),
             "--port", "0", "--no-progress", "--log-level", "WARNING", "--memory", memory,
             "--chat-template", template, *limits],
            stderr=self._log,
        )  # fmt: skip
        self.url = ""
        while not self.url:
            time.sleep(0.1)
            if self._process.poll() is not None:
                raise RuntimeError(log.read_text())
            lines = [x for x in log.read_text().splitlines() if x.startswith("Serving at ")]
            self.url = lines[0].split()[2].rstrip(":") if lines else ""

    def figures(self) -> dict[str, Any]:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", "/live.json")
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer

    def held(self) -> dict[str, float | None]:
        """Descriptors, threads and seconds of processor time; None where there is no /proc."""
        place = Path(f"/proc/{self._process.pid}")
        if not place.exists():
            return {"descriptors": None, "threads": None, "cpu_seconds": None}
        numbers = (place / "stat").read_text().rpartition(") ")[2].split()
        ticks = int(numbers[11]) + int(numbers[12])
        return {
            "descriptors": len(os.listdir(place / "fd")),
            "threads": int(numbers[17]),
            "cpu_seconds": ticks / os.sysconf("SC_CLK_TCK"),
        }

    def heap(self) -> float | None:
        """Bytes in use beside MLX's since the last call, the median; None where nothing tells."""
        samples = [int(x) for x in self._heap.read_text().splitlines()[self._samples :]]
        self._samples += len(samples)
        return median(samples) if samples else None

    def idle(self) -> None:
        """Wait until nothing is being answered and its connections' threads have ended."""
        end = time.monotonic() + 60
        while time.monotonic() < end and self.figures()["traffic"]["active"]:
            time.sleep(0.2)
        time.sleep(1)

    def stop(self) -> dict[str, Any]:
        """Exit status and what it wrote."""
        self._process.send_signal(signal.SIGTERM)
        status = self._process.wait(60)
        self._log.seek(0)
        written = self._log.read()
        self._log.close()
        return {"exit_status": status, "tracebacks": written.count("Traceback"), "log": written}


def yardstick() -> float:
    """Seconds of a fixed piece of work: how busy is the machine?"""
    began = time.perf_counter()
    sum(i * i for i in range(300_000))
    return time.perf_counter() - began


def snapshot(server: Server) -> dict[str, Any]:
    """What the server holds now, in bytes, and its counters."""
    held = server.held()  # first: the next line opens a connection
    live = server.figures()
    assert live["experts"] is not None
    memory, cache = live["memory"], live["experts"]["cache"]
    needed = cache["hits"] + cache["prefetched"] + live["experts"]["misses"]
    return {
        **{k: memory[k] for k in ("resident", "active", "peak", "reusable", "budget")},
        **held,
        "tokens": live["traffic"]["tokens"],
        "requests": live["traffic"]["requests"],
        "hits": cache["hits"] + cache["prefetched"],
        "needed": needed,
        "beside": server.heap(),
        "read_bytes": live["experts"]["read"]["bytes"],
        "read_errors": live["experts"]["read"]["errors"],
    }


def minute(at: float, now: dict[str, Any], before: dict[str, Any], seen: Tally) -> dict[str, Any]:
    """One row of the record: what is held, and what happened since the row before."""
    tokens = now["tokens"] - before["tokens"]
    cpu = (now["cpu_seconds"] or 0) - (before["cpu_seconds"] or 0)
    kept = (
        "resident", "beside", "active", "peak", "reusable", "descriptors", "threads", "read_errors",
    )  # fmt: skip

    def middle(values: list[float]) -> float | None:
        return round(median(values), 4) if values else None

    return {
        "minute": round(at / 60, 2),
        **{k: now[k] for k in kept},
        "tokens": tokens,
        "requests": sum(seen.kinds.values()),
        "compared": seen.compared,
        "wrong": len(seen.wrong),
        "errors": len(seen.errors),
        "first_token_s": middle(seen.first_token),
        "tokens_per_s": middle(seen.rates),
        "cpu_ms_per_token": round(1e3 * cpu / tokens, 2) if tokens else None,
        "hit_rate": round(
            (now["hits"] - before["hits"]) / max(1, now["needed"] - before["needed"]), 4
        ),
        "yardstick_ms": middle([1e3 * yardstick() for _ in range(5)]),
        "load_average": round(os.getloadavg()[0], 2),
    }


def run(
    args: argparse.Namespace, server: Server, make: Callable[[str], Load], log: Path
) -> dict[str, Any]:
    """The soak; returns the record.

    Args:
        make: the clients of a server at this URL.
    """
    load = make(server.url)
    rows: list[dict[str, Any]] = []
    wrong: list[dict[str, str]] = []
    errors: list[str] = []
    kinds: Counter[str] = Counter()
    try:
        for kind in load.kinds:  # which opens shards and starts threads
            load.ask(kind, random.Random(kind))
        server.idle()
        start = before = snapshot(server)
        began = time.monotonic()
        load.start(args.clients)
        for n in range(1, math.ceil(args.minutes) + 1):
            end_of_row = began + 60 * min(n, args.minutes)
            time.sleep(max(0.0, end_of_row - time.monotonic()))
            now, seen = snapshot(server), load.take()
            rows.append(minute(time.monotonic() - began, now, before, seen))
            before = now
            wrong, errors = wrong + seen.wrong, errors + seen.errors
            kinds += seen.kinds
            print(json.dumps(rows[-1]), flush=True)
        load.stop()
        seen = load.take()
        wrong, errors = wrong + seen.wrong, errors + seen.errors
        server.idle()
        end = snapshot(server)
    finally:
        load.stop()
        stopped = server.stop()
    Path(f"{log}.full").write_text(stopped.pop("log"))
    return {
        "minutes": args.minutes, "memory": args.memory, "clients": args.clients,
        "think_s": args.think, "kinds": dict(kinds), "start": start, "end": end, **stopped,
        "wrong": wrong[:20], "errors": errors[:20], "rows": rows,
    }  # fmt: skip


def setup_arg_parser(
    text: str | None, minutes: float, memory: str, clients: int
) -> argparse.ArgumentParser:
    """The options of a load: help text, and defaults."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--memory", default=memory, help="the promise (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=clients)
    parser.add_argument("--out", type=Path, required=True, help="record (.json)")
    return parser


def main() -> None:
    parser = setup_arg_parser(__doc__, minutes=60, memory="46MB", clients=3)
    parser.add_argument("--think", type=float, default=4.0, help="mean seconds between requests")
    parser.add_argument("--stock", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    asked = [q for p in prompts() for q in (p, p + "\n")]
    if args.stock:  # in a process of its own, whose memory is gone afterwards
        args.stock.write_text(json.dumps(stock_replies(asked, LENGTHS)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        replies = Path(scratch) / "stock.json"
        command = [sys.executable, __file__, "--out", str(args.out), "--stock", str(replies)]
        subprocess.run(command, check=True)
        expected, log = json.loads(replies.read_text()), args.out.with_suffix(".log")
        record = run(
            args, Server(args.memory, log), lambda url: Load(url, expected, args.think), log
        )
    record["limits"] = LIMITS
    record["verdict"] = verdict(record)
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(*record["verdict"]["words"], sep="\n")


if __name__ == "__main__":
    main()

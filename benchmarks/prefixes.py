"""Prompts remembered on the drive: what they save, what they cost, and what faults do to them.

    python benchmarks/prefixes.py                      # everything, to the screen
    python benchmarks/prefixes.py restart --write      # one part, and its table of docs/prefixes.md

restart   A system prompt of 4,000 tokens and 200 new ones: a server's first request, one with
          other new tokens, and one after a restart, its entries dropped from the page cache. In
          the same run a process of its own measures the two parts that such a request must take:
          to read the entry, and to compute the new tokens on top of it.
agent     200 requests of 12 conversations with one system prompt: mlx-lm's cache of prompts in
          memory, ours, and ours with a folder, ample and too small.
families  A prompt of 200 tokens in chunks of 64 on a tiny checkpoint of every family: kept, read
          at each chunk, continued, compared with the same prompt uninterrupted.
faults    A damaged byte, a cut or foreign file, a full drive, kill -9: is the result the same?

The first two run on a model with random weights, the last on the embedded one, with a quarter of
the experts in the cache. The whole takes about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import platform as host
import random
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm import stream_generate
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache
from mlx_lm.utils import load_model, load_tokenizer

from mlx_streamexperts import (
    PrefixCache,
    StreamConfig,
    UnsupportedModelError,
    demo_model,
    load,
    patch,
    prefill,
)
from mlx_streamexperts._analysis.random_model import write_random_model
from mlx_streamexperts._config import format_size
from mlx_streamexperts._hooks import logits_of
from mlx_streamexperts._memory.footprint import leaves
from mlx_streamexperts._osinfo import drop_page_cache
from mlx_streamexperts._prefixes import entries

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import families as lm  # noqa: E402
from serving import serving  # noqa: E402

PAGE = ROOT / "docs" / "prefixes.md"
CACHE = "10MB"  # a quarter of the embedded model's experts
SMALL_CACHE = "2MB"  # a quarter of the random model's
QUIET = StreamConfig(progress=False)
SYSTEM_TOKENS, NEW_TOKENS, REPLY_TOKENS, ROUNDS = 4000, 200, 16, 1
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}

Rows = list[list[str]]


def table(head: list[str], rows: Rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(x) + " |" for x in lines) + "\n"


def cpu_seconds(process: int) -> float:
    """Processor time of a process so far: a busy machine disturbs it less than the clock's."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Words:
    """Texts of a given number of tokens, made of the samples that come with the embedded model."""

    def __init__(self) -> None:
        self._tokenizer = load_tokenizer(demo_model())
        samples = json.loads((demo_model() / "eval.json").read_text())["samples"]
        self._tokens = [
            t for s in samples for t in self._tokenizer.encode(f"{s['prompt']} {s['completion']}\n")
        ]

    def text(self, tokens: int, seed: int) -> str:
        start = seed * 211
        chosen = [self._tokens[(start + i) % len(self._tokens)] for i in range(tokens)]
        return self._tokenizer.decode(chosen)


def model_folder(root: Path) -> Path:
    """A model with random weights and a chat template, by which a system prompt's end is found.

    Of 2 layers, so that 4,200 tokens take seconds: 2 kB of keys and values for each, and some
    milliseconds. Kimi K2.5 has 70 kB and 20 ms (predicted for an M4 Max).
    """
    folder = write_random_model(
        root / "model", layers=2, experts=32, top_k=4, hidden=256, inner=256, bits=4, vocab=12288
    )
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


class Server:
    """A server in a process of its own.

    Attributes:
        port: where it listens.
    """

    def __init__(self, folder: Path, *options: str) -> None:
        command = [
            sys.executable, "-m", "mlx_streamexperts.server", "--model", str(folder), "--port", "0",
            "--cache", SMALL_CACHE, "--no-progress", *options,
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert self._process.stderr is not None
        line = next(x for x in self._process.stderr if x.startswith("Serving at "))
        self.port = int(line.rpartition(":")[2])

    def ask(self, messages: list[dict[str, str]]) -> tuple[float, float, str]:
        """Seconds and processor seconds until the reply's first token, and the reply."""
        body = {
            "messages": messages, "max_tokens": REPLY_TOKENS, "temperature": 0, "stream": True,
            "logit_bias": {"0": -100},  # the reply does not end early
        }  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        start, before, used = time.perf_counter(), cpu_seconds(self._process.pid), 0.0
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        first, text = 0.0, ""
        for raw in connection.getresponse():
            line = raw.decode().strip()
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:])["choices"]:
                if piece := choice["delta"].get("content"):
                    if not first:
                        first = time.perf_counter() - start
                        used = cpu_seconds(self._process.pid) - before
                    text += piece
        connection.close()
        return first, used, text

    def figures(self) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", "/live.json")
        return dict(json.loads(connection.getresponse().read()))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        self._process.communicate()


def restart(root: Path) -> str:
    folder = model_folder(root)
    words = Words()
    system = words.text(SYSTEM_TOKENS, 0)

    def messages(seed: int) -> list[dict[str, str]]:
        user = words.text(NEW_TOKENS, seed)
        return [{"role": "system", "content": system}, {"role": "user", "content": user}]

    kinds = ("first", "second", "restarted", "plain")
    seconds: dict[str, list[tuple[float, float]]] = {k: [] for k in kinds}
    moved: dict[str, list[tuple[int, ...]]] = {k: [] for k in kinds}
    parts: list[tuple[float, ...]] = []
    writing: list[float] = []
    same = True

    def ask(server: Server, kind: str, seed: int) -> str:
        before = server.figures()
        clock, used, text = server.ask(messages(seed))
        after = server.figures()
        if kind == "first":
            writing.append(after["prefixes"]["write_seconds"])
        seconds[kind].append((clock, used))
        of = [
            (x["experts"]["read"]["bytes"], *((x["prefixes"] or {}).get(n, 0) for n in NAMES))
            for x in (before, after)
        ]
        moved[kind].append(tuple(b - a for a, b in zip(*of, strict=True)))
        print(f"{kind}: {clock:.2f} s, {used:.2f} of a core", file=sys.stderr, flush=True)
        return text

    for number in range(ROUNDS):
        kept = root / f"kept{number}"
        seeds = [10 * number + i for i in (1, 2, 3, 4)]
        with Server(folder, "--prefix-cache", str(kept)) as server:
            texts = [ask(server, "first", seeds[0]), ask(server, "second", seeds[1])]
        drop(kept)
        with Server(folder, "--prefix-cache", str(kept)) as server:
            texts.append(ask(server, "restarted", seeds[2]))
        drop(kept)
        parts.append(measure_parts(folder, kept, messages(seeds[3])))
        print(f"parts: {parts[-1]}", file=sys.stderr, flush=True)
        with Server(folder, "--prompt-cache-size", "0") as server:
            expected = [ask(server, "plain", s) for s in seeds[:3]]
        same &= texts == expected

    reading, computing, reading_used, computing_used = (
        statistics.median(x) for x in zip(*parts, strict=True)
    )
    rows = []
    for kind, name in zip(
        kinds,
        (
            "first time", "second time, other new tokens (from memory)",
            "after a restart, other new tokens (from the drive)", "without a cache of prompts",
        ),
        strict=True,
    ):  # fmt: skip
        bytes_moved = [int(statistics.median(x)) for x in zip(*moved[kind], strict=True)]
        clock, used = (statistics.median(x) for x in zip(*seconds[kind], strict=True))
        rows.append([
            name, f"{clock:.2f} s", f"{clock / (reading + computing):.2f}", f"{used:.2f} s",
            f"{used / (reading_used + computing_used):.2f}", *map(format_size, bytes_moved),
        ])  # fmt: skip
    return (
        table(
            ["request", "time to first token", "of the two parts", "processor time",
             "of the parts'", "experts read", "entries read", "entries written"],
            rows,
        )
        + f"\nThe two parts, in a process of their own: {reading:.2f} s ({reading_used:.2f} s of a "
        f"processor) to read the entry of {SYSTEM_TOKENS:,} tokens, dropped from the page cache, "
        f"and {computing:.2f} s ({computing_used:.2f} s) to compute the {NEW_TOKENS} new tokens "
        f"up to the first of the reply. Writing took {statistics.median(writing):.2f} s of the "
        f"first request. Rounds: {ROUNDS}. All {3 * ROUNDS} replies of "
        f"{REPLY_TOKENS} tokens are {'the same as' if same else '**not** those of'} without a "
        "cache of prompts.\n"
    )  # fmt: skip


def drop(kept: Path) -> None:
    for file in kept.glob("*/*"):
        drop_page_cache(file)


NAMES = ("read_bytes", "written_bytes")


def measure_parts(folder: Path, kept: Path, messages: list[dict[str, str]]) -> tuple[float, ...]:
    """To read the system prompt's entry, and to compute the rest up to its first token.

    Returns:
        The seconds of both, and the processor seconds of both.
    """
    call = f"print_parts({str(folder)!r}, {str(kept)!r}, {messages!r})"
    return tuple(map(float, in_process(call).split()))


def in_process(call: str) -> str:
    """Call a function of this script in a process of its own; returns what it prints."""
    return subprocess.run(
        child(call), check=True, text=True, stdout=subprocess.PIPE, env=ENVIRONMENT
    ).stdout


def child(call: str) -> list[str]:
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
    return [sys.executable, "-c", f"{code}import prefixes; prefixes.{call}"]


def print_parts(folder: str, kept: str, messages: list[dict[str, str]]) -> None:
    """The body of `measure_parts`, in its process."""
    model, tokenizer = load(folder, cache=SMALL_CACHE, config=QUIET)
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    cache = PrefixCache(model, kept, "50GB")
    caches = make_prompt_cache(model)
    clock, used = [time.perf_counter()], [time.process_time()]
    done = cache.restore(caches, prompt[:-1])
    clock.append(time.perf_counter())
    used.append(time.process_time())
    assert done >= SYSTEM_TOKENS, done
    next(iter(stream_generate(model, tokenizer, prompt[done:], prompt_cache=caches, max_tokens=2)))
    clock.append(time.perf_counter())
    used.append(time.process_time())
    print(*(f"{b - a:.4f}" for x in (clock, used) for a, b in pairwise(x)))


REQUESTS, TALKS, LONGEST = 200, 12, 900


def session(words: Words) -> Iterator[tuple[int, str | None]]:
    """Which conversation speaks next, and what it says; None begins it anew.

    An agent calls several times in a row (70 %) before another one has its turn.
    """
    choose, talk = random.Random(7), 0
    for number in range(REQUESTS):
        if choose.random() > 0.7:
            talk = choose.randrange(TALKS)
        yield talk, words.text(choose.randrange(20, 60), 100 + number)


class Counted:
    """Counts what a prompt cache drops."""

    def __init__(self) -> None:
        self.dropped = 0
        self.most = 0

    def watch(self, cache: Any) -> Any:
        trim, insert = cache._lru.pop, cache.insert_cache

        def popped() -> Any:
            self.dropped += 1
            return trim()

        def inserted(*args: Any, **options: Any) -> None:
            insert(*args, **options)
            self.most = max(self.most, cache.nbytes)

        cache._lru.pop, cache.insert_cache = popped, inserted
        return cache


def agent(root: Path) -> str:
    folder = model_folder(root)
    words = Words()
    system = {"role": "system", "content": words.text(300, 0)}
    rows, texts = [], {}
    from mlx_streamexperts.server import _command

    ours = _command.BoundedPromptCache

    def stock(admission: Any, size: int, provider: Any = None) -> LRUPromptCache:
        return LRUPromptCache(size)

    small = "5 MB"
    cases: list[tuple[str, Any, list[str]]] = [
        ("mlx-lm's, in memory", stock, []),
        ("ours, in memory", ours, []),
        ("ours, and a folder of 1 GB", ours, ["--prefix-cache", str(root / "ample")]),
        (
            f"ours, and a folder of {small}", ours,
            ["--prefix-cache", str(root / "small"), "--prefix-bytes", small],
        ),
    ]  # fmt: skip
    for name, kind, options in cases:
        counted = Counted()
        made = lambda *a, kind=kind, counted=counted, **o: counted.watch(kind(*a, **o))  # noqa: E731
        said: list[str] = []
        hits = cached = total = 0
        with (
            mock.patch.object(_command, "BoundedPromptCache", made),
            serving("--model", str(folder), "--cache", SMALL_CACHE, *options) as running,
        ):
            talks: dict[int, list[dict[str, str]]] = {}
            start = time.perf_counter()
            for talk, text in session(words):
                history = talks.setdefault(talk, [system])
                history.append({"role": "user", "content": text or ""})
                body = {"messages": history, "max_tokens": 4, "temperature": 0}
                status, answer = running.post(body, "/v1/chat/completions")
                assert status == 200, answer
                said.append(answer["choices"][0]["message"]["content"])
                history.append({"role": "assistant", "content": said[-1]})
                usage = answer["usage"]
                reused = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
                hits += reused > 0
                cached += reused
                total += usage["prompt_tokens"]
                if usage["total_tokens"] > LONGEST:
                    del talks[talk]
            seconds = time.perf_counter() - start
            drive = running.figures()["prefixes"] or {}
        texts[name] = said
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        size = format_size
        rows.append([
            name, f"{hits}", f"{cached:,} of {total:,} ({cached / total:.1%})", f"{seconds:.0f} s",
            size(counted.most), f"{counted.dropped}",
            *([size(drive["read_bytes"]), size(drive["written_bytes"]), f"{drive['evicted']}"]
              if drive else ["-"] * 3),
        ])  # fmt: skip
    same = all(t == texts[cases[0][0]] for t in texts.values())
    return (
        table(
            ["cache of prompts", "hits", "prompt tokens not computed", "time", "most memory",
             "dropped from memory", "read", "written", "evicted from the drive"],
            rows,
        )
        + f"\nThe {REQUESTS} replies are {'the same' if same else '**not** the same'} in all rows. "
        "Memory holds 10 prompts, mlx-lm's default. Times are of\na machine busy with other work, "
        "more so in some rows than in others.\n"
    )  # fmt: skip


def in_chunks(model: nn.Module, tokens: list[int], caches: list[Any], options: Any) -> None:
    """Run a prompt as mlx-lm does."""
    for i in range(0, len(tokens), CHUNK):
        model(mx.array([tokens[i : i + CHUNK]]), cache=caches)
        maybe_quantize_kv_cache(caches, **options)
        mx.eval([c.state for c in caches])


def said_after(model: nn.Module, last: int, caches: list[Any]) -> list[np.ndarray]:
    """Logits of the last token of a prompt and of 8 tokens that follow greedily."""
    found: list[np.ndarray] = []
    for _ in range(9):
        logits = logits_of(model(mx.array([[last]]), cache=caches))[0, -1].astype(mx.float32)
        found.append(np.array(logits))
        last = int(found[-1].argmax())
    return found


CHUNK = 64


def remembered(model: nn.Module, folder: Path, quantized: bool) -> str:
    """Does a family's prompt of 200 tokens go on bit by bit from each of its entries?"""
    options: dict[str, Any] = {
        "kv_bits": 8 if quantized else None, "kv_group_size": 32, "quantized_kv_start": 0,
    }  # fmt: skip
    tokens = lm.token_stream(lm.VOCAB, 200, seed=5).tolist()
    whole = make_prompt_cache(model)
    try:
        in_chunks(model, tokens[:-1], whole, options)
        expected = said_after(model, tokens[-1], whole)
    except Exception as e:
        if not quantized:
            raise
        reason = " ".join(str(e).split()).partition(". ")[0] or type(e).__name__
        return f"refused by mlx-lm: {reason}"
    prefill(model, tokens, PrefixCache(model, folder, "1GB", **options))
    for end in (CHUNK, 2 * CHUNK, 3 * CHUNK):
        kept = PrefixCache(model, folder, "1GB", **options)
        caches = make_prompt_cache(model)
        if kept.restore(caches, tokens[:end], aligned=True) != end:
            return "**not kept**"
        in_chunks(model, tokens[end:-1], caches, options)
        got = said_after(model, tokens[-1], caches)
        if not all(map(np.array_equal, got, expected)):
            return "**other bits**"
    return "yes"


def survey(root: Path, names: list[str]) -> dict[tuple[str, ...], list[str]]:
    """Families by their caches and answers."""
    found: dict[tuple[str, ...], list[str]] = {}
    mx.disable_compile()
    for name in names:
        folder = root / name
        try:
            lm.build(name, folder)
            with patch(cache="1GB", config=replace(QUIET, prefill_tokens=CHUNK)) as patched:
                model, _ = load_model(folder)
        except UnsupportedModelError as e:
            found.setdefault(("-", str(e), ""), []).append(name)
            continue
        caches = make_prompt_cache(model)
        kinds = ", ".join(sorted({type(c).__name__ for c in leaves(caches)}))
        answers = [remembered(model, root / "kept" / name, q) for q in (False, True)]
        print(f"{name}: {kinds}: {answers}", file=sys.stderr, flush=True)
        found.setdefault((kinds, *answers), []).append(name)
        patched.streams[0].close()
        del model, caches
        mx.clear_cache()
    mx.enable_compile()
    return found


def families(root: Path) -> str:
    """Every family that tests/families.py can build."""
    return families_table(survey(root, sorted(lm.FAMILIES)))


def families_table(found: dict[tuple[str, ...], list[str]]) -> str:
    rows = [[", ".join(f"`{n}`" for n in names), *key] for key, names in sorted(found.items())]
    return table(["families", "caches", "goes on bit by bit", "with `--kv-bits 8`"], rows)


KILLS = 3


def faults(root: Path) -> str:
    model, tokenizer = load(
        str(demo_model()), cache=CACHE, config=replace(QUIET, prefill_tokens=CHUNK)
    )
    words = Words()
    tokens = tokenizer.encode(words.text(200, 1))
    rows: Rows = []

    def run(folder: Path) -> tuple[np.ndarray, PrefixCache]:
        kept = PrefixCache(model, folder, "1GB")
        caches, rest = prefill(model, tokens, kept)
        logits = logits_of(model(mx.array([rest]), cache=caches))
        return np.array(logits.astype(mx.float32)), kept

    def files(folder: Path) -> list[Path]:
        return sorted(folder.glob("*/*.prefix"), key=lambda f: int(f.name.partition("-")[0]))

    expected, _ = run(root / "whole")

    def tried(what: str, folder: Path) -> None:
        got, kept = run(folder)
        again, later = run(folder)
        same = np.array_equal(got, expected) and np.array_equal(again, expected)
        rows.append([
            what, f"{kept.read_tokens} of {len(tokens) - 1}", format_size(kept.written_bytes),
            f"{later.read_tokens}", "yes" if same else "**no**",
        ])  # fmt: skip

    def harmed(what: str, harm: Callable[[Path, list[Path]], None]) -> None:
        folder = root / what.replace(" ", "-")
        run(folder)
        harm(folder, files(folder))
        tried(what, folder)

    def flip(file: Path, at: int) -> None:
        raw = bytearray(file.read_bytes())
        raw[at] ^= 1
        file.write_bytes(raw)

    harmed("none", lambda _, f: None)
    harmed("a bit of the second entry's rows", lambda _, f: flip(f[1], -200))
    harmed("a bit of the second entry's header", lambda _, f: flip(f[1], 40))
    harmed("the second entry is cut short", lambda _, f: os.truncate(f[1], 5000))
    harmed("the second entry is empty", lambda _, f: os.truncate(f[1], 0))
    harmed("the second entry is the third's content", lambda _, f: shutil.copy(f[2], f[1]) and None)
    harmed("the second entry is gone", lambda _, f: f[1].unlink())
    harmed("the folder is gone", lambda d, f: shutil.rmtree(d))
    harmed("all is another model's", lambda d, f: f[0].parent.rename(d / ("0" * 32)))

    def half(_: Path, found: list[Path]) -> None:
        found[2].rename(found[2].with_name(found[2].stem + ".1-2-3.partial"))

    harmed("the third entry was being written", half)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))  # as a drive that fills up meanwhile
    try:
        tried("each write fails after 100 kB", root / "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    with mock.patch.object(entries, "KEEP_FREE_BYTES", 1 << 62):
        tried("less is free than stays free", root / "free")
    return (
        table(
            ["fault", "tokens read", "written", "read the next time", "the same logits"], rows
        )
        + "\n" + killed(root, model, tokenizer, words)
    )  # fmt: skip


def prompts(words: Words, tokenizer: Any) -> list[list[int]]:
    return [tokenizer.encode(words.text(150, 3 + i)) for i in range(10)]


def write_for_ever(folder: str) -> None:
    """The process that is killed: the same 10 prompts again and again, in a small folder."""
    model, tokenizer = load(
        str(demo_model()), cache=CACHE, config=replace(QUIET, prefill_tokens=CHUNK)
    )
    kept = PrefixCache(model, folder, "5MB")
    print("ready", flush=True)
    while True:
        for tokens in prompts(Words(), tokenizer):
            prefill(model, tokens, kept)


def killed(root: Path, model: nn.Module, tokenizer: Any, words: Words) -> str:
    """Kill two processes that share a folder, at any moment; look at every entry afterwards."""
    folder = root / "killed"
    chosen = random.Random(3)
    whole = damaged = 0
    for _ in range(KILLS):
        running = [
            subprocess.Popen(
                child(f"write_for_ever({str(folder)!r})"), stdout=subprocess.PIPE, env=ENVIRONMENT
            )
            for _ in range(2)
        ]
        for process in running:
            assert process.stdout is not None
            process.stdout.readline()
        while not list(folder.glob("*/*")):
            time.sleep(0.01)
        time.sleep(chosen.uniform(0.1, 3))
        for process in running:
            process.kill()
            process.communicate()
        kept = entries.Entries(folder, 1 << 40)
        for entry_folder in folder.iterdir():
            for file in list(entry_folder.glob("*.prefix")):
                entry = kept.open(entry_folder.name, file.name.removesuffix(".prefix"))
                try:
                    for name in entry.header["arrays"] if entry is not None else ():
                        entry.array(name)  # type: ignore[union-attr]
                    whole += entry is not None
                    damaged += entry is None
                except entries.DamagedError:
                    damaged += 1
    same = 0
    for tokens in prompts(words, tokenizer):
        results = []
        for where in (folder, root / "fresh"):
            caches, rest = prefill(model, tokens, PrefixCache(model, where, "1GB"))
            results.append(
                np.array(logits_of(model(mx.array([rest]), cache=caches)).astype(mx.float32))
            )
        same += np.array_equal(*results)
    return (
        f"`kill -9`, {KILLS} times at a random moment, of two processes that write into one folder "
        f"of 5 MB: {whole} entries found whole, {damaged} damaged; {same} of 10 prompts have the "
        "logits of a fresh folder afterwards.\n"
    )


PARTS: dict[str, Callable[[Path], str]] = {
    "restart": restart,
    "agent": agent,
    "families": families,
    "faults": faults,
}


def machine() -> str:
    return (
        f"{host.system()} {host.machine()}, {os.cpu_count()} cores shared with other work, "
        f"{mx.default_device()}; MLX {version('mlx')}, mlx-lm {version('mlx-lm')}; {date.today()}"
    )


def write(part: str, text: str) -> None:
    """Replace the part of the page between its marks."""
    begin, end = f"<!-- {part}: begin -->\n", f"<!-- {part}: end -->\n"
    head, _, rest = PAGE.read_text().partition(begin)
    PAGE.write_text(head + begin + text + end + rest.partition(end)[2])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", choices=[[], *PARTS], metavar="PART", help="restart, agent, faults"
    )
    parser.add_argument("--write", action="store_true", help="update docs/prefixes.md")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    for part in args.parts or PARTS:
        with tempfile.TemporaryDirectory(prefix="prefixes-") as folder:
            text = f"{machine()}.\n\n{PARTS[part](Path(folder))}"
        print(text, flush=True)
        if args.write:
            write(part, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

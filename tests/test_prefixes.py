"""Prompts remembered on the drive: the same bits, whatever happens to the folder."""

from __future__ import annotations

import errno
import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from conftest import QUIET, load_streamed
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from serving import serving

from mlx_streamexperts import (
    PrefixCache,
    chat,
    demo_model,
    generate,
    load,
    patch,
    prefill,
    stream,
)
from mlx_streamexperts._prefixes import entries, remembered

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch
CHUNK = 64
TOKENS = families.token_stream(families.VOCAB, 200, seed=9).tolist()


def test_an_example(tmp_path: Path, not_compiled: None) -> None:
    model, tokenizer = load(str(demo_model()), cache="10MB", config=QUIET)
    prompt = tokenizer.encode("In the beginning God created the heaven. " * 9)
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=5)
    for read in (0, len(prompt) - 1):
        kept = PrefixCache(model, tmp_path / "prefixes", "1GB")
        caches, rest = prefill(model, prompt, kept)
        assert kept.read_tokens == read
        text = mlx_lm.generate(model, tokenizer, rest, prompt_cache=caches, max_tokens=5)
        assert text == expected


def small_model(checkpoint: Callable[..., Path], family: str = "qwen3_moe") -> nn.Module:
    return load_streamed(checkpoint(family), 1 << 40, replace(QUIET, prefill_tokens=CHUNK))


def logits(model: nn.Module, rest: list[int], caches: list[Any]) -> np.ndarray:
    return np.array(model(mx.array([rest]), cache=caches).astype(mx.float32))


def run(model: nn.Module, kept: PrefixCache, tokens: list[int] = TOKENS) -> np.ndarray:
    """The logits after a prompt."""
    caches, rest = prefill(model, tokens, kept)
    return logits(model, rest, caches)


@pytest.fixture
def model(checkpoint: Callable[..., Path], not_compiled: None) -> nn.Module:
    return small_model(checkpoint)


@pytest.mark.parametrize(
    "family",
    ["qwen3_next", "gpt_oss", "deepseek_v32", "deepseek_v41", "llama4", "nemotron_h"],
)
def test_every_kind_of_cache_comes_back(
    family: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    not_compiled: None,
    monkeypatch: Patch,
) -> None:
    """Rows, recurrent states, windows, lists, chunks, and a family's own classes."""
    monkeypatch.setattr(remembered, "SHORTEST", 5)
    model = small_model(checkpoint, family)
    with stream(model):
        first = PrefixCache(model, tmp_path, "1GB")
        expected = run(model, first)
        again = PrefixCache(model, tmp_path, "1GB")
        assert np.array_equal(run(model, again), expected)
        assert (again.read_tokens, again.written_bytes) == (len(TOKENS) - 1, 0)
        longer = PrefixCache(model, tmp_path, "1GB")
        other = [*TOKENS, *TOKENS[:70]]
        got = run(model, longer, other)
        assert longer.read_tokens == 3 * CHUNK  # not 199, where only the other prompt ended
        shutil.rmtree(tmp_path)
        assert np.array_equal(got, run(model, PrefixCache(model, tmp_path, "1GB"), other))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*"), key=lambda f: int(f.name.partition("-")[0]))


def test_only_new_rows_are_written(model: nn.Module, tmp_path: Path) -> None:
    kept = PrefixCache(model, tmp_path, "1GB")
    run(model, kept, TOKENS[:193])
    caches = make_prompt_cache(model)
    assert kept.restore(caches, TOKENS) == 192
    one_token = sum(c.keys[..., :1, :].nbytes + c.values[..., :1, :].nbytes for c in caches)
    assert len(files(tmp_path)) == 3
    assert kept.written_bytes == sum(f.stat().st_size for f in files(tmp_path))
    assert kept.written_bytes < 1.2 * one_token * 192
    assert oct(files(tmp_path)[0].parent.stat().st_mode)[-3:] == "700"


def test_nothing_is_read_without_room(model: nn.Module, tmp_path: Path) -> None:
    kept = PrefixCache(model, tmp_path, "1GB")
    prefill(model, TOKENS, kept)
    caches, heard = make_prompt_cache(model), []
    assert kept.restore(caches, TOKENS, room=lambda n, _: bool(heard.append(n))) == 0
    assert heard == [192, 128, 64]
    assert kept.read_bytes == 0 and caches[0].empty()


def test_what_is_read_keeps_to_the_memory(tmp_path: Path, not_compiled: None) -> None:
    """A prompt longer than planned: experts make room before it is read, as they do for a pass."""
    tokens = np.random.default_rng(0).integers(5, 2000, 4000).tolist()
    config = replace(QUIET, prefill_tokens=32, context_tokens=256, pressure="off")
    gc.collect()
    base = mx.get_active_memory()
    model, _ = load(str(demo_model()), memory="50MB", config=config)
    with stream(model) as expert_stream:
        caches = make_prompt_cache(model)
        for cache in caches:
            rows = mx.random.normal((1, 2, len(tokens), 64))
            cache.update_and_fetch(rows, rows)
        kept = PrefixCache(model, tmp_path, "1GB")
        assert kept.save(tokens, caches, aligned=True) > 0
        del cache, caches, rows
        mx.clear_cache()
        mx.reset_peak_memory()
        caches, _ = prefill(model, [*tokens, 1], kept)
        assert kept.read_tokens == len(tokens)
        assert sum(c.nbytes for c in caches) > expert_stream.plan.kv + 20_000_000
        assert mx.get_peak_memory() - base <= expert_stream.plan.bound


@pytest.mark.parametrize("harm", ["bit", "header", "cut", "empty", "foreign", "lost parent"])
def test_what_is_damaged_is_computed_again(harm: str, model: nn.Module, tmp_path: Path) -> None:
    expected = run(model, PrefixCache(model, tmp_path, "1GB"))
    *_, middle, last = files(tmp_path)
    raw = bytearray(middle.read_bytes())
    if harm == "bit":
        raw[-100] ^= 1
    elif harm == "header":
        raw[30] ^= 1
    elif harm == "cut":
        del raw[-50:]
    elif harm == "empty":
        raw.clear()
    elif harm == "foreign":
        raw[:] = last.read_bytes()
    if harm == "lost parent":
        middle.unlink()
    else:
        middle.write_bytes(raw)
    kept = PrefixCache(model, tmp_path, "1GB")
    assert np.array_equal(run(model, kept), expected)
    assert kept.read_tokens == CHUNK
    assert kept.written_bytes > 0
    kept = PrefixCache(model, tmp_path, "1GB")
    assert np.array_equal(run(model, kept), expected)
    assert kept.read_tokens >= 3 * CHUNK  # it is whole again


@pytest.mark.parametrize("harm", ["cut", "deleted", "a folder"])
def test_a_file_that_goes_while_it_is_read(harm: str, model: nn.Module, tmp_path: Path) -> None:
    """A mapped file would end the process: its pages could not be read any more."""
    run(model, PrefixCache(model, tmp_path, "1GB"))
    kept = PrefixCache(model, tmp_path, "1GB")
    chain = kept._chain(max(kept._entries.heads(kept._identity)))
    assert chain is not None
    file = chain[0].file
    assert chain[0].array("0.keys.0").shape[-2] > 0
    if harm == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        file.unlink()
        if harm == "a folder":
            file.mkdir()
    caches = make_prompt_cache(model)
    assert not kept._put(caches, chain, len(TOKENS) - 1)
    assert all(c.empty() for c in caches)
    with pytest.raises(entries.DamagedError, match="keys"):
        chain[0].array("1.keys.0")


def test_what_cannot_be_opened_now_stays(
    model: nn.Module, tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    """A process that has too many files open had deleted the prompts of all others."""
    run(model, PrefixCache(model, tmp_path, "1GB"))
    before, kept = files(tmp_path), PrefixCache(model, tmp_path, "1GB")
    chain = kept._chain(max(kept._entries.heads(kept._identity)))
    assert chain is not None

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as during:
        during.setattr(Path, "open", refuse)
        assert not kept._put(make_prompt_cache(model), chain, len(TOKENS) - 1)
        other = PrefixCache.__new__(PrefixCache)
        vars(other).update(vars(kept), _entries=entries.Entries(tmp_path, 10**9))
        assert other.restore(make_prompt_cache(model), TOKENS) == 0
    assert files(tmp_path) == before
    assert caplog.text.count("cannot be read now: Too many open files") == 2
    assert other.restore(make_prompt_cache(model), TOKENS) == 3 * CHUNK


def test_another_model_or_chunk_has_its_own(
    model: nn.Module, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    run(model, PrefixCache(model, tmp_path, "1GB"))
    config, folder = replace(QUIET, prefill_tokens=CHUNK), checkpoint("qwen3_moe")
    with patch(cache=1 << 40, config=config):
        fewer, _ = mlx_lm.utils.load_model(folder, model_config={"num_experts_per_tok": 1})
    for other in (
        load_streamed(folder, 1 << 40, replace(config, prefill_tokens=50)),
        small_model(checkpoint, "gpt_oss"),
        fewer,
    ):
        with stream(other):
            kept = PrefixCache(other, tmp_path, "1GB")
            assert kept.restore(make_prompt_cache(other), TOKENS) == 0
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(b"x")
    kept = PrefixCache(model, tmp_path, "1GB", str(adapter))
    assert kept.restore(make_prompt_cache(model), TOKENS) == 0


def test_weights_that_differ_anywhere_have_their_own(tmp_path: Path, not_compiled: None) -> None:
    """An edit of a few tensors leaves sizes, headers and most bytes as they are."""
    folder, tokens = tmp_path / "m", list(range(5, 105))
    shutil.copytree(demo_model(), folder)
    for edits in range(2):
        for file in sorted(folder.glob("*.safetensors")) if edits else ():
            raw = bytearray(file.read_bytes())
            header = json.loads(raw[8 : (start := 8 + int.from_bytes(raw[:8], "little"))])
            for name, at in header.items():
                if "layers.1.self_attn.v_proj.scales" in name:
                    begin, end = (start + x for x in at["data_offsets"])
                    raw[begin:end] = bytes(end - begin)
                    file.write_bytes(raw)
        model, _ = load(str(folder), cache="10MB", config=QUIET)
        kept = PrefixCache(model, tmp_path / "prefixes", "1GB")
        prefill(model, tokens, kept)
        assert kept.read_tokens == 0
        assert kept.written_bytes > 0


def test_a_full_drive_costs_the_entry_only(
    model: nn.Module, tmp_path: Path, monkeypatch: Patch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(model, PrefixCache(model, tmp_path / "a", "1GB"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 2 * 10**9))
    kept = PrefixCache(model, tmp_path / "b", "1GB")
    assert np.array_equal(run(model, kept), expected)
    assert kept.written_bytes == 0
    assert not files(tmp_path / "b")
    assert "stay free" in caplog.text


def test_what_costs_more_than_it_saves_is_not_kept(
    model: nn.Module, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(remembered, "_WEIGHTY", 1)
    caches = make_prompt_cache(model)
    model(mx.array([TOKENS]), cache=caches)
    nbytes = sum(c.nbytes for c in caches)
    for slow in (True, False):
        kept = PrefixCache(model, tmp_path, "1GB")
        kept.computed(len(TOKENS), 1.0)
        kept._byte_seconds = (0.9 if slow else 0.1) / nbytes  # to write and to read it takes twice
        assert (kept.save(TOKENS, caches) > 0) is not slow
    assert kept._byte_seconds != 0.1 / nbytes  # it was measured


ONE = f"{1:032x}"  # a model


def lengths(kept: entries.Entries) -> list[int]:
    """Of the entries that are there, in tokens."""
    return sorted(head.end for head in kept.heads(ONE).values())


def test_who_has_to_go(tmp_path: Path) -> None:
    """What was never used, then the least recently used; what others build on goes last."""
    kept = entries.Entries(tmp_path, 1 << 40)
    age = 1000

    def write(end: int, parent: int | None, used: int = 0) -> None:
        nonlocal age
        begin = 0 if parent is None else parent
        ids, of = np.arange(begin, end), None if parent is None else f"{parent}-x"
        head = entries.Head(of, begin, end, ids, [], True, True, made=age)
        kept.write(ONE, f"{end}-x", head, {}, {"a": mx.zeros(5000, mx.uint8)})
        if used:
            os.utime(tmp_path / ONE / f"{end}-x.prefix", (used, used))
        age += 1

    write(100, None, used=5000)  # a system prompt
    write(200, 100, used=6000)  # a conversation, and its next turn
    write(250, 200, used=5500)
    write(300, 100, used=7000)
    write(400, None)  # two prompts that nobody came back to, in two chunks
    write(410, 400)
    write(500, 100)
    stale = tmp_path / ONE / "1-x.9-9-9.partial"
    stale.touch()
    os.utime(stale, (0, 0))  # of a process that was killed
    gone = []
    before = lengths(kept)
    while len(before) > 1:
        kept.most_bytes = sum(f.stat().st_size for f in files(tmp_path) if f != stale) - 1
        kept._make_room()
        now = lengths(kept)
        gone += sorted(set(before) - set(now))
        before = now
    assert gone == [410, 400, 500, 250, 200, 300]
    assert kept.evicted == 6
    assert not stale.exists()


def test_what_is_not_ours_stays_and_counts_for_nothing(tmp_path: Path) -> None:
    """Somebody states a folder that holds other things too."""
    kept = entries.Entries(tmp_path, 70_000)
    others = [tmp_path / "Downloads" / name for name in ("film.partial", "9-a.prefix", "1.body")]
    others.append(tmp_path / ONE / "film.partial")
    for file in others:
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(30_000))
        os.utime(file, (0, 0))
    write_one(kept, 100)
    assert lengths(kept) == [100]
    kept.most_bytes = 1
    kept._make_room()
    assert lengths(kept) == []
    assert all(file.exists() for file in others)


def write_one(
    kept: entries.Entries, end: int, parent: int | None = None, size: int = 50_000
) -> int:
    begin, of = (0, None) if parent is None else (parent, f"{parent}-x")
    head = entries.Head(of, begin, end, np.arange(begin, end), [], True, True, made=end)
    return kept.write(ONE, f"{end}-x", head, {}, {"a": mx.zeros(size, mx.uint8)})


def test_the_folder_never_takes_more(tmp_path: Path, monkeypatch: Patch) -> None:
    """Room is made before an entry is written, never from what it builds on; else nothing goes."""
    kept = entries.Entries(tmp_path, 160_000)
    peak, original = [0], os.utime

    def utime(*args: Any) -> None:
        peak.append(sum(f.stat().st_size for f in files(tmp_path)))
        original(*args)

    monkeypatch.setattr(os, "utime", utime)
    assert write_one(kept, 100)
    assert write_one(kept, 200)
    assert write_one(kept, 300, parent=100)
    assert lengths(kept) == [100, 200, 300]
    assert write_one(kept, 400, parent=100)
    assert lengths(kept) == [100, 300, 400]
    assert not write_one(kept, 500, parent=100, size=120_000)
    assert lengths(kept) == [100, 300, 400]
    assert 150_000 < max(peak) <= kept.most_bytes


@pytest.mark.parametrize("harm", ["damaged", "another version's"])
def test_an_entry_below_that_has_no_head(harm: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """What builds on it goes, then it goes like any other; nothing fails."""
    kept = entries.Entries(tmp_path, 1 << 40)
    with monkeypatch.context() as before:
        if harm == "another version's":
            before.setattr(entries, "FORMAT", entries.FORMAT + 1)
        write_one(kept, 100)
    write_one(kept, 200, parent=100)
    below = tmp_path / ONE / "100-x.prefix"
    if harm == "damaged":
        with below.open("r+b") as f:
            f.seek(30)
            f.write(b"xxx")
    other = entries.Entries(tmp_path, 110_000)
    write_one(other, 50)
    assert lengths(other) == [50]
    assert below.exists() is (harm != "damaged")
    other.most_bytes = 60_000
    assert write_one(other, 60)
    assert lengths(other) == [60]


def test_an_entry_that_goes_on_otherwise_gives_its_first_tokens(
    model: nn.Module, tmp_path: Path
) -> None:
    """A server's prompts end anywhere, and only rows can be cut: as mlx-lm trims in memory."""
    told = [*TOKENS[:120], (TOKENS[120] + 1) % families.VOCAB, *TOKENS[:70]]
    first, again = (PrefixCache(model, tmp_path, "1GB") for _ in range(2))
    run(model, first, TOKENS[:190])
    caches = make_prompt_cache(model)
    model(mx.array([TOKENS[:150]]), cache=caches)
    assert first.save(TOKENS[:150], caches) == 0  # its rows are there
    caches = make_prompt_cache(model)
    assert again.restore(caches, told) == 120
    whole = make_prompt_cache(model)
    model(mx.array([told[:120]]), cache=whole)
    assert np.array_equal(logits(model, told[120:], caches), logits(model, told[120:], whole))
    written = again.save(told, caches)
    assert again.restore(make_prompt_cache(model), [*told, 1]) == len(told)
    assert 0 < written < 0.6 * first.written_bytes  # 71 rows, not 191
    assert again.restore(make_prompt_cache(model), told, aligned=True) == CHUNK


def test_quantized_keys_and_values(model: nn.Module, tmp_path: Path) -> None:
    """From where mlx-lm quantizes them on; what was kept before stays of use."""
    options: dict[str, Any] = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 100}
    results = []
    for read in (0, 3 * CHUNK):
        kept = PrefixCache(model, tmp_path, "1GB", **options)
        caches, rest = prefill(model, TOKENS, kept)
        assert kept.read_tokens == read
        assert type(caches[0]).__name__ == "QuantizedKVCache"
        results.append(logits(model, rest, caches))
    plain = make_prompt_cache(model)
    stock = generate_step(
        mx.array(TOKENS),
        model,
        max_tokens=1,
        prompt_cache=plain,
        prefill_step_size=CHUNK,
        **options,
    )
    chosen, _ = next(iter(stock))
    assert np.array_equal(*results)
    assert int(results[0][0, -1].argmax()) == chosen
    assert PrefixCache(model, tmp_path, "1GB").restore(make_prompt_cache(model), TOKENS) == 0


def test_a_window_of_another_size_is_another_prompt(model: nn.Module, tmp_path: Path) -> None:
    kept = PrefixCache(model, tmp_path, "1GB")
    for size in (32, 48):
        caches = make_prompt_cache(model, size)
        assert kept.restore(caches, TOKENS) == 0
        prefill(model, TOKENS, kept, caches)
        again = make_prompt_cache(model, size)
        assert kept.restore(again, TOKENS) == 3 * CHUNK
        assert again[0].max_size == size


def test_two_processes_share_a_folder_that_is_too_small(model: nn.Module, tmp_path: Path) -> None:
    """Each deletes what the other reads and builds on."""
    whole = run(model, PrefixCache(model, tmp_path / "one", "1GB"))
    most = sum(f.stat().st_size for f in files(tmp_path / "one")) * 2 // 3
    two = [PrefixCache(model, tmp_path / "both", most) for _ in range(2)]
    for turn in range(6):
        tokens = TOKENS if turn % 3 else TOKENS[::-1]
        got = run(model, two[turn % 2], tokens)
        assert turn % 3 == 0 or np.array_equal(got, whole)
        assert sum(f.stat().st_size for f in files(tmp_path / "both")) <= most
    assert all(kept.evicted for kept in two)


KILLED = f"""
import sys, os
from pathlib import Path
from mlx_streamexperts._prefixes.entries import Entries, Head
import mlx.core as mx, numpy as np
head = Head(None, 0, 1, np.ones(1, np.int64), [], True, True, 0)
kept = Entries(Path(sys.argv[1]), 10**9)
print("ready", flush=True)
for i in range(10**6):
    a = mx.full(300_000, i % 7, mx.bfloat16)
    kept.write("{ONE}", str(i % 50) + "-x", head, dict(), dict(a=a))
"""


def test_kill_9_leaves_whole_entries(tmp_path: Path) -> None:
    """While two processes write the same names."""
    running = [
        subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()
    kept = entries.Entries(tmp_path, 10**9)
    while len(kept.heads(ONE)) < 20:
        time.sleep(0.01)
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    names = kept.heads(ONE)
    for name in names:
        entry = kept.open(ONE, name)
        assert entry is not None
        assert entry.array("a").shape == (300_000,)
    assert kept.heads(ONE) == names  # none was damaged


def test_generate_and_chat_use_it(capsys: Capture, tmp_path: Path, not_compiled: None) -> None:
    text = "In the beginning God created the heaven and the earth. " * 8
    options = ["--cache", "10MB", "--no-progress", "--prefix-cache", str(tmp_path)]
    said = []
    for _ in range(2):
        assert generate.main(["-p", text, "-m", "6", *options]) == 0
        said.append(capsys.readouterr().out)
    assert said[0].split("==========")[1] == said[1].split("==========")[1]
    assert "Prefix cache: 0 tokens from the drive" in said[0]
    counts = [re.search(r"^Prompt: (\d+) tokens", s, re.M)[1] for s in said]  # type: ignore[index]
    assert counts[0] == counts[1] and int(counts[0]) > 64  # all of it, wherever it came from
    assert ", 0 B written" in said[1]
    assert generate.main(["-p", "x", *options, "--draft-model", "y"]) == 1
    assert "--prefix-cache does not work with --draft-model" in capsys.readouterr().err
    (tmp_path / "file").write_bytes(b"")
    assert generate.main(["-p", "hi", "--prefix-cache", str(tmp_path / "file" / "folder")]) == 1
    assert "folder: cannot be created: Not a directory" in capsys.readouterr().err
    assert {"--prefix-cache", "--prefix-bytes"} <= {
        s for a in chat.setup_arg_parser()._actions for s in a.option_strings
    }


def test_the_server_remembers_after_a_restart(tmp_path: Path, not_compiled: None) -> None:
    """A prompt that was answered, its reply, and what follows it, are read from the drive."""
    prompt = "In the beginning God created the heaven and the earth. " * 8
    options = ["--cache", "10MB", "--prefix-cache", str(tmp_path)]
    answers = []
    for _ in range(2):
        with serving(*options) as running:
            _, answer = running.post({"prompt": prompt, "max_tokens": 8})
            usage = answer["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            answers.append((answer["choices"][0]["text"], cached))
            assert usage["prompt_tokens"] > 70
            told = running.request("GET", "/metrics")[2].decode()
            assert f"streamexperts_prefix_read_tokens_total {float(cached)}" in told
            assert running.figures()["prefixes"]["read_tokens"] == cached
    assert answers[0][0] == answers[1][0]
    assert [cached for _, cached in answers] == [0, usage["prompt_tokens"] - 1]

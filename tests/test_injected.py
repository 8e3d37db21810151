"""Faults at run time: each is a named error or a retry that succeeds, and leaves nothing behind.

Once a fault has passed, the model computes what stock mlx-lm computes, with the threads,
descriptors and slots that it had before. The tests use real faults if the system can make them:
reads that fail in the C library, limits, signals, forks, a full file system.
"""

from __future__ import annotations

import ast
import ctypes
import functools
import gc
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, all_experts, leftovers, load_streamed, smallest_cache, until
from mlx_lm.models.cache import make_prompt_cache

import mlx_streamexperts
from mlx_streamexperts import ExpertReadError, ExpertStream, StreamConfig, StreamError, pack, stream
from mlx_streamexperts.convert import _command as convert

HERE = Path(__file__).parent
TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
NEXT = mx.array([[2]])


@pytest.fixture
def folder(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint to be damaged."""
    return Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "model"))


class Watched:
    """A streamed model with the fewest slots, and what stock mlx-lm says."""

    def __init__(self, folder: Path, config: StreamConfig = QUIET) -> None:
        stock, _ = mlx_lm.utils.load_model(folder)
        self.expected = [np.array(stock(t)) for t in (TOKENS, NEXT)]
        with stream(load_streamed(folder, 1 << 40, config)) as whole:
            cache = smallest_cache(whole)
        self.model: nn.Module = load_streamed(folder, cache, config)  # has opened no shard yet
        self.stream: ExpertStream = stream(self.model)
        self.left = leftovers()

    def call(self) -> None:
        mx.eval(self.model(TOKENS))

    def assert_sound(self) -> None:
        """Exact, and nothing more than before is left about."""
        for _ in range(2):
            for tokens, expected in zip((TOKENS, NEXT), self.expected, strict=True):
                assert np.array_equal(np.array(self.model(tokens)), expected)
        for layer in self.stream.layers:
            cache = layer.cache
            taken = [int(cache.slot_of[e]) for e in cache.resident]
            assert sorted(taken + cache._free) == list(range(cache.slots))  # none lost, none twice
        new = leftovers() - self.left
        assert not [name for name in new if name.startswith("thread")]


@pytest.fixture
def watched(folder: Path) -> Iterator[Watched]:
    gc.collect()  # else an earlier model that goes meanwhile would hide a file that stays
    before = leftovers()
    mx.clear_cache()
    made = Watched(folder)
    yield made
    made.stream.close()
    assert not leftovers() - before


# Files that change under a loaded model.


def test_a_shard_deleted_before_it_was_opened(watched: Watched, folder: Path) -> None:
    hidden = folder / "hidden"
    hidden.mkdir()
    for shard in folder.glob("*.safetensors"):
        shard.rename(hidden / shard.name)
    with pytest.raises(ExpertReadError, match="No such file") as e:
        watched.call()
    assert e.value.file.parent == folder
    for shard in hidden.iterdir():
        shard.rename(folder / shard.name)
    watched.assert_sound()


def test_a_shard_deleted_while_it_is_open_is_still_read(watched: Watched, folder: Path) -> None:
    watched.assert_sound()
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    watched.assert_sound()


def test_a_shard_replaced_by_another_is_not_read_in_its_place(
    watched: Watched, folder: Path, tmp_path: Path
) -> None:
    """The other one is valid and has the same header, as a fine-tune has."""
    for shard in folder.glob("*.safetensors"):
        other = bytearray(shard.read_bytes())
        other[-2000:] = bytes(2000)
        shard.rename(tmp_path / shard.name)
        shard.write_bytes(other)
    with pytest.raises(ExpertReadError, match="replaced by another"):
        watched.call()
    for shard in folder.glob("*.safetensors"):
        (tmp_path / shard.name).rename(shard)
    watched.assert_sound()


def test_without_permission(watched: Watched, folder: Path) -> None:
    """The permission is lost after the model was loaded, and comes back."""
    for shard in folder.glob("*.safetensors"):
        shard.chmod(0)
    if os.geteuid() == 0:
        os.chmod(folder, 0)
        os.seteuid(65534)  # root may read everything
    try:
        with pytest.raises(ExpertReadError, match="Permission denied"):
            watched.call()
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
            os.chmod(folder, 0o755)
        for shard in folder.glob("*.safetensors"):
            shard.chmod(0o644)
    watched.assert_sound()


def test_out_of_descriptors(watched: Watched) -> None:
    importlib.import_module("numpy.ma")  # NumPy loads it late, and then from a file
    gc.collect()
    gc.disable()  # a file that closes meanwhile would leave its descriptor
    try:
        out_of_them = pytest.raises(ExpertReadError, match="Too many open files")
        with limit(resource.RLIMIT_NOFILE, lowest_free_descriptor()), out_of_them:
            watched.call()
    finally:
        gc.enable()
    watched.assert_sound()


def lowest_free_descriptor() -> int:
    fd = os.open(os.devnull, os.O_RDONLY)
    os.close(fd)
    return fd


@contextmanager
def limit(kind: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


# Threads, processes, memory.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_thread_that_dies_is_replaced(watched: Watched) -> None:
    """All of them die while idle. The next reads succeed, with as many threads as before."""
    reader = watched.stream._reader
    before = list(reader._threads)
    for thread in before:
        assert thread.ident is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit)
        )
    for _ in before:
        reader._work.put(None)  # it dies when it runs next
    for thread in before:
        thread.join(60)
        assert not thread.is_alive()
    reader._job_seconds = 1.0  # reads are long: callers leave them to the threads
    watched.assert_sound()
    assert all(t.is_alive() for t in reader._threads) and not {*before} & {*reader._threads}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_reader_thread_that_dies_reading_fails_that_read(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = watched.stream._reader
    reader._job_seconds = 1.0
    execute, died = reader._execute, []

    def deadly(job: Any) -> Any:
        if not died:
            died.append(threading.current_thread())
            raise SystemExit  # between taking a read and doing it
        return execute(job)

    monkeypatch.setattr(reader, "_execute", deadly)
    with pytest.raises(ExpertReadError, match="Interrupted"):
        watched.call()
    died[0].join(60)
    reader.revive()  # as the next one does who waits long
    watched.assert_sound()


def test_a_forked_child_says_so_and_the_parent_goes_on(watched: Watched) -> None:
    watched.call()
    child = os.fork()
    if not child:
        code = 1
        try:
            watched.model(NEXT)
        except StreamError as e:
            code = 0 if "forked" in str(e) else 2
        finally:
            watched.stream.close()  # touches neither threads nor device
            os._exit(code)
    assert exit_code(child) == 0
    watched.assert_sound()


FORKS = """
import os, sys
import mlx.core as mx
import mlx_lm.utils
from mlx_streamexperts import StreamConfig, StreamError, demo_model, patch, stream
with patch(cache="3MB", config=StreamConfig(progress=False, prefetch="on")):
    model, _ = mlx_lm.utils.load_model(demo_model())
mx.eval(model(mx.array([[1, 2, 3]])))
child = os.fork()
if not child:
    try:
        model(mx.array([[1]]))
    except StreamError as e:
        sys.exit(7 if "spawn" in str(e) else 8)  # not os._exit: as a program ends
status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
mx.eval(model(mx.array([[4]])))
sys.exit(status)
"""


def test_a_forked_child_ends_as_programs_do() -> None:
    """With the threads and files of its parent; the advice in the error works."""
    done = subprocess.run([sys.executable, "-c", FORKS], capture_output=True, timeout=300)
    assert done.returncode == 7, done.stderr[-2000:]
    spawned = subprocess.run([sys.executable, "-c", SPAWNS], capture_output=True, timeout=300)
    assert spawned.returncode == 0, spawned.stderr[-2000:]


SPAWNS = """
import multiprocessing, subprocess, sys
import mlx.core as mx
import mlx_lm.utils
from mlx_streamexperts import StreamConfig, demo_model, patch
with patch(cache="3MB", config=StreamConfig(progress=False)):
    model, _ = mlx_lm.utils.load_model(demo_model())
mx.eval(model(mx.array([[1]])))
child = multiprocessing.get_context("spawn").Process(
    target=exec, args=("from mlx_streamexperts import demo_model, load, stream\\n"
        "model, _ = load(str(demo_model()), cache='3MB')\\n"
        "import mlx.core as mx\\nmx.eval(model(mx.array([[1]])))",))
child.start()
child.join()
sys.exit(child.exitcode)
"""


def exit_code(child: int, patience: float = 60) -> int:
    end = time.monotonic() + patience
    while time.monotonic() < end:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    raise AssertionError("the child hangs")


@pytest.mark.parametrize("locked", [False, True])
def test_a_model_that_is_collected_in_its_own_readers_thread_closes(
    locked: bool, checkpoint: Callable[..., Path]
) -> None:
    """Python's collector may run anywhere, even while the reader's lock is held."""
    models = [load_streamed(checkpoint("qwen3_moe"), 1 << 18)]
    reader, layer = stream(models[0]).reader, stream(models[0]).layers[-1]

    def collect(*_: Any) -> None:
        if models and reader.is_mine():
            with reader._lock if locked else nullcontext():
                models.clear()
                gc.collect()

    reader.on_read.add(collect)
    layer.slots.prefetch([0, 1, 2, 3])  # wakes the reader's threads
    until(lambda: not models and not any(t.is_alive() for t in reader._threads))  # or close hangs


def test_no_memory_for_slots(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that is too large is an error, and the model goes on with a smaller one."""
    real = mx.zeros

    def scarce(shape: Any, *args: Any) -> mx.array:
        if shape[0] > 4:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return real(shape, *args)

    with monkeypatch.context() as m:
        m.setattr(mx, "zeros", scarce)
        with pytest.raises(StreamError, match=r"no memory for .* bytes of expert slots"):
            watched.stream.resize(all_experts(watched.stream) // 2)
    with pytest.raises(StreamError, match="resize again"):
        watched.call()
    watched.stream.resize(smallest_cache(watched.stream))
    watched.assert_sound()


# Ctrl-C, and other exceptions that any line may raise.


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def no_memory() -> None:
    raise MemoryError


@pytest.fixture(autouse=True)
def _python_handles_ctrl_c() -> Iterator[None]:
    """Programs that run in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("happens", [ctrl_c, no_memory])
def test_an_exception_at_every_step(happens: Callable[[], None], watched: Watched) -> None:
    """At the last time that each line of ours runs in a call, and for Ctrl-C at the first too.

    Lines that leave a `with` or run after an exception are left out: the interpreter looks for
    signals where functions are called and loops go round, not there.
    """
    mx.eval(watched.model(NEXT))
    call = lambda: watched.model(NEXT)  # noqa: E731
    times = Counter(steps(watched, call, OURS, None))
    first = [1] if happens is ctrl_c else []
    places = {(place, n) for place, count in times.items() for n in (*first, count)}
    assert len(times) > 150
    interrupted = 0
    for place in sorted(places):
        try:
            steps(watched, call, OURS, place, happens)
        except (KeyboardInterrupt, MemoryError, ExpertReadError):
            interrupted += 1
        assert np.array_equal(np.array(watched.model(NEXT)), watched.expected[1]), place
    # Which thread reads, and so how often a line runs in this one, is left to chance.
    assert interrupted > 0.5 * len(places)
    watched.assert_sound()


@pytest.mark.parametrize("run_ahead", ["off", "on"])
def test_ctrl_c_at_every_step_of_speculation(run_ahead: str, folder: Path) -> None:
    """The same of prefetching, run-ahead and calls in parts: a step with a KV cache.

    A step that ran ahead leaves the KV cache as it was, so that it can simply be done again.
    Otherwise some layers have the token already, as in stock mlx-lm.
    """
    before = leftovers()
    config = StreamConfig(progress=False, prefetch="on", overlap="on", run_ahead=run_ahead)
    watched = Watched(folder, config)
    stock, _ = mlx_lm.utils.load_model(folder)
    caches = make_prompt_cache(stock), make_prompt_cache(watched.model)
    expected = [np.array(stock(t, cache=caches[0])) for t in (TOKENS, NEXT)][1]
    mx.eval(watched.model(TOKENS, cache=caches[1]))
    start = TOKENS.size

    def call() -> mx.array:
        return watched.model(NEXT, cache=caches[1])

    def take_back() -> None:
        for cache in caches[1]:
            cache.trim(cache.offset - start)

    for _ in range(3):  # what is tried at first has been
        times = Counter(steps(watched, call, SPECULATION, None))
        take_back()
    assert {name for name, _ in times} >= USED[run_ahead]
    interrupted = 0
    for place in sorted({(place, n) for place, count in times.items() for n in (1, count)}):
        try:
            steps(watched, call, SPECULATION, place, ctrl_c)
        except KeyboardInterrupt:
            interrupted += 1
            if run_ahead == "on":
                assert {c.offset for c in caches[1]} == {start}, place
        take_back()
        assert np.array_equal(np.array(call()), expected), place
        take_back()
    assert interrupted > 0.5 * len(times)
    watched.assert_sound()
    watched.stream.close()
    assert not leftovers() - before


Place = tuple[str, int]
OURS = {
    "reader.py", "files.py", "ranges.py", "slots.py", "expert_map.py", "bank.py",
    "layer.py", "policies.py",
}  # fmt: skip
USED = {
    "off": {"prefetch.py", "split.py", "thread_guard.py", "autotune.py"},
    "on": {
        "runahead.py",
        "slot_tables.py",
        "cache_snapshot.py",
        "policy.py",
        "split.py",
        "thread_guard.py",
    },
}
SPECULATION = USED["off"] | USED["on"] | {"layer.py", "slots.py", "bank.py"}


def steps(
    watched: Watched, call: Callable[[], mx.array], files: set[str],
    stop_at: tuple[Place, int] | None, happens: Callable[[], None] | None = None,
) -> list[Place]:  # fmt: skip
    """Call the model with empty slots; returns the lines that ran.

    When the line of `stop_at` runs for the nth time, something happens there.
    """
    for layer in watched.stream.layers:
        layer.slots.cache.clear()
    watched.stream._reader._job_seconds = 0.0  # the caller reads, which a signal can end
    seen: list[Place] = []
    left = [stop_at[1] if stop_at else -1]
    package = Path(mlx_streamexperts.__file__).parent

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        file = Path(frame.f_code.co_filename)
        if not file.is_relative_to(package) or file.name not in files:
            return None
        handlers, withs = uninterrupted(file)
        been: set[int] = set()

        def line(frame: FrameType, event: str, arg: object) -> Any:
            number = frame.f_lineno
            if event == "line" and number not in handlers and number not in been & withs:
                seen.append((file.name, number))
                left[0] -= stop_at is not None and seen[-1] == stop_at[0]
                if left[0] == 0 and happens is not None:
                    left[0] = -1
                    sys.settrace(None)
                    happens()
            been.add(number)
            return line

        return line

    sys.settrace(trace)
    try:
        mx.eval(call())
    finally:
        sys.settrace(None)
    return seen


@functools.cache
def uninterrupted(file: Path) -> tuple[set[int], set[int]]:
    """Lines of handlers (`except`, `finally`) and `try:`, and first lines of `with`, seen again at
    its end.
    """
    handlers: set[int] = set()
    withs: set[int] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.With):
            withs.add(node.lineno)
        if isinstance(node, ast.Try):
            handlers.add(node.lineno)  # `try:` itself does nothing
            for last in [n for h in node.handlers for n in h.body] + node.finalbody:
                handlers.update(range(last.lineno, (last.end_lineno or last.lineno) + 1))
            handlers.update(h.lineno for h in node.handlers)
    return handlers, withs


def run_apart(what: str, folder: Path, *arguments: str, **environment: str) -> Any:
    """What faulty_run.py prints."""
    done = subprocess.run(
        [sys.executable, str(HERE / "faulty_run.py"), what, str(folder), *arguments],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("run_ahead", ["off", "on"])
def test_ctrl_c_at_random_moments(run_ahead: str, checkpoint: Callable[..., Path]) -> None:
    """Real signals, about a hundred a second, during calls with misses and prefetches."""
    counts = run_apart("signals", checkpoint("qwen3_moe"), "1", RUN_AHEAD=run_ahead)
    assert counts["interrupted"] > 20 and counts["calls"] > 0
    assert counts["wrong"] == counts["left"] == counts["readers"] == 0


# Reads that fail in the C library.


@pytest.fixture(scope="module")
def outcomes(
    checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD; test_faults.py fails reads at our seam")
    folder = tmp_path_factory.mktemp("faulty")
    library, control = folder / "faulty.so", folder / "control"
    build = [compiler, "-shared", "-fPIC", "-o", str(library), str(HERE / "faulty.c"), "-ldl"]
    subprocess.run(build, check=True)
    control.write_bytes(bytes(16))
    return run_apart(
        "faults", checkpoint("qwen3_moe"), LD_PRELOAD=str(library), FAULTY=str(control)
    )


@pytest.mark.parametrize("bypass", ["off", "on"])
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("EIO", "Input/output error at byte"),
        ("EIO once", "Input/output error at byte"),
        ("ESTALE", "Stale file handle at byte"),
        ("end", "unexpected end of file at byte"),
        ("EINTR", ""),
        ("short", ""),
        ("slow", ""),
    ],
)
def test_reads_that_fail_in_the_c_library(
    fault: str, says: str, bypass: str, outcomes: dict[str, Any]
) -> None:
    """A named error, or a retry with the same result; afterwards exact again."""
    if f"{bypass}: no such reads" in outcomes:
        pytest.skip("this file system cannot read past the page cache")
    outcome = outcomes[f"{bypass}: {fault}"]
    assert outcome["seen"] > 0, "the fault was never met"
    assert (says in outcome["raised"]) and bool(says) == bool(outcome["raised"])
    assert outcome["same"] == (not says)
    assert outcome["exact_after"]


# A full disk while something is written.


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if os.geteuid() or not shutil.which("mount") or subprocess.run(mount).returncode:
        pytest.skip("cannot mount; test_a_file_longer_than_allowed fails the same writes")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("command", ["pack", "convert"])
def test_a_disk_that_fills_up(
    command: str,
    checkpoint: Callable[..., Path],
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is room when the work begins, and when it is repeated."""
    out = small_disk / "out"
    with monkeypatch.context() as m:
        usage = shutil.disk_usage("/")
        m.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
        assert write(command, checkpoint, out) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert not (out / "manifest.json").exists() and not (out / "config.json").exists()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert write(command, checkpoint, out) == 0
    assert (out / "manifest.json").exists() or (out / "config.json").exists()
    assert not list(out.glob("*.partial"))


@pytest.mark.parametrize("command", ["pack", "convert"])
def test_a_file_longer_than_allowed(
    command: str,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The system's limit on a file's length (`ulimit -f`)."""
    out = tmp_path / "out"
    with limit(resource.RLIMIT_FSIZE, 100_000):
        assert write(command, checkpoint, out) == 1
    assert "File too large" in capsys.readouterr().err
    assert write(command, checkpoint, out) == 0
    assert not list(out.glob("*.partial"))


def write(command: str, checkpoint: Callable[..., Path], out: Path) -> int:
    source = checkpoint("qwen3_moe")
    main = {"pack": pack.main, "convert": convert.main}[command]
    return main(["--model", str(source), "--out", str(out), "--no-progress"])

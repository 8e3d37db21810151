"""Run one system once and print one line of JSON: the part that all adapters share.

Imported by the `run_*.py` beside it, each in the virtual environment of its own system, so it
needs nothing but mlx, mlx-lm and NumPy. Everything that decides a figure is here and the same for
all: which tokens go in, what is timed, when the page cache is dropped, what counts as memory.

The tokens are given (prompt and continuation), so that every system does the same work even where
one of them would have chosen another token; what it would have chosen is compared with stock's.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import resource
import sys
import time
import traceback
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

PREFILL_CHUNK = 2048  # mlx_lm.generate's


class RefusedError(Exception):
    """The system cannot run this checkpoint or these options; the message says why."""


class Session:
    """A loaded mlx-lm model, fed as `mlx_lm.generate` feeds it. Adapters override what differs.

    Args:
        model: called as `model(tokens [1, T], cache=...)`, returns logits [1, T, V].
        files: what the system reads experts from; their pages are what cold and warm mean.
    """

    def __init__(self, model: Any, files: Iterable[Path]) -> None:
        from mlx_lm.models.cache import make_prompt_cache

        self.model, self.files = model, list(files)
        self.kv = make_prompt_cache(model)

    def prefill(self, tokens: list[int]) -> mx.array:
        """Logits [V] after the prompt, evaluated."""
        return prompt_logits(self.model, tokens, PREFILL_CHUNK, self.kv)

    def step(self, token: int) -> mx.array:
        """Logits [V] after one more token, evaluated."""
        logits = self.model(mx.array([[token]]), cache=self.kv)[0, -1]
        mx.eval(logits)
        return logits

    def slot_bytes(self) -> int | None:
        """Bytes of experts held now; None where everything is resident."""
        return None

    def forget(self) -> None:
        """Unmap pages of experts that are not in the cache: mapped pages cannot be dropped."""

    def report(self) -> dict[str, Any]:
        """The system's own counters."""
        return {}


def prompt_logits(model: Any, tokens: list[int], chunk: int, cache: Any = None) -> mx.array:
    """Logits [V] after a prompt, evaluated, by the code that `mlx_lm.generate` runs it with.

    Args:
        chunk: tokens of a forward pass.
        cache: what it fills; None for one of its own.
    """
    from mlx_lm.generate import generate_step

    seen: list[mx.array] = []

    def note(_: mx.array, logits: mx.array) -> mx.array:
        seen.append(logits)
        return logits

    steps = generate_step(
        mx.array(tokens), model, max_tokens=0, prompt_cache=cache, prefill_step_size=chunk,
        logits_processors=[note],
    )  # fmt: skip
    list(steps)  # none: the prompt alone is run
    mx.eval(seen[-1])
    return seen[-1][0]


def expert_files(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.glob("*.safetensors"))


def drop(files: Iterable[Path]) -> None:
    """Take the files' pages out of the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def no_read_ahead(suffix: str) -> None:
    """Files with this suffix that Python opens from now on are read without read-ahead.

    With 8 MB of the kernel's, as on the machine of our figures, a rival that reads experts through
    the page cache had twice the bytes read from the drive that it asked for.
    """
    open_file = os.open

    def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        fd = open_file(path, flags, *args, **kwargs)
        if str(path).endswith(suffix) and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        return fd

    os.open = opened


def warm(files: Iterable[Path]) -> None:
    """Read the files into the page cache."""
    for file in files:
        with open(file, "rb", buffering=0) as f:
            while f.read(8 << 20):
                pass


def cached_share(files: Iterable[Path]) -> float:
    """Which part of the files' pages the page cache holds."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    held = pages = 0
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as f, mmap.mmap(f.fileno(), size, access=mmap.ACCESS_READ) as m:
            base = np.frombuffer(m, np.uint8)
            count = -(-size // mmap.PAGESIZE)
            flags = ctypes.create_string_buffer(count)
            if libc.mincore(base.ctypes.data, size, flags) == 0:
                held += int((np.frombuffer(flags, np.uint8)[:count] & 1).sum())
                pages += count
            del base
    return held / max(pages, 1)


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as RssAnon; 0 where there is none."""
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    return next((int(x.split()[1]) << 10 for x in text.splitlines() if x.startswith(field)), 0)


def peak_rss_bytes() -> int:
    """The most memory that this process has had resident."""
    # On Linux ru_maxrss begins with what the process that started this one had at its peak.
    scale = 1 if sys.platform == "darwin" else 1024
    return status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def storage_bytes() -> int:
    """Bytes that this process has had read from the drive, faults on mapped files included."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return next(int(x.split()[1]) for x in lines if x.startswith("read_bytes"))


def fingerprint(logits: mx.array) -> list[int]:
    """[token that greedy decoding would take, checksum of the logits' bits]."""
    values = np.array(logits.astype(mx.float32))
    return [int(values.argmax()), zlib.crc32(values.tobytes())]


def run(job: dict[str, Any], open_session: Callable[[dict[str, Any]], Session]) -> dict[str, Any]:
    """Load, prefill, decode; see the module's docstring for what is the same for all."""
    start = time.perf_counter()
    session = open_session(job)
    load_seconds = time.perf_counter() - start
    loaded_peak = mx.get_peak_memory()
    mx.reset_peak_memory()

    def prepare() -> None:
        if job["state"] == "cold":
            session.forget()
            drop(session.files)

    warm(session.files) if job["state"] == "warm" else drop(session.files)
    cached = cached_share(session.files)
    before = storage_bytes()
    start, used = time.perf_counter(), time.process_time()
    logits = session.prefill(job["prompt"])
    prefill_seconds, prefill_cpu = time.perf_counter() - start, time.process_time() - used
    prefill_read = storage_bytes() - before
    outputs, steps, decode_cpu = [fingerprint(logits)], [], 0.0
    anonymous = decode_read = 0
    for token in job["continuation"]:
        prepare()
        before = storage_bytes()
        start, used = time.perf_counter(), time.process_time()
        logits = session.step(token)
        steps.append(time.perf_counter() - start)
        decode_cpu += time.process_time() - used
        decode_read += storage_bytes() - before
        outputs.append(fingerprint(logits))
        anonymous = max(anonymous, status_bytes("RssAnon"))
    return {
        "load_seconds": load_seconds,
        "prefill_seconds": prefill_seconds,
        "prefill_tokens_per_s": len(job["prompt"]) / prefill_seconds,
        "prefill_read_bytes": prefill_read,
        "decode_tokens_per_s": len(steps) / sum(steps),
        "step_seconds": steps,
        "prefill_cpu_seconds": prefill_cpu,
        "decode_cpu_seconds": decode_cpu,
        "decode_read_bytes": decode_read,
        "outputs": outputs,
        "slot_bytes": session.slot_bytes(),
        "peak_mlx_bytes": max(mx.get_peak_memory(), loaded_peak),
        "peak_rss_bytes": peak_rss_bytes(),
        "peak_anonymous_bytes": anonymous,
        "cached_share_at_start": cached,
        "counters": session.report(),
    }


def main(
    open_session: Callable[[dict[str, Any]], Session],
    pack: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """The command line of every adapter: `run_x.py JOB.json`; the last line printed is JSON.

    Args:
        open_session: loads the model as the job says.
        pack: writes the system's own copy of the experts to `job["store"]`, where it has one.
    """
    job = json.loads(Path(sys.argv[1]).read_text())
    try:
        if job.get("pack"):
            start = time.perf_counter()
            assert pack is not None
            pack(job)
            os.sync()  # dirty pages cannot be dropped
            result: dict[str, Any] = {"pack_seconds": time.perf_counter() - start}
        else:
            result = run(job, open_session)
    except RefusedError as e:
        result = {"refused": str(e)}
    except Exception as e:
        traceback.print_exc()
        result = {"failed": f"{type(e).__name__}: {e}"}
    print("\n" + json.dumps(result), flush=True)

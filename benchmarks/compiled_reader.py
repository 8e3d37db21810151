"""What a reader in C would bring: the same reads, without Python between them. An experiment.

    python benchmarks/compiled_reader.py [--model FOLDER] [--store STORE]

The package reads with Python threads: `pread` runs without Python's lock, but each read takes it
before and after, and the waiting thread wants it too. Here demand reads go to a pool of C threads
instead (compiled with `cc`, called through `ctypes`), which never takes the lock; waiting is one
call. The rest of the package is as it is, prefetching is off. Errors end the script: this shows
what could be gained, and is no reader.

Four models decode the same tokens, each token by all of them in random order: with threads past the
page cache, the same with C, and through the page cache, with reads announced (`posix_fadvise`) and
not. Before each step their files are dropped from the page cache. Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
from decode import decode, prompt_tokens
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import StreamConfig, demo_model, patch, stream
from mlx_streamexperts._io.ranges import ByteRange, merge, span_bytes
from mlx_streamexperts._io.reader import DEMAND, ExpertReader

SOURCE = r"""
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

/* A read of parts side by side in a file. left: reads of its expert that have not ended. */
typedef struct {
    int fd, parts, *left;
    long offset, length, *sizes;
    char **into;
} Run;

enum { MOST = 1 << 16 };
static Run queue[MOST];
static unsigned head, tail, align;
static int failed;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t work = PTHREAD_COND_INITIALIZER, ended = PTHREAD_COND_INITIALIZER;

static int execute(Run *run, char **bounce, long *room) {
    long start = run->offset - run->offset % align, end = run->offset + run->length, got = 0;
    long whole = (end - start + align - 1) / align * align;
    if (whole > *room) {
        free(*bounce);
        if (posix_memalign((void **)bounce, 4096, whole)) return 1;
        *room = whole;
    }
    while (start + got < end) {
        long n = pread(run->fd, *bounce + got, whole - got, start + got);
        if (n <= 0) return 1;
        got += n;
    }
    char *from = *bounce + (run->offset - start);
    for (int i = 0; i < run->parts; from += run->sizes[i++])
        memcpy(run->into[i], from, run->sizes[i]);
    return 0;
}

static void *worker(void *unused) {
    char *bounce = 0;
    long room = 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (head == tail) pthread_cond_wait(&work, &lock);
        Run run = queue[head++ % MOST];
        pthread_mutex_unlock(&lock);
        int bad = execute(&run, &bounce, &room);
        pthread_mutex_lock(&lock);
        failed |= bad;
        if (--*run.left == 0) pthread_cond_broadcast(&ended);
    }
}

void start(int threads, int alignment) {
    pthread_t thread;
    align = alignment;
    while (threads--) pthread_create(&thread, 0, worker, 0);
}

/* All arrays stay the caller's, and must outlive the reads. */
void submit(int runs, int *fds, long *offsets, long *lengths, int *parts, char **into, long *sizes,
            int **left) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < runs; into += parts[i], sizes += parts[i], i++) {
        Run run = {fds[i], parts[i], left[i], offsets[i], lengths[i], sizes, into};
        queue[tail++ % MOST] = run;
    }
    pthread_cond_broadcast(&work);
    pthread_mutex_unlock(&lock);
}

/* Wait until one of the counters is 0. */
int wait_any(int count, int **left) {
    pthread_mutex_lock(&lock);
    for (;;) {
        for (int i = 0; i < count; i++)
            if (!*left[i]) {
                pthread_mutex_unlock(&lock);
                return failed;
            }
        pthread_cond_wait(&ended, &lock);
    }
}
"""


class CTicket:
    """The part of `Ticket` that a demand read needs."""

    def __init__(self, library: Any, counters: dict[int, ctypes.c_int], kept: tuple) -> None:
        self._library, self._counters, self._kept = library, counters, kept
        self.errors: dict[int, Exception] = {}
        self.submitted, self.seconds = time.perf_counter(), 0.0

    @property
    def left(self) -> dict[int, ctypes.c_int]:
        return {e: c for e, c in self._counters.items() if c.value}

    def wait_for_any(self, experts: Any) -> list[int]:
        chosen = [self._counters[e] for e in experts]
        pointers = (ctypes.c_void_p * len(chosen))(*map(ctypes.addressof, chosen))
        if self._library.wait_any(len(chosen), pointers):
            raise RuntimeError("a read failed")
        return [e for e in experts if not self._counters[e].value]

    def wait(self) -> None:
        while left := self.left:
            self.wait_for_any(list(left))


class CReader:
    """Takes the place of a reader's `submit`."""

    def __init__(self, reader: ExpertReader) -> None:
        folder = Path(tempfile.mkdtemp())
        (folder / "reader.c").write_text(SOURCE)
        library, source = folder / "reader.so", folder / "reader.c"
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
        self._library = ctypes.CDLL(str(library))
        self._reader = reader
        alignment = {a for _, a in reader._files._files.values()}
        assert len(alignment) == 1, "read every file first"
        self._library.start(len(reader._threads), alignment.pop())

    def submit(self, ranges: list[ByteRange], priority: int = DEMAND) -> CTicket:
        assert priority == DEMAND
        counters: dict[int, ctypes.c_int] = {r.expert: ctypes.c_int(0) for r in ranges}
        longest = self._reader._read_bytes
        runs = [
            run for e in counters for run in merge([r for r in ranges if r.expert == e], longest)
        ]  # one expert's each, as a counter is
        parts = [r for run in runs for r in run]
        for run in runs:
            counters[run[0].expert].value += 1
        numbers = ctypes.c_int * len(runs)
        longs = ctypes.c_long * len(runs)
        files = self._reader._files._files
        kept = (
            numbers(*[files[run[0].file][0] for run in runs]),
            longs(*[run[0].offset for run in runs]),
            longs(*map(span_bytes, runs)),
            numbers(*map(len, runs)),
            (ctypes.c_void_p * len(parts))(
                *[ctypes.addressof(ctypes.c_char.from_buffer(r.into)) for r in parts]
            ),
            (ctypes.c_long * len(parts))(*[len(r.into) for r in parts]),
            (ctypes.c_void_p * len(runs))(
                *[ctypes.addressof(counters[run[0].expert]) for run in runs]
            ),
        )
        stats = self._reader.stats
        stats.reads += len(runs)
        stats.bytes += sum(kept[2])
        ticket = CTicket(self._library, counters, (*kept, ranges))
        self._library.submit(len(runs), *kept)
        return ticket


def streamed(args: argparse.Namespace, share: float, bypass: str) -> tuple[Any, ExpertReader]:
    config = StreamConfig(
        cache=1 << 60, progress=False, prefetch="off", store=args.store, bypass_page_cache=bypass
    )
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(args.model)
    expert_stream = stream(model)
    expert_stream.resize(int(share * expert_stream.plan.experts))
    return model, expert_stream._reader


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=demo_model())
    parser.add_argument("--store", help="a packed store of the model")
    parser.add_argument("--shares", default="0.25,0.125", help="resident shares to try")
    parser.add_argument("--tokens", type=int, default=40, help="timed decode steps a round")
    parser.add_argument("--warm-up", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    tokens = prompt_tokens(args.model, args.warm_up + args.tokens)
    for share in map(float, args.shares.split(",")):
        arms = {
            "threads": streamed(args, share, "on"),
            "C": streamed(args, share, "on"),
            "announced": streamed(args, share, "off"),
            "not announced": streamed(args, share, "off"),
        }
        for model, _ in arms.values():
            decode(model, tokens, args.warm_up)
        reader = arms["C"][1]
        reader.submit = CReader(reader).submit  # type: ignore[method-assign, assignment]
        arms["not announced"][1]._files.announce = lambda runs: None  # type: ignore[method-assign]
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        order, rng = list(arms), random.Random(0)
        for _ in range(args.rounds):
            caches = {name: make_prompt_cache(model) for name, (model, _) in arms.items()}
            for i, token in enumerate(tokens):
                rng.shuffle(order)
                logits = []
                for name in order:
                    model, reader = arms[name]
                    for fd, _ in reader._files._files.values():
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    start = time.perf_counter()
                    y = model(mx.array([[token]]), cache=caches[name])
                    mx.eval(y)
                    if i >= args.warm_up:
                        seconds[name].append(time.perf_counter() - start)
                    logits.append(y)
                assert all(mx.array_equal(y, logits[0]) for y in logits)
        print(f"{share:.1%} resident")
        for name, times in seconds.items():
            quarter, median, _ = statistics.quantiles(times)
            a, b, _ = statistics.quantiles(seconds["threads"])
            print(
                f"  {name:14s} {1e3 * median:6.2f} ms a token, lower quartile {1e3 * quarter:6.2f};"
                f" speed against threads {b / median:.2f}, {a / quarter:.2f}",
                flush=True,
            )
        for model, _ in arms.values():
            stream(model).close()


if __name__ == "__main__":
    main()

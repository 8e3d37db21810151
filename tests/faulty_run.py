"""Runs in a process of its own: reads that fail in the C library, Ctrl-C at random moments.

Prints one JSON object; test_injected.py says what must be in it.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import mmap
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
from conftest import leftovers, load_streamed, smallest_cache

from mlx_streamexperts import ExpertStream, StreamConfig, StreamError, stream

TOKENS = [mx.array([[3, 1, 4, 1, 5, 9, 2, 6]]), mx.array([[2]]), mx.array([[7]]), mx.array([[1]])]
SHORT, SLOW, END = 1000, 1001, 1002


def with_faults(folder: Path, expected: list[np.ndarray]) -> dict[str, Any]:
    """By fault: what the call raised (or nothing), and whether the next calls are exact."""
    with open(os.environ["FAULTY"], "r+b") as f:
        control = memoryview(mmap.mmap(f.fileno(), 16)).cast("i")
    results: dict[str, Any] = {}
    for bypass in ("off", "on"):
        config = StreamConfig(progress=False, prefetch="off", bypass_page_cache=bypass)
        try:
            model = load_streamed(folder, 1 << 40, config)
        except StreamError as e:  # a file system without direct reads
            results[f"{bypass}: no such reads"] = str(e)
            continue
        with stream(model) as expert_stream:
            expert_stream.resize(smallest_cache(expert_stream))
            for name, kind, after, count in (
                ("EIO", errno.EIO, 3, -1),
                ("EIO once", errno.EIO, 0, 1),
                ("EINTR", errno.EINTR, 0, 50),
                ("short", SHORT, 0, -1 if bypass == "on" else 500),
                ("slow", SLOW, 0, 1),
                ("end", END, 2, -1),
                ("ESTALE", errno.ESTALE, 0, -1),
            ):
                control[1], control[2], control[3], control[0] = after, count, 0, kind
                raised, same = "", False
                try:
                    same = np.array_equal(np.array(model(TOKENS[0])), expected[0])
                except StreamError as e:
                    raised = str(e)
                control[0] = 0
                seen = control[3]
                after_it = [np.array(model(t)) for t in TOKENS]
                results[f"{bypass}: {name}"] = {
                    "raised": raised,
                    "same": bool(same),
                    "seen": seen,
                    "exact_after": all(map(np.array_equal, expected, after_it)),
                }
    return results


def with_signals(folder: Path, expected: list[np.ndarray], seconds: float) -> dict[str, Any]:
    """SIGINT at random moments; every call that is not interrupted is compared with stock.

    It goes on until enough of either came about, however busy the machine is.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in background jobs
    order = random.Random(1)
    counts = {"sent": 0, "interrupted": 0, "calls": 0, "wrong": 0}
    config = StreamConfig(progress=False, prefetch="on", run_ahead=os.environ["RUN_AHEAD"])
    model = load_streamed(folder, 1 << 40, config)
    expert_stream: ExpertStream = stream(model)
    expert_stream.resize(2 * smallest_cache(expert_stream))
    before = leftovers()
    armed, over = threading.Event(), threading.Event()
    start = time.monotonic()
    mx.eval(model(TOKENS[1]))
    longest = time.monotonic() - start

    def send() -> None:
        while not over.is_set():
            if armed.wait(0.1):
                armed.clear()
                # Some before a call is over, some after; the slower the machine, the later.
                time.sleep(order.random() * max(0.004, 2 * longest))
                os.kill(os.getpid(), signal.SIGINT)
                counts["sent"] += 1

    sender = threading.Thread(target=send)
    sender.start()
    end, which = time.monotonic() + seconds, 0
    while time.monotonic() < end or counts["calls"] < 3 or counts["interrupted"] < 30:
        try:
            try:
                armed.set()
                while True:
                    which = (which + 1) % len(TOKENS)
                    got = np.array(model(TOKENS[which]))
                    counts["calls"] += 1
                    counts["wrong"] += not np.array_equal(got, expected[which])
            except KeyboardInterrupt:
                counts["interrupted"] += 1
        except KeyboardInterrupt:  # on its way out of the handler
            pass
    over.set()
    sender.join()
    for which, t in enumerate(TOKENS):
        counts["wrong"] += not np.array_equal(np.array(model(t)), expected[which])
    counts["left"] = (leftovers() - before).total()
    expert_stream.close()
    counts["readers"] = sum(t.name.startswith("expert-reader") for t in threading.enumerate())
    return counts


if __name__ == "__main__":
    faulthandler.dump_traceback_later(240, exit=True)
    what, folder = sys.argv[1], Path(sys.argv[2])
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = [np.array(stock(t)) for t in TOKENS]
    if what == "faults":
        print(json.dumps(with_faults(folder, expected)))
    else:
        print(json.dumps(with_signals(folder, expected, float(sys.argv[3]))))

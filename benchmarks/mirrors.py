"""Two played drives against each of them alone: what reading from both brings, what faults cost.

    python benchmarks/mirrors.py FOLDER

FOLDER gets a random 4-bit model, a packed store of it, and a copy of each, about 0.9 GB in all.
Folders are played drives: a bus of a stated rate that carries one read at a time, and 80 us of
latency (`_analysis/throttle.py`). Files are in the page cache, so that the rates are those stated.
Each row decodes the same tokens from the same start, and all rows must give the same logits. Rows
take turns in rounds. The last rows break the slow drive halfway: its reads fail, or never end.
"""

from __future__ import annotations

import argparse
import errno
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from random_model import write_random_model

from mlx_streamexperts import StreamConfig, mirror, pack, patch, stream
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._analysis.throttle import Throttle
from mlx_streamexperts._config import parse_size

_HANGS_SECONDS = 30.0


class Breaking(Throttle):
    """Played drives of which one fails, or hangs, once `how` is set.

    Attributes:
        how: `fails`, `hangs`, or nothing.
    """

    how = ""

    def __init__(self, breaks: Path, folders: dict[Path, float]) -> None:
        super().__init__(1e12, folders=folders)
        self._breaks = breaks

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        if self.how and self.drive(fd) == self._breaks:
            if self.how == "fails":
                raise OSError(errno.EIO, "played")
            time.sleep(_HANGS_SECONDS)
        return super().__call__(fd, buffers, offset)


def decode(
    folder: Path, config: StreamConfig, share: float, tokens: list[int], warm_up: int,
    drives: Breaking, breaks: str,
) -> tuple[list[float], np.ndarray, dict[str, int]]:  # fmt: skip
    """Seconds of each token, all logits, and the bytes read by drive."""
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(folder)
    real = platform.read_into
    with stream(model) as s:
        s.resize(int(share * s.plan.experts))
        cache, seconds, logits = make_prompt_cache(model), [], []
        platform.read_into, drives.how = drives, ""
        try:
            for i, token in enumerate(tokens):
                if i == warm_up:
                    s.reset()
                if i == (warm_up + len(tokens)) // 2:
                    drives.how = breaks
                start = time.perf_counter()
                logits.append(np.array(model(mx.array([[token]]), cache=cache)))
                seconds.append(time.perf_counter() - start)
        finally:
            platform.read_into = real
        read = s.stats().read
        assert not read.errors
        return seconds[warm_up:], np.stack(logits), read.drive_bytes or {"": read.bytes}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fast", default="24MB", help="bytes/s of the fast drive")
    parser.add_argument("--slow", default="12MB", help="bytes/s of the slow drive")
    parser.add_argument("--shares", default="0.25,0.125", help="resident shares to try")
    parser.add_argument("--tokens", type=int, default=10, help="timed tokens a round")
    parser.add_argument("--warm-up", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    rates = parse_size(args.fast), parse_size(args.slow)
    folder = write_random_model(args.folder / "fast", layers=4, experts=32, top_k=4, bits=4)
    store, quiet = args.folder / "fast-packed", "--no-progress"
    slow, slow_store = args.folder / "slow", args.folder / "slow-packed"
    assert pack.main(["--model", str(folder), "--out", str(store), quiet]) == 0
    assert mirror.main([str(folder), str(slow), quiet]) == 0
    assert mirror.main([str(store), str(slow_store), quiet]) == 0
    for file in folder.iterdir():  # so that the slow drive can be used alone, too
        if not (slow / file.name).exists():
            shutil.copy(file, slow)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 16384, args.warm_up + args.tokens).tolist()

    def arm(packed: bool, which: str, share: float) -> Callable[[], tuple[list[float], np.ndarray]]:
        where = {"fast": store, "slow": slow_store} if packed else {"fast": folder, "slow": slow}
        base = "slow" if which == "slow alone" else "fast"
        config = StreamConfig(
            cache=1 << 60, progress=False, bypass_page_cache="off",
            store=str(where[base]) if packed else None,
            mirrors=None if "alone" in which else [str(where["slow"])],
        )  # fmt: skip

        def run() -> tuple[list[float], np.ndarray]:
            played = dict(zip((where["fast"], where["slow"]), map(float, rates), strict=True))
            drives = Breaking(where["slow"], played)
            breaks = which.rpartition(" ")[2] if "slow drive" in which else ""
            model = {"fast": folder, "slow": slow}[base]
            seconds, logits, by_drive = decode(
                model, config, share, tokens, args.warm_up, drives, breaks
            )
            read[which].append(sum(by_drive.values()) / sum(seconds))
            return seconds, logits

        return run

    for packed in (False, True):
        for share in map(float, args.shares.split(",")):
            names = ["fast alone", "slow alone", "both"]
            names += [f"both, slow drive {how}" for how in ("fails", "hangs")]
            read: dict[str, list[float]] = {name: [] for name in names}
            times: dict[str, list[list[float]]] = {name: [] for name in names}
            arms = {name: arm(packed, name, share) for name in names}
            expected = None
            for number in range(args.rounds):
                for name in names if number % 2 == 0 else names[::-1]:
                    seconds, logits = arms[name]()
                    expected = logits if expected is None else expected
                    assert np.array_equal(logits, expected), f"{name} computes other logits"
                    times[name].append(seconds)
            speeds = {
                n: statistics.median(len(x) / sum(x) for x in rounds) for n, rounds in times.items()
            }
            print(f"{'packed' if packed else 'in place'}, {share:.1%} resident", flush=True)
            for name in names:
                rate = statistics.median(read[name])
                print(
                    f"  {name:24s} {speeds[name]:6.2f} tokens/s, {rate / 1e6:5.1f} MB/s "
                    f"({rate / sum(rates):.2f} of both rates), "
                    f"{speeds[name] / speeds[names[0]]:.2f} of the fast drive alone, "
                    f"longest token {max(map(max, times[name])):.2f} s",
                    flush=True,
                )
            both, alone = speeds["both"], speeds[names[0]] + speeds[names[1]]
            print(f"  both / (fast alone + slow alone): {both / alone:.2f}", flush=True)


if __name__ == "__main__":
    main()

"""Coverage-guided fuzzing of everything that reads a file somebody else may have written.

    pip install -e '.[cpu,test,fuzz]'
    python benchmarks/fuzz.py header -max_total_time=300

What follows the target's name goes to libFuzzer. An input that ends in anything but one of our own
errors, takes over two seconds or makes the process pass 2 GB of memory stops the run and is saved.
Without atheris (it has no macOS wheels) `--random SECONDS` mutates blindly.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None

from contextlib import nullcontext

with atheris.instrument_imports(["mlx_streamexperts"]) if atheris else nullcontext():
    from mlx_streamexperts import StreamConfig, StreamError, demo_model, pack
    from mlx_streamexperts._experts.hot_set import identity, read_hot_set
    from mlx_streamexperts._experts.packed_store import use_store, verify_store
    from mlx_streamexperts._experts.trace import read_trace
    from mlx_streamexperts._io.checkpoint import INDEX, read_checkpoint, read_header
    from mlx_streamexperts._loading.discover import discover

SLOWEST_SECONDS = 2.0
Target = Callable[[bytes], None]


def header(folder: Path) -> tuple[Target, list[bytes]]:
    file = folder / "model.safetensors"
    seed = small_shard()

    def run(data: bytes) -> None:
        file.write_bytes(data)
        for entry in read_header(file):
            assert 8 <= entry.offset <= entry.offset + entry.nbytes <= len(data)

    return run, [seed]


def index(folder: Path) -> tuple[Target, list[bytes]]:
    (folder / "model.safetensors").write_bytes(small_shard())

    def run(data: bytes) -> None:
        (folder / INDEX).write_bytes(data)
        for entry in read_checkpoint(folder).tensors.values():
            assert entry.file.parent == folder

    weights = {"a": "model.safetensors", "b": "model.safetensors"}
    return run, [json.dumps({"metadata": {"total_size": 32}, "weight_map": weights}).encode()]


def config(folder: Path) -> tuple[Target, list[bytes]]:
    for file in demo_model().iterdir():
        if file.suffix in (".safetensors", ".json"):
            (folder / file.name).symlink_to(file)
    seed = (folder / "config.json").read_bytes()
    (folder / "config.json").unlink()

    def run(data: bytes) -> None:
        (folder / "config.json").write_bytes(data)
        settings = StreamConfig(memory="2GB")
        discover(folder, settings, {}).plan(settings)

    return run, [seed]


def manifest(folder: Path) -> tuple[Target, list[bytes]]:
    layers = discover(demo_model(), StreamConfig(), {}).layers
    assert pack.main(["--model", str(demo_model()), "--out", str(folder / "s")]) == 0
    file = folder / "s" / "manifest.json"
    seed, tensors = file.read_bytes(), [x.tensors for x in layers]
    whole = json.loads(seed)
    for plan in whole["layers"]:  # what verifying reads is not what is tried here
        with (folder / "s" / plan["file"]).open("r+b") as f:
            f.truncate(plan["experts"] * plan["stride"])

    def run(data: bytes) -> None:
        file.write_bytes(data)
        for number, _ in enumerate(verify_store(folder / "s")):
            if number == 2:
                break
        try:
            use_store(layers, folder / "s", verify_reads=True)
            for x in layers:
                for t in x.tensors.values():
                    assert all(Path(f).parent == folder / "s" for f in t.stored.files)
        finally:
            for x, before in zip(layers, tensors, strict=True):
                x.slots.relocate({name: t.stored for name, t in before.items()})

    return run, [seed]


def trace(folder: Path) -> tuple[Target, list[bytes]]:
    file = folder / "trace.jsonl"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        routing = read_trace(file)
        for calls, experts in zip(routing.layers, routing.experts, strict=True):
            assert all(c.min() >= 0 and c.max() < experts for c in calls)

    lines = [
        {"experts": [4, 4], "expert_bytes": [10, 10], "layers": ["a", "b"]},
        {"layer": 0, "experts": [[0, 1], [2, 3]]},
        {"layer": 1, "experts": [[3, 1]]},
    ]
    return run, ["\n".join(map(json.dumps, lines)).encode()]


def hotset(folder: Path) -> tuple[Target, list[bytes]]:
    layers = discover(demo_model(), StreamConfig(), {}).layers
    saved = [{"name": x.name, "experts": [0, 1, 2]} for x in layers]
    content = {"format": 1, "checkpoint": identity(layers), "layers": saved}
    file = folder / "hot.json"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        for x, experts in zip(layers, read_hot_set(layers, file), strict=True):
            assert len(set(experts)) == len(experts) and all(0 <= e < x.experts for e in experts)

    return run, [json.dumps(content).encode()]


TARGETS = {f.__name__: f for f in (header, index, config, manifest, trace, hotset)}


def small_shard() -> bytes:
    text = json.dumps(
        {
            "a": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]},
            "b": {"dtype": "U32", "shape": [2, 2], "data_offsets": [16, 32]},
        }
    ).encode()
    return len(text).to_bytes(8, "little") + text + bytes(32)


def guarded(run: Target) -> Target:
    """Our own errors are what should be; slowness is not."""

    def once(data: bytes) -> None:
        start = time.perf_counter()
        try:
            run(data)
        except StreamError as e:
            assert str(e)
        taken = time.perf_counter() - start
        assert taken < SLOWEST_SECONDS, f"{taken:.1f} seconds"

    return once


WORDS = [
    b"-1", b"0", b"1e999", b"NaN", b"Infinity", b"9223372036854775808", b"99999999999999999999999",
    b"null", b"true", b"{}", b"[]", b'""', b'"../../etc/passwd"', b'"/etc/passwd"', b"[" * 3000,
    b"\xff", b"\\ud800", b"1073741824", b"-9223372036854775809", b"0.5",
]  # fmt: skip


def mutated(data: bytes, order: random.Random) -> bytes:
    """A few bytes, or a whole JSON value, replaced; or a word of trouble put in."""
    content = bytearray(data)
    for _ in range(order.randint(1, 4)):
        at = order.randrange(len(content) + 1)
        kind = order.randrange(4)
        if kind == 0:
            content[at : at + order.randint(0, 8)] = order.randbytes(order.randint(0, 4))
        elif kind == 1:
            content[at : at + 1] = order.choice(WORDS)
        elif kind == 2:  # the value after a colon or a comma
            starts = [i for i, c in enumerate(content[:4000]) if c in b":,["]
            if starts:
                start = order.choice(starts) + 1
                end = start
                while end < len(content) and content[end] not in b",}]":
                    end += 1
                content[start:end] = order.choice(WORDS)
        else:
            end = min(len(content), at + order.randint(1, 200))
            content[at:at] = content[at:end]
    return bytes(content)


def randomly(run: Target, seeds: list[bytes], seconds: float, seed: int) -> int:
    """Mutate without guidance; returns the inputs tried."""
    order, tried, end = random.Random(seed), 0, time.monotonic() + seconds
    while time.monotonic() < end:
        data = mutated(order.choice(seeds), order)
        Path("crash").write_bytes(data)  # beforehand: native code may take the process down
        run(data)
        tried += 1
    Path("crash").unlink(missing_ok=True)
    return tried


def main() -> None:
    target, arguments = TARGETS[sys.argv[1]], sys.argv[2:]
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        run, seeds = target(folder)
        run = guarded(run)
        for seed in seeds:
            run(seed)
        if "--random" in arguments or atheris is None:
            seconds = float(arguments[arguments.index("--random") + 1])
            print(f"{sys.argv[1]}: {randomly(run, seeds, seconds, int(time.time())):,} inputs")
            return
        corpus = folder / "corpus"
        corpus.mkdir()
        order = random.Random(1)
        for seed in seeds:
            for number in range(200):
                data = mutated(seed, order) if number else seed
                (corpus / str(number)).write_bytes(data)
        limits = [
            "-rss_limit_mb=2048",
            "-timeout=10",
            f"-max_len={2 * max(map(len, seeds)) + 4096}",
        ]
        atheris.Setup([sys.argv[0], *limits, *arguments, str(corpus)], run)
        atheris.Fuzz()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

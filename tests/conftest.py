"""Shared helpers: build a family once, run stock and streamed models on the same tokens."""

from __future__ import annotations

import gc
import json
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
import vlm_families

from mlx_streamexperts import ExpertStream, StreamConfig, demo_model, patch, stream
from mlx_streamexperts._loading import patching
from mlx_streamexperts._loading.lazy_load import original_load_model
from mlx_streamexperts._memory import process_memory

QUIET = StreamConfig(progress=False, prefetch="off")
"""Without guesses, whose reads come by chance: counts are exact. test_prefetch.py turns them on."""


def load_streamed(folder: Path, cache: int, config: StreamConfig = QUIET) -> nn.Module:
    """A model without tokenizer, its experts in a cache of `cache` bytes."""
    with patch(cache=cache, config=config):
        return mlx_lm.utils.load_model(folder)[0]


def demo_texts() -> list[str]:
    """The shipped model's prompts, one of each of its topics."""
    return [p["prompt"] for p in json.loads((demo_model() / "prompts.json").read_text())]


def demo_tokens(count: int) -> np.ndarray:
    """The first tokens of those texts, int [count]."""
    tokenizer = mlx_lm.utils.load_tokenizer(demo_model())
    return np.array([t for text in demo_texts() for t in tokenizer.encode(text)])[:count]


def smallest_cache(expert_stream: ExpertStream) -> int:
    """Bytes of one token's experts in every layer."""
    return sum(n.top_k * n.expert_bytes for n in expert_stream.needs())


def all_experts(expert_stream: ExpertStream) -> int:
    """Bytes of all experts."""
    return sum(n.experts * n.expert_bytes for n in expert_stream.needs())


def assert_same(expected: list[np.ndarray], got: list[np.ndarray], what: str) -> None:
    """Logits of every call are the same bits."""
    assert len(expected) == len(got)
    for step, (a, b) in enumerate(zip(expected, got, strict=True)):
        assert np.array_equal(a, b), f"{what}: call {step}, off by {np.abs(a - b).max()}"


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait until a condition holds; fail if it does not in time."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def until_memory_is(at_most: float, seconds: float = 60.0) -> None:
    """Wait until MLX's arrays take no more bytes; fail if they do for a minute.

    An operation that nobody waited for may still run, and hold what it reads and makes.
    """

    def fits() -> bool:
        gc.collect()
        mx.synchronize()
        mx.clear_cache()
        return mx.get_active_memory() <= at_most

    until(fits, seconds)


def leftovers() -> Counter[str]:
    """Threads, but for the progress bars' own, and open descriptors: how many of each.

    `leftovers() - before` is what has been left since. What was there before may go meanwhile: a
    model of an earlier test may hold its threads and files until the garbage collector comes by.
    """
    found = Counter(f"thread {t.name}" for t in threading.enumerate() if t.name != "tqdm_monitor")
    for fd in os.listdir("/dev/fd"):
        with suppress(OSError):  # the one that listed them
            of = os.fstat(int(fd))
            number = f" {of.st_dev}:{of.st_ino}" if stat.S_ISREG(of.st_mode) else ""
            found[f"descriptor of {stat.filemode(of.st_mode)[0]}{number}"] += 1
    return found


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of both libraries with a vision tower and a processor, in 4 bits."""
    folder = vlm_families.make_vlm_checkpoint(
        tmp_path_factory.mktemp("s") / "m", "qwen3_vl_moe", bits=4
    )
    vlm_families.add_processor(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Files of two pictures."""
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = [str(folder / f"{n}.png") for n in range(2)]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (56, 84, 3), dtype=np.uint8)).save(file)
    return files


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="run the tests that are marked `full` too, and let MLX compile its functions",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: one of many choices; only --full tries them all")
    # On a CPU MLX has g++ compile each function for each layout: 0.45 s each, and 280 of them in
    # these tests. Two processes that compile the same one at once may load half a library.
    if mx.default_device() == mx.cpu and not config.getoption("--full"):
        mx.disable_compile()
        os.environ["MLX_DISABLE_COMPILE"] = "1"  # for processes that tests start


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        chosen = [x for x in items if x.get_closest_marker("full") is None]
        config.hook.pytest_deselected(items=[x for x in items if x not in set(chosen)])
        items[:] = chosen


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """Loading a model collects garbage: not among all that the libraries have made."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def compiled() -> Iterator[None]:
    """With MLX's functions compiled, as users have them."""
    yield from _compiling(True)


@pytest.fixture
def not_compiled() -> Iterator[None]:
    """Not even with --full: compiling for a CPU takes longer than a test of a tiny model does."""
    yield from _compiling(False)


def _compiling(wanted: bool) -> Iterator[None]:
    mx.enable_compile() if wanted else mx.disable_compile()
    yield
    mx.disable_compile() if "MLX_DISABLE_COMPILE" in os.environ else mx.enable_compile()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds a family's checkpoint, once per set of arguments."""
    built: dict[str, Path] = {}

    def build(family: str, **options: object) -> Path:
        key = f"{family} {options}"
        if key not in built:
            folder = tmp_path_factory.mktemp(family)
            try:
                built[key] = families.build(family, folder, **options)  # type: ignore[arg-type]
            except ValueError as e:
                if "not supported" not in str(e):
                    raise
                pytest.skip(f"mlx-lm {mlx_lm.__version__} does not have {family} yet")
        return built[key]

    return build


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose experts are larger than a file system's blocks."""
    folder = tmp_path_factory.mktemp("original") / "model"
    return families.build("qwen3_moe", folder, quantize=None)


@pytest.fixture
def streamed(checkpoint: Callable[..., Path]) -> Iterator[tuple[nn.Module, ExpertStream]]:
    """A small streamed qwen3_moe with a quarter of its experts in cache; closed afterwards."""
    folder = checkpoint("qwen3_moe")
    model = load_streamed(folder, 1 << 40)
    expert_stream = stream(model)
    expert_stream.resize(all_experts(expert_stream) // 4)
    yield model, expert_stream
    expert_stream.close()
    mx.clear_cache()


def remove_patches() -> None:
    """Undo what an example or a snippet has installed for good, as users do."""
    for installed in list(patching._installed):
        patching.remove(installed)


@pytest.fixture(scope="module", autouse=True)
def _mlx_lm_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """No file leaves mlx-lm patched: what follows in this process would not be stock.

    Nor a streamed model: even a closed one takes its part of what later ones are promised.
    """
    if not request.session.testsfailed:  # the traceback of a failed test may hold one
        end = time.monotonic() + 60
        while process_memory.held_bytes() and time.monotonic() < end:
            time.sleep(0.01)  # a thread that holds it is about to end
        assert not process_memory._registered, f"left by {_files[-1:]}, or before"
    _files.append(request.node.name)
    yield
    assert not patching._installed
    assert not patching._scoped
    assert mlx_lm.utils.load_model is original_load_model


_files: list[str] = []  # that this process has run

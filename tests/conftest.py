"""Shared helpers: build a family once, run stock and streamed models on the same tokens."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
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


def leftovers() -> tuple[list[str], int]:
    """Names of threads (but for the progress bars' own), and the number of open descriptors."""
    names = sorted(t.name for t in threading.enumerate() if t.name != "tqdm_monitor")
    return names, len(os.listdir("/dev/fd"))


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


@pytest.fixture
def not_compiled() -> Iterator[None]:
    """Compiling for a CPU takes longer than a test of a tiny model does."""
    mx.disable_compile()
    yield
    mx.enable_compile()


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
def _mlx_lm_as_it_was() -> Iterator[None]:
    """No file leaves mlx-lm patched: what follows in this process would not be stock."""
    yield
    assert not patching._installed
    assert not patching._scoped
    assert mlx_lm.utils.load_model is original_load_model

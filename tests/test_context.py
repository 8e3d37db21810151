"""The context of a server if nobody stated it, and the line that a server starts with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mlx_streamexperts import BudgetError, StreamConfig, demo_model, plan
from mlx_streamexperts.server import _context as context
from mlx_streamexperts.server._context import ContextChoice, choose_context, enough, start_line


class Model:
    """1 MB of experts, and a KV cache that takes 1,000 bytes for each 1,024 tokens."""

    def __init__(self, folder: Path, *_: Any, **options: Any) -> None:
        self.model_config = json.loads((folder / "config.json").read_text())

    def plan(self, config: StreamConfig) -> Any:
        tokens, memory = config.context_tokens or 4096, config.memory or 500_000
        cache = min(1_000_000, memory - 1000 * (tokens // 1024))
        if cache < 10_000:
            raise BudgetError("too small", needed_bytes=1)
        free = max(tokens, 1024 * (memory - cache) // 1000)
        return SimpleNamespace(
            memory=memory, cache=cache, resident_share=cache / 1_000_000, longest_context=free
        )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 131_072}))
    monkeypatch.setattr(context, "discover", Model)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("memory", "tokens"),
    [
        (None, 49_152),  # 452 of 496 bytes are left
        (2000_000, None),  # all experts fit, and what is free is longer than any of these
        (1100_000, 131_072),  # the model was made for no more
        (100_000, 16_384),  # a quarter of 96 is 24, and 32,768 would take 28
        (104_000, 16_384),
        (120_000, 32_768),
    ],
)
def test_the_longest_that_leaves_most_experts(
    memory: int | None, tokens: int | None, folder: str
) -> None:
    choice = choose_context([folder], StreamConfig(memory=memory), False)
    assert (None if choice is None else choice.tokens) == tokens


def test_a_budget_that_is_too_small_is_refused(folder: str) -> None:
    with pytest.raises(BudgetError):
        choose_context([folder], StreamConfig(memory=8_000), False)


def test_what_is_stated_stays(folder: str) -> None:
    for config in (
        StreamConfig(memory=500_000, context_tokens=4096),
        StreamConfig(cache=500_000),
        StreamConfig(memory=500_000, pipeline=True),
    ):
        assert choose_context([folder], config, False) is None


def test_every_model_of_the_budget_counts(folder: str, tmp_path: Path) -> None:
    (tmp_path / "short").mkdir()
    (tmp_path / "short/config.json").write_text(
        '{"text_config": {"max_position_embeddings": 9000}}'
    )
    choice = choose_context([folder, str(tmp_path / "short")], StreamConfig(memory=500_000), False)
    assert choice is not None and choice.tokens == 8192


def test_the_line_says_what_a_context_costs() -> None:
    url = "http://127.0.0.1:8080"
    found = plan(demo_model(), config=StreamConfig(memory="120MB", context_tokens=8192))
    line = start_line(url, found, ContextChoice(8192, 0.034))
    assert line.startswith(f"Serving at {url}: {found.resident_share:.0%} of the experts")
    assert (
        "within 120 MB, room for 8,192 tokens of context (69.2 MB, 3.4% of the experts less" in line
    )
    assert start_line(url, None, None) == f"Serving at {url}"
    assert "within a cache of" in start_line(url, replace(found, memory=None), None)


@pytest.mark.parametrize(("prompt", "tokens"), [(1, 4096), (3072, 4096), (3073, 8192)])
def test_what_would_do_for_a_prompt(prompt: int, tokens: int) -> None:
    assert enough(prompt) == tokens


def test_the_line_predicts_on_a_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "processor_name", lambda: "Apple M4 Max")
    monkeypatch.setattr(context, "total_memory_bytes", lambda: 128 << 30)
    found = plan(demo_model(), config=StreamConfig(memory="100MB"))
    assert "; predicted " in start_line("http://127.0.0.1:8080", found, None)
    monkeypatch.setattr(context, "processor_name", lambda: "Some CPU")
    assert "predicted" not in start_line("http://127.0.0.1:8080", found, None)

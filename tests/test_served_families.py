"""Families that mlx-lm's server computes wrongly are served rightly, or not at all, by ours."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import families
import mlx_lm
import pytest
from conftest import until
from serving import Running, letters, serving

from mlx_streamexperts import generate, run
from mlx_streamexperts.server import _command as server
from mlx_streamexperts.server._kv_admission import BoundedPromptCache

TEXT = "".join(chr(33 + i * 37 % 90) for i in range(400))


@contextmanager
def served(folder: Path, *options: str) -> Iterator[Running]:
    with serving("--cache", "4MB", "--model", str(folder), *options) as running:
        yield running


def expected(folder: Path, prompts: list[str]) -> list[str]:
    model, tokenizer = mlx_lm.load(str(folder))
    return [mlx_lm.generate(model, tokenizer, p, max_tokens=10) for p in prompts]


@pytest.fixture(scope="module")
def checkpoints(checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """With a tokenizer."""

    def build(name: str, words: int = families.VOCAB, seed: int = 0) -> Path:
        return letters(checkpoint(name, seed=seed), words)

    return build


@pytest.mark.parametrize("name", ["jamba", "nemotron_h", "qwen3_next"])
def test_requests_at_once_get_what_each_gets_alone(
    name: str, checkpoints: Callable[..., Path]
) -> None:
    prompts = [TEXT[100:160], TEXT[:7], TEXT[50:73], TEXT[20:24]]
    folder = checkpoints(name)
    with served(folder) as running, ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda p: running.text(p, 10), prompts)) == expected(folder, prompts)
        assert running.generator.model_provider.is_batchable == (name == "qwen3_next")


@pytest.mark.parametrize("name", ["llama4", "gpt_oss", "qwen3_moe"])
def test_a_prompt_that_shares_its_beginning_with_an_earlier_one(
    name: str, checkpoints: Callable[..., Path]
) -> None:
    """Chunks and windows are 8 tokens here: they are full."""
    prompts = [TEXT[:50], TEXT[:50] + "abc", TEXT[:30], TEXT[:120], TEXT[:90], TEXT[:50]]
    folder = checkpoints(name)
    with served(folder) as running:
        assert [running.text(p, 10) for p in prompts] == expected(folder, prompts)


def test_tokens_that_the_model_does_not_have(checkpoints: Callable[..., Path]) -> None:
    folder = checkpoints("mixtral", words=3000)  # the model has 128
    with served(folder) as running:
        for token in (families.VOCAB, 2999, 3000):
            status, answer = running.post({"prompt": "a", "logit_bias": {str(token): 50}})
            assert (status, answer["error"]["param"]) == (400, "logit_bias")
        status, answer = running.post({"prompt": "ab\u0434c"})
        assert (status, answer["error"]["param"]) == (400, "prompt")
        assert "only 128" in answer["error"]["message"]
        bias = {str(t): 50.0 for t in range(families.VOCAB)}
        assert running.text("abc", 4, logit_bias=bias) == running.text("abc", 4)
    options = ["--model", str(folder), "--cache", "4MB", "--no-progress", "-m", "2"]
    assert generate.main([*options, "--prompt", "abc"]) == 0
    assert generate.main([*options, "--prompt", "ab\u0434c"]) == 1


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("qwen3_next", ["--draft-model", "DRAFT"], "--draft-model"),
        ("gpt_oss", ["--draft-model", "DRAFT"], "--draft-model"),
        ("deepseek_v3", ["--kv-bits", "8"], "--kv-bits"),
        ("gpt_oss", ["--kv-bits", "8"], "--kv-bits"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(
    name: str,
    options: list[str],
    says: str,
    checkpoints: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mlx_streamexperts._loading import load as patching

    monkeypatch.setattr(patching, "_load_trunk", lambda *_: pytest.fail("weights were read"))
    options = [str(checkpoints("qwen3_moe")) if o == "DRAFT" else o for o in options]
    model = ["--model", str(checkpoints(name))]
    ours = ["--cache", "4MB", "--no-progress"]
    commands: list[tuple[Any, list[str]]] = [
        (server, [*model, *ours, *options, "--port", "0"]),
        (generate, [*model, *ours, *options]),
        (run, [*ours, "mlx_lm.cache_prompt", *model, *options]),
    ]
    for command, arguments in commands:
        assert command.main(arguments) == 1
        lines = capsys.readouterr().err.splitlines()
        [line] = [x for x in lines if x.startswith("error: ")]
        assert says in line
        assert name in line


def test_a_draft_model_that_knows_fewer_tokens_is_refused(
    checkpoints: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--cache", "4MB", "--no-progress", "-p", "a", "-m", "2", "--draft-model"]
    draft = str(checkpoints("qwen3_moe"))
    assert generate.main([*options, draft]) == 1
    assert "knows 128 tokens" in capsys.readouterr().err
    model = ["--model", str(checkpoints("mixtral", words=3000))]  # more than either model has
    options.append(str(checkpoints("qwen3_moe", words=3000, seed=1)))
    assert generate.main([*model, *options]) == 0


@pytest.mark.parametrize("draft", [None, 0, 1])
def test_a_reply_is_gone_on_with_however_it_ended(
    draft: int | None,
    checkpoints: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    not_compiled: None,
) -> None:
    """With a draft model mlx-lm keeps caches that lack a token, the draft model's two.

    Drafts of the model itself are all accepted, those of another one are not.
    """
    folder, kept = checkpoints("qwen3_moe"), []
    original = BoundedPromptCache.insert_cache

    def insert(self: Any, model: Any, tokens: list[int], caches: list[Any], **options: Any) -> None:
        kept.append(len(tokens) - min(c.offset for c in caches))
        original(self, model, tokens, caches, **options)

    monkeypatch.setattr(BoundedPromptCache, "insert_cache", insert)
    ends: list[tuple[int, dict[str, Any]]] = [(n, {"num_draft_tokens": 2}) for n in (1, 3, 4, 5)]
    ends.append((8, {"stop": expected(folder, [TEXT[4:44]])[0][2:4]}))
    ends.append((8, {"logit_bias": {"96": 100}}))  # the end of the text
    options = [] if draft is None else ["--draft-model", str(checkpoints("qwen3_moe", seed=draft))]
    begun = [TEXT[i : i + 40] for i in range(len(ends) + 1)]
    with served(folder, "--prompt-cache-size", "20", *options) as running:
        said = [
            running.text(p, most, seed=1, **end)
            for p, (most, end) in zip(begun, ends, strict=False)
        ]
        with running.client().completions.create(
            model="default_model", prompt=begun[-1], max_tokens=400, stream=True
        ) as stream:
            said.append(next(iter(stream)).choices[0].text)  # and the client leaves
        until(lambda: running.figures()["traffic"]["active"] == 0)
        prompts = [p + text + "ab" for p, text in zip(begun, said, strict=True)]
        told = [running.post({"prompt": p, "max_tokens": 10})[1] for p in prompts]
    assert [t["choices"][0]["text"] for t in told] == expected(folder, prompts)
    # Later ones end while a pass is under way; if that ends too, nothing is kept.
    assert max(kept[:4]) == {None: 0, 0: 2, 1: 1}[draft]
    for t in told[:4]:
        assert t["usage"]["prompt_tokens_details"]["cached_tokens"] >= 39


def test_a_further_model_is_looked_at_at_the_start(
    checkpoints: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["--model", str(checkpoints("qwen3_moe")), "--also-serve", str(checkpoints("gpt_oss"))]
    assert server.main([*models, "--cache", "4MB", "--kv-bits", "8", "--kv-group-size", "32"]) == 1
    assert "--kv-bits 8 --kv-group-size 32 does not work with gpt_oss" in capsys.readouterr().err

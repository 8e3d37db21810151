"""What people do with mlx-lm's generation works on a streamed model, and gives the same tokens."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, save_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from mlx_streamexperts import (
    CheckpointError,
    UnsupportedModelError,
    demo_model,
    generate,
    load,
    plan,
    run,
    stream,
)

pytestmark = pytest.mark.usefixtures("compiled")  # so random states reach samplers as for users

DEMO = str(demo_model())
PROMPT = "In the beginning God created the heaven and the earth. And"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[nn.Module, nn.Module, Any]]:
    """The embedded model with everything loaded, and streamed; the tokenizer."""
    stock, tokenizer = mlx_lm.load(DEMO)
    model, _ = load(DEMO, cache="10MB", config=QUIET)
    with stream(model):
        yield stock, model, tokenizer


def tokens(model: nn.Module, tokenizer: Any, **options: Any) -> tuple[list[int], list[np.ndarray]]:
    """Tokens of a generation, and the log-probabilities that they were chosen by."""
    mx.random.seed(3)
    options = {"max_tokens": 14, **options}
    made = list(mlx_lm.stream_generate(model, tokenizer, options.pop("prompt", PROMPT), **options))
    return [r.token for r in made], [np.array(r.logprobs) for r in made]


def no_z(tokens: mx.array, logits: mx.array) -> mx.array:
    """A logits processor of the user's own: forbids some tokens."""
    return mx.where(mx.arange(logits.shape[-1]) % 3 == 0, -mx.inf, logits)


FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "rotating KV": lambda: {"max_kv_size": 12},
    "quantized KV": lambda: {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": 8},
    "8-bit KV from the start": lambda: {"kv_bits": 8, "quantized_kv_start": 0},
    "short prefill steps": lambda: {"prefill_step_size": 3},
    "logits processors": lambda: {
        "logits_processors": [*make_logits_processors({5: -2.0}, 1.3, 8), no_z]
    },
    "sampling": lambda: {"sampler": make_sampler(0.8, top_p=0.9, min_p=0.01, top_k=40)},
    "XTC": lambda: {"sampler": make_sampler(0.7, xtc_probability=0.5, xtc_threshold=0.05)},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_gives_the_same_tokens(
    feature: str, pair: tuple[nn.Module, nn.Module, Any]
) -> None:
    stock, model, tokenizer = pair
    stream(model).reset()
    expected = tokens(stock, tokenizer, **FEATURES[feature]())
    got = tokens(model, tokenizer, **FEATURES[feature]())
    assert got[0] == expected[0]
    assert all(np.array_equal(a, b) for a, b in zip(expected[1], got[1], strict=True))
    assert stream(model).stats().cache.misses > 0


@pytest.mark.parametrize("processors", [False, True])
def test_drafts_change_no_token_and_save_passes(
    processors: bool, pair: tuple[nn.Module, nn.Module, Any]
) -> None:
    stock, model, tokenizer = pair
    more = FEATURES["logits processors"]() if processors else {}
    plain, _ = tokens(stock, tokenizer, **more)
    options = {"draft_model": stock, "num_draft_tokens": 3, **more}
    expected, _ = tokens(stock, tokenizer, **options)
    stream(model).reset()
    assert tokens(model, tokenizer, **options)[0] == expected
    # With processors mlx-lm's own drafts change the text: it shows them no token of the prompt.
    assert processors or expected == plain
    calls = stream(model).stats().calls // len(stream(model).layers)
    assert calls <= 1 + 14 / 2  # the prompt, and a pass for up to four tokens


def test_a_prompt_cache_goes_through_a_file_between_models(
    pair: tuple[nn.Module, nn.Module, Any], tmp_path: Path
) -> None:
    """Each continues what the other one began."""
    stock, model, tokenizer = pair
    replies = []
    for i, (beginning, going_on) in enumerate([(stock, stock), (stock, model), (model, stock)]):
        cache = make_prompt_cache(beginning)
        tokens(beginning, tokenizer, max_tokens=4, prompt_cache=cache)
        save_prompt_cache(str(tmp_path / f"{i}.safetensors"), cache)
        cache = load_prompt_cache(str(tmp_path / f"{i}.safetensors"))
        replies.append(tokens(going_on, tokenizer, prompt=" And God", prompt_cache=cache)[0])
    assert replies[0] == replies[1] == replies[2]
    states = [mx.load(str(tmp_path / f"{i}.safetensors")) for i in range(3)]
    assert all(mx.array_equal(states[0][k], s[k]) for s in states for k in states[0])


@pytest.mark.parametrize("kv", [[], ["--max-kv-size", "16"], ["--kv-bits", "8"]], ids=str)
def test_cache_prompt_and_prompt_cache_file_on_the_command_line(
    kv: list[str], capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file, ours = str(tmp_path / "stock.safetensors"), str(tmp_path / "ours.safetensors")
    first = ["--model", DEMO, "--prompt", PROMPT, *kv, "--quantized-kv-start", "0"]
    second = ["-p", " And God", "-m", "10", "--verbose", "F", "--prompt-cache-file", file]
    monkeypatch.setattr(sys, "argv", ["cache_prompt", *first, "--prompt-cache-file", file])
    importlib.import_module("mlx_lm.cache_prompt").main()
    monkeypatch.setattr(sys, "argv", ["generate", *second])
    capsys.readouterr()
    importlib.import_module("mlx_lm.generate").main()
    expected = capsys.readouterr().out
    command = ["--cache", "10MB", "--no-progress", "mlx_lm.cache_prompt", *first]
    assert run.main([*command, "--prompt-cache-file", ours]) == 0
    saved, again = mx.load(file), mx.load(ours)
    assert saved.keys() == again.keys()
    assert all(mx.array_equal(saved[k], again[k]) for k in saved)
    capsys.readouterr()
    second[-1] = ours
    assert generate.main([*second, "--cache", "10MB", "--no-progress"]) == 0
    assert capsys.readouterr().out == expected


def adapter(folder: Path, part: str, rank: int = 4) -> str:
    """A LoRA adapter of the embedded model's last layers, random and strong enough to be seen."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model, _ = mlx_lm.load(DEMO)
    settings = {"rank": rank, "scale": 20.0, "dropout": 0.0, "keys": [part]}
    linear_to_lora_layers(model, 4, settings)
    mx.random.seed(1)
    weights = {
        k: mx.random.normal(v.shape) * 0.05
        for k, v in mlx_lm.utils.tree_flatten(model.trainable_parameters())
        if "lora" in k
    }
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    config = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def test_adapters_on_the_command_line(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trunk, experts = (adapter(tmp_path / p, p) for p in ("self_attn.q_proj", "mlp.gate"))
    refused = adapter(tmp_path / "experts", "mlp.switch_mlp.down_proj")
    replies = []
    for path in ([], ["--adapter-path", trunk], ["--adapter-path", experts]):
        arguments = ["-p", PROMPT, "-m", "12", "--verbose", "F", *path]
        monkeypatch.setattr(sys, "argv", ["generate", "--model", DEMO, *arguments])
        importlib.import_module("mlx_lm.generate").main()
        replies.append(capsys.readouterr().out)
        assert generate.main([*arguments, "--cache", "10MB", "--no-progress"]) == 0
        assert capsys.readouterr().out == replies[-1]
    assert len(set(replies)) == 3  # the adapters were felt
    arguments = ["-p", PROMPT, "-m", "1", "--cache", "10MB", "--adapter-path", refused]
    assert generate.main(arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "adapters.safetensors" in error
    assert "down_proj" in error
    with pytest.raises(UnsupportedModelError, match="down_proj"):
        load(DEMO, cache="10MB", adapter_path=refused, config=QUIET)


def test_threads_of_a_host_generate_at_once(pair: tuple[nn.Module, nn.Module, Any]) -> None:
    """Two threads, each in the middle of its own reply of the same model."""
    stock, model, tokenizer = pair
    prompts = [PROMPT, "def main(", "The system call read", "Chapter 1."]
    expected = [tokens(stock, tokenizer, prompt=p)[0] for p in prompts]
    got: dict[int, list[int]] = {}
    failed: list[BaseException] = []

    def work(which: range) -> None:
        try:
            for i in which:
                own = mlx_lm.utils.load_tokenizer(demo_model())  # its detokenizer has state
                got[i] = tokens(model, own, prompt=prompts[i])[0]
        except BaseException as e:
            failed.append(e)

    threads = [threading.Thread(target=work, args=(range(i, 4, 2),)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
    assert [got[i] for i in range(4)] == expected


CUSTOM = """
import mlx.nn as nn
from mlx_lm.models import qwen3_moe

class ModelArgs(qwen3_moe.ModelArgs):
    pass

class Model(qwen3_moe.Model):
    def sanitize(self, weights):
        return super().sanitize({k.removeprefix("own."): w for k, w in weights.items()})
"""


def test_a_checkpoints_own_model_file_on_every_way_to_load(capsys: Capture, tmp_path: Path) -> None:
    """Its classes, its names of tensors; never without being asked to trust it."""
    folder = tmp_path / "own"
    shutil.copytree(DEMO, folder)
    (folder / "model.safetensors.index.json").unlink()
    for file in folder.glob("*.safetensors"):
        weights = {f"own.{k}": mx.array(w) for k, w in mx.load(str(file)).items()}
        mx.eval(weights)
        mx.save_safetensors(str(file), weights)
    (folder / "own_model.py").write_text(CUSTOM)
    config = json.loads((folder / "config.json").read_text())
    config.update(model_file="own_model.py", model_type="of_nobody_else")
    (folder / "config.json").write_text(json.dumps(config))
    model, tokenizer = load(str(folder), cache="10MB", config=QUIET, trust_remote_code=True)
    with stream(model):
        assert type(model).__module__ == "custom_model"
        stock, _ = mlx_lm.load(DEMO)
        got = tokens(model, tokenizer, max_tokens=6)[0]
        assert got == tokens(stock, tokenizer, max_tokens=6)[0]
    planned = plan(str(folder), cache="10MB", trust_remote_code=True)
    assert planned.cache == plan(DEMO, cache="10MB").cache
    for refuse in (load, plan):
        with pytest.raises(CheckpointError, match="trust_remote_code"):
            refuse(str(folder), cache="10MB", config=QUIET)
    arguments = ["--model", str(folder), "-p", PROMPT, "-m", "6", "--cache", "10MB"]
    assert generate.main(arguments) == 1
    assert "trust_remote_code" in capsys.readouterr().err.splitlines()[-1]
    assert generate.main([*arguments, "--trust-remote-code"]) == 0
    assert "hit rate" in capsys.readouterr().out

"""The command line: every option of mlx-lm's, ours beside them, sensible with no flags at all."""

from __future__ import annotations

import gc
import importlib
import io
import json
import shutil
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from conftest import QUIET

from mlx_streamexperts import (
    StreamConfig,
    StreamError,
    chat,
    demo_model,
    generate,
    load,
    plan,
    stream,
)
from mlx_streamexperts._loading.demo import DEMO_PROMPT

stock = importlib.import_module("mlx_lm.generate")


def options(parser: object) -> set[str]:
    return {s for a in parser._actions for s in a.option_strings}  # type: ignore[attr-defined]


def streaming_options() -> set[str]:
    """The options of `StreamConfig`; `about` has none, and `progress` is --no-progress."""
    fields = {"--" + f.replace("_", "-") for f in StreamConfig.__dataclass_fields__}
    fields = fields - {"--mirrors"} | {"--mirror"}  # it can be stated several times
    return fields - {"--progress", "--about"}


def test_every_option_of_mlx_lm_and_every_streaming_option_is_there() -> None:
    ours = options(generate.setup_arg_parser())
    assert options(stock.setup_arg_parser()) <= ours
    assert streaming_options() <= ours
    assert "--no-progress" in ours


def test_no_flags_stream_the_embedded_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--prompt", "In the beginning", "--max-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert "embedded demonstration model" in err
    model, tokenizer = mlx_lm.load(str(demo_model()))
    expected = mlx_lm.generate(model, tokenizer, "In the beginning", max_tokens=12)
    assert expected in out
    for word in ("Prompt:", "Generation:", "Time to first token", "hit rate", "Read:", "peak"):
        assert word in out, word


def test_the_embedded_model_gets_a_prompt_that_it_can_complete(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate.main(["-m", "20", "--verbose", "F", "--no-progress"]) == 0
    model, tokenizer = mlx_lm.load(str(demo_model()))
    expected = mlx_lm.generate(model, tokenizer, DEMO_PROMPT, max_tokens=20)
    assert capsys.readouterr().out.strip() == expected.strip()


def test_nothing_to_read_is_called_that(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert chat.main(["--cache", "10MB", "--no-progress"]) == 0
    out = capsys.readouterr().out
    assert "Experts: none was used" in out and "hit rate" not in out
    assert generate.main(["--prompt", "", "--cache", "10MB", "--no-progress"]) == 1
    assert "error: the prompt is empty" in capsys.readouterr().err


@pytest.mark.parametrize("cache", ["10MB", "1GB"])
def test_quiet_output_is_what_mlx_lm_prints(
    cache: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling too: the same seed draws the same tokens."""
    arguments = ["-p", "def main(", "-m", "20", "--verbose", "F", "--temp", "0.7", "--seed", "1"]
    assert generate.main([*arguments, "--no-progress", "--cache", cache]) == 0
    ours = capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["generate", "--model", str(demo_model()), *arguments])
    stock.main()
    assert ours == capsys.readouterr().out


def test_a_draft_model_changes_no_token(capsys: pytest.CaptureFixture[str]) -> None:
    text = []
    for draft in ([], ["--draft-model", str(demo_model())]):
        arguments = ["-p", "The system call", "-m", "10", "--verbose", "F", "--no-progress"]
        assert generate.main([*arguments, "--cache", "12MB", *draft]) == 0
        text.append(capsys.readouterr().out)
    assert text[0] == text[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1MB"], "too small"),
        (["--memory", "many"], "not a size"),
        (["--cache", "1kB"], "smallest that works"),
        (["--image", __file__], "--image: this model, qwen3_moe, takes only text"),
        (["--image", "http://x/x.png", "x.png"], "--image x.png: there is no such file"),
        (
            ["--image", __file__, "--loader", "mlx-lm"],
            "--image needs mlx-vlm: run without --loader",
        ),
        (["--model", "/no/such/folder"], "/no/such/folder: there is no such folder"),
        (["--threads", "0"], "at least 1"),
        (["--draft-model", "x", "--prompt-cache-file", "y"], "does not work with --draft-model"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(["-p", "x", "-m", "1", *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_the_embedded_model_is_an_ordinary_checkpoint_that_learned_its_topics() -> None:
    folder = demo_model()
    assert sum(f.stat().st_size for f in folder.iterdir()) <= 45_000_000
    scores = json.loads((folder / "eval.json").read_text())
    assert scores
    model, tokenizer = load(str(folder), cache="12MB", config=QUIET)
    with stream(model) as expert_stream:
        text = "And God said, Let there be light: and there was light."
        tokens = mx.array(tokenizer.encode(text))[None]
        logits = model(tokens[:, :-1])
        picked = mx.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        loss = (mx.logsumexp(logits, axis=-1) - picked).mean().item()
        assert loss < 5.0  # a uniform guess costs 9
        assert expert_stream.stats().cache.misses > 0


def test_resident_share_of_the_default_leaves_something_to_stream() -> None:
    model, _ = load(str(demo_model()), cache="10MB", config=QUIET)
    with stream(model) as expert_stream:
        assert 0.15 < expert_stream.plan.resident_share < 0.6


def test_memory_option_holds_for_generation() -> None:
    gc.collect()
    mx.clear_cache()
    others = mx.get_active_memory()  # of other tests' models
    model, tokenizer = load(
        str(demo_model()), memory="50MB",
        config=StreamConfig(progress=False, context_tokens=256, prefill_tokens=64),
    )  # fmt: skip
    with stream(model) as expert_stream:
        mx.reset_peak_memory()
        prompt = "The system call " * 40
        mlx_lm.generate(model, tokenizer, prompt, max_tokens=20, prefill_step_size=64)
        assert mx.get_peak_memory() - others <= 50_000_000
        assert expert_stream.stats().cache.misses > 0


def test_mlx_vlm_is_asked_for_by_name_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("mlx_vlm", "mlx_vlm.utils", "mlx_vlm.generate.dispatch"):
        monkeypatch.setitem(sys.modules, name, None)
    config = json.loads((demo_model() / "config.json").read_text())
    folder = tmp_path / "new"
    shutil.copytree(demo_model(), folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "not_in_mlx_lm"}))
    for call in (load, plan):
        with pytest.raises(StreamError, match=r"pip install 'mlx-vlm>="):
            call(str(folder), "200MB", config=StreamConfig(progress=False))
    assert generate.main(["--model", str(folder)]) == 1


def test_pictures_are_not_asked_of_mlx_lm(capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--loader", "mlx-lm", "--video", "film.mp4"]) == 1
    assert "--video needs mlx-vlm" in capsys.readouterr().err

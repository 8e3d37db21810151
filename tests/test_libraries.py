"""The model folder decides whether mlx-lm or mlx-vlm loads it; commands work or say why not."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import vlm_families
from mlx_lm.models.cache import make_prompt_cache
from vlm_families import make_vlm_checkpoint

from mlx_streamexperts import (
    PrefixCache,
    StreamConfig,
    StreamError,
    UnsupportedModelError,
    load,
    plan,
    prefill,
    stream,
)
from mlx_streamexperts import generate as generate_command
from mlx_streamexperts._loading.libraries import library

AUTO, VLM = StreamConfig(progress=False), StreamConfig(progress=False, loader="mlx-vlm")

vlm = pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: extra `vlm`")


@pytest.fixture(scope="module")
def vlm_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A family that mlx-lm lacks."""
    return make_vlm_checkpoint(tmp_path_factory.mktemp("step3p7") / "m", "step3p7")


def test_the_folder_decides(
    checkpoint: Callable[..., Path], vlm_only: Path, seeing: Path, tmp_path: Path
) -> None:
    exported = make_vlm_checkpoint(tmp_path / "m", "kimi_vl")  # other tensors than mlx-lm's
    for folder, expected in (
        (checkpoint("qwen3_moe"), "mlx-lm"),
        (seeing, "mlx-lm"),
        (exported, "mlx-vlm"),
        (vlm_only, "mlx-vlm"),
        (make_vlm_checkpoint(tmp_path / "v41", "deepseek_v41_engram"), "mlx-vlm"),
    ):
        assert library(folder, AUTO) == expected, folder
        assert library(folder, VLM) == "mlx-vlm"


@pytest.mark.usefixtures("not_compiled")
def test_the_choice_takes_no_random_numbers(seeing: Path) -> None:
    """It may have to try mlx-lm's loader."""
    drawn = []
    for choose in (False, True):
        mx.random.seed(5)
        if choose:
            library(seeing, AUTO)
        drawn.append(mx.random.uniform(shape=(4,)).tolist())
    assert drawn[0] == drawn[1]


def test_prompts_of_one_library_are_not_the_others(
    seeing: Path, tmp_path: Path, not_compiled: None
) -> None:
    """Both load this folder, and neither computes the other's bits."""
    tokens = [int(t) for t in np.random.default_rng(1).integers(5, 60, 100)]
    for config in (AUTO, VLM):
        whole = load(str(seeing), cache="400kB", config=config)[0]
        model = whole if config is AUTO else whole.language_model
        kept = PrefixCache(model, tmp_path, "1GB")
        assert kept.restore(make_prompt_cache(model), tokens) == 0
        prefill(model, tokens, kept)
        assert kept.written_bytes > 0
        assert kept.restore(make_prompt_cache(model), tokens) == 99


def test_load_and_plan_take_a_model_of_mlx_vlm(seeing: Path) -> None:
    stock, stock_processor = vlm.load(str(seeing))
    model, processor = load(str(seeing), cache="400kB", config=VLM)
    assert type(processor) is type(stock_processor)
    tokens = np.arange(1, 40)
    for got, expected in zip(
        vlm_families.run(model, tokens, 30), vlm_families.run(stock, tokens, 30), strict=True
    ):
        assert np.array_equal(got, expected)
    assert stream(model).stats().cache.misses > 0
    planned = plan(seeing, cache="400kB", config=VLM)
    assert planned == stream(model).plan
    assert planned.trunk > plan(seeing, cache="400kB", config=AUTO).trunk  # the tower


def test_model_code_is_not_run_without_permission(seeing: Path, tmp_path: Path) -> None:
    folder, ran = tmp_path / "m", tmp_path / "ran"
    shutil.copytree(seeing, folder)
    (folder / "model.py").write_text(f"open({str(ran)!r}, 'w')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "model.py"}))
    for config in (AUTO, VLM):
        with pytest.raises(StreamError, match=r"trust_remote_code"):
            plan(folder, "600MB", config=config)
    assert not ran.exists()


@pytest.mark.usefixtures("not_compiled")
def test_generate_sees_pictures_as_mlx_vlm_does(
    seeing: Path,
    pictures: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = ["--model", str(seeing), "-p", "What is it?", "-m", "8", "--no-progress"]
    ours += ["--cache", "400kB", "--image", pictures[0], "--image", pictures[1]]
    assert generate_command.main([*ours, "--no-verbose"]) == 0
    text = capsys.readouterr().out
    arguments = ["--model", str(seeing), "--prompt", "What is it?", "--max-tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["generate", *arguments, "--image", *pictures])
    dispatch = importlib.import_module("mlx_vlm.generate.dispatch")
    dispatch.main()
    assert text == capsys.readouterr().out
    mx.random.seed(0)
    assert generate_command.main(ours) == 0
    out = capsys.readouterr().out
    assert text.strip() in out
    for word in ("Time to first token", "27 tokens in 1 chunk", "hit rate", "peak"):
        assert word in out, word


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft-model", "x"], "--draft-model does not work with models of mlx-vlm"),
        (["--adapter-path", "x"], "--adapter-path does not work with models of mlx-vlm"),
        (["--output-modality", "image"], "streamed models generate text only"),
    ],
)
def test_what_generate_does_not_do_with_mlx_vlm_is_said(
    options: list[str], message: str, vlm_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate_command.main(["--model", str(vlm_only), *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "options", "instead"),
    [
        ("chat", [], "mlx_streamexperts.run mlx_vlm.chat"),
        ("server", [], "mlx_streamexperts.run mlx_vlm.server"),
        ("bench", [], "mlx_streamexperts.generate"),
        ("report", ["--out", "page.html"], "mlx_streamexperts.generate"),
        ("tune", ["--out", "settings.json"], "mlx_streamexperts.generate"),
    ],
)
def test_commands_of_mlx_lm_alone_say_what_to_run_instead(
    command: str,
    options: list[str],
    instead: str,
    vlm_only: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    main = importlib.import_module(f"mlx_streamexperts.{command}").main
    assert main(["--model", str(vlm_only), "--cache", "10MB", *options]) == 1
    error = capsys.readouterr().err
    assert "this one loads through mlx-vlm" in error
    assert instead in error


def test_several_machines_are_refused(vlm_only: Path) -> None:
    from mlx_streamexperts import plan_ranks

    with pytest.raises(UnsupportedModelError, match="not of mlx-vlm"):
        plan_ranks(str(vlm_only), 2, StreamConfig(memory="600MB"))

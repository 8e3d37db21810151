"""Options, and the settings files that hold them.

>>> parse_size("96GB"), parse_size("24GiB"), parse_size(96e9)
(96000000000, 25769803776, 96000000000)
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest

from mlx_streamexperts import (
    BudgetError,
    StreamConfig,
    StreamError,
    demo_model,
    generate,
    load,
    patch,
    plan,
    stream,
)
from mlx_streamexperts import stream as stream_of
from mlx_streamexperts._cli.settings import following_stock_options
from mlx_streamexperts._config import DEFAULTS, SAVED, add_arguments, from_arguments, parse_size
from mlx_streamexperts._loading.discover import discover
from mlx_streamexperts._loading.tuned_for import tuned_for


def test_how_settings_are_saved_loaded_and_overridden(tmp_path: Path) -> None:
    StreamConfig(memory="24GB", threads=16).save(tmp_path / "mine.json")
    config = StreamConfig.load(tmp_path / "mine.json")
    assert (config.memory, config.threads) == ("24GB", 16)
    assert config.policy is None  # not stated: the default, filled in at load
    assert config.with_defaults().policy == "lrfu"
    assert replace(config, threads=8).threads == 8  # the default's value, but stated
    assert parsed("--settings", f"{tmp_path}/mine.json", "--threads", "8").threads == 8


def parsed(*argv: str) -> StreamConfig:
    """The options of a command line with mlx-lm's `--max-kv-size` and `--prefill-step-size`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-kv-size", type=int)
    parser.add_argument("--prefill-step-size", type=int)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return following_stock_options(from_arguments(args), args, args)


# Values


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (1, 1),
        (np.int64(5), 5),
        (np.float32(8), 8),
        (96e9, 96 * 10**9),
        ("96GB", 96 * 10**9),
        ("1.5g", 1_500_000_000),
        ("2KiB", 2048),
    ],
)  # fmt: skip
def test_sizes(size: float | str, nbytes: int) -> None:
    assert parse_size(size) == nbytes
    assert isinstance(parse_size(size), int)
    assert StreamConfig(read_size=size).read_size == size  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, -1, 0.3, math.nan, math.inf, True, "many", "", "-1GB", [1]])
def test_what_is_no_size(size: object) -> None:
    with pytest.raises(StreamError, match=r"memory: .*size"):
        StreamConfig(memory=size)  # type: ignore[arg-type]


def test_a_number_without_its_unit_is_asked_about() -> None:
    with pytest.raises(
        StreamError, match="memory: '96' is a size of 96 bytes: did you mean '96GB'"
    ):
        parsed("--memory", "96")
    assert parse_size("4096") == 4096


@pytest.mark.parametrize("option", ["threads", "context_tokens", "prefill_tokens", "cores"])
def test_counts_are_whole_numbers(option: str) -> None:
    for wrong in (0, -1, 1.5, "64", math.nan, True):
        with pytest.raises(StreamError, match=f"{option} must be"):
            StreamConfig(**{option: wrong})
    assert type(getattr(StreamConfig(**{option: np.int64(7)}), option)) is int


# Defaults


def test_a_default_is_none_until_it_is_stated() -> None:
    nothing = StreamConfig()
    assert all(getattr(nothing, name) is None for name in DEFAULTS)
    assert {name: getattr(nothing.with_defaults(), name) for name in DEFAULTS} == DEFAULTS
    for name, value in DEFAULTS.items():
        stated = replace(nothing, **{name: value})
        assert [n for n in DEFAULTS if getattr(stated, n) is not None] == [name]
        assert stated != nothing
        assert stated.with_defaults() == nothing.with_defaults()
        assert pickle.loads(pickle.dumps(stated)) == stated


def test_every_default_is_in_the_help() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    text = " ".join(parser.format_help().split())
    for name, value in DEFAULTS.items():
        assert "--" + name.replace("_", "-") in text
        assert f"(default: {value})" in text


def test_a_stream_has_no_option_that_is_none() -> None:
    with stream_of(load(str(demo_model()), config=StreamConfig(cache="10MB", threads=3))[0]) as s:
        assert {name: getattr(s.config, name) for name in DEFAULTS} == {**DEFAULTS, "threads": 3}


# Command lines


def test_a_command_line_states_the_options_on_it() -> None:
    assert parsed() == StreamConfig()
    config = parsed("--threads", "8", "--overlap", "auto", "--no-progress")
    assert config == StreamConfig(threads=8, overlap="auto", progress=False)


def test_force_is_short_for_oversubscribe() -> None:
    assert [parsed(*argv).oversubscribe for argv in ((), ("--force",), ("--oversubscribe",))] == [
        False, True, True,
    ]  # fmt: skip


def test_a_context_that_is_stated_is_kept_beside_max_kv_size(tmp_path: Path) -> None:
    assert parsed().context_tokens is None
    assert parsed("--max-kv-size", "32768").context_tokens == 32768
    for stated in (4096, 100):  # the first is the default that a plan assumes
        argv = ("--context-tokens", str(stated), "--max-kv-size", "32768")
        assert parsed(*argv).context_tokens == stated
    # A settings file gives way to the command line, mlx-lm's options included.
    StreamConfig(context_tokens=4096, prefill_tokens=64).save(tmp_path / "s.json")
    file = ("--settings", f"{tmp_path}/s.json")
    assert parsed(*file).context_tokens == 4096
    both = parsed(*file, "--max-kv-size", "32768", "--prefill-step-size", "128")
    assert (both.context_tokens, both.prefill_tokens) == (32768, 128)


def test_a_budget_on_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    StreamConfig(memory="24GB", cache="12GB", threads=4).save(tmp_path / "s.json")
    config = parsed("--settings", f"{tmp_path}/s.json", "--memory", "8GB")
    assert (config.memory, config.cache, config.threads) == ("8GB", None, 4)


def test_a_command_uses_a_settings_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    StreamConfig(cache="3MB").save(tmp_path / "s.json")
    arguments = ["-p", "In the", "-m", "2", "--no-progress", "--settings"]
    assert generate.main([*arguments, f"{tmp_path}/s.json"]) == 0
    assert "expert cache 3" in capsys.readouterr().out
    assert generate.main([*arguments, f"{tmp_path}/none.json"]) == 1
    assert "none.json" in capsys.readouterr().err


# Settings files


def test_a_file_holds_all_that_was_stated(tmp_path: Path) -> None:
    config = StreamConfig(
        memory=np.float32(8e9), cache=10**9, policy="lru", threads=np.int64(3), read_size=1 << 20,
        bypass_page_cache="on", overlap="off", prefetch="on", prefetch_depth=2, run_ahead="off",
        keep_awake="off", cores=2, context_tokens=64, prefill_tokens=32, reserve="1GB",
        wired="off", pressure="auto", rows="on", row_cache="64MB", in_place="off",
        about={"model": "demo"},
    )  # fmt: skip
    assert not [n for n in SAVED if getattr(config, n) == getattr(StreamConfig(), n)]
    config.save(tmp_path / "s.json")
    assert StreamConfig.load(tmp_path / "s.json") == replace(config, memory=8_000_000_000)
    assert StreamConfig.load(str(tmp_path / "s.json")).about == {"model": "demo"}
    assert json.loads((tmp_path / "s.json").read_text())["about"] == {"model": "demo"}
    StreamConfig().save(tmp_path / "s.json")  # replaces it
    assert StreamConfig.load(tmp_path / "s.json") == StreamConfig()


@pytest.mark.parametrize(
    "option",
    [{"store": "x"}, {"hot_set": "x"}, {"oversubscribe": True}, {"pipeline": True},
     {"split": "1,2"}, {"progress": False}, {"store": "x", "verify_reads": True}],
)  # fmt: skip
def test_options_of_one_run_are_not_saved(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(StreamError, match=f"{next(iter(option))} cannot be saved"):
        StreamConfig(**option).save(tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"version": True}, "version True"),
        ({"version": 1.0}, "version 1.0"),
        ({"more": 1}, "'more'"),
        ({"settings": []}, r"settings must be a JSON object"),
        ({"about": "me"}, "about must be a JSON object"),
        ({"settings": {"no_such": 1}}, "'no_such' is no option"),
        ({"settings": {"about": {}}}, "'about' is no option"),
        ({"settings": {"store": "/elsewhere"}}, "'store' is no option"),
        ({"settings": {"oversubscribe": True}}, "'oversubscribe' is no option"),
        ({"settings": {"threads": "3"}}, "threads must be"),
        ({"settings": {"threads": 0}}, "threads must be"),
        ({"settings": {"threads": True}}, "threads must be"),
        ({"settings": {"cores": 1.5}}, "cores must be"),
        ({"settings": {"policy": "best"}}, "policy='best'"),
        ({"settings": {"policy": ["lru"]}}, "policy="),
        ({"settings": {"wired": None}}, "wired=None"),
        ({"settings": {"read_size": "a lot"}}, "read_size: 'a lot'"),
        ({"settings": {"memory": math.nan}}, "memory: "),
        ({"settings": {"cache": {}}}, "cache: "),
    ],
)
def test_a_wrong_file_is_refused_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "s.json"
    StreamConfig(threads=3).save(file)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(StreamError, match=rf"s\.json: .*{message}"):
        StreamConfig.load(file)


@pytest.mark.parametrize("text", ["{torn", "[]", "", '{"version": 1, "version": 1}', "\xff"])
def test_a_file_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(StreamError, match=r"s\.json"):
        StreamConfig.load(tmp_path / "s.json")


# A warning about settings that were tuned elsewhere

DEMO = demo_model()


def tuned(**change: Any) -> StreamConfig:
    """The settings of a file that was tuned here, but for some changes."""
    config = StreamConfig(cache="10MB", progress=False, threads=3)
    about = {"model": "demo", **tuned_for(discover(DEMO, config, {}).layers, config)}
    for name, value in change.items():
        about[name] = {**about[name], **value} if isinstance(value, dict) else value
    return replace(config, about=about)


def threads_of(folder: Path, config: StreamConfig) -> int:
    with patch(config=config) as patched:
        mlx_lm.utils.load_model(folder)
    with patched.streams[0] as s:
        return s.config.threads


@pytest.mark.parametrize(
    "config",
    [tuned(), replace(tuned(), about=None), replace(tuned(), about={"model": "by hand"}),
     tuned(budget={"memory": None, "cache": None})],
    ids=["here", "no notes", "other notes", "no budget"],
)  # fmt: skip
def test_no_warning_without_a_difference(config: StreamConfig) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert threads_of(DEMO, config) == 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"budget": {"cache": 9_000_000}}, "budget cache: 9000000, here 10000000"),
        ({"machine": {"cores": 4096}}, "machine cores: 4096"),
        ({"libraries": {"mlx": "0.1"}}, "libraries mlx: 0.1"),
    ],
)
def test_settings_tuned_elsewhere_are_used_with_a_warning(change: dict[str, Any], why: str) -> None:
    with pytest.warns(UserWarning, match=why):
        assert threads_of(DEMO, tuned(**change)) == 3


def test_settings_tuned_for_another_model_are_used_with_a_warning(
    checkpoint: Callable[..., Path],
) -> None:
    with pytest.warns(UserWarning, match="for another model, demo"):
        assert threads_of(checkpoint("qwen3_moe"), tuned()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": 10**400}, "must be a number of bytes"),
        ({"reserve": "1GB,2GB"}, "reserve: '1GB,2GB' is not a size"),
        ({"threads": 10**20}, "threads must be at most 1024"),
    ],
)
def test_what_no_machine_has_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamError, match=message):
        StreamConfig(**options)
    assert parse_size("1" + "0" * 400 + "GB") == 1 << 62  # more than any machine has


@pytest.mark.parametrize("value", [np.float32(1.2), [np.int64(3)], {1, 2}, math.nan])
def test_notes_that_json_has_not_are_refused_by_name(value: Any, tmp_path: Path) -> None:
    config = StreamConfig(threads=3, about={"model": "demo", "gain": value})
    with pytest.raises(StreamError, match=r"about\['gain'\] cannot be saved"):
        config.save(tmp_path / "s.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("about", [[], 0, "", False])
def test_notes_of_another_kind_are_refused(about: Any, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"version": 1, "about": about, "settings": {}}))
    with pytest.raises(StreamError, match="about must be a JSON object"):
        StreamConfig.load(file)


def test_options_may_be_a_dict() -> None:
    folder = str(demo_model())
    assert plan(folder, config={"cache": "20MB", "context_tokens": 512}) == plan(
        folder, config=StreamConfig(cache="20MB", context_tokens=512)
    )
    with pytest.raises(StreamError, match=r"no option 'threats'; did you mean 'threads'"):
        patch(config={"threats": 2})
    with pytest.raises(StreamError, match="a StreamConfig or a dict"):
        patch(config=3)  # type: ignore[arg-type]


def test_a_number_may_be_a_float_and_needs_its_unit() -> None:
    assert StreamConfig(memory=96e9).memory == 96e9
    with pytest.raises(StreamError, match="did you mean '96GB'"):
        StreamConfig(memory=96)
    assert StreamConfig(cache="1kB").cache == "1kB"
    with pytest.raises(BudgetError, match="Smaller context_tokens or prefill_tokens need less"):
        plan(str(demo_model()), memory=2e6)


def test_a_plan_and_its_counters_say_what_matters() -> None:
    """One line, and the lines of a summary."""
    model, _ = load(str(demo_model()), cache="10MB", config={"progress": False})
    with stream(model) as expert_stream:
        assert "\n" not in repr(expert_stream.plan) and len(repr(expert_stream.plan)) < 250
        assert "25% of 39.3 MB of experts resident" in repr(expert_stream.plan)
        mx.eval(model(mx.array([[1, 2, 3]])))
        text = str(expert_stream.stats())
        assert re.match(r"Experts: [\d.]+% hit rate \(\d+ first uses, \d+ misses", text)
        assert "\nRead: " in text and len(text) < 500


def test_a_mistyped_option_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        generate.main(["--memory", "-1GB"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: argument --memory: expected one argument; ")

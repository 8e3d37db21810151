"""Profiles: picked up where everything is as it was tuned, never against what was stated."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, assert_same

from mlx_streamexperts import StreamConfig, StreamError, demo_model, generate, load, patch, plan
from mlx_streamexperts import stream as stream_of
from mlx_streamexperts._config import TUNED
from mlx_streamexperts._loading.discover import discover
from mlx_streamexperts._loading.profiles import (
    CACHE_SHARE,
    Place,
    default_file,
    place_of,
    profile_folder,
    write_profile,
)
from mlx_streamexperts._osinfo import config_folder
from mlx_streamexperts.tune._command import _VALUES

DEMO = demo_model()
CONFIG = StreamConfig(cache="10MB", progress=False)
SETTINGS = {"threads": 3, "prefetch": "off"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STREAMEXPERTS_PROFILES", str(tmp_path))
    return tmp_path


def place(config: StreamConfig = CONFIG) -> Place:
    return place_of(discover(DEMO, config, {}).layers, config)


def save(
    settings: dict[str, Any] = SETTINGS, config: StreamConfig = CONFIG, file: Path | None = None
) -> Path:
    found = place(config)
    file = file or default_file(found, "demo")
    write_profile(file, found, "demo", settings, {"gain": 1.25})
    return file


def loaded(config: StreamConfig = CONFIG) -> Any:
    """The options and the profile in force after `load`; the stream is closed."""
    with stream_of(load(str(DEMO), config=config)[0]) as s:
        return s


def test_which_options_are_stated() -> None:
    nothing = StreamConfig()
    assert not any(nothing.stated(name) for name in TUNED)
    for name in TUNED:
        default = copy.copy(type(nothing).__dataclass_fields__[name].default)
        plain = int(default) if isinstance(default, int) else str(default)
        for config in (StreamConfig(**{name: plain}), replace(nothing, **{name: plain})):
            assert config == nothing
            assert [n for n in TUNED if config.stated(n)] == [name]
            assert [n for n in TUNED if replace(config, cache=5).stated(n)] == [name]
            assert pickle.loads(pickle.dumps(config)).stated(name)
    assert not any(copy.deepcopy(nothing).stated(name) for name in TUNED)
    assert StreamConfig(cache="1GB").stated("cache")
    assert not nothing.stated("cache")


def test_a_command_line_states_what_is_on_it() -> None:
    from mlx_streamexperts._config import from_arguments

    parser = generate.setup_arg_parser()
    assert not any(from_arguments(parser.parse_args([])).stated(n) for n in TUNED)
    config = from_arguments(parser.parse_args(["--threads", "8", "--overlap", "auto"]))
    assert {n for n in TUNED if config.stated(n)} == {"threads", "overlap"}
    assert from_arguments(parser.parse_args(["--no-profile"])).profile == "off"


def test_nothing_is_picked_up_unless_something_was_saved() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loaded().profile is None


def test_load_patch_and_commands_pick_it_up(capsys: pytest.CaptureFixture[str]) -> None:
    file = save()
    s = loaded()
    assert (s.profile.file, s.profile.settings, s.profile.gain) == (file, SETTINGS, 1.25)
    assert (s.config.threads, s.config.prefetch, s.config.overlap) == (3, "off", "auto")
    assert s.plan.cache <= 10_000_000
    with patch(config=CONFIG) as patched:
        mlx_lm.utils.load_model(DEMO)
    assert patched.streams[0].config.threads == 3
    arguments = ["-p", "In the", "-m", "4", "--no-progress"]  # the embedded model's 10 MB
    assert generate.main(arguments) == 0
    assert f"Profile: {file.name}: threads 3, prefetch off" in capsys.readouterr().out
    assert generate.main([*arguments, "--no-profile"]) == 0
    assert "Profile" not in capsys.readouterr().out


def test_what_is_stated_counts_more(capsys: pytest.CaptureFixture[str]) -> None:
    save()
    s = loaded(replace(CONFIG, threads=8))  # the default's value, but stated
    assert s.config.threads == 8
    assert s.profile.settings == {"prefetch": "off"}
    assert generate.main(["-p", "In", "-m", "2", "--no-progress", "--threads", "8"]) == 0
    assert "prefetch off" in (out := capsys.readouterr().out)
    assert "threads 3" not in out
    s = loaded(replace(CONFIG, threads=8, prefetch="auto"))
    assert s.profile.settings == {}
    assert "stated otherwise" in str(s.profile)
    assert loaded(replace(CONFIG, profile="off")).profile is None


def test_the_cache_takes_its_share_of_what_the_budget_leaves() -> None:
    config = StreamConfig(memory="90MB", progress=False)
    whole = plan(str(DEMO), config=config)
    save({CACHE_SHARE: 0.6}, config)
    s = loaded(config)
    assert 0.5 * whole.cache < s.plan.cache <= 0.6 * whole.cache
    assert s.plan.memory == 90_000_000
    assert plan(str(DEMO), config=config).cache == s.plan.cache
    tight = StreamConfig(memory=whole.minimum, progress=False)
    save({CACHE_SHARE: 0.1}, tight)
    assert loaded(tight).plan.cache == plan(str(DEMO), config=replace(tight, profile="off")).cache


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"budget": {"memory": None, "cache": 9_000_000}}, "budget cache: 9000000, here 10000000"),
        ({"machine": {"cores": 4096}}, "machine cores: 4096"),
        ({"libraries": {"mlx": "0.1"}}, "libraries mlx: 0.1"),
        ({"experts_in": ["/elsewhere"]}, "experts_in"),
    ],
)
def test_a_stale_one_is_left_alone_and_it_says_why(change: dict[str, Any], why: str) -> None:
    file = save()
    content = json.loads(file.read_text())
    for key, value in change.items():
        content[key] = {**content[key], **value} if isinstance(value, dict) else value
    file.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=why):
        s = loaded()
    assert s.profile is None
    assert s.config == CONFIG
    assert not s.config.stated("threads")


def test_another_models_is_none_of_our_business(checkpoint: Callable[..., Path]) -> None:
    file = save()
    other = checkpoint("qwen3_moe")
    with patch(config=CONFIG) as patched, warnings.catch_warnings():
        warnings.simplefilter("error")
        mlx_lm.utils.load_model(other)
    assert patched.streams[0].profile is None
    stated = patch(config=replace(CONFIG, profile=str(file)))
    with stated, pytest.warns(UserWarning, match="checkpoint"):
        mlx_lm.utils.load_model(other)
    assert stated.streams[0].profile is None


def test_a_file_that_is_named(tmp_path: Path) -> None:
    file = save(file=tmp_path / "elsewhere" / "mine.json")
    assert loaded().profile is None
    assert loaded(replace(CONFIG, profile=str(file))).config.threads == 3
    with pytest.raises(StreamError, match="no such file"):
        load(str(DEMO), config=replace(CONFIG, profile=str(tmp_path / "none.json")))


@pytest.mark.parametrize(
    "settings",
    [{"context_tokens": 8}, {"store": "x"}, {"threads": "3"}, {"threads": 0}, {"threads": True},
     {"policy": "best"}, {"read_size": "a lot"}, {CACHE_SHARE: 2}, {"no_such": 1}, []],
)  # fmt: skip
def test_only_lossless_settings_of_the_right_kind_come_from_a_file(
    settings: Any, folder: Path
) -> None:
    file = save()
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "settings": settings}))
    assert loaded().profile is None
    with pytest.warns(UserWarning, match="is not used"):
        assert loaded(replace(CONFIG, profile=str(file))).profile is None
    file.write_text("{torn")
    assert loaded().profile is None


def test_every_value_that_is_tried_gives_the_same_bits(checkpoint: Callable[..., Path]) -> None:
    """The list of what may be tuned is a list of what no result depends on."""
    assert set(_VALUES) == {*TUNED, CACHE_SHARE}
    folder = checkpoint("qwen3_moe")
    experts = plan(str(folder), cache=1 << 40).experts
    tokens = mx.array(np.arange(20) * 7 % 60)[None]

    def logits(config: StreamConfig) -> list[np.ndarray]:
        with patch(config=config):
            model, _ = mlx_lm.utils.load_model(folder)
        with stream_of(model):
            cache = mlx_lm.models.cache.make_prompt_cache(model)
            calls = [tokens[:, :12], *(tokens[:, i : i + 1] for i in range(12, 20))]
            return [np.array(model(t, cache=cache)) for t in calls]

    quiet = replace(QUIET, cache=experts // 2)
    expected = logits(quiet)
    for name, values in _VALUES.items():
        assert name == CACHE_SHARE or values[0] == getattr(StreamConfig(), name)
        for value in values[1:]:
            change = {name: value}
            if name == CACHE_SHARE:
                change = {"cache": int(experts / 2 * value)}
            if name == "prefetch_depth":
                change["prefetch"] = "on"
            assert_same(expected, logits(replace(quiet, **change)), str(change))


def test_the_folder_is_where_programs_of_the_user_keep_settings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert profile_folder() == tmp_path
    monkeypatch.delenv("STREAMEXPERTS_PROFILES")
    assert profile_folder() == config_folder() / "mlx-streamexperts" / "profiles"
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/set/by/user")
    assert config_folder() == Path("/set/by/user")
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative, which the convention says to ignore")
    assert config_folder() == Path.home() / ".config"
    monkeypatch.setattr("sys.platform", "darwin")
    assert config_folder() == Path.home() / "Library" / "Application Support"

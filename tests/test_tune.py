"""Tuning: the candidates, the rule for a gain, disqualification, and the ledger."""

from __future__ import annotations

import itertools
import json
import random
import shlex
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import conftest
import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest

from mlx_streamexperts import (
    StreamConfig,
    StreamError,
    demo_model,
    generate,
    load,
    patch,
    plan,
)
from mlx_streamexperts import stream as stream_of
from mlx_streamexperts._config import DEFAULTS
from mlx_streamexperts.tune import _command as tune
from mlx_streamexperts.tune import _runner as runner
from mlx_streamexperts.tune import _tuner as tuner
from mlx_streamexperts.tune import main, seconds, setup_arg_parser
from mlx_streamexperts.tune._command import Outcome, Run, Tuner
from mlx_streamexperts.tune._ledger import Ledger
from mlx_streamexperts.tune._search import next_settings

SPACE = {"threads": (8, 1, 4, 16), "prefetch": ("auto", "off", "on"), "prefetch_depth": (1, 2),
         "policy": ("lrfu", "lru")}  # fmt: skip
GAINS = {"threads": {16: 1.3, 4: 0.8, 1: 0.5}, "prefetch": {"on": 0.7, "off": 1.2}}
QUIET = ["--no-progress"]


class Machine:
    """A made-up one: speeds by the settings, a clock that a run moves on by a second.

    Args:
        noise: rates vary by so much, up and down.
        change: what of a run is otherwise, by the setting that is on.
        gains: factors of the speed, by setting and value.
    """

    def __init__(
        self,
        noise: float = 0.01,
        change: Callable[[dict[str, Any]], Any] = lambda s: {},
        gains: dict[str, dict[Any, float]] = GAINS,
    ) -> None:
        self.runs: list[dict[str, Any]] = []
        self.now = 0.0
        self._random, self._noise, self._change = random.Random(1), noise, change
        self._gains = gains

    def run(self, settings: dict[str, Any]) -> Run:
        self.runs.append(settings)
        self.now += 1
        speed = 10.0
        for name, value in settings.items():
            speed *= self._gains.get(name, {}).get(value, 1.0)
        given = {
            "rates": tuple(
                k * speed * (1 + self._random.uniform(-self._noise, self._noise)) for k in (1, 2, 3)
            ),
            "first_token": (0.1, 0.2, 0.3), "tokens": "t", "logits": "l", "peak_bytes": 10,
            "promised_bytes": 20, "read_bytes": 1000, "hit_rate": 0.5,
        }  # fmt: skip
        return Run(**{**given, **(self._change(settings) or {})})

    def clock(self) -> float:
        return self.now

    def tuner(self, ledger: Ledger | None = None, **options: Any) -> Tuner:
        options = {"seconds": 1e9, "clock": self.clock, **options}
        return Tuner(self.run, SPACE, ledger, **options)


def test_how_tuning_goes() -> None:
    machine = Machine()
    record = machine.tuner().once({"threads": 16})
    assert machine.runs[-3:] == [{}, {"threads": 16}, {}]  # between two runs of the defaults
    assert record["ratio"] == pytest.approx(1.3, rel=0.02)
    assert record["ratio"] - 1 > record["noise"]  # of the defaults: so it is kept
    assert record["kept"]
    outcome = machine.tuner().tune()
    assert outcome.best is not None
    assert outcome.best["settings"].items() >= {"threads": 16, "prefetch": "off"}.items()
    assert outcome.best["phase"] == "verify"  # it won again


def best(outcome: Outcome) -> dict[str, Any]:
    """The settings that won."""
    return outcome.best["settings"] if outcome.best else {}


def same(settings: dict[str, Any]) -> frozenset[tuple[str, Any]]:
    return frozenset(settings.items())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_best_combination_is_found_and_wins_again(file: Path) -> None:
    machine = Machine()
    ledger = Ledger(file, {"model": "m"})
    outcome = machine.tuner(ledger).tune()
    assert outcome.best is not None
    assert outcome.best["settings"].items() >= {"threads": 16, "prefetch": "off"}.items()
    assert outcome.best["ratio"] == pytest.approx(1.3 * 1.2, rel=0.02)
    assert outcome.best["phase"] == "verify"
    verify = [r for r in lines(file) if r.get("phase") == "verify"][-2:]
    for name in ("tokens_per_s", "baseline_tokens_per_s"):  # of all that the gain is of
        assert outcome.best[name] == pytest.approx(sum(r[name] for r in verify) / 2)
    assert outcome.ended == "nothing is left to try"
    assert not outcome.disqualified
    first, *records = lines(file)
    assert first == {"ledger": 2, "model": "m"}
    assert [r["trial"] for r in records] == list(range(len(records)))
    tried = [r["settings"] for r in records if r["phase"] == "search"]
    assert len({same(s) for s in tried}) == len(tried) == outcome.trials
    # Every one of 4 x 2 combinations with prefetch off, whose depth means nothing, and 4 x 2 x 2 x
    # 2 with it, but for the defaults.
    assert len(tried) == 8 + 32 - 1
    assert not any(s.get("prefetch") == "off" and "prefetch_depth" in s for s in tried)
    singles = [{n: v} for n, values in SPACE.items() for v in values[1:]]
    assert tried[: len(singles)] == singles  # each alone at first, so that the ledger tells
    for r in records:
        assert r["phase"] != "search" or r["kept"] == (r["ratio"] > 1 + r["noise"])


def test_the_combination_that_promises_most_is_next() -> None:
    space = {"threads": (8, 1, 4), "policy": ("lrfu", "lru")}
    tried: list[tuple[dict[str, Any], float | None]] = [
        ({"threads": 1}, None), ({"threads": 4}, 1.2), ({"policy": "lru"}, 0.9),
    ]  # fmt: skip
    assert next_settings(space, tried) == {"threads": 4, "policy": "lru"}
    tried.append(({"threads": 4, "policy": "lru"}, 0.5))
    assert next_settings(space, tried) == {"threads": 1, "policy": "lru"}  # which failed alone
    tried.append(({"threads": 1, "policy": "lru"}, None))
    assert next_settings(space, tried) is None


def test_what_pays_only_together_is_tried_after_each_alone(file: Path) -> None:
    pair = {"threads": 4, "policy": "lru"}
    singles = sum(len(values) - 1 for values in SPACE.values())
    Machine().tuner(Ledger(file, {}), trials=singles + 1, together=[pair]).tune()
    tried = [r["settings"] for r in lines(file)[1:] if r["phase"] == "search"]
    assert tried[singles:] == [pair]
    space = {"cache_share": (1.0, 0.7, 0.5), "bypass_page_cache": ("auto", "on", "off")}
    assert tune.together(space) == [
        {"cache_share": share, "bypass_page_cache": "off"} for share in (0.7, 0.5)
    ]
    assert tune.together({"cache_share": (1.0, 0.7)}) == []  # the file system cannot bypass


def test_the_defaults_run_before_and_after_every_candidate() -> None:
    machine = Machine()
    machine.tuner(trials=5).tune()
    assert machine.runs[:5] == [{}] * 4 + machine.runs[4:5]
    for a, b in itertools.pairwise(machine.runs[3:]):
        assert (a == {}) != (b == {})


def test_noise_is_not_taken_for_a_gain() -> None:
    """Sixty per cent up and down, and no setting matters."""
    outcome = Machine(noise=0.6, gains={}).tuner(trials=12).tune()
    assert outcome.spread > 0.3
    assert outcome.best is None


def test_one_lucky_run_is_not_verified(file: Path) -> None:
    lucky: list[int] = []

    def luck(settings: dict[str, Any]) -> Any:
        if settings == {"policy": "lru"}:
            lucky.append(1)
            return {"rates": (100, 200, 300)} if len(lucky) == 1 else None
        return {"rates": (10, 20, 30)} if settings else None

    ledger = Ledger(file, {})
    outcome = Machine(change=luck).tuner(ledger, trials=9).tune()
    assert outcome.best is None
    verify = [r for r in lines(file) if r.get("phase") == "verify"]
    assert [r["settings"] for r in verify] == [{"policy": "lru"}] * 2
    assert not any(r["kept"] for r in verify)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"tokens": "other"}, "other greedy tokens"),
        ({"logits": "other"}, "other logits"),
        ({"peak_bytes": 21}, "held 21 bytes, 20 were promised"),
    ],
)
def test_other_results_or_too_much_memory_disqualify(
    change: dict[str, Any], why: str, file: Path
) -> None:
    """However fast it is."""
    told: list[dict[str, Any]] = []

    def wrong(settings: dict[str, Any]) -> Any:
        return change if settings.get("threads") == 16 else None

    ledger = Ledger(file, {})
    outcome = Machine(change=wrong).tuner(ledger, on_record=told.append).tune()
    assert "threads" not in best(outcome)
    assert best(outcome)["prefetch"] == "off"
    records = [r for r in lines(file)[1:] if r["settings"].get("threads") == 16]
    assert json.loads(json.dumps(outcome.disqualified)) == records
    assert records
    for r in records:
        assert (r["kept"], r["disqualified"]) == (False, True)
        assert why in r["why"]
    assert json.loads(json.dumps(told)) == lines(file)[1:]


def test_a_slower_first_token_is_no_gain() -> None:
    def slow(settings: dict[str, Any]) -> Any:
        return {"first_token": (1, 2, 3)} if settings.get("threads") == 16 else None

    machine = Machine(change=slow)
    assert "10.00 times as long" in machine.tuner().once({"threads": 16})["why"]
    assert "threads" not in best(machine.tuner().tune())


def test_a_trial_that_fails_is_recorded_and_skipped(file: Path) -> None:
    def fail(settings: dict[str, Any]) -> Any:
        if settings.get("threads") == 16:
            raise OSError("drive is gone")
        return {}

    ledger = Ledger(file, {})
    outcome = Machine(change=fail).tuner(ledger).tune()
    assert best(outcome).items() >= {"prefetch": "off"}.items()
    assert not outcome.disqualified
    failed = [r for r in lines(file)[1:] if r["settings"].get("threads") == 16]
    assert failed
    assert {r["why"] for r in failed} == {"failed: OSError: drive is gone"}
    assert {r["kept"] for r in failed} == {False}


@pytest.mark.parametrize(
    "stock", [("other", "l"), ("t", "other"), ("other", None)], ids=["tokens", "logits", "device"]
)
def test_defaults_that_differ_from_stock_end_it(stock: tuple[str, str | None]) -> None:
    with pytest.raises(StreamError, match="than mlx-lm without streaming"):
        Machine().tuner(stock=lambda: stock).tune()


def test_stock_may_say_nothing_of_logits() -> None:
    assert Machine().tuner(stock=lambda: ("t", None), trials=1).tune().trials == 1


def test_defaults_that_fail_end_it() -> None:
    def fail(settings: dict[str, Any]) -> Any:
        raise StreamError("no drive")

    with pytest.raises(StreamError, match="no drive"):
        Machine(change=fail).tuner().tune()


def test_time_is_kept_verification_included() -> None:
    machine = Machine()
    outcome = machine.tuner(seconds=20).tune()
    assert outcome.ended == "the time is over"
    assert outcome.best is not None
    assert outcome.best["phase"] == "verify"
    assert 14 < machine.now <= 20


def test_ctrl_c_ends_with_what_was_found(file: Path) -> None:
    def stop(settings: dict[str, Any]) -> Any:
        if len(machine.runs) == 24:
            raise KeyboardInterrupt
        return {}

    machine = Machine(change=stop)
    ledger = Ledger(file, {})
    outcome = machine.tuner(ledger).tune()
    assert outcome.ended == "interrupted"
    assert outcome.best is not None
    assert outcome.best["ratio"] > 1.25
    assert outcome.best["phase"] == "search"
    ledger = Ledger(file, {}, resume=True)
    resumed = Machine().tuner(ledger).tune().best
    assert resumed is not None
    assert resumed["phase"] == "verify"

    def at_once(settings: dict[str, Any]) -> Any:
        raise KeyboardInterrupt

    assert Machine(change=at_once).tuner().tune() == Outcome(ended="interrupted")


def test_a_run_goes_on_where_it_was(file: Path) -> None:
    ledger = Ledger(file, {})
    assert Machine().tuner(ledger, trials=5).tune().trials == 5
    whole = file.read_bytes()
    with file.open("ab") as f:
        f.write(whole.splitlines()[-1][:37])  # cut off in the middle of a line
    machine = Machine()
    ledger = Ledger(file, {}, resume=True)
    assert ledger.torn
    outcome = machine.tuner(ledger, trials=12).tune()
    assert outcome.trials == 12
    assert file.read_bytes().startswith(whole)
    tried = [r["settings"] for r in lines(file)[1:] if r["phase"] == "search"]
    assert len({same(s) for s in tried}) == 12
    assert outcome.best is not None
    assert outcome.best["ratio"] > 1.25  # threads=16, of the first session


def test_results_of_an_earlier_session_must_come_again(file: Path) -> None:
    ledger = Ledger(file, {})
    Machine().tuner(ledger, trials=1).tune()
    changed = Machine(change=lambda s: {"tokens": "other"})
    ledger = Ledger(file, {}, resume=True)
    with pytest.raises(StreamError, match="other greedy tokens"):
        changed.tuner(ledger).tune()


def test_a_ledger_is_never_lost_or_mixed_up(file: Path) -> None:
    ledger = Ledger(file, {"model": "a", "tuple": (1, 2)})
    ledger.append({"n": 1})
    before = file.read_bytes()
    with pytest.raises(StreamError, match=r"--resume goes on with it, --overwrite begins anew"):
        Ledger(file, {"model": "a"})
    with pytest.raises(StreamError, match="model was 'a', now it is 'b'"):
        Ledger(file, {"model": "b", "tuple": (1, 2)}, resume=True)
    assert file.read_bytes() == before
    ledger = Ledger(file, {"model": "a", "tuple": (1, 2)}, resume=True)
    assert (ledger.records, ledger.torn) == ([{"n": 1}], False)
    ledger = Ledger(file, {"model": "b"}, overwrite=True)
    assert ledger.records == []
    assert lines(file) == [{"ledger": 2, "model": "b"}]
    for text in ("no JSON\n{}\n", "[]\n{}\n", '{"ledger": 99}\n', '{"led', "", "\n"):
        file.write_text(text)
        if text:
            with pytest.raises(StreamError, match="ledger of trials"):
                Ledger(file, {}, resume=True)
        else:  # made, and the power went before its first line
            Ledger(file, {}, resume=True)


def test_a_line_is_on_the_drive_when_its_trial_ends(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda fd: synced.append(len(lines(file))))
    ledger = Ledger(file, {})
    Machine().tuner(ledger, trials=2).tune()
    assert synced[0] == 1
    assert sorted(set(synced)) == list(range(1, len(lines(file)) + 1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"context_tokens": 1}, "is no setting to tune"), ({"threads": "16"}, "such as 8"),
     ({"threads": True}, "such as 8"), ({"policy": 3}, "such as 'lrfu'")],
)  # fmt: skip
def test_only_what_changes_no_result_can_be_tried(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(StreamError, match=message):
        Machine().tuner().once(settings)


def test_prompts_of_a_file(tmp_path: Path) -> None:
    text, jsonl = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("one\nline more\n\n\n\ntwo\n")
    assert runner.read_prompts(text) == ["one\nline more", "two"]
    jsonl.write_text('{"prompt": "one"}\n\n"two"\n')
    assert runner.read_prompts(jsonl) == ["one", "two"]
    for bad in ("\n", "{}\n", "3\n", "no JSON\n"):
        jsonl.write_text(bad)
        with pytest.raises(StreamError, match=r"line 1|no prompts"):
            runner.read_prompts(jsonl)
    with pytest.raises(StreamError, match="cannot be read"):
        runner.read_prompts(tmp_path / "none.txt")
    assert len(set(runner.shipped_prompts())) == 4


SHORT = ["--tokens", "3", "--warm-up", "2", *QUIET]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def prompts(tmp_path: Path) -> list[str]:
    file = tmp_path / "prompts.txt"
    file.write_text("In the beginning\n\ndef main(\n")
    return ["--prompts", str(file)]


def test_the_embedded_model_is_tuned_for_real(
    folder: Path, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Within a budget, the cache's share included."""
    arguments = ["--memory", "90MB", *SHORT, *prompts]
    assert main([*arguments, "--trials", "2", "--quality-budget", "0.01"]) == 0
    out, err = capsys.readouterr()
    assert "Lossy: not measured: the text has" in out  # the prompts are too short
    assert "Trials: 2, as many as were asked for" in out
    assert "tuned.ledger.jsonl" in err
    first, baseline, *trials = lines(folder / "tuned.ledger.jsonl")
    assert first["budget"] == {"memory": 90_000_000, "cache": None}
    assert first["page_cache"] == "keep"
    assert baseline["same_as_stock"] is None  # that would not fit
    assert [t["settings"] for t in trials[:2]] == [{"cache_share": 0.85}, {"cache_share": 0.7}]
    for t in trials:
        assert not t["disqualified"] and not t["why"].startswith("failed"), t["why"]
        assert 0 < t["peak_bytes"] <= t["promised_bytes"] == 90_000_000
        assert t["read_bytes"] > 0
        assert 0 < t["hit_rate"] < 1
        assert t["tokens_per_s"] > 0
        assert all(seconds > 0 for seconds in t["first_token"])
    assert main(arguments) == 1
    assert "--resume" in capsys.readouterr().err


def test_what_wins_is_saved_for_every_command(
    folder: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The speeds are made up, all else is real."""
    machine = Machine()
    monkeypatch.setattr(runner.Runner, "run", lambda self, settings: machine.run(settings))
    monkeypatch.setattr(runner.Runner, "stock", lambda self: None)
    assert main([*SHORT, *prompts, "--policy", "lrfu", "--trials", "20"]) == 0
    out = capsys.readouterr().out
    assert "Settings: tuned.json" in out
    assert "(verified)" in out
    assert sorted(p.name for p in folder.iterdir()) == ["tuned.json", "tuned.ledger.jsonl"]
    config = StreamConfig.load("tuned.json")
    assert config.threads == 16
    assert config.policy == "lrfu"  # stated: neither tried nor lost
    assert config.cache == "10MB"  # of the embedded model
    about = config.about
    assert about is not None
    assert about["gain"] > 1.25
    assert about["verified"]
    assert about["model"] == "demo"
    assert about["machine"]["cores"] >= 1
    assert set(about["libraries"]) == {"mlx", "mlx-lm", "mlx-streamexperts"}
    model, _ = load(str(demo_model()), config=config)
    with stream_of(model) as s, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert s.config == config.with_defaults()
    (command,) = (line.partition(": ")[2] for line in out.splitlines() if line.startswith("Use: "))
    python, dash, module, *arguments = shlex.split(command)
    assert [python, dash, module] == ["python", "-m", "mlx_streamexperts.generate"]
    assert generate.main([*arguments, "-p", "In", "-m", "2", *QUIET]) == 0


def test_a_winning_share_of_the_budget_is_saved_in_bytes(
    folder: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is as much as that trial had."""
    whole = plan(str(demo_model()), memory="90MB")
    gain = {"rates": (100, 200, 300)}
    machine = Machine(change=lambda s: gain if s.get("cache_share") == 0.7 else {})
    monkeypatch.setattr(runner.Runner, "run", lambda self, settings: machine.run(settings))
    monkeypatch.setattr(runner.Runner, "stock", lambda self: None)
    assert main([*SHORT, *prompts, "--memory", "90MB", "--trials", "2"]) == 0
    config = StreamConfig.load("tuned.json")
    assert (config.memory, config.cache) == (whole.memory, int(0.7 * whole.cache))
    saved = plan(str(demo_model()), config=config)
    assert 0.6 * whole.cache < saved.cache <= 0.7 * whole.cache
    assert saved.memory == 90_000_000
    few = runner.Runner(demo_model(), StreamConfig(memory=whole.minimum), runner.Workload(("In",)))
    least = few.applied({"cache_share": 0.01}, few.config)  # never fewer slots than it takes
    assert plan(str(demo_model()), config=least).cache == few.plan.cache


def test_a_share_is_of_what_other_models_leave() -> None:
    """Closed, a model still has its trunk: the rest of the cache could not hold every share."""
    other, _ = load(str(demo_model()), cache="3MB")
    stream_of(other).close()
    work = runner.Workload(("In",), 2, 1)
    r = runner.Runner(demo_model(), StreamConfig(memory="90MB"), work)
    for share in (0.99, 0.85, 0.7):
        assert r.run({"cache_share": share}).peak_bytes <= 90_000_000


def test_the_printed_command_has_the_files_that_settings_cannot_hold() -> None:
    args = setup_arg_parser().parse_args(["--model", "my model", "--store", "s", "--out", "o"])
    assert tune._command(args).endswith("--settings o --model 'my model' --store s")


def test_every_value_that_is_tried_gives_the_same_bits(checkpoint: Callable[..., Path]) -> None:
    """No result depends on an option that can be tuned."""
    assert set(tune._VALUES) == {*DEFAULTS, "cache_share"}
    model_folder = checkpoint("qwen3_moe")
    experts = plan(str(model_folder), cache=1 << 40).experts
    tokens = mx.array(np.arange(20) * 7 % 60)[None]

    def logits(config: StreamConfig) -> list[np.ndarray]:
        with patch(config=config):
            model, _ = mlx_lm.utils.load_model(model_folder)
        with stream_of(model):
            cache = mlx_lm.models.cache.make_prompt_cache(model)
            calls = [tokens[:, :12], *(tokens[:, i : i + 1] for i in range(12, 20))]
            return [np.array(model(t, cache=cache)) for t in calls]

    quiet = replace(conftest.QUIET, cache=experts // 2)
    expected = logits(quiet)
    for name, values in tune._VALUES.items():
        assert name == "cache_share" or values[0] == DEFAULTS[name]
        for value in values[1:]:
            change = {name: value}
            if name == "cache_share":
                change = {"cache": int(experts / 2 * value)}
            if name == "prefetch_depth":
                change["prefetch"] = "on"
            conftest.assert_same(expected, logits(replace(quiet, **change)), str(change))


def test_one_trial_is_one_line(
    folder: Path, prompts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    one = ["--once", '{"threads": 2, "overlap": "auto"}']
    assert main([*SHORT, *prompts, *one]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["settings"] == {"threads": 2}
    assert record["ratio"] > 0
    assert not record["disqualified"]
    assert not list(folder.iterdir())


def test_the_results_are_compared_with_stock(
    file: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it fits; one of its own tokens changed is noticed."""
    arguments = [*SHORT, *prompts, "--ledger", str(file), "--once", '{"threads": 2}']
    assert main(arguments) == 0
    assert lines(file)[1]["same_as_stock"] is True
    assert lines(file)[2]["kept"] in (True, False)
    before = runner.Runner.stock
    monkeypatch.setattr(
        runner.Runner, "stock", lambda self: (before(self)[0], "one bit is another")
    )
    assert main([*arguments, "--overwrite"]) == 1
    assert len(lines(file)) == 1


def test_a_dry_run_loads_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner.Runner, "run", None)
    assert main(["--memory", "90MB", "--threads", "8", "--dry-run", *QUIET]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "threads" not in said["space"]
    assert said["space"]["cache_share"][0] == 1.0
    assert (said["out"], said["ledger"]) == ("tuned.json", "tuned.ledger.jsonl")
    assert not list(folder.iterdir())
    assert main(["--cache", "10MB", "--dry-run", *QUIET]) == 0
    assert "cache_share" not in json.loads(capsys.readouterr().out)["space"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--memory", "1GB"], "all experts are resident"),
        (["--tokens", "1"], "at least 2"),
        (["--pipeline"], "one machine"),
        (["--once", '{"context_tokens": 1}'], "no setting to tune"),
        (["--prompts", "/no/such/file"], "cannot be read"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUIET, *arguments]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["--once", "[]"], ["--once", "{"], ["--time-limit", "soon"]])
def test_what_cannot_be_parsed_is_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)


def test_times() -> None:
    assert [seconds(t) for t in ("90", "90s", "1.5m", "2h")] == [90, 90, 90, 7200]


def test_the_page_cache_is_dropped_before_each_run(
    monkeypatch: pytest.MonkeyPatch, prompts: list[str]
) -> None:
    dropped: list[Path] = []

    def drop(path: Path) -> bool:
        dropped.append(path)
        return True

    monkeypatch.setattr(runner, "drop_page_cache", drop)
    work = runner.Workload(("In the",), 2, 1, "drop")
    r = runner.Runner(demo_model(), StreamConfig(cache="10MB"), work)
    dropped.clear()
    run = r.run({})
    assert {p.name for p in dropped} == {Path(f).name for f in r._files}
    assert run.tokens == r.stock()[0]  # type: ignore[index]
    monkeypatch.setattr(runner, "drop_page_cache", lambda path: False)
    with pytest.raises(StreamError, match="cannot be asked"):
        runner.Runner(demo_model(), StreamConfig(cache="10MB"), work)


def test_the_noise_is_what_nine_of_ten_pairs_stay_below() -> None:
    t = Machine().tuner()
    assert t.spread == float("inf")
    t._noise = [0.01 * i for i in range(1, 11)]
    assert t.spread == pytest.approx(0.09)
    assert tuner._NOISE_SHARE == 0.9

"""Reports of runs that go wrong or end early, of sensors that fail, and of hostile names."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from test_report import SCHEMA, TINY, render, sentence

from mlx_streamexperts import StreamConfig
from mlx_streamexperts._io.reader import DEMAND
from mlx_streamexperts.report import _command as report
from mlx_streamexperts.report import _locality as locality
from mlx_streamexperts.report import _method as method
from mlx_streamexperts.report import _page as page
from mlx_streamexperts.report import _power as power
from mlx_streamexperts.report import _quality as quality
from mlx_streamexperts.report import _speed as speed
from mlx_streamexperts.report import _study as study
from mlx_streamexperts.report import main
from mlx_streamexperts.report._drive import ReadLog
from mlx_streamexperts.report._panels import PANELS
from mlx_streamexperts.report._report import (
    Kind,
    KindRow,
    Power,
    PromptRow,
    Report,
    Sustained,
    as_json,
    from_json,
)

DEMO = Path(__file__).parents[1] / "docs" / "report" / "demo.json"


def limits_of(found: dict[str, Any]) -> list[str]:
    return page.limits(from_json(Report, found))


@pytest.fixture
def found() -> dict[str, Any]:
    """A whole report: the committed one."""
    return json.loads(DEMO.read_text())  # type: ignore[no-any-return]


def test_a_run_that_is_interrupted_leaves_what_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "report.json").write_text("of an earlier run")
    monkeypatch.setattr(study.drive, "rates_by_size", interrupt)
    monkeypatch.setattr(report, "QUICK", replace(study.QUICK, lengths=(8,), batches=(1,)))
    assert main([*TINY, "--out", str(tmp_path)]) == 130
    assert "Ended while at: the drive" in capsys.readouterr().err
    kept = json.loads((tmp_path / "unfinished.json").read_text())
    jsonschema.validate(kept, SCHEMA)
    assert kept["unfinished"] == "the drive" and len(kept["speed"]["by_prompt"]) == 2
    assert "rates" not in kept["ssd"] and "quality" not in kept
    assert "the drive" in kept["limits"][0]
    text = (tmp_path / "unfinished.html").read_text()
    assert "Not whole" in text and "Not measured: the run ended before." in text
    assert '<svg role="img"' in text[text.index('id="figure-by_prompt"') :]
    assert (tmp_path / "report.json").read_text() == "of an earlier run"


@pytest.mark.parametrize(
    ("section", "part"), [("speed", "by_batch"), ("ssd", "sensitivity"), ("quality", None)]
)
def test_a_whole_report_lacks_nothing_and_a_page_can_do_without(
    found: dict[str, Any], section: str, part: str | None
) -> None:
    jsonschema.validate(found, SCHEMA)
    found[section].pop(part) if part else found.pop(section)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, SCHEMA)
    found["unfinished"] = "it"
    found["speed"].pop("sustained")
    found.pop("power")
    jsonschema.validate(found, SCHEMA)
    assert "Not measured: the run ended before." in render(found)


def test_a_page_of_what_there_is_after_every_part(
    monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]
) -> None:
    monkeypatch.setattr(page, "svg", lambda *_: "")  # a second each
    whole = {k: dict(found[k]) for k in ("speed", "ssd", "locality", "power", "quality")}
    for section in whole:
        found.pop(section)
    for section, parts in whole.items():
        by_part = section in ("speed", "ssd")  # the others come as a whole
        found[section] = {} if by_part else parts
        for part in parts if by_part else [section]:
            if by_part:
                found[section][part] = parts[part]
            found["unfinished"] = f"what follows {section}, {part}"
            text = render({**found, "limits": limits_of(found)})
            assert ("Not measured: the run ended before." in text) == (section != "quality")


def test_a_page_that_fails_loses_no_measurement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]
) -> None:
    made = from_json(Report, found)
    monkeypatch.setattr(report, "measure", lambda *_: [made])
    monkeypatch.setattr(page, "render", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["--out", str(tmp_path), "--no-progress"])
    written = json.loads(json.dumps(as_json(made)))  # JSON has lists for tuples
    assert json.loads((tmp_path / "report.json").read_text()) == written


def test_what_came_after_the_last_step_is_kept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]
) -> None:
    """As of a sustained run that was interrupted: its windows, and the power that it took."""
    drawn = found.pop("power")

    def interrupted(*args: Any) -> Iterator[Report]:
        early = from_json(Report, {**found, "unfinished": "decoding on and on"})
        yield early
        early.power = from_json(Power, drawn)
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "measure", interrupted)
    monkeypatch.setattr(page, "svg", lambda *_: "")
    assert main(["--out", str(tmp_path), "--no-progress"]) == 130
    assert json.loads((tmp_path / "unfinished.json").read_text())["power"] == drawn


def test_a_quick_run_says_so(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "svg", lambda *_: "")  # which takes seconds
    assert found["method"]["settings"]["kind"] == "quick"
    assert "A quick run (--quick)" in render(found)
    assert any("quick run" in text for text in limits_of(found))
    found["method"]["settings"]["kind"] = "full"
    assert "A quick run" not in render(found)
    assert not any("quick run" in text for text in limits_of(found))
    assert study.FULL.kind == "full"


def test_a_busy_machine_is_named(found: dict[str, Any]) -> None:
    cores = found["method"]["machine"]["cores"]
    for load, busy in ((0.1 * cores, False), (0.5 * cores, True), (None, False)):
        found["method"]["load_average"] = load
        assert any("other work" in text for text in limits_of(found)) == busy


def test_names_are_text_and_no_formula(found: dict[str, Any]) -> None:
    evil = '<script>alert("$x_$")</script>&'
    found["method"]["model"]["name"] = evil
    found["note"] = evil
    found["method"]["prompts"][0]["task"] = found["speed"]["by_prompt"][0]["task"] = evil
    for window in found["speed"]["sustained"]["windows"]:
        window["celsius"] = {evil: 50.0}
    found["power"] |= {"celsius_before": {}, "celsius_after": {evil: 50.0}}
    found["power"]["missing"] = {evil: evil}
    text = render(found)
    assert "<script" not in text and text.count("&lt;script&gt;") >= 5
    assert "50 °C at the end" in sentence("heat", found)


def test_a_file_that_is_no_whole_report_is_refused(
    tmp_path: Path, found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for spoil in (lambda: found["speed"].update(by_prompt=5), lambda: found.pop("method")):
        spoil()
        (tmp_path / "bad.json").write_text(json.dumps(found))
        assert main(["--render", str(tmp_path / "bad.json"), "--out", str(tmp_path)]) == 1
        assert "not a whole report" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["bad.json"]


def test_too_little_context_is_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--context-tokens", "100", "--out", str(tmp_path)]) == 1
    assert f"--context-tokens {64 + speed.SUSTAINED_TOKENS}" in capsys.readouterr().err


def test_no_path_of_an_option_is_in_a_report() -> None:
    config = StreamConfig(store="/home/me/s", hot_set="/home/me/h", about={"model": "/home/me/m"})
    options = method._options(SimpleNamespace(config=config))  # type: ignore[arg-type]
    assert "home" not in json.dumps(options)
    assert options["store"] is True and "about" not in options


# Sensors


@pytest.mark.parametrize("fails", [1, 2, 3])
def test_a_sensor_that_fails_costs_the_others_nothing(fails: int) -> None:
    reads = itertools.count(1)

    def broken() -> float:
        if next(reads) == fails:
            raise OSError(19, "No such device")
        return 0.0

    joules = iter([5.0, 9.0, 15.0])
    sensors = power.Sensors(energy={"GPU 0": broken, "RAPL package-0": lambda: next(joules)})
    sensors.begin()
    sensors.look()
    assert sensors.end() == {"RAPL package-0": 10.0}
    assert sensors.missing == {"GPU 0": "failed while measuring: OSError"}


def test_a_counter_that_starts_over_twice() -> None:
    values = iter([8.0, 3.0, 9.0, 1.0])  # of 10: 5 more, 6 more, 2 more
    counter = power._unwrapped(lambda: next(values), 10.0)
    assert [counter() - 8.0 for _ in range(3)] == pytest.approx([5.0, 11.0, 13.0])


def test_what_the_platform_counts_is_not_counted_again(found: dict[str, Any]) -> None:
    parts = {"RAPL psys": 30.0, "RAPL package-0": 20.0}
    assert power.counted(parts) == {"RAPL psys": 30.0}
    assert power.counted({"GPU 0": 1.0, "RAPL package-0": 2.0}) == {
        "GPU 0": 1.0, "RAPL package-0": 2.0,
    }  # fmt: skip
    found["power"] |= {"sources": list(parts), "watts": parts, "watts_at_rest": parts}
    found["power"]["joules_per_token"] = 1.0
    assert "30 W while" in sentence("watts", found)
    assert "package" not in sentence("watts", found)


def test_a_card_tells_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def energy(card: int) -> int:
        if card == 0:
            raise NVMLError("Not Supported")
        return 5000

    library = SimpleNamespace(
        NVMLError=NVMLError, nvmlInit=lambda: None, nvmlDeviceGetCount=lambda: 2,
        nvmlDeviceGetHandleByIndex=lambda i: i, nvmlDeviceGetTotalEnergyConsumption=energy,
        NVML_TEMPERATURE_GPU=0, nvmlDeviceGetTemperature=lambda card, kind: 40 + card,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda card: 8 * card,
        nvmlClocksThrottleReasonHwSlowdown=8,
    )  # fmt: skip
    monkeypatch.setattr(power.sys, "platform", "linux")
    monkeypatch.setitem(power.sys.modules, "pynvml", library)
    sensors = power.Sensors()
    power._nvml(sensors)
    assert list(sensors.energy) == ["GPU 1"]
    assert sensors.missing == {"GPU 0 energy": "Not Supported"}
    assert sensors.heat() == {"GPU 0": 40.0, "GPU 1": 41.0}
    assert sensors.throttled() == ["GPU 1: heat or power, by the hardware"]


def test_thermal_pressure_of_a_mac() -> None:
    """By a stand-in of its C library: nothing of this was run on a Mac."""
    levels = iter([0, 2, 9])

    def register(name: bytes, token: Any) -> int:
        token._obj.value = 7
        return 0 if name == b"com.apple.system.thermalpressurelevel" else 1

    def state(token: Any, level: Any) -> int:
        assert token.value == 7
        level._obj.value = next(levels)
        return 0

    read = power._thermal_pressure(
        SimpleNamespace(notify_register_check=register, notify_get_state=state)
    )
    assert (read(), read()) == ("heavy", "level 9")
    mute = SimpleNamespace(notify_register_check=lambda *_: 1)
    with pytest.raises(OSError, match="does not say"):
        power._thermal_pressure(mute)


# Arithmetic


def decoding(monkeypatch: pytest.MonkeyPatch, steps: list[float | type | None]) -> None:
    """A sustained run that takes these seconds; None is a prompt of 20 s."""
    now = [0.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def endless(*args: object) -> Iterator[float | None]:
        yield None
        for step in steps:
            if isinstance(step, type):
                raise step
            now[0] += 20.0 if step is None else step
            yield step

    monkeypatch.setattr(speed, "_endless", endless)


def sustained(seconds: float) -> Sustained:
    return speed.sustained(SimpleNamespace(), [], seconds, 2.0, power.Sensors())[0]  # type: ignore[arg-type]


def test_prompts_are_no_dips_and_a_rest_is_no_window(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding(monkeypatch, [1.0, 1.0, None, 0.5, 0.5, 0.5, 0.5, 1.9])
    run = sustained(25.9)
    assert [w.tokens_per_s for w in run.windows] == [1.0, 2.0]
    assert [w.at_s for w in run.windows] == [2.0, 24.0]
    assert run.tokens == 8 and run.decode_s == pytest.approx(5.9)
    assert run.seconds == pytest.approx(25.9) and not run.interrupted


def test_ctrl_c_keeps_the_windows_of_a_sustained_run(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding(monkeypatch, [1.0, 1.0, 1.0, KeyboardInterrupt])
    run = sustained(600.0)
    assert len(run.windows) == 1 and run.interrupted and run.tokens == 3
    decoding(monkeypatch, [1.0, KeyboardInterrupt])
    with pytest.raises(KeyboardInterrupt):
        sustained(600.0)


def test_a_slow_token_is_a_window_if_there_is_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    decoding(monkeypatch, [1.0, 0.5])
    assert [w.tokens_per_s for w in sustained(0.1).windows] == [1.0]


def test_repeats_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def generate(model: object, prompt: list[int], tokens: int) -> SimpleNamespace:
        asked.append(len(prompt))
        return SimpleNamespace(first_token=float(len(asked)), tokens_per_s=float(len(prompt)))

    monkeypatch.setattr(speed, "generate", generate)
    rows = speed.first_tokens(SimpleNamespace(), [0] * 9, (3, 5), 3)  # type: ignore[arg-type]
    assert asked == [3, 5] * 4  # not 3 thrice, whose experts would be there the second time
    assert [r.seconds.values for r in rows] == [[3, 5, 7], [4, 6, 8]]  # the first: untimed
    assert [r.seconds.median for r in rows] == [5, 6]


def test_a_log_of_known_reads() -> None:
    log = ReadLog()
    one = [SimpleNamespace(into=b"x" * 100)]
    for priority, times in ((DEMAND, (0, 1, 4)), (DEMAND + 1, (0, 2, 3)), (DEMAND, (5, 6, 7))):
        log.note(one, priority, *times)  # type: ignore[arg-type]
    summary = log.summary()
    assert summary.reads == 3 and summary.ahead == 1
    last, middle = summary.percentiles[-1], summary.percentiles[3]
    assert (last.bytes, last.latency_s, last.queued_s, last.depth) == (100, 3, 2, 2)
    assert (middle.percentile, middle.latency_s, middle.depth) == (50, 1, 1)


def test_a_perplexity_beyond_all_numbers_is_one() -> None:
    logits = np.array([[0.0, 2000.0], [0.0, 0.0]], np.float32)
    exam = quality.Exam([SimpleNamespace(tokens=[0, 0])], [], 0)  # type: ignore[list-item]
    found = exam.judge(answers := quality.Answers([logits], [], 1.0), answers)
    assert np.isfinite(found.perplexity) and found.perplexity > 1e300


def test_hit_rates_by_task_and_language() -> None:
    rows = [
        PromptRow(i, share, rate) for i, rate in enumerate((0.2, 0.4, 0.9)) for share in (0.25, 0.5)
    ]
    kinds = [Kind("prose", "English"), Kind("prose", "German"), Kind("code", "C")]
    kind = locality.by_kind(rows, kinds)
    assert kind.share == 0.25 and kind.deviation == pytest.approx(0.36056, rel=1e-4)
    assert kind.task[0] == KindRow("prose", 2, pytest.approx(0.3), 0.2, 0.4)
    assert [x.name for x in kind.language] == ["English", "German", "C"]
    assert locality.by_kind(rows[:2], kinds[:1]).deviation == 0


def test_all_right_is_not_certain(found: dict[str, Any]) -> None:
    found["quality"] |= {"task_items": 30, "task_score": 1.0}
    assert "error 0 %" not in sentence("score", found)


def test_the_named_machines_are_named_on_the_curve(found: dict[str, Any]) -> None:
    panel = next(p for p in PANELS if p.key == "by_rate")
    text = page.draw(panel, from_json(Report, found))
    for machine in found["ssd"]["sensitivity"]["machines"]:
        assert machine["name"].rsplit(" ", 2)[0] in text.split(">", 1)[1]
    assert "predicted" in text

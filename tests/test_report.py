"""A report of the embedded model: its JSON follows the schema, its page says and draws the same."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import matplotlib.pyplot as plt
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from conftest import demo_tokens

import mlx_streamexperts
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts import demo_model
from mlx_streamexperts._analysis.exactness import prefill_bound
from mlx_streamexperts._analysis.throttle import slowed
from mlx_streamexperts._experts.trace import Routing
from mlx_streamexperts.report import _command as report
from mlx_streamexperts.report import _page as page
from mlx_streamexperts.report import _power as power
from mlx_streamexperts.report import _quality as quality
from mlx_streamexperts.report import _speed as speed
from mlx_streamexperts.report import main
from mlx_streamexperts.report._drive import _factor, seconds_behind
from mlx_streamexperts.report._locality import reuse_distances, token_overlap
from mlx_streamexperts.report._panels import COLOURS, PANELS
from mlx_streamexperts.report._report import Overlap, Report, as_json, from_json
from mlx_streamexperts.report._speed import Run, combined

SCHEMA = json.loads(
    (Path(mlx_streamexperts.__file__).parent / "data" / "report-schema.json").read_text()
)
TINY = [
    "--prompts=2", "--prompt-tokens=12", "--tokens=4", "--repeats=1", "--seconds=0.005",
    "--points=2", "--items=2", "--sustained=0.01", "--note=<b>tiny</b>", "--no-progress",
]  # fmt: skip


def sentence(key: str, found: dict[str, Any]) -> str:
    """What the page says under a panel."""
    panel = next(p for p in PANELS if p.key == key)
    return page.answer(panel, from_json(Report, found))


def render(found: dict[str, Any]) -> str:
    return page.render(from_json(Report, found))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(report, "QUICK", replace(report.QUICK, lengths=(8, 16), batches=(1, 2)))
        assert main([*TINY, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def found(written: Path) -> dict[str, Any]:
    return json.loads((written / "report.json").read_text())  # type: ignore[no-any-return]


def test_the_json_follows_the_schema(found: dict[str, Any]) -> None:
    jsonschema.validate(found, SCHEMA)
    damaged = {**found, "speed": {**found["speed"], "by_batch": [{"batch": 1}]}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(damaged, SCHEMA)


def test_committed_reports_follow_the_schema() -> None:
    files = list((Path(__file__).parents[1] / "docs" / "report").glob("*.json"))
    assert files
    for file in files:
        jsonschema.validate(json.loads(file.read_text()), SCHEMA)


def test_the_schema_is_documented() -> None:
    file = Path(__file__).parents[1] / "docs" / "make_report_schema.py"
    spec = importlib.util.spec_from_file_location("make_report_schema", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text() == module.page(), "stale: run docs/make_report_schema.py"
    assert module.schema() == SCHEMA, "stale: run docs/make_report_schema.py"


def test_a_report_is_its_json(found: dict[str, Any]) -> None:
    report = from_json(Report, found)
    assert as_json(report) == found
    assert report.speed.by_prompt is not None
    assert report.speed.by_prompt[0].name.startswith(found["speed"]["by_prompt"][0]["task"])
    with pytest.raises(TypeError, match="cold_start"):
        from_json(Report, {**found, "speed": {}})


def test_nothing_in_it_names_a_path(found: dict[str, Any]) -> None:
    assert str(demo_model()) not in json.dumps(found)
    assert found["method"]["model"]["name"] == "demo"


class _References(HTMLParser):
    """What a browser would load, identifiers, and links within the page."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag in ("script", "iframe", "object", "embed")
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            elif name in ("src", "href", "data", "srcset"):
                where = self.links if (value or "").startswith("#") else self.loaded
                where.append(value or "")


def test_the_page_is_self_contained(written: Path) -> None:
    text = (written / "report.html").read_text()
    parsed = _References()
    parsed.feed(text)
    assert parsed.loaded == ["data:,"] and not parsed.scripts
    assert not re.search(r"@import|https?://|url\((?!#)", text)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert {x[1:] for x in parsed.links} <= set(parsed.ids)
    assert not [c for c in COLOURS if c in text]  # every stand-in became one of the page's colours


def test_every_section_and_figure_is_on_the_page(written: Path, found: dict[str, Any]) -> None:
    text = (written / "report.html").read_text()
    for key in ("method", *page.SECTIONS, "limits"):
        assert f'<section id="{key}">' in text
    for panel in PANELS:
        begin = text.index(f'id="figure-{panel.key}"')
        inside = text[begin : text.index("</figure>", begin)]
        drawable = (
            panel.section != "power"
            or found["power"]["sources" if panel.key == "watts" else "celsius_after"]
        )
        assert ("<svg" in inside) == bool(drawable)
        assert re.search(r"<p>[^<]{20,}</p>", inside)
    assert "&lt;b&gt;tiny" in text  # what a user wrote is text, not markup


def test_figures_are_of_the_json(found: dict[str, Any]) -> None:
    wanted = ("sustained", "by_prompt", "by_rate", "perplexity")
    axes, made = {}, from_json(Report, found)
    for panel in PANELS:
        if panel.key in wanted:
            _, axes[panel.key] = plt.subplots()
            panel.draw(axes[panel.key], panel.part(made), made)
    windows = found["speed"]["sustained"]["windows"]
    assert np.allclose(axes["sustained"].lines[0].get_ydata(), [w["tokens_per_s"] for w in windows])
    widths = sorted(bar.get_width() for bar in axes["by_prompt"].patches)
    medians = sorted(p["tokens_per_s"]["median"] for p in found["speed"]["by_prompt"])
    assert np.allclose(widths, medians)
    curve = found["ssd"]["sensitivity"]["curve"]
    assert np.allclose(axes["by_rate"].lines[0].get_ydata(), [p["tokens_per_s"] for p in curve])
    judged = [found["quality"]["streamed"], *found["quality"]["lossy"]]
    widths = [bar.get_width() for bar in axes["perplexity"].patches]
    assert np.allclose(widths, [r["perplexity"] for r in judged])
    plt.close("all")


def test_the_curve_for_slower_drives_counts_what_was_read_behind_them(
    found: dict[str, Any],
) -> None:
    """The own drive's reads and a machine's own time beside them are its limit."""
    s = from_json(Report, found).ssd.sensitivity  # type: ignore[union-attr]
    assert s is not None
    own = s.unthrottled
    assert s.rate_factor >= 1 and s.latency_factor >= 1
    points = [(p.bytes_per_s, p.tokens_per_s) for p in s.curve]
    best = 1 / (own.other_s + own.wait_s)
    assert all(rate <= best * 1.001 for _, rate in points)
    (slow_rate, slow), (fast_rate, fast) = points[0], points[1]
    if slow < 0.99 * best and fast < 0.99 * best:
        seconds = 1 / slow - own.other_s, 1 / fast - own.other_s
        assert seconds[0] / seconds[1] == pytest.approx(fast_rate / slow_rate)
    for p in s.by_rate:
        at = np.interp(np.log(p.bytes_per_s), np.log([r for r, _ in points]),
                       [v for _, v in points])  # fmt: skip
        assert p.modelled_tokens_per_s == pytest.approx(at, rel=0.05)


def test_a_token_behind_a_slower_drive_by_hand() -> None:
    own = combined([Run(1.0, [0.03, 0.03], 60, 100, 4_000_000, 200, 0.02)])
    assert (own.other_s, own.wait_s) == (pytest.approx(0.02), pytest.approx(0.01))
    assert seconds_behind(own, 0.001) == pytest.approx(0.03)  # no faster than the own drive
    assert seconds_behind(own, 0.1) == pytest.approx(0.12)


def test_the_model_of_slower_drives_goes_through_the_pages_own_points() -> None:
    own = combined([Run(1.0, [0.03, 0.03], 60, 100, 4_000_000, 200, 0.02)])
    twice = [(x, combined([Run(1.0, [0.02 + 2 * x] * 2, 60, 100, 4, 2, 0.02)])) for x in (0.1, 0.2)]
    assert _factor(own, twice) == pytest.approx(2, rel=0.01)
    assert _factor(own, [(10 * x, d) for x, d in twice]) == 1  # no faster than the throttle


def test_sentences_give_the_figures_of_the_json(found: dict[str, Any]) -> None:
    assert f"{found['speed']['tokens_per_s']['median']:.3g} tokens/s" in sentence(
        "by_prompt", found
    )
    assert "measured once" in sentence("by_prompt", found)  # so there is no spread to state
    assert "one by one, are the same bits" in sentence("kl", found)


def test_what_is_not_the_same_bits_is_held_to_the_promise(found: dict[str, Any]) -> None:
    """A device may sum a prompt in another order, within a bound; decoded tokens never differ."""
    found = copy.deepcopy(found)
    found["quality"]["streamed"]["identical"] = False
    seen = found["quality"]["exactness"]
    seen.update(prompts_difference=0.004, prompts_bound=0.05)
    assert "same bits" in (said := sentence("kl", found)) and "0.4 % of the largest" in said
    assert "selftest" not in said and "same bits</b>decoding" in render(found)
    seen["prompts_difference"] = 0.06
    assert "MORE than the 5 %" in (said := sentence("kl", found)) and "selftest" in said
    seen.update(prompts_difference=0.0, decoded_identical=False)
    assert "NOT the same" in (said := sentence("kl", found)) and "selftest" in said
    assert "same bits" not in render(found).split("<nav")[0]
    del found["quality"]["exactness"]  # as older reports have it
    assert "off by" in sentence("kl", found) and render(found)


def test_differences_from_stock_are_found() -> None:
    tokens = demo_tokens(12).tolist()
    prompts = [SimpleNamespace(tokens=tokens)]
    items = [SimpleNamespace(context=tokens[:4], choices=[tokens[4:6], tokens[6:8]], right=0)]
    stock, _ = mlx_lm.utils.load_model(demo_model())
    exam = quality.Exam(prompts, items, 4)  # type: ignore[arg-type]
    right = exam.ask(stock)
    dtype = stock(mx.array([[0]])).dtype
    assert vars(quality.exact(right, right, dtype)) == {
        "decoded_tokens": 4,
        "decoded_identical": True,
        "prompts_difference": 0.0,
        "prompts_bound": prefill_bound(dtype),
    }
    stock.model.norm.weight = stock.model.norm.weight * 1.01
    wrong = quality.exact(right, exam.ask(stock), dtype)
    assert not wrong.decoded_identical and 0.005 < wrong.prompts_difference < 0.02


def test_streaming_is_exact_and_shortcuts_are_not(found: dict[str, Any]) -> None:
    judged = found["quality"]
    assert judged["exactness"]["decoded_identical"]
    assert judged["exactness"]["decoded_tokens"] == 8 * len(found["method"]["prompts"])
    assert judged["exactness"]["prompts_difference"] <= judged["exactness"]["prompts_bound"]
    assert judged["streamed"]["identical"] and judged["streamed"]["kl_nats"] == 0
    assert judged["streamed"]["perplexity"] == judged["stock"]["perplexity"]
    assert {r["kind"] for r in judged["lossy"]} == {"fewer experts", "fewer bits"}
    assert all(r["kl_nats"] > 0 and not r["identical"] for r in judged["lossy"])


def test_shortcuts_leave_the_stock_model_as_it_was() -> None:
    stock, _ = mlx_lm.utils.load_model(demo_model())
    tokens = demo_tokens(12).tolist()
    prompt = SimpleNamespace(tokens=tokens)
    before = quality.logits(stock, tokens, 0)
    item = SimpleNamespace(context=tokens[:4], choices=[tokens[4:6], tokens[6:8]], right=0)
    whole = quality.Answers([before], [], 1.0)
    exam = quality.Exam([prompt], [item], 0)  # type: ignore[list-item]
    rows = quality.shortcuts(stock, whole, exam, (2,))
    assert len(rows) > 2 and all(r.kl_nats > 0 for r in rows)
    assert np.array_equal(quality.logits(stock, tokens, 0), before)


def test_a_page_can_be_written_again(written: Path, tmp_path: Path) -> None:
    again = ["--render", str(written / "report.json"), "--out", str(tmp_path)]
    assert main(again) == 0
    assert (tmp_path / "report.html").read_text() == (written / "report.html").read_text()


def test_what_cannot_be_reported_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.json"
    other.write_text('{"schema": "mlx-streamexperts/report", "version": 0}')
    for arguments, text in (
        (["--cache", "1GB"], "nothing would be streamed"),
        (["--render", str(other)], "not a report"),
        (["--tokens", "0"], "--tokens must be above 0"),
    ):
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
        assert text in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_throttle_is_gone_afterwards() -> None:
    before = platform.read_into
    with pytest.raises(KeyError), slowed(1e9, 0.0):
        assert platform.read_into is not before
        raise KeyError
    assert platform.read_into is before


def test_reuse_and_overlap_of_known_routing() -> None:
    calls = [np.array([row]) for row in ([0, 1], [0, 2], [1, 2], [0, 1])]
    routing = Routing("known", (4,), (), (calls,))
    # 0 at distance 0; 1 after 0, 2; 2 at 1; then 0 after 1, 2 and 1 at 0; three first uses.
    found = reuse_distances(routing)
    assert found.first_uses == 3 / 8 and found.uses[-1] == 5 / 8
    assert found.uses[0] == 2 / 8
    assert token_overlap([routing])[0] == Overlap(lag=1, shared=0.5, by_chance=0.5)


def test_drift() -> None:
    assert speed.drift([10, 10, 10, 7, 9, 9, 9, 9, 9]) == pytest.approx(-0.1)
    assert speed.drift([10, 9]) is None


def test_counters_of_energy_are_read_and_wrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zone = tmp_path / "intel-rapl:0"
    zone.mkdir()
    for name, text in (
        ("name", "package-0"), ("energy_uj", "9000000"), ("max_energy_range_uj", "10000000"),
    ):  # fmt: skip
        (zone / name).write_text(text)
    monkeypatch.setattr(power, "POWERCAP", tmp_path)
    monkeypatch.setattr(power, "THERMAL", tmp_path / "none")
    monkeypatch.setattr(sys, "platform", "linux")
    sensors = power.find_sensors()
    sensors.begin()
    (zone / "energy_uj").write_text("2000000")
    assert sensors.end()["RAPL package-0"] == pytest.approx(3.0)
    assert "temperature" in sensors.missing and not sensors.heat()


def test_apple_silicon_by_its_library(monkeypatch: pytest.MonkeyPatch) -> None:
    class Monitor:
        mj = 7000

        def get_cumulative_energy(self) -> SimpleNamespace:
            return SimpleNamespace(cpu_total_mj=3 * self.mj, gpu_mj=self.mj, dram_mj=None)

    library = SimpleNamespace(AppleEnergyMonitor=Monitor)
    monkeypatch.setitem(sys.modules, "zeus_apple_silicon", library)
    monkeypatch.setattr(sys, "platform", "darwin")
    sensors = power.find_sensors()
    sensors.begin()
    monkeypatch.setattr(Monitor, "mj", 7500)
    assert sensors.end() == {"Apple silicon CPU": 1.5, "Apple silicon GPU": 0.5}
    assert "RAPL" not in sensors.missing

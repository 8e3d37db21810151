"""Lossy runs: off unless stated, as stated where they are on, and never mistaken for exact ones."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest
from conftest import (
    QUIET,
    all_experts,
    assert_same,
    demo_texts,
    demo_tokens,
    load_streamed,
)
from serving import serving

from mlx_streamexperts import (
    ExpertStream,
    StreamConfig,
    StreamError,
    UnsupportedModelError,
    demo_model,
    generate,
    stream,
)
from mlx_streamexperts._analysis.exactness import load_streamed as load_to_compare
from mlx_streamexperts._cache.lossy import LEVELS, Kept, LayerWays, LossyStats, Ways, keep
from mlx_streamexperts._experts.layer import StreamedSwitch
from mlx_streamexperts._experts.lossy import LossySwitch
from mlx_streamexperts._prefixes.remembered import PrefixCache, prefill
from mlx_streamexperts.doctor._selftest import selftest
from mlx_streamexperts.server._audience import lowest

PREFILL, STEPS = 20, 8


@pytest.fixture(scope="module")
def expected() -> list[np.ndarray]:
    """Stock logits of the demo model."""
    stock, _ = mlx_lm.utils.load_model(demo_model())
    return families.run(stock, demo_tokens(PREFILL + STEPS), PREFILL)


@pytest.fixture(autouse=True)
def _not_compiled(not_compiled: None) -> None:
    """See there."""


def demo(lossy: int | str, share: float, **options: str) -> tuple[nn.Module, ExpertStream]:
    model = load_streamed(demo_model(), 1 << 40, replace(QUIET, lossy=lossy, **options))
    s = stream(model)
    s.resize(int(share * all_experts(s)))
    return model, s


def test_levels_and_ways_are_understood() -> None:
    assert Ways.parse(None) is None
    assert Ways.parse(0) is None
    assert Ways.parse("0") is None
    assert StreamConfig().lossy is None
    for level, text in LEVELS.items():
        ways, by_name = Ways.parse(str(level)), Ways.parse(text)
        assert ways is not None
        assert by_name is not None
        assert (ways.skip, ways.prefer, ways.top) == (by_name.skip, by_name.prefer, by_name.top)
        assert [ways.allows(n) for n in range(4)] == [n <= level for n in range(4)]
        assert [by_name.allows(n) for n in range(4)] == [True, False, False, False]
    ways = Ways.parse("skip=0.05, prefer=0.1, top=6@2-3, top=4@3-9")
    assert ways is not None
    assert [ways.of(i).top for i in range(5)] == [0, 0, 6, 4, 4]
    assert ways.of(0) == LayerWays(0.05, 0.1, 0)


@pytest.mark.parametrize(
    "wrong",
    [4, -1, "4", 1.5, True, "", "skip", "skip=", "skip=0", "skip=0.6", "skip=nan", "top=0", "top=a",
     "top=2@1", "keep=1", "skip=0.1;top=2"],
)  # fmt: skip
def test_anything_else_is_refused(wrong: int | str) -> None:
    with pytest.raises(StreamError, match="lossy"):
        StreamConfig(lossy=wrong)


@pytest.mark.parametrize("wrong", ["skip=2", "prefer=5%"])
def test_a_share_out_of_range_is_told_the_range(wrong: str) -> None:
    name = wrong.partition("=")[0]
    with pytest.raises(StreamError, match=f"'{wrong}' .* at most 0.5, for example {name}=0.05"):
        Ways.parse(f"top=6,{wrong}")


def plainly(
    ways: LayerWays, experts: np.ndarray, weights: np.ndarray, here: np.ndarray, scores: np.ndarray
) -> list[dict[int, float]]:
    """The weight of each expert of each token, worked out token by token. One expert once."""
    shares = weights / weights.sum(-1, keepdims=True)
    ranked = [sorted(range(len(row)), key=lambda k, r=row: -r[k]) for row in shares]
    kept = [r[: ways.top or len(r)] for r in ranked]
    largest: dict[int, float] = {}
    for t, row in enumerate(kept):
        for k in row:
            share = 1.0 if k == ranked[t][0] else shares[t, k]
            e = experts[t, k]
            largest[e] = max(largest.get(e, 0.0), share)
    found = []
    for t, row in enumerate(kept):
        mine = {int(experts[t, k]): float(weights[t, k]) for k in row}
        spare = sorted(
            (e for e in range(len(here)) if here[e] and e not in experts[t]),
            key=lambda e, t=t: -scores[t, e],
        )
        moved = 0.0
        exchanged = []
        for k in reversed(ranked[t]):
            e = int(experts[t, k])
            if k not in row or here[e] or largest[e] > ways.prefer:
                continue
            moved += shares[t, k]
            if moved <= ways.prefer:
                exchanged.append(k)
        for k in sorted(exchanged):
            if not spare:
                break
            e = int(experts[t, k])
            own = mine.pop(e)
            mine[spare[0]] = own * scores[t, spare[0]] / scores[t, e]
            spare.pop(0)
        for e in [e for e in mine if not here[e] and largest.get(e, 1.0) < ways.skip]:
            del mine[e]
        factor = weights[t].sum() / sum(mine.values())
        found.append({e: w * factor for e, w in mine.items()})
    return found


@pytest.mark.parametrize(
    "ways",
    [LayerWays(skip=0.2), LayerWays(top=2), LayerWays(prefer=0.3), LayerWays(0.25, 0.15, 3)],
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_what_stays_is_what_a_plain_count_says(ways: LayerWays, tokens: int) -> None:
    rng = np.random.default_rng(tokens)
    for _ in range(40):
        scores = rng.random((tokens, 12)).astype(np.float32) ** 2 + 1e-3
        experts = np.argsort(-scores, axis=-1)[:, :4]
        experts = np.take_along_axis(
            experts, rng.permuted(np.tile(np.arange(4), (tokens, 1)), axis=1), 1
        )
        weights = np.take_along_axis(scores, experts, -1) * rng.random((tokens, 1))
        here, stats = rng.random(12) < 0.5, LossyStats()
        kept = keep(ways, experts, weights, here, scores, stats)
        wanted = plainly(ways, experts, weights, here, scores)
        got: list[dict[int, float]] = [{} for _ in wanted]
        for t, (row, by) in enumerate(zip(*(kept or Kept(experts, weights)), strict=True)):
            for e, w in zip(row.tolist(), by.tolist(), strict=True):
                if w:
                    got[t][e] = w
        for a, b in zip(got, wanted, strict=True):
            assert a == pytest.approx(b, rel=1e-4)
        unused = sum(int(e) not in a for a, row in zip(got, experts, strict=True) for e in row)
        assert (stats.chosen, stats.tokens, stats.left_out) == (4 * tokens, tokens, unused)


def test_it_is_off_unless_stated_and_then_nothing_of_it_is_in_the_model() -> None:
    for lossy in (None, 0, "0"):
        model = load_streamed(demo_model(), 1 << 30, replace(QUIET, lossy=lossy))
        with stream(model) as s:
            assert s.lossy is None
            switches = [m for m in model.modules() if isinstance(m, StreamedSwitch)]
            assert len(switches) == len(s.layers)
            assert not any(isinstance(m, LossySwitch) for m in switches)


@pytest.mark.parametrize("run_ahead", ["off", "on"])
def test_a_lossy_model_that_leaves_nothing_out_is_exact(
    expected: list[np.ndarray], run_ahead: str
) -> None:
    tokens = demo_tokens(PREFILL + STEPS)
    model, s = demo("skip=0.000001", 0.5, run_ahead=run_ahead)
    with s:
        assert_same(expected, families.run(model, tokens, PREFILL), "nothing is that weak")
        assert s.stats().lossy.left_out == 0
        assert s.stats().lossy.tokens == (PREFILL + STEPS) * len(s.layers)
        s.lossy.use(Ways.parse("skip=0.5"))
        with s.lossy.using(None):
            assert_same(expected, families.run(model, tokens, PREFILL), "exact for now")
        assert s.stats().lossy.left_out == 0
        families.run(model, tokens, PREFILL)
        assert s.stats().lossy.left_out > 0


@pytest.mark.parametrize("run_ahead", ["off", "on"])
def test_fewer_experts_are_those_of_a_model_with_fewer(run_ahead: str) -> None:
    """The model's weights add up to 1, so a smaller top-k of its own does the same."""
    tokens = demo_tokens(PREFILL + STEPS)
    stock, _ = mlx_lm.utils.load_model(demo_model())
    for i, layer in enumerate(stock.layers):
        layer.mlp.top_k = 5 if i >= 2 else 8
    expected = families.run(stock, tokens, PREFILL)
    model, s = demo("top=5@2-99", 0.5, run_ahead=run_ahead)
    with s:
        got = families.run(model, tokens, PREFILL)
        for a, b in zip(expected, got, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(a).max())
        layers, counted = len(s.layers) - 2, s.stats().lossy
        assert counted.left_out == 3 * layers * len(tokens)
        assert 0 < counted.mass_left_out < counted.share_left_out


@pytest.mark.parametrize("run_ahead", ["off", "on"])
def test_skipping_reads_less_and_counts_what_it_left_out(run_ahead: str) -> None:
    tokens, read = demo_tokens(PREFILL + STEPS), []
    model, s = demo("skip=0.12", 0.3, run_ahead=run_ahead)
    with s:
        for ways in (None, s.lossy.stated):
            s.resize(int(0.3 * all_experts(s)))
            s.reset()
            with s.lossy.using(ways):
                families.run(model, tokens, PREFILL)
            read.append(s.stats().read.bytes)
        counted = s.stats().lossy
        assert read[1] < 0.9 * read[0]
        assert 0 < counted.left_out < counted.chosen
        assert 0 < counted.mass_left_out < 0.12 * counted.left_out / counted.tokens


def test_a_layer_computes_the_experts_that_stay_and_nothing_else() -> None:
    model, s = demo("skip=0.2,prefer=0.2", 0.5)
    with s:
        families.run(model, demo_tokens(PREFILL + 1), PREFILL)
        layer, switch = s.layers[3], model.layers[3].mlp.switch_mlp
        here = layer.cache.resident
        gone = [e for e in range(layer.experts) if e not in here]
        indices = mx.array([[[here[0], gone[0], here[1], gone[1]]]])
        weights = mx.array([[[0.4, 0.1, 0.2, 0.3]]])
        x = mx.random.normal((1, 1, 320))
        before = s.stats().read.reads
        got = (switch(x, indices) * weights[..., None]).sum(-2)
        assert layer.cache.slot_of[gone[0]] < 0
        assert s.stats().read.reads > before  # of the other one
        new = mx.array([[[0.4, 0.2, 0.3]]]) / 0.9
        with s.lossy.using(None):
            exact = switch(x, mx.array([[[here[0], here[1], gone[1]]]]))
        assert mx.allclose(got, (exact * new[..., None]).sum(-2), atol=1e-4)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss", "gemma4_text"])
def test_families_differ_in_how_they_weight_experts(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    folder = checkpoint(family)
    tokens = families.token_stream(64, 20, 0)
    stock, _ = mlx_lm.utils.load_model(folder)
    expected = families.run(stock, tokens, 12)
    model = load_streamed(folder, 1 << 40, replace(QUIET, lossy="skip=0.000001"))
    with stream(model) as s:
        s.resize(all_experts(s) // 2)
        assert_same(expected, families.run(model, tokens, 12), family)
        s.lossy.use(Ways.parse("skip=0.4"))
        got = families.run(model, tokens, 12)
        assert all(np.isfinite(x).all() for x in got)
        assert s.stats().lossy.left_out > 0


@pytest.mark.parametrize("family", ["bailing_moe", "llama4"])
def test_a_family_whose_weights_cannot_be_seen_is_refused_by_name(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.\d.*: lossy does not work"):
        load_streamed(checkpoint(family), 1 << 40, replace(QUIET, lossy=1))


def test_what_must_be_exact_refuses_it_and_what_may_changes_it(tmp_path: Path) -> None:
    lossy = replace(QUIET, lossy=1)
    for refusing in (
        lambda: load_to_compare(demo_model(), lossy),
        lambda: next(selftest(lossy)),
        lambda: lossy.save(tmp_path / "settings.json"),
        lambda: replace(lossy, pipeline=True),
    ):
        with pytest.raises(StreamError, match="lossy"):
            refusing()
    (tmp_path / "settings.json").write_text('{"version": 1, "settings": {"lossy": 2}}')
    with pytest.raises(StreamError, match="'lossy' is no option that a settings file can hold"):
        StreamConfig.load(tmp_path / "settings.json")
    _, s = demo(2, 0.5)
    for level, ways in ((1, Ways.parse(1)), (0, None), (None, Ways.parse(2))):
        s.lossy.use_level(level)
        assert s.lossy.now == ways
    with s, pytest.raises(StreamError, match="lossy"):
        s.trace(tmp_path / "trace")


def test_nothing_that_it_computed_is_kept_for_exact_runs(tmp_path: Path) -> None:
    tokens = demo_tokens(70).tolist()
    model, s = demo("skip=0.1", 0.3)
    with s:
        kept = PrefixCache(model, tmp_path / "kept", "1GB")
        prefill(model, tokens, kept)
        assert kept.written_bytes == 0
        assert kept.restore([], tokens) == 0


def test_its_first_and_last_lines_say_so(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    arguments = ["--prompt", "In the beginning", "--max-tokens", "4", "--no-progress"]
    assert generate.main([*arguments, "--lossy", "2"]) == 0
    assert "lossy: level 2" in caplog.text
    assert "depend on which experts are resident" in caplog.text
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "level 2" in last
    assert "of the router's mass" in last


def test_a_request_may_ask_for_exactness_and_gets_it() -> None:
    """Not even what lossy requests left in the prompt cache is used for it."""
    prompt = demo_texts()[1]
    model, tokenizer = mlx_lm.load(str(demo_model()))
    expected = mlx_lm.generate(model, tokenizer, prompt, max_tokens=8)
    with serving("--cache", "10MB", "--lossy", "2") as running:
        lossy = running.generator.model_provider.expert_stream.lossy
        running.text(prompt, 8)
        before = lossy.stats()
        assert before.tokens > 0
        assert running.text(prompt, 8, lossy=0) == expected
        assert lossy.stats() == before
        with ThreadPoolExecutor() as clients:  # they share passes
            beside = clients.submit(running.text, prompt, 8, lossy=2)
            assert running.text(prompt, 8, lossy=0) == expected
            beside.result()
        running.text(prompt, 8, lossy=2)
        assert lossy.stats().tokens > before.tokens
        running.text(prompt, 8, lossy=1)
        status, answer = running.post({"prompt": prompt, "max_tokens": 2, "lossy": 3})
        assert (status, answer["error"]["param"]) == (400, "lossy")
        assert "level 2" in answer["error"]["message"]
        metrics = running.request("GET", "/metrics")[2].decode()
        assert "streamexperts_lossy_experts_left_out_total" in metrics
        assert running.figures()["experts"]["lossy"]["tokens"] > 0


def test_requests_that_share_passes_are_as_exact_as_the_most_exact_one() -> None:
    class Client:
        context = None

        def __init__(self, lossy: int | None) -> None:
            self.lossy = lossy

        def gone(self) -> bool:
            return False

    assert lowest([Client(None), None]) is None
    assert lowest([Client(None), Client(2), Client(0)]) == 0

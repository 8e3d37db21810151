"""The benchmark of run-ahead's guesses compares with the exact pass; it fills places as it says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from conftest import QUIET, load_streamed
from mlx_lm.models.cache import make_prompt_cache

from mlx_streamexperts import demo_model, stream

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import agreement


def test_the_first_row_is_the_exact_pass(tmp_path: Path) -> None:
    """Whatever the other rows lacked: it chooses what an ordinary session chooses."""
    folder = demo_model()
    tokens = agreement.texts(folder)[3][1][:6]
    model, probes = agreement.load_probed(folder)
    rows = 1 + len(list(agreement.settings()))
    cache, seen = make_prompt_cache(model), []
    for probe in probes:
        for live in probe.caches:
            live.place(range(live.slots))
    for token in tokens:
        mx.eval(model.model(mx.full((rows, 1), token), cache=cache))
        agreement.take_exact(cache)
        seen += [sorted(p.chosen[0].tolist()) for p in probes]
        if token == tokens[0]:
            assert any((p.chosen != p.chosen[0]).any() for p in probes[1:])  # others go astray
    ordinary = load_streamed(folder, 1 << 40, QUIET)
    with stream(ordinary) as s:
        with s.trace(tmp_path / "trace"):
            cache = make_prompt_cache(ordinary)
            for token in tokens:
                mx.eval(ordinary(mx.array([[token]]), cache=cache))
        calls = [json.loads(x) for x in (tmp_path / "trace").read_text().splitlines()[1:]]
    assert seen == [sorted(c["experts"][0]) for c in calls]


def test_missing_places_are_filled_as_stated() -> None:
    _, probes = agreement.load_probed(demo_model())
    probe = probes[2]
    layer = probe._inner.layer
    x = mx.random.normal((1, 1, 320), key=mx.random.key(0))
    many = mx.broadcast_to(x, (21, 1, 320))
    weights = mx.softmax(probe._gate(x)[0, 0], precise=True)
    chosen = mx.argpartition(weights, kth=-8)[-8:]
    for live in probe.caches:
        live.place(chosen[:3].tolist())  # five are missing; slot of the first: taken last to first
    y = np.array(probe(many, mx.broadcast_to(chosen, (21, 1, 8))))[:, 0]  # [21, K, D]
    whole = np.array(layer.switch(x, chosen[None, None]))[0, 0]  # [K, D]
    assert np.array_equal(y[0], whole)
    by_filling = dict(zip(agreement.FILLINGS, y[1:5], strict=True))
    part = float(weights[chosen[:3]].sum() / weights[chosen].sum())
    assert np.array_equal(by_filling[agreement.NOTHING][:3], whole[:3])
    assert not by_filling[agreement.NOTHING][3:].any()
    assert not by_filling[agreement.SCALED][3:].any()
    assert np.allclose(by_filling[agreement.SCALED][:3] * part, whole[:3], rtol=1e-4, atol=1e-6)
    slot_of = probe.caches[0].slot_of
    first = min((e for e in chosen[:3].tolist()), key=lambda e: slot_of[e])
    stand_in = np.array(layer.switch(x, mx.array([[[first]]])))[0, 0, 0]
    assert np.array_equal(by_filling[agreement.ANY][5], stand_in)
    rows = np.array(probe._gate(mx.eye(320))).T
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    nearest = max(chosen[:3].tolist(), key=lambda e: rows[e] @ rows[int(chosen[5])])
    stand_in = np.array(layer.switch(x, mx.array([[[nearest]]])))[0, 0, 0]
    assert np.array_equal(by_filling[agreement.NEAREST][5], stand_in)


def test_counts_hold_together_and_repeat(monkeypatch: pytest.MonkeyPatch) -> None:
    some = agreement.texts(demo_model())[::8]
    monkeypatch.setattr(agreement, "texts", lambda folder: some)
    topics, counts = agreement.measure(demo_model(), 4)
    _, again = agreement.measure(demo_model(), 4)
    assert len(topics) == len(counts) == 2
    assert np.array_equal(counts, again)
    c = {name: counts[..., i] for i, name in enumerate(agreement.COUNTS)}
    assert c["exact"].sum() > 0 and not counts[:, :, :, 0].any()
    assert (c["both"] <= np.minimum(c["exact"], c["named"])).all()
    for part in ("exact", "named", "both"):
        assert (c[part + "_out"] <= c[part]).all()
    passes = slice(0, len(agreement.FILLINGS))
    assert np.array_equal(c["exact"][:, :, passes], c["named"][:, :, passes])


def test_tables_are_put_where_they_belong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    agreement.put_between_marks(page, "one")
    page.write_text("before\n" + page.read_text() + "after\n")
    agreement.put_between_marks(page, "two")
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "two" in text and "one" not in text

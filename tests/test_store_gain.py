"""A packed store is advised where it would help, in one line, and nowhere else."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from conftest import QUIET

from mlx_streamexperts import StreamConfig, demo_model, load, pack, stream
from mlx_streamexperts._cli.summary import Timing, rows
from mlx_streamexperts._experts.store_gain import store_gain
from mlx_streamexperts._io.files import direct_works
from mlx_streamexperts._loading.discover import discover

DIRECT = direct_works(next(demo_model().glob("model*.safetensors")))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed") / "store"
    assert pack.main(["--out", str(folder), "--no-progress"]) == 0
    return folder


def test_the_estimate_agrees_with_what_was_measured(store: Path) -> None:
    """Waits per miss of the embedded model: 0.368 ms, 0.101 ms from a store."""
    before = store_gain(discover(demo_model(), StreamConfig(), {}).layers, 4 << 20)
    assert before.reads == 9
    assert 0.25e-3 < before.seconds < 0.45e-3
    after = store_gain(discover(demo_model(), StreamConfig(store=str(store)), {}).layers, 4 << 20)
    assert (after.reads, after.saved) == (1, 0)
    assert 0.05e-3 < after.seconds < 0.15e-3
    assert before.saved == pytest.approx(before.seconds - after.seconds)


@pytest.mark.skipif(not DIRECT, reason="the file system cannot read past the page cache")
def test_load_and_summary_tell_of_it_once(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = replace(QUIET, bypass_page_cache="on", progress=True)
    for extra, told in (({"store": str(store)}, 0), ({"bypass_page_cache": "off"}, 0), ({}, 1)):
        model = load(str(demo_model()), cache="4MB", config=replace(config, **extra))[0]  # type: ignore[arg-type]
        with stream(model) as expert_stream:
            error = capsys.readouterr().err
            found = re.findall(
                r"store would save about (\d+)% .* takes 9 reads .*pack --model", error
            )
            assert len(found) == told, error
            for _ in range(3):
                mx.eval(model(mx.array([[1, 2, 3, 4]])))
            waited = expert_stream.stats().read.wait_seconds
            lines = dict(rows([expert_stream], Timing(total=2 * waited)))
            assert ("Store" in lines) == bool(told), lines
            if told:  # half of the time is waiting, of which nine reads for one are four fifths
                assert re.match(
                    r"would be about [67]\d% faster: streamexperts pack", lines["Store"]
                )
                # The same reads in a run that hardly waits: not worth a line.
                assert "Store" not in dict(rows([expert_stream], Timing(total=100 * waited)))


def test_nothing_is_told_if_all_experts_are_resident(capsys: pytest.CaptureFixture[str]) -> None:
    with stream(load(str(demo_model()), cache="1GB")[0]):
        assert "packed store" not in capsys.readouterr().err

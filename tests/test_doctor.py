"""`doctor` judges a model from its headers; from a repository it fetches nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import originals
import pytest
from conftest import QUIET

from mlx_streamexperts import CheckpointError, plan
from mlx_streamexperts._analysis.measure import (
    drive_rates,
    layer_seconds,
    memory_rate,
    sync_seconds,
)
from mlx_streamexperts._io import hub
from mlx_streamexperts._io.remote import RemoteFile
from mlx_streamexperts._memory.hardware import NAMED_MACHINES
from mlx_streamexperts._osinfo import apple_budget, apple_limit
from mlx_streamexperts.doctor import _command as doctor
from mlx_streamexperts.doctor import examine
from mlx_streamexperts.doctor._examination import DoesNotFit, Verdict


def test_a_model_is_judged_before_it_is_loaded(checkpoint: Callable[..., Path]) -> None:
    options = ["--model", str(checkpoint("qwen3_moe")), "--machine", "M4 Max 128 GB"]
    parser = doctor.setup_arg_parser()
    (verdict,) = examine(parser.parse_args([*options, "--memory", "400MB"])).machines
    assert isinstance(verdict, Verdict)
    assert verdict.plan.minimum < verdict.plan.memory == 400_000_000
    speed = verdict.prediction.tokens_per_s
    assert speed.low < speed.likely < speed.high
    (verdict,) = examine(parser.parse_args([*options, "--memory", "1MB"])).machines
    assert isinstance(verdict, DoesNotFit)
    assert 1_000_000 < verdict.needed < 400_000_000


class FakeHub:
    """A repository that is a local folder; counts the bytes read of shards."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.read_bytes, self.name = folder, 0, "some/repo"

    def __call__(self, repo: str) -> FakeHub:
        if repo != self.name:
            raise FileNotFoundError(f"no repository {repo}")
        return self

    @property
    def files(self) -> dict[str, RemoteFile]:
        return {f.name: RemoteFile(f.stat().st_size, None) for f in self.folder.iterdir()}

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        data = (self.folder / name).read_bytes()[begin:end]
        if name.endswith(".safetensors"):
            self.read_bytes += len(data)
        return data


@pytest.fixture
def fake_hub(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> FakeHub:
    folder = Path(shutil.copytree(checkpoint("qwen3_moe"), tmp_path / "remote"))
    fake = FakeHub(folder)
    monkeypatch.setattr(hub, "Repository", fake)
    monkeypatch.setattr(hub, "_HEADER_GUESS", 4096)
    return fake


def test_a_repository_is_planned_from_its_headers(fake_hub: FakeHub) -> None:
    weights = sum(f.stat().st_size for f in fake_hub.folder.glob("*.safetensors"))
    assert plan("some/repo", cache="1GB", config=QUIET) == plan(
        fake_hub.folder, cache="1GB", config=QUIET
    )
    assert 0 < fake_hub.read_bytes < weights / 2


def test_the_headers_of_a_repository_are_removed_afterwards(fake_hub: FakeHub) -> None:
    with hub.headers_only("some/repo") as (folder, downloaded):
        assert not downloaded
        for file in fake_hub.folder.glob("*.safetensors"):
            assert (folder / file.name).stat().st_size == file.stat().st_size
    assert not folder.exists()


def test_a_downloaded_repository_is_used_as_it_is(
    fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "hf_repo_to_path", lambda _: fake_hub.folder)
    with hub.headers_only("some/repo") as (folder, downloaded):
        assert (folder, downloaded) == (fake_hub.folder, True)
    assert fake_hub.read_bytes == 0
    assert folder.exists()


def test_a_repository_that_is_not_there_is_an_error(fake_hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="other/repo is neither a model folder"):
        plan("other/repo", config=QUIET)


def test_a_remote_header_that_lies_is_an_error(fake_hub: FakeHub) -> None:
    file = next(fake_hub.folder.glob("*.safetensors"))
    with file.open("r+b") as f:
        f.write((1 << 40).to_bytes(8, "little"))
    with pytest.raises(CheckpointError, match="header claims"):
        plan("some/repo", config=QUIET)


def test_this_machine_is_measured_and_the_model_judged(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint("qwen3_moe"))
    options = ["--model", folder, "--memory", "400MB", "--drive-seconds", "0.1"]
    assert doctor.main([*options, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    (here,) = report["machines"]
    assert here["plan"]["memory"] == 400_000_000
    assert here["plan"]["minimum"] < 400_000_000
    assert here["prediction"]["tokens_per_s"]["likely"] > 0
    one, many = report["measured"]["drive"]
    assert (one["depth"], many["depth"]) == (1, 8)  # 8 are the reader's threads
    assert here["machine"]["drive_rate"] == many["rate"]
    both_ways = report["measured"]["page_cache"] is not None
    assert both_ways == report["measured"]["page_cache_bypassed"]
    assert report["measured"]["in_place"] is True
    assert doctor.main(options) == 0
    text = capsys.readouterr().out
    for word in ("predicted decode", "measured", "hit rate", "limited by", "smallest memory"):
        assert word in text, word


def test_named_machines_need_no_measurement(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint("qwen3_moe"))
    assert doctor.main(["--model", folder, "--machine", "all"]) == 0
    out = capsys.readouterr().out
    assert "M5 Max 128 GB" in out
    assert "(measured" not in out and "Assumed, not measured: drive" in out
    assert doctor.main(["--model", folder, "--machine", "Cray"]) == 1
    assert "unknown machine 'Cray'" in capsys.readouterr().err


@pytest.mark.parametrize("machine", ["M4 32 GB", "M5 Max 128 GB"])
def test_a_machine_without_a_stated_budget_gets_what_it_can_hold(
    machine: str, checkpoint: Callable[..., Path]
) -> None:
    """It was three quarters of its memory, of which Metal's limit lets in 95 %: refused, always."""
    limit = apple_budget(NAMED_MACHINES[machine].memory)  # in whole GB
    assert 0 <= apple_limit(NAMED_MACHINES[machine].memory).nbytes - limit < 10**9
    p = plan(checkpoint("qwen3_moe"), machine=machine, config=QUIET)
    assert p.memory == limit
    folder = str(checkpoint("qwen3_moe"))
    args = doctor.setup_arg_parser().parse_args(["--model", folder, "--machine", machine])
    (verdict,) = examine(args).machines
    assert isinstance(verdict, Verdict)
    assert verdict.plan.memory == limit


@pytest.mark.parametrize("machine", [["--machine", "all"], []], ids=["named", "this"])
def test_an_original_is_judged_as_it_will_be_converted(
    machine: list[str],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    built = checkpoint("kimi_k25", quantize=None)
    source = originals.write(built, tmp_path / "source", originals.int4)
    command = ["--model", str(source), "--memory", "400MB", *machine]
    command += ["--drive-seconds", "0.1"]
    assert doctor.main(command) == 0
    text = capsys.readouterr().out
    assert "has to be converted first" in text and "tokens/s" in text
    store = ["--store", str(tmp_path / "store")]  # made of what streams: this does not
    assert doctor.main([*command, *store]) == 1
    assert "mlx_streamexperts.convert" in capsys.readouterr().err


def test_the_smallest_memory_is_told_and_works(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoint("qwen3_moe")
    assert doctor.main(["--model", str(folder), "--memory", "1MB"]) == 2
    assert "does not fit" in capsys.readouterr().err
    least = plan(folder, memory="400MB", config=QUIET).minimum
    assert plan(folder, memory=least, config=QUIET).memory == least
    assert doctor.main(["--model", str(folder), "--memory", str(least - 1)]) == 2
    assert f"{least:,}" in capsys.readouterr().err


def test_measurements_are_of_the_right_order(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    (one, two) = drive_rates([(str(file), 1 << 20)], 4096, (1, 2), direct=False, seconds=0.05)
    for r in (one, two):
        assert 0 < r.mean_depth <= r.depth
        assert 1e5 < r.rate < 1e12
        assert 0 < r.latency < 1
    assert drive_rates([(str(file), 100)], 4096, (1,), direct=False) == []
    assert 1e7 < memory_rate(1 << 22, 3) < 1e14
    assert 0 <= sync_seconds(4, 64) < 1
    assert 0 < layer_seconds(2) < 1


def test_the_first_line_is_a_verdict_and_the_second_the_command(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint("qwen3_moe"))
    assert doctor.main(["--model", folder, "--machine", "m4 max 128"]) == 0
    first, second, limit, helps, *_ = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{folder} on M4 Max 128 GB: runs")
    assert "to download" not in first  # a folder of this machine
    for word in ("tokens/s (", "first token of 1000 after"):
        assert word in first, word
    assert second == f"  Type: streamexperts chat --model {folder} --memory 91GB"
    assert "limits it" in limit and "help most" in helps


def test_a_stated_drive_is_taken_as_it_is(checkpoint: Callable[..., Path]) -> None:
    options = ["--model", str(checkpoint("qwen3_moe")), "--machine", "m4 64", "--drive"]
    parser = doctor.setup_arg_parser()
    slow, fast = (
        examine(parser.parse_args([*options, d])).machines[0] for d in ("1GB/s", "7GB/s:50us")
    )
    assert (slow.machine.drive_rate, fast.machine.drive_rate) == (1e9, 7e9)
    assert fast.machine.drive_latency == pytest.approx(50e-6) and fast.machine.drive_share == (1, 1)


def test_more_than_the_machine_has_is_refused(
    checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(checkpoint("qwen3_moe")), "--machine", "m4 max 128"]
    assert doctor.main([*options, "--memory", "200GB"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "more than the device can hold" in out
    assert "tokens/s" not in out


def test_without_a_model_the_machine_and_what_suits_it_are_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert doctor.main(["--drive-seconds", "0.1"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("this machine: ") and "Measuring" in err and "(measured" in out
    assert doctor.main(["--machine", "M4 16GB", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert "Kimi K2.5 (4-bit)" in found["too_large"]
    assert "Qwen3-30B-A3B (4-bit)" in [m["name"] for m in found["suited"]]
    speeds = [m["prediction"]["tokens_per_s"]["likely"] for m in found["suited"]]
    assert speeds == sorted(speeds, reverse=True)

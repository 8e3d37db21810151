"""What a drive is said to give at so many reads in flight was measured with as many in flight."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import leftovers

from mlx_streamexperts import ExpertReadError
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._analysis import measure
from mlx_streamexperts._analysis.measure import drive_rates, expert_rate
from mlx_streamexperts._analysis.throttle import slowed

READ = 4096


@pytest.fixture
def file(tmp_path: Path) -> tuple[str, int]:
    made = tmp_path / "file"
    made.write_bytes(bytes(1 << 20))
    return str(made), 1 << 20


@pytest.mark.parametrize("depth", [1, 4, 16])
def test_the_stated_depth_is_kept(
    depth: int, file: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drive that ends its reads when so many are under way, 10 ms later by its own clock."""
    now = [10.0]

    def tick() -> None:
        now[0] += 0.01

    together = threading.Barrier(depth, tick, timeout=60)  # fewer would wait for the others

    def read(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        together.wait()
        return sum(map(len, buffers))

    monkeypatch.setattr(platform, "read_into", read)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    (found,) = drive_rates([file], READ, (depth,), direct=False, seconds=0.295)
    assert now[0] == pytest.approx(10.3)
    assert found.mean_depth == pytest.approx(depth)
    assert found.latency == pytest.approx(0.01)
    assert found.rate == pytest.approx(depth * READ / 0.01)


def test_a_drive_of_known_rate(file: tuple[str, int]) -> None:
    """Latency alone bounds one read, the bus bounds eight."""
    with slowed(4e6, 0.005):
        one, eight = drive_rates([file], READ, (1, 8), direct=False, seconds=0.3)
    assert one.rate <= READ / 0.005
    assert one.latency >= 0.005
    assert one.rate < eight.rate <= 4.1e6


def test_a_drive_that_slows_down(file: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Prediction counts with what is left after a while; the clock is the drive's own."""
    parts = [(file[0], 100, 100 + READ), (file[0], 50_000, 50_000 + READ // 2)]
    now, read = [10.0], set()

    def slower(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        now[0] += 0.01 if now[0] < 12 else 0.04
        read.add((offset, sum(map(len, buffers))))
        return sum(map(len, buffers))

    monkeypatch.setattr(platform, "read_into", slower)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    found = expert_rate(parts, 1, direct=False, seconds=4)
    assert read == {(100, READ), (50_000, READ // 2)}
    first, _, _, last = found.by_second
    assert first == pytest.approx(100 * 0.75 * READ, rel=0.02)
    assert last == pytest.approx(25 * 0.75 * READ, rel=0.05)
    assert found.sustained == pytest.approx(last, rel=0.05)
    assert found.sustained < found.rate < first


def test_a_file_that_cannot_be_read(file: tuple[str, int], tmp_path: Path) -> None:
    before = leftovers()
    with pytest.raises(ExpertReadError):
        drive_rates([(str(tmp_path / "none"), 1 << 20)], READ, (4,), direct=False, seconds=0.05)
    assert not leftovers() - before


def test_nothing_is_left_of_a_measurement_that_fails(
    file: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(5, "Input/output error")

    before = leftovers()
    monkeypatch.setattr(platform, "read_into", fail)
    with pytest.raises(ExpertReadError):
        drive_rates([file], READ, (4,), direct=False, seconds=0.05)
    assert not leftovers() - before

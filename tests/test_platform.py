"""Differences between systems: limits of memory, reads past the page cache, a Mac's answers."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from conftest import QUIET, load_streamed, smallest_cache

from mlx_streamexperts import ExpertReadError, pack, stream
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._io.files import ShardFiles, direct_works
from mlx_streamexperts._io.ranges import ByteRange
from mlx_streamexperts._osinfo import METAL_SHARE, apple_limit, device_limit, metal_limit

GB, GIB = 10**9, 2**30
module = sys.modules[stream.__module__]

# As Macs describe themselves. Working sets of 16 and 96 GB: what llama.cpp and MLX print there; of
# 128 and 512 GB: three quarters, as up to macOS 14. The longest buffer is a share of the memory.
MACS = {
    "M4 16 GB": {
        "architecture": "applegpu_g16g",
        "device_name": "Apple M4",
        "memory_size": 16 * GIB,
        "max_recommended_working_set_size": 11_453_251_584,
        "max_buffer_length": 8_589_934_592,
        "resource_limit": 499_000,
    },
    "M2 Max 96 GB": {
        "architecture": "applegpu_g14c",
        "device_name": "Apple M2 Max",
        "memory_size": 96 * GIB,
        "max_recommended_working_set_size": 72 * GIB,
        "max_buffer_length": 54 * GIB,
        "resource_limit": 499_000,
    },
    "M4 Max 128 GB": {
        "architecture": "applegpu_g16s",
        "device_name": "Apple M4 Max",
        "memory_size": 128 * GIB,
        "max_recommended_working_set_size": 96 * GIB,
        "max_buffer_length": 72 * GIB,
        "resource_limit": 499_000,
    },
    "M3 Ultra 512 GB": {
        "architecture": "applegpu_g15d",
        "device_name": "Apple M3 Ultra",
        "memory_size": 512 * GIB,
        "max_recommended_working_set_size": 384 * GIB,
        "max_buffer_length": 288 * GIB,
        "resource_limit": 499_000,
    },
}


@pytest.mark.parametrize("name", MACS)
def test_a_mac_holds_a_share_of_its_working_set(name: str) -> None:
    info = MACS[name]
    recommended = int(info["max_recommended_working_set_size"])
    limit = metal_limit(info)
    assert limit.nbytes == int(0.95 * recommended)
    assert limit.command is None
    assert metal_limit(info, limit.nbytes).command is None  # it fits as it is


@pytest.mark.parametrize("name", MACS)
@pytest.mark.parametrize("share", [0.72, 0.75, 0.8, 0.8123456])
def test_the_command_makes_just_enough_room(name: str, share: float) -> None:
    info = MACS[name]
    total = int(info["memory_size"])
    wanted = int(total * share)
    command = metal_limit(info, wanted).command
    assert command is not None
    setting, _, value = command.removeprefix("sudo sysctl ").partition("=")
    assert setting == "iogpu.wired_limit_mb"
    raised = {**info, "max_recommended_working_set_size": int(value) << 20}
    assert metal_limit(raised, wanted).nbytes >= wanted
    less = {**info, "max_recommended_working_set_size": (int(value) - 1) << 20}
    assert metal_limit(less, wanted).nbytes < wanted
    assert total - (int(value) << 20) >= 2 * GIB  # something is left for the system


@pytest.mark.parametrize("name", MACS)
def test_no_command_where_the_machine_is_too_small(name: str) -> None:
    total = int(MACS[name]["memory_size"])
    assert metal_limit(MACS[name], int(0.95 * (total - GIB))).command is None
    assert metal_limit(MACS[name], 2 * total).command is None


def test_a_mac_of_which_only_the_memory_is_known() -> None:
    assert apple_limit(96 * GIB) == metal_limit(MACS["M2 Max 96 GB"])
    assert apple_limit(16 * GIB).nbytes == int(METAL_SHARE * (16 * GIB * 2 // 3))
    wanted = 80 * 10**9
    assert apple_limit(96 * GIB, wanted) == metal_limit(MACS["M2 Max 96 GB"], wanted)


def test_the_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    monkeypatch.setattr(mx, "device_info", lambda: MACS["M4 16 GB"])
    assert device_limit(12 * GB) == metal_limit(MACS["M4 16 GB"], 12 * GB)
    cuda = {"device_name": "NVIDIA H100", "total_memory": 80 * GIB, "free_memory": GIB}
    monkeypatch.setattr(mx, "device_info", lambda: cuda)
    assert device_limit(1 << 50).nbytes == 80 * GIB
    assert device_limit(1 << 50).command is None


def test_the_processor_has_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "total_memory_bytes", lambda: 3 * GB)
    monkeypatch.setattr(mx, "default_device", lambda: mx.cpu)
    assert device_limit().nbytes == 3 * GB


V2 = "30 23 0:26 {shown} /sys/fs/cgroup rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = (
    "31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"
    "35 31 0:32 {shown} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
)


def machine(root: Path, membership: str, mounts: str, files: dict[str, str]) -> Path:
    """A `/proc` and `/sys` with these control groups."""
    files = {
        "proc/self/cgroup": membership,
        "proc/self/mountinfo": "22 27 0:21 / /proc rw - proc proc rw\n" + mounts,
        **{f"sys/fs/cgroup/{name}": text for name, text in files.items()},
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_least_limit_around_this_process_counts(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "0::/user.slice/job.scope/part\n",
        V2.format(shown="/"),
        {
            "user.slice/memory.max": "max\n",
            "user.slice/job.scope/memory.max": "500000000\n",
            "user.slice/job.scope/part/memory.max": "700000000\n",
            "other.slice/memory.max": "1000\n",
        },
    )
    assert platform.total_memory_bytes(root) == 500_000_000
    (root / "sys/fs/cgroup/user.slice/job.scope/part/memory.high").write_text("300000000\n")
    assert platform.total_memory_bytes(root) == 300_000_000


def test_control_groups_of_version_1(tmp_path: Path) -> None:
    root = machine(
        tmp_path,
        "9:name=systemd:/\n4:memory:/jobs/7\n1:cpu,cpuacct:/elsewhere\n0::/\n",
        V1.format(shown="/"),
        {
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/jobs/memory.limit_in_bytes": "400000000\n",
            "memory/jobs/7/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/elsewhere/memory.limit_in_bytes": "1000\n",
        },
    )
    assert platform.total_memory_bytes(root) == 400_000_000


@pytest.mark.parametrize(
    ("shown", "path"), [("/docker/ab", "/docker/ab"), ("/docker/ab", "/docker/ab/c"), ("/", "/..")]
)
def test_a_container_sees_its_own_group_at_the_top(tmp_path: Path, shown: str, path: str) -> None:
    root = machine(
        tmp_path,
        f"4:memory:{path}\n",
        V1.format(shown=shown),
        {
            "memory.limit_in_bytes": "5\n",  # outside what is mounted
            "memory/memory.limit_in_bytes": "600000000\n",
            "memory/c/memory.limit_in_bytes": "650000000\n",
        },
    )
    assert platform.total_memory_bytes(root) == 600_000_000


def test_no_limit_is_the_machine(tmp_path: Path) -> None:
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert platform.total_memory_bytes(tmp_path) == whole  # neither /proc nor /sys
    root = machine(tmp_path, "0::/\n", V2.format(shown="/"), {"memory.max": "max\n"})
    assert platform.total_memory_bytes(root) == whole


# macOS, with stand-ins for what it says.

VM_STAT = """\
Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                               20000.
Pages active:                            300000.
Pages inactive:                          290000.
Pages speculative:                         3000.
Pages throttled:                              0.
Pages wired down:                         90000.
Pages purgeable:                           2000.
"Translation faults":                 123456789.
Pages copy-on-write:                    1234567.
File-backed pages:                       150000.
Anonymous pages:                         443000.
Pages stored in compressor:              100000.
Pages occupied by compressor:             40000.
"""


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """A Mac with 16 GB and pages of 16 KiB; returns the programs that are run."""
    said = {
        "/usr/bin/vm_stat": VM_STAT,
        "/bin/ps": "  54321\n",
        "/usr/sbin/sysctl": "Apple M4\n",
    }
    ran: list[list[str]] = []

    def run(command: tuple[str, ...], **options: object) -> subprocess.CompletedProcess[str]:
        # A full path, and no descriptor to be closed: then Python spawns and does not fork.
        assert (os.path.isabs(command[0]), options["close_fds"]) == (True, False)
        ran.append(list(command))
        return subprocess.CompletedProcess(command, 0, said[command[0]])

    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "PAGE_BYTES", 16_384)
    monkeypatch.setattr(platform.subprocess, "run", run)
    monkeypatch.setattr(platform, "total_memory_bytes", lambda: 16 * GIB)
    for name in ("posix_fadvise", "sched_getaffinity", "O_DIRECT"):
        monkeypatch.delattr(os, name, raising=False)
    return ran


def test_inactive_pages_are_not_all_available_on_a_mac(mac: list[list[str]]) -> None:
    assert platform.available_memory_bytes() == (20_000 + 150_000 + 2000) * 16_384
    assert mac == [["/usr/bin/vm_stat"]]


def test_a_mac_whose_programs_fail(mac: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(2, "No such file or directory")

    monkeypatch.setattr(platform.subprocess, "run", fail)
    assert platform.available_memory_bytes() == 8 * GIB
    assert platform.processor_name() == ""
    assert platform.resident_bytes() == 0


def test_what_a_mac_says_of_itself(mac: list[list[str]]) -> None:
    assert platform.processor_name() == "Apple M4"
    assert platform.resident_bytes() == 54_321 * 1024
    assert mac[-1] == ["/bin/ps", "-o", "rss=", "-p", str(os.getpid())]
    assert platform.usable_cores() == os.cpu_count()


class System:
    """What macOS's C library answers."""

    def __init__(self, pressure: int = 0) -> None:
        self.pressure, self.calls = pressure, []  # type: ignore[var-annotated]

    def pthread_set_qos_class_self_np(self, *args: int) -> int:
        self.calls.append(args)
        return 0

    def notify_register_check(self, name: bytes, token: object) -> int:
        self.calls.append(name)
        return 0

    def notify_get_state(self, token: object, level: Any) -> int:
        level._obj.value = self.pressure
        return 0


def test_a_macs_readers_work_as_fast_as_a_user_waits(
    mac: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    system = System()
    monkeypatch.setattr(platform.ctypes, "CDLL", lambda _: system)
    assert platform.raise_thread_priority()
    assert system.calls == [(0x19, 0)]
    monkeypatch.setattr(platform.ctypes, "CDLL", lambda _: object())  # an older system
    assert not platform.raise_thread_priority()


@pytest.mark.parametrize(
    ("source", "pressure", "scarce"),
    [("AC Power", 0, False), ("Battery Power", 0, True), ("AC Power", 2, True)],
)
def test_a_mac_on_battery_or_hot_is_short_of_power(
    source: str, pressure: int, scarce: bool, mac: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform.ctypes, "CDLL", lambda _: System(pressure))
    platform._own_thermal_pressure.cache_clear()
    said = f"Now drawing from '{source}'\n -InternalBattery-0 (id=1)\t80%; discharging\n"
    monkeypatch.setattr(platform, "_output", lambda *command: said)
    assert platform.power_is_scarce() is scarce


def test_a_mac_cannot_drop_cached_pages(mac: list[list[str]], tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert not platform.drop_page_cache(tmp_path / "file")
    os.close(platform.open_buffered(tmp_path / "file"))


@pytest.fixture
def nocache(monkeypatch: pytest.MonkeyPatch, mac: list[list[str]]) -> list[tuple[int, int]]:
    """Calls of `fcntl` that macOS would take."""
    calls: list[tuple[int, int]] = []
    monkeypatch.setattr(fcntl, "fcntl", lambda fd, what, value: calls.append((what, value)))
    return calls


def test_reads_past_a_macs_page_cache_are_aligned(
    nocache: list[tuple[int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """XNU sends what is unaligned through the page cache: offset, length and address."""
    data = np.random.default_rng(0).integers(0, 256, 200_001, np.uint8).tobytes()
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    reads: list[tuple[int, int]] = []
    read_into = platform.read_into

    def record(fd: int, buffers: list[memoryview], offset: int) -> int:
        reads.append((offset, sum(map(len, buffers))))
        return read_into(fd, buffers, offset)

    monkeypatch.setattr(platform, "read_into", record)
    assert direct_works(file)
    assert nocache == [(48, 1)]
    reads.clear()
    shards = ShardFiles(True, {str(file): platform.file_mark(file)})
    try:
        for offset, nbytes in ((0, 16_384), (5, 7), (16_380, 9), (40_000, 100_000), (199_990, 11)):
            into = memoryview(bytearray(nbytes))
            half = nbytes // 2
            parts = [
                ByteRange(str(file), offset, into[:half], "layer", 0, "a"),
                ByteRange(str(file), offset + half, into[half:], "layer", 0, "b"),
            ]
            shards.read(parts)
            assert bytes(into) == data[offset : offset + nbytes]
        with pytest.raises(ExpertReadError):
            end = ByteRange(str(file), 200_000, memoryview(bytearray(2)), "layer", 0, "a")
            shards.read([end])
    finally:
        shards.close()
    assert nocache == [(48, 1)] * 2
    assert reads
    assert all(offset % 16_384 == 0 and nbytes % 16_384 == 0 for offset, nbytes in reads)


def test_a_read_is_announced_to_a_mac(
    mac: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """fcntl(2): `struct radvisory { off_t ra_offset; int ra_count; }`."""
    asked: list[tuple[int, int, bytes]] = []
    monkeypatch.setattr(fcntl, "fcntl", lambda *given: asked.append(given))
    platform.announce_read(7, 3 << 33, 8500)
    platform.announce_read(7, 0, 3 << 33)
    assert [(fd, command) for fd, command, _ in asked] == [(7, 44)] * 2
    numbers = [struct.unpack("=qi", raw[:12]) for _, _, raw in asked]
    assert numbers == [(3 << 33, 8500), (0, 2**31 - 1)]
    assert {len(raw) for *_, raw in asked} == {16}  # as large as the C structure


def test_a_read_that_cannot_be_announced_is_no_error() -> None:
    platform.announce_read(10**6, 0, 100)


def test_a_macs_file_system_without_it(
    mac: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(45, "Operation not supported")

    (tmp_path / "file").write_bytes(b"x")
    monkeypatch.setattr(fcntl, "fcntl", refuse)
    before = platform.open_descriptors()
    assert not direct_works(tmp_path / "file")
    assert platform.open_descriptors() == before


@pytest.mark.parametrize("store", [False, True])
def test_a_model_runs_on_a_mac_past_the_page_cache(
    store: bool, nocache: list[tuple[int, int]], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Every expert is read through the aligned path, and the bits are the same."""
    folder = checkpoint("qwen3_moe")
    config = replace(QUIET, bypass_page_cache="on")
    if store:
        out = tmp_path / "store"
        assert pack.main(["--model", str(folder), "--out", str(out), "--no-progress"]) == 0
        assert set(nocache) == {(51, 0)}  # F_FULLFSYNC: written through the drive's own cache
        nocache.clear()
        config = replace(config, store=str(out))
    tokens = mx.array([[3, 1, 4, 1, 5]])
    expected = np.array(mlx_lm.utils.load_model(folder)[0](tokens))
    model = load_streamed(folder, 1 << 40, config)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        assert np.array_equal(np.array(model(tokens)), expected)
    assert set(nocache) == {(48, 1)}


@pytest.mark.parametrize(("active", "left"), [(0, 0), (2 * GB, 2 * GB), (9 * GB, 2 * GB)])
def test_what_is_read_of_the_trunk_is_not_counted_twice(
    active: int,
    left: int,
    streamed: tuple[object, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The page cache is bypassed if the other experts exceed half of the memory left free."""
    _, expert_stream = streamed
    # 2 GB of trunk, 3 GB of slots, 3.9 GB free once the trunk is read: 0.9 GB are left.
    plan = replace(expert_stream.plan, trunk=2 * GB, cache=3 * GB, experts=int(3.44 * GB))
    monkeypatch.setattr(expert_stream, "plan", plan)
    monkeypatch.setattr(expert_stream, "config", replace(QUIET, bypass_page_cache="auto"))
    monkeypatch.setattr(mx, "get_active_memory", lambda: active)
    free = int(3.9 * GB) + 2 * GB - left
    monkeypatch.setattr(module, "available_memory_bytes", lambda: free)
    monkeypatch.setattr(module, "direct_works", lambda file: True)
    monkeypatch.setattr(module, "TINY_READ_BYTES", 0)
    assert not expert_stream._decide_bypass()
    monkeypatch.setattr(module, "available_memory_bytes", lambda: free - GB // 10)
    assert expert_stream._decide_bypass()
    layer = expert_stream.layers[0]
    for more in (0, 1):  # parts that are smaller than that go through the page cache
        part = layer.expert_bytes // len(layer.tensors) + more
        monkeypatch.setattr(module, "TINY_READ_BYTES", part)
        assert expert_stream._decide_bypass() is not bool(more)

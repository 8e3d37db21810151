"""What the system says: limits of memory, by device, machine and container."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_streamexperts import platform
from mlx_streamexperts.platform import METAL_SHARE, apple_limit, device_limit, metal_limit

GB, GIB = 10**9, 2**30

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

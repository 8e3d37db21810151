"""Ranks on hosts of their own: network namespaces on one switch, each with its own address."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import Ended, Host, run_ranks

from mlx_streamexperts import generate


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def can_make_hosts() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    name = f"probe{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except subprocess.CalledProcessError:
        return False
    return True


pytestmark = pytest.mark.skipif(
    not can_make_hosts(), reason="needs Linux, root and iproute2 to make network namespaces"
)


@pytest.fixture
def make_hosts() -> Iterator[Callable[[int], list[Host]]]:
    """Makes hosts 10.77.0.1, ...; each has one interface, `eth0`, plugged into the same switch."""
    made: list[str] = []

    def namespace(name: str) -> str:
        ip("netns", "add", name)
        made.append(name)
        return name

    def make(count: int) -> list[Host]:
        prefix = f"h{os.getpid()}"
        switch = namespace(f"{prefix}switch")
        ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        ip("-n", switch, "link", "set", "bridge", "up")
        hosts = []
        for i in range(count):
            host = Host(namespace(f"{prefix}n{i}"), f"10.77.0.{i + 1}")
            port = f"port{i}"
            ip("-n", switch, "link", "add", port, "type", "veth", "peer", "eth0", "netns",
               host.namespace)  # fmt: skip
            ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            ip("-n", host.namespace, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.namespace, "link", "set", "lo", "up")
            ip("-n", host.namespace, "link", "set", "eth0", "up")
            hosts.append(host)
        return hosts

    yield make
    for name in made:
        ip("netns", "delete", name)


WORDS = ("-p", "In the beginning", "-m", "12", "--verbose", "F", "--no-progress", "--cache", "12MB")


@pytest.mark.parametrize("count", [2, 3])
def test_the_text_is_that_of_one_machine(
    count: int,
    make_hosts: Callable[[int], list[Host]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert generate.main([*WORDS]) == 0
    expected = capsys.readouterr().out
    ended = run_ranks("command", count, tmp_path, *WORDS, hosts=make_hosts(count))
    assert [e.status for e in ended] == [0] * count, [e.err for e in ended]
    assert ended[0].out == expected


def named(ended: list[Ended], rank: int, by: int) -> None:
    """Rank `by` says that `rank` was lost, and ends with an error."""
    assert ended[by].status == 1, ended[by].err
    errors = [line for line in ended[by].err.splitlines() if line.startswith("error")]
    assert any(f"rank {rank} " in line and "was lost" in line for line in errors), ended[by].err


def test_a_cut_cable_is_named_at_both_ends(
    make_hosts: Callable[[int], list[Host]], tmp_path: Path
) -> None:
    ended = run_ranks("one_ends", 2, tmp_path, 1, "unplug", hosts=make_hosts(2))
    named(ended, 1, by=0)
    named(ended, 0, by=1)


@pytest.mark.parametrize("how", ["SIGKILL", "SIGSTOP"])
def test_a_host_that_dies_is_named_by_all_others(
    how: str, make_hosts: Callable[[int], list[Host]], tmp_path: Path
) -> None:
    frozen = 1 if how == "SIGSTOP" else None
    ended = run_ranks("one_ends", 3, tmp_path, 1, how, frozen=frozen, hosts=make_hosts(3))
    for rank in (0, 2):
        named(ended, 1, by=rank)

"""Processes of one distributed run on this machine, over MLX's ring backend."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).with_name("rank_programs.py")
LIMIT_SECONDS = 180  # a hang is a failure, not a wait


@dataclass(frozen=True)
class Ended:
    """One rank's exit status and what it printed."""

    status: int
    out: str
    err: str

    def json(self) -> object:
        """Its last line."""
        assert self.status == 0, self.err
        return json.loads(self.out.splitlines()[-1])


@dataclass(frozen=True)
class Host:
    """A host of its own on this machine: a network namespace with an address."""

    namespace: str
    address: str


def start(
    arguments: Sequence[Sequence[str]], folder: Path, hosts: Sequence[Host] = ()
) -> list[subprocess.Popen[str]]:
    """Start one process a rank: `python arguments[rank]`, on its host if `hosts` are given."""
    if hosts:
        return _start(arguments, [f"{h.address}:41000" for h in hosts], folder, hosts)
    with ExitStack() as held:
        # Bound and not listening: nobody else is given these ports meanwhile, and MLX sets
        # SO_REUSEADDR too.
        ports = []
        for _ in arguments:
            s = held.enter_context(socket.socket())
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            s.bind(("127.0.0.1", 0))
            ports.append(s.getsockname()[1])
    return _start(arguments, [f"127.0.0.1:{port}" for port in ports], folder)


def _start(
    arguments: Sequence[Sequence[str]], addresses: list[str], folder: Path,
    hosts: Sequence[Host] = (),
) -> list[subprocess.Popen[str]]:  # fmt: skip
    file = folder / f"hosts-{addresses[0].rpartition(':')[2]}.json"
    file.write_text(json.dumps([[address] for address in addresses]))
    within = [["ip", "netns", "exec", host.namespace] for host in hosts]
    return [
        subprocess.Popen(
            [*(within[rank] if hosts else []), sys.executable, *words],
            env={**os.environ, "MLX_HOSTFILE": str(file), "MLX_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, words in enumerate(arguments)
    ]


def finish(processes: Sequence[subprocess.Popen[str]], frozen: int | None) -> list[Ended]:
    """Wait for all but those that stop for ever; none outlives this, however it ends."""
    ended: list[Ended] = []
    try:
        for rank, process in sorted(enumerate(processes), key=lambda p: p[0] == frozen):
            if rank == frozen:
                process.kill()
            out, err = process.communicate(timeout=LIMIT_SECONDS)
            ended.insert(rank, Ended(process.returncode, out, err))
        return ended
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()


def run_ranks(
    program: str,
    ranks: int,
    folder: Path,
    *arguments: object,
    own: Sequence[object] = (),
    frozen: int | None = None,
    hosts: Sequence[Host] = (),
) -> list[Ended]:
    """Run one of `rank_programs.py` on every rank.

    Args:
        program: its name.
        ranks: how many processes.
        folder: for the hostfile.
        *arguments: of all ranks.
        own: one more argument for each rank.
        frozen: a rank that stops and does not end by itself; killed when the others have ended.
        hosts: where each rank runs; this machine's own network if empty.
    """
    shared = [str(PROGRAMS), program, *map(str, arguments)]
    each = [[*shared, *map(str, own[rank : rank + 1])] for rank in range(ranks)]
    return finish(start(each, folder, hosts), frozen)

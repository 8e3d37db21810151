"""Limits that a process is started with: it works within them, or says in one line what it needs.

Real limits of real processes: macOS starts a program with 256 descriptors, which 180 shards and
some clients exceed.
"""

from __future__ import annotations

import os
import resource
import select
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import families
import originals
import pytest
from conftest import until
from serving import Running

from mlx_streamexperts import StreamError, demo_model
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._io.files import allow_open, room_for_clients

SHARDS, CLIENTS = 180, 100
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
GENERATE = ["-m", "mlx_streamexperts.generate", "--prompt", "hi", "--max-tokens", "3"]
GENERATE += ["--no-progress", "--cache", "10MB"]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in 180 shards."""
    folder = tmp_path_factory.mktemp("many")
    changes = {"num_hidden_layers": 6, "vocab_size": 12288}
    with mock.patch.dict(families.FAMILIES["qwen3_moe"], changes):
        built = families.build("qwen3_moe", folder / "built", quantize=None, shards=1)
    out = originals.write(built, folder / "many", originals.single, shards=SHARDS)
    assert len(list(out.glob("model*.safetensors"))) == SHARDS
    return out


def run(
    arguments: list[str], kind: int, soft: int, hard: int, *, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """Python in a process that starts with this limit."""
    return subprocess.run(
        [sys.executable, *arguments],
        input=stdin,
        preexec_fn=lambda: resource.setrlimit(kind, (soft, hard)),
        capture_output=True,
        text=True,
        timeout=300,
    )


def assert_one_line(done: subprocess.CompletedProcess[str], *said: str) -> None:
    assert done.returncode == 1, done.stderr
    (line,) = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
    assert "Traceback" not in done.stderr
    for text in said:
        assert text in line


SERVE = """
import sys
from serving import serving
with serving("--model", sys.argv[1], "--cache", "1GB") as running:
    reader = running.generator.model_provider.expert_stream.reader
    print(running.port, len(reader._files._files), flush=True)
    input()
"""


def refused_of_a_hundred(many: Path, hard: int) -> int:
    """Clients that a server refuses; the others are connected all at once while it answers one."""
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(many)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard)),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    clients: list[socket.socket] = []
    try:
        port, opened = map(int, process.stdout.readline().split())
        assert opened > 150  # of the shards, those with experts
        running = Running(port, None)  # type: ignore[arg-type]
        clients = [socket.create_connection(("127.0.0.1", port), 60) for _ in range(CLIENTS)]
        asking, *idle = clients
        body = b'{"prompt": "NAME", "max_tokens": 3}'
        asking.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        assert asking.recv(64).split()[1] == b"200"
        with socket.create_connection(("127.0.0.1", port), 60) as last:
            last.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert select.select([last], [], [], 60)[0]  # those before it have been taken
        readable = select.select(idle, [], [], 0)[0]
        refusals = [client.recv(64).split()[1] for client in readable]
        assert set(refusals) <= {b"503"}
        for client in clients:
            client.close()
        until(lambda: running.request("GET", "/health")[0] == 200)
        assert running.text("NAME", 3)
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
        return len(refusals)
    finally:
        for client in clients:
            client.close()
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()


def test_a_mac_starts_with_256_descriptors(many: Path) -> None:
    """180 shards, all read, and 100 clients at once."""
    assert refused_of_a_hundred(many, HARD) == 0


def test_256_and_no_more(many: Path) -> None:
    """Fewer clients are connected at once; the shards have theirs."""
    assert 80 < refused_of_a_hundred(many, 256) < CLIENTS


@pytest.mark.parametrize("hard", [64, HARD])
def test_64_descriptors(hard: int, many: Path) -> None:
    """The demonstration model's shards work; 180 do where the limit may be raised."""
    assert run(GENERATE, resource.RLIMIT_NOFILE, 64, hard).returncode == 0
    done = run([*GENERATE, "--model", str(many)], resource.RLIMIT_NOFILE, 64, hard)
    if hard == 64:
        assert_one_line(done, str(many), "180 files", "may have 64", "ulimit -n 2")
    else:
        assert done.returncode == 0, done.stderr


IMPORT = """
import resource, mlx_streamexperts, mlx_lm.utils
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("soft", "hard", "then"),
    [(64, 64, 64), (256, HARD, 2048), (256, 1000, 1000), (HARD, HARD, HARD)],
)
def test_mlx_lm_takes_no_descriptors_away(soft: int, hard: int, then: int) -> None:
    """When imported it sets 2048 of 4096, come what may."""
    done = run(["-c", IMPORT], resource.RLIMIT_NOFILE, soft, hard)
    assert done.stdout.split() == [str(then), str(hard)], done.stderr


@pytest.mark.parametrize("megabytes", [900, 1000, 4000])
def test_a_small_address_space(megabytes: int) -> None:
    """MLX's threads would end the process where they can map nothing."""
    if sys.platform == "darwin":
        pytest.skip("macOS does not heed this limit")
    nbytes = megabytes << 20
    done = run([*GENERATE, "--model", str(demo_model())], resource.RLIMIT_AS, nbytes, nbytes)
    if megabytes < 4000:
        assert_one_line(done, "ulimit -v", "this process may map")
    else:
        assert done.returncode == 0, done.stderr


def limits(soft: int, hard: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Stand-ins for the system's; returns what is set."""
    state = [(soft, hard)]
    monkeypatch.setattr(platform.resource, "getrlimit", lambda kind: state[-1])
    monkeypatch.setattr(platform.resource, "setrlimit", lambda kind, pair: state.append(pair))
    return state


INFINITE = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "system", "wanted", "allowed"),
    [
        (256, INFINITE, "darwin", 500, 500),
        (256, INFINITE, "darwin", 20_000, 10_240),  # OPEN_MAX
        (256, INFINITE, "linux", 20_000, 20_000),
        (256, 1000, "linux", 20_000, 1000),
        (1024, 4096, "linux", 500, 1024),  # it is never lowered
        (INFINITE, INFINITE, "darwin", 500, 500),
    ],
)
def test_the_soft_limit_is_raised_as_far_as_needed(
    soft: int, hard: int, system: str, wanted: int, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform.sys, "platform", system)
    state = limits(soft, hard, monkeypatch)
    assert platform.allow_descriptors(wanted) == allowed
    assert state[-1] == (allowed if allowed > soft != INFINITE else soft, hard)


def test_a_limit_that_cannot_be_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(kind: int, pair: tuple[int, int]) -> None:
        raise ValueError("current limit exceeds maximum limit")

    limits(256, 4096, monkeypatch)
    monkeypatch.setattr(platform.resource, "setrlimit", refuse)
    monkeypatch.setattr(platform, "open_descriptors", lambda: 20)
    assert platform.allow_descriptors(500) == 256
    allow_open(200, "model")
    with pytest.raises(StreamError, match=r"model: 300 files .* may have 256: .*ulimit -n 384"):
        allow_open(300, "model")


def test_what_is_left_for_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(120):
        (tmp_path / f"model-{i}.safetensors").touch()
    limits(256, 256, monkeypatch)
    monkeypatch.setattr(platform, "open_descriptors", lambda: 20)
    assert room_for_clients(1024, [tmp_path]) == 256 - 120 - 64
    assert room_for_clients(50, [tmp_path]) == 50
    assert room_for_clients(1024, []) == 256 - 64
    limits(256, 100_000, monkeypatch)
    assert room_for_clients(1024, [tmp_path]) == 1024


def test_how_many_are_open(monkeypatch: pytest.MonkeyPatch) -> None:
    before = platform.open_descriptors()
    fd = os.open(os.devnull, os.O_RDONLY)
    try:
        assert platform.open_descriptors() == before + 1
    finally:
        os.close(fd)

"""`pack` takes a repository of the Hub by ranges; what the server does wrong never gets in."""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
import mlx.core as mx
import mlx_lm.utils
import numpy as np
import pytest
from conftest import load_streamed, smallest_cache
from hub_server import REPO, SHA, Answer, Hub, digests, serving

from mlx_streamexperts import CheckpointError, StreamConfig, pack, plan, stream
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._experts import from_hub
from mlx_streamexperts._io import remote
from mlx_streamexperts._io.checkpoint import INDEX
from mlx_streamexperts._loading.load import resolve

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture
def server(original: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_of(original, monkeypatch) as hub:
        yield hub


@contextmanager
def hub_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(folder) as hub:
        hub.sha256 = digests(folder)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()  # it has read the environment
        monkeypatch.setattr(remote, "_PIECE_BYTES", 64 << 10)
        monkeypatch.setattr(remote, "_FIRST_WAIT", 0.01)
        yield hub
        huggingface_hub.close_session()


def run(out: Path, *options: str) -> int:
    return pack.main([REPO, "--out", str(out), *options, "--no-progress"])


def output(folder: Path) -> np.ndarray:
    """Logits, with experts read from files."""
    model = load_streamed(folder, 1 << 40)
    with stream(model) as expert_stream:
        expert_stream.resize(smallest_cache(expert_stream))
        return np.array(model(TOKENS))


def assert_unpacks_to(original: Path, folder: Path) -> None:
    assert pack.main(["--unpack", "--model", str(folder), "--no-progress"]) == 0
    assert sorted(f.name for f in folder.iterdir()) == sorted(f.name for f in original.iterdir())
    for file in original.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_repository_becomes_a_model_that_needs_nothing_else(
    server: Hub, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected, out = np.array(mlx_lm.utils.load_model(original)[0](TOKENS)), tmp_path / "out"
    assert run(out) == 0
    assert np.array_equal(output(out), expected)
    shards = {f.name: f.stat().st_size for f in original.glob("*.safetensors")}
    assert not shards.keys() & set(server.whole)
    fetched, whole = sum(server.sent[n] for n in shards), sum(shards.values())
    assert whole <= fetched < whole + len(shards) * ((1 << 20) + (72 << 10))  # headers, samples
    used = sum(f.stat().st_blocks * 512 for f in out.rglob("*"))
    assert used < whole + 4 * 16 * 16384 + (200 << 10)  # blocks are padded to pages
    assert pack.main(["--verify", "--out", str(out / "experts"), "--no-progress"]) == 0
    with pytest.raises(RuntimeError, match="moved-to-a-packed-store"):
        mlx_lm.utils.load_model(out)
    assert run(out) == 1
    assert "has a packed model already" in capsys.readouterr().err
    assert_unpacks_to(original, out)


def test_shards_of_any_name_make_a_model_of_mlx_vlm(
    seeing: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both libraries have this family, and mlx-lm reads `model*.safetensors` alone."""
    pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: extra `vlm`")
    folder, out = tmp_path / "m", tmp_path / "out"
    shutil.copytree(seeing, folder)
    for file in folder.glob("model-*"):
        file.rename(folder / file.name.replace("model-", "part-"))
    index = folder / INDEX
    index.write_text(index.read_text().replace("model-0", "part-0"))
    expected = plan(seeing, cache="400kB", config=StreamConfig(loader="mlx-vlm"))
    with hub_of(folder, monkeypatch):
        assert plan(REPO, cache="400kB") == expected
        assert run(out) == 0
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        assert {f.name for f in resolve(REPO).iterdir()} == {f.name for f in folder.iterdir()}
    assert plan(out, cache="400kB") == expected
    assert_unpacks_to(folder, out)


def test_a_part_of_a_repository_in_the_cache_is_not_the_model(
    server: Hub, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer, or some shards of a download that was interrupted."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / f"models--{REPO.replace('/', '--')}"
    snapshot = cached / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(SHA)
    shards = sorted(original.glob("*.safetensors"))
    expected = plan(original, cache="10MB")
    for shard in (None, *shards):
        for file in original.iterdir():
            if file not in shards or file == shard:
                (snapshot / file.name).unlink(missing_ok=True)
                (snapshot / file.name).symlink_to(file)
        before = server.asked
        assert plan(REPO, cache="10MB") == expected
        assert (server.asked > before) == (shard != shards[-1])
    (snapshot / shards[0].name).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=f"{shards[0].name} is missing"):
        plan(REPO, cache="10MB")


def dropped(answer: Answer) -> None:
    answer.sent = len(answer.data) // 2


def gone(answer: Answer) -> None:
    answer.status = 0


def busy(answer: Answer) -> None:
    answer.status, answer.headers["Retry-After"] = 503, "0"


def short(answer: Answer) -> None:
    """A part of what was asked for, and honest about it."""
    answer.data = answer.data[: 1 + len(answer.data) // 3]
    last = answer.begin + len(answer.data) - 1
    answer.headers["Content-Range"] = f"bytes {answer.begin}-{last}/{answer.size}"


def test_what_passes_is_tried_again(server: Hub, original: Path, tmp_path: Path) -> None:
    faults, answers = itertools.cycle([dropped, busy, short, gone]), itertools.count(1)
    server.redirects = True

    def lie(answer: Answer) -> None:
        answer.headers["ETag"] = f'"{next(answers)}"'  # of another server: it says nothing
        if server.asked % 3 == 0:
            next(faults)(answer)

    server.lie = lie
    assert run(tmp_path / "out") == 0
    assert_unpacks_to(original, tmp_path / "out")


@pytest.mark.parametrize(
    ("said", "seconds"), [(None, 0), ("7", 7), ("9999", 300), ("\u00b2", 0), ("-1", 0), ("soon", 0)]
)
def test_how_long_a_busy_server_asks_to_wait(said: str | None, seconds: float) -> None:
    assert remote._seconds(said) == seconds


def ignores_ranges(answer: Answer) -> None:
    answer.status = 200
    del answer.headers["Content-Range"]


def grows(answer: Answer) -> None:
    answer.headers["Content-Range"] += "0"


def moves(answer: Answer) -> None:
    answer.headers["Content-Range"] = f"bytes 1-{answer.end - answer.begin}/{answer.size}"


def changes(answer: Answer) -> None:
    answer.headers["ETag"] = '"another"'


def ends(answer: Answer) -> None:
    answer.status = 416


def overflows(answer: Answer) -> None:
    answer.data += b"more"


def forbids(answer: Answer) -> None:
    answer.status = 403


def damages(answer: Answer) -> None:
    answer.data = bytes(len(answer.data))


def dies(answer: Answer) -> None:
    answer.status = 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (ignores_ranges, "it cannot send parts of files"),
        (grows, "the Hub says"),
        (moves, "the server sends 'bytes 1-"),
        (changes, "the file changed meanwhile"),
        (ends, "the file ends earlier"),
        (overflows, "more than was asked"),
        (forbids, "status 403, Forbidden"),
        (damages, "what arrived has SHA-256"),
        (dies, "nothing arrives any more"),
    ],
)
def test_what_does_not_pass_is_refused_by_name(
    fault: Callable[[Answer], None],
    message: str,
    server: Hub,
    original: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(remote, "_TRIES", 3)
    monkeypatch.setattr(from_hub, "_NOTED_BYTES", 1)
    out, answers = tmp_path / "out", itertools.count()

    def lie(answer: Answer) -> None:
        if next(answers) >= 20 or (fault is damages and answer.begin > 1 << 20):
            fault(answer)

    server.lie = lie
    assert run(out) == 1
    error = capsys.readouterr().err
    assert message in error
    assert f"error: {REPO}/model" in error
    assert not (out / "config.json").exists()
    with pytest.raises(CheckpointError, match="packing into this folder is unfinished"):
        output(out)
    server.lie = lambda answer: None
    assert run(out) == 0
    assert_unpacks_to(original, out)


def test_a_repository_that_changes_between_runs_is_refused(
    server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.lie = lambda answer: forbids(answer) if server.asked > 10 else None
    assert run(tmp_path / "out") == 1
    server.lie = changes
    assert run(tmp_path / "out") == 1
    assert "changed since packing it began" in capsys.readouterr().err
    assert pack.main(["other/repo", "--out", str(tmp_path / "out"), "--no-progress"]) == 1
    assert "some/repo is being packed there" in capsys.readouterr().err


def test_a_damaged_shard_takes_only_its_own_layers_with_it(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    weights: dict[str, mx.array] = {}
    for file in original.glob("*.safetensors"):
        weights |= mx.load(str(file))  # type: ignore[arg-type]
    shards: list[dict[str, mx.array]] = [{}, {}, {}]
    for name, array in weights.items():
        shards[int(name.split(".")[2]) if ".switch_mlp." in name else 0][name] = array
    for n, shard in enumerate(shards, 1):
        file = source / f"model-{n:05d}-of-00003.safetensors"
        mx.save_safetensors(str(file), shard, metadata={"unlike": "x" * 100 * n})  # in size
    (source / "config.json").write_bytes((original / "config.json").read_bytes())
    second, third = (source / f"model-{n:05d}-of-00003.safetensors" for n in (2, 3))
    with hub_of(source, monkeypatch) as hub:

        def lie(answer: Answer) -> None:
            if answer.size == third.stat().st_size and answer.begin > 100_000:
                answer.data = bytes(len(answer.data))

        hub.lie = lie
        assert run(out) == 1
        first_layer = (out / "experts" / "layer-00000.experts").stat().st_ino
        hub.lie = lambda answer: None
        hub.sent.clear()
        assert run(out) == 0
        header = 1 << 20  # what is read of a shard to get its header
        assert hub.sent[second.name] == header < second.stat().st_size < hub.sent[third.name]
        assert (out / "experts" / "layer-00000.experts").stat().st_ino == first_layer
    assert_unpacks_to(source, out)


def test_killed_in_its_first_moments_it_goes_on(
    server: Hub, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, resize = tmp_path / "out", os.truncate
    out.mkdir()
    (out / "packing.json.partial").write_text('{"about')  # killed in the first note

    def stop(path: Path, size: int) -> None:
        if path.name.startswith("model-00002"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        resize(path, size)

    with monkeypatch.context() as m:
        m.setattr(os, "truncate", stop)
        assert run(out) == 1
    shard = next(out.glob("model-00002*"))
    assert shard.stat().st_size < (original / shard.name).stat().st_size
    assert run(out) == 0
    assert_unpacks_to(original, out)


def test_the_library_that_began_goes_on(
    server: Hub, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mlx_vlm.utils", reason="mlx-vlm is not installed: extra `vlm`")
    out = tmp_path / "out"
    server.lie = lambda answer: forbids(answer) if server.asked > 20 else None
    assert run(out, "--loader", "mlx-vlm") == 1
    server.lie = lambda answer: None
    capsys.readouterr()
    assert run(out, "--loader", "mlx-lm") == 1
    assert "were laid out by mlx-vlm" in capsys.readouterr().err
    assert run(out) == 0
    assert (out / "experts" / "only-copy.json").exists()
    assert pack.main(["--unpack", "--model", str(out), "--loader", "mlx-lm"]) == 1
    assert "--loader mlx-vlm" in capsys.readouterr().err
    assert_unpacks_to(original, out)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--model {0} --out FOLDER;"),
        (["--out", "packed"], "--model {0};"),
        (["--replace"], "--model {0};"),
        (["--verify"], "--out {0};"),
    ],
)
def test_a_folder_in_a_repositorys_place_is_told_its_option(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        pack.main([str(tmp_path), *options])
    assert f"write {said.format(tmp_path)}" in capsys.readouterr().err


def test_room_is_checked_before_anything_is_fetched(
    server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "free_disk_bytes", lambda _: 100_000)
    assert run(tmp_path / "out") == 1
    assert "100,000 are free" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("dear")
    assert run(tmp_path / "mine") == 1
    assert "not empty" in capsys.readouterr().err


KILLED = """
import os, shutil, sys, threading
from pathlib import Path
from uuid import UUID
import huggingface_hub
from hub_server import REPO, digests, serving
from mlx_streamexperts import StreamConfig
from mlx_streamexperts import _osinfo as platform
from mlx_streamexperts._experts import from_hub
from mlx_streamexperts._errors import CheckpointError
from mlx_streamexperts._io import moved, remote
from mlx_streamexperts._io.hub import fetch_headers
from mlx_streamexperts._io.output import LOCK
from mlx_streamexperts._loading.discover import discover
from mlx_streamexperts._loading.libraries import library

remote._PIECE_BYTES, from_hub._NOTED_BYTES = 256 << 10, 512 << 10
moved.uuid4 = lambda: UUID(int=1)  # finished folders are compared
OUT, HEADERS = Path("out"), Path("headers")
STEPS = [(platform, "sync_to_drive"), (os, "pwrite"), (os, "truncate"), (Path, "replace"),
         (Path, "unlink")]
OFTEN = {"pwrite": 60, "replace": 4, "sync_to_drive": 4, "unlink": 2}  # killed at one in so many

def pack():
    before = from_hub.begun(OUT, REPO)
    repository = remote.Repository(REPO if before is None else f"{REPO}@{before['commit']}")
    found = discover(HEADERS, StreamConfig(), {}, in_shards=True)
    shards = [file.name for file in found.shards]
    with from_hub.receiving(
        repository, REPO, found.layers, HEADERS, shards, OUT, "mlx-lm 1"
    ) as arriving:
        list(arriving.fetch())
        list(arriving.verify())
        arriving.finish()

def in_a_fork(kill_at=0):
    child = os.fork()
    if child == 0:
        left = kill_at or -1
        lock = threading.Lock()
        def counted(original):
            every = OFTEN.get(original.__name__, 1)
            calls = 0
            def step(*args, **kwargs):
                nonlocal left, calls
                with lock:
                    calls += 1
                    left -= calls % every == 0
                    if left == 0:
                        os.kill(os.getpid(), 9)
                return original(*args, **kwargs)
            return step
        for owner, name in STEPS:
            setattr(owner, name, counted(getattr(owner, name)))
        try:
            pack()
        finally:
            os._exit(bool(sys.exc_info()[0]))
    return os.waitpid(child, 0)[1]

def content():
    files = [f for f in sorted(OUT.rglob("*")) if f.is_file() and f.name != LOCK]
    return {str(f): f.read_bytes() for f in files}

with serving(Path("original")) as hub:
    hub.sha256 = digests(Path("original"))
    constants = huggingface_hub.constants
    constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    constants.ENDPOINT = hub.url
    HEADERS.mkdir()
    fetch_headers(remote.Repository(REPO), HEADERS)
    assert in_a_fork() == 0
    expected = content()
    for step in range(1, 1000):
        shutil.rmtree(OUT, ignore_errors=True)
        status = in_a_fork(step)
        assert status in (0, 9), (step, status)
        if status == 0:
            break
        if content() != expected:
            try:
                library(OUT, StreamConfig())
            except CheckpointError:
                pass
            else:
                assert (OUT / "packing.json").exists(), step  # it was all but removed
            assert in_a_fork() == 0, step
        found = content()
        assert found.keys() == expected.keys(), (step, found.keys() ^ expected.keys())
        assert found == expected, step
    print(step)
"""


def test_killed_at_every_step_it_goes_on(original: Path, tmp_path: Path) -> None:
    (tmp_path / "original").symlink_to(original)
    kept = {k: v for k, v in os.environ.items() if k not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    path = os.pathsep.join([str(Path(__file__).parent), kept.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", KILLED],
        cwd=tmp_path,
        env={**kept, "PYTHONPATH": path, "NO_PROXY": "127.0.0.1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10

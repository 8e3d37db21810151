"""What is released: its types, archives, licences, bounds; and that documents keep their word."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from contextlib import suppress
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import mlx_streamexperts

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

USER = """
import mlx_lm
from mlx_streamexperts import (
    BudgetError, CheckpointError, ExpertReadError, ExpertStream, Plan, StreamConfig, StreamError,
    demo_model, load, patch, plan, stream,
)

def budget(name: str) -> Plan:
    try:
        return plan(name, memory="1GB")
    except BudgetError as e:
        needed: int = e.needed_bytes
        return plan(name, memory=needed)

def run(name: str) -> float:
    model, tokenizer = load(name, cache=10_000_000, config=StreamConfig(progress=False))
    with stream(model) as s:
        streams: ExpertStream = s
        streams.resize("20MB")
        try:
            mlx_lm.generate(model, tokenizer, prompt="x")
        except ExpertReadError as e:
            print(e.layer, e.expert + 1, e.file.name, e.errno)
        except (CheckpointError, StreamError):
            raise
        return streams.stats().cache.hit_rate

with patch(memory="1GB") as patched:
    reveal: list[ExpertStream] = patched.streams
budget(str(demo_model()))
"""


def test_a_users_script_is_typed_strictly(tmp_path: Path) -> None:
    """By the types that the package ships (py.typed)."""
    script = tmp_path / "user.py"
    script.write_text(USER)
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nstrict = true\n[mypy-mlx_lm.*]\nignore_missing_imports = true\n"
        "[mypy-mlx_streamexperts.*]\nfollow_imports = silent\n"
        "[mypy-huggingface_hub.*,transformers.*]\nfollow_imports = skip\n"  # 3,800 files
    )
    pytest.importorskip("mypy", reason="in the dev extra")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("from mlx_streamexperts import plan\n\nplan('x', memory=[1]).slots + 'y'\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "user.py", "wrong.py"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [line.split(":")[0] for line in errors] == ["wrong.py", "wrong.py"], done.stdout


# What is built, and how it installs.

Archives = dict[str, dict[str, bytes]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive of this checkout."""
    wheels = pytest.importorskip("hatchling.builders.wheel", reason="in the dev extra")
    sources = pytest.importorskip("hatchling.builders.sdist")
    folder = tmp_path_factory.mktemp("dist")
    for builder in (wheels.WheelBuilder, sources.SdistBuilder):
        list(builder(str(ROOT)).build(directory=str(folder)))
    return folder


@pytest.fixture(scope="module")
def archives(built: Path) -> Archives:
    """Bytes by name of the files in each, below the source archive's own folder."""
    with zipfile.ZipFile(only(built, "*.whl")) as z:
        wheel = {n: z.read(n) for n in z.namelist()}
    with tarfile.open(only(built, "*.tar.gz")) as t:
        members = [(m.name.partition("/")[2], t.extractfile(m)) for m in t if m.isfile()]
        source = {name: file.read() for name, file in members if file is not None}
    return {"wheel": wheel, "source": source}


def only(folder: Path, pattern: str) -> Path:
    (found,) = folder.glob(pattern)
    return found


def test_what_the_archives_hold(archives: Archives) -> None:
    """Every file of the package, licence and types among them, and nothing of tests or tools."""
    package = ROOT / "mlx_streamexperts"
    files = {f for f in package.rglob("*") if f.is_file() and "__pycache__" not in f.parts}
    ours = {str(f.relative_to(ROOT)) for f in files}
    assert {f"mlx_streamexperts/{n}" for n in ("py.typed", "data/demo/config.json")} <= ours
    licence = (ROOT / "LICENSE").read_bytes()
    info = f"mlx_streamexperts-{PROJECT['version']}.dist-info/"
    wheel, source = archives["wheel"], archives["source"]
    assert wheel[info + "licenses/LICENSE"] == source["LICENSE"] == licence
    about = {"CHANGELOG.md", "LICENSE", "README.md", "SECURITY.md", "pyproject.toml", "PKG-INFO"}
    assert {n for n in wheel if not n.startswith(info)} == ours
    assert {*source} - {".gitignore"} == ours | about
    for name in ours:
        assert wheel[name] == source[name] == (ROOT / name).read_bytes()


def test_the_source_archive_builds_the_same_wheel(
    built: Path, archives: Archives, tmp_path: Path
) -> None:
    shutil.unpack_archive(only(built, "*.tar.gz"), tmp_path / "source", filter="data")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    place = only(tmp_path / "source", "*")
    subprocess.run(command, cwd=place, check=True, capture_output=True)
    with zipfile.ZipFile(only(tmp_path, "*.whl")) as z:
        assert {n: z.read(n) for n in z.namelist()} == archives["wheel"]


INSTALLED = """
import sys, mlx_streamexperts, mlx_lm
assert mlx_streamexperts.__file__.startswith(sys.prefix), mlx_streamexperts.__file__
from mlx_streamexperts import demo_model, load, stream
model, tokenizer = load(demo_model(), cache="10MB")
text = mlx_lm.generate(model, tokenizer, "In the beginning", max_tokens=3)
assert stream(model).stats().cache.misses and text
"""


def test_a_wheel_installed_from_scratch(built: Path, tmp_path: Path) -> None:
    """Outside the checkout, beside the dependencies that are here."""
    fresh = tmp_path / "fresh"
    venv.create(fresh, symlinks=True)
    python = fresh / "bin" / "python"
    wheel = only(built, "*.whl")
    command = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index"]
    subprocess.run([*command, "--no-deps", wheel], check=True, capture_output=True)
    site = sysconfig.get_path("purelib", vars={"base": str(fresh)})
    # A folder in a .pth file is searched, but .pth files in it (the checkout's own) are not read.
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    for arguments in (["-c", INSTALLED], ["-m", "mlx_streamexperts.generate", "--help"]):
        done = subprocess.run(
            [python, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert "--memory" in done.stdout


# Licences, origins, bounds, workflows.

ALLOWED = {
    "0BSD", "Apache 2.0 License", "Apache Software License", "Apache-2.0", "BSD 3-Clause License",
    "3-Clause BSD License", "BSD License", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0",
    "CNRI-Python", "HPND", "ISC", "ISC License", "ISC License (ISCL)", "MIT", "MIT License",
    "MIT-0", "MIT-CMU", "Mozilla Public License 2.0 (MPL 2.0)",
    "MPL-2.0", "PSF-2.0", "Python Software Foundation License", "Unlicense",
    "Zlib",
}  # fmt: skip
"""Licences that ask for no more than to be named. MPL-2.0 (tqdm's) is about changed files alone."""


def licence(name: str) -> str:
    """As an SPDX expression where the distribution has one, else in its own words."""
    about = metadata.metadata(name)
    classifiers = [c for c in about.get_all("Classifier") or [] if c.startswith("License ::")]
    named = [c.rpartition(" :: ")[2] for c in classifiers]
    return about.get("License-Expression") or " AND ".join(named) or about.get("License") or ""


def allowed(expression: str) -> bool:
    """All parts of one of its choices are."""
    choices = expression.split(" OR ")
    return any(all(part.strip() in ALLOWED for part in c.split(" AND ")) for c in choices)


def dependencies(name: str, extras: Iterable[str], found: set[str]) -> set[str]:
    """Adds what is installed along with a distribution, and along with that."""
    for needed in map(Requirement, metadata.requires(name) or []):
        key, marker = re.sub(r"[-_.]+", "-", needed.name).lower(), needed.marker
        applies = marker is None or any(marker.evaluate({"extra": e}) for e in ("", *extras))
        if not applies or (key in found and not needed.extras):
            continue
        with suppress(metadata.PackageNotFoundError):  # of an extra that is not installed here
            metadata.distribution(key)
            found.add(key)
            dependencies(key, needed.extras, found)
    return found


def test_every_dependency_has_a_licence_that_goes_with_ours() -> None:
    extras = set(PROJECT["optional-dependencies"]) - {"cuda", "dev", "fuzz", "test"}
    found = dependencies("mlx-streamexperts", extras, set())
    assert {re.split("[<>=]", d)[0].replace("_", "-") for d in PROJECT["dependencies"]} <= found
    assert {n: licence(n) for n in found if not allowed(licence(n))} == {}
    assert allowed("Apache-2.0 OR GPL-3.0") and not allowed("MIT AND GPL-3.0") and not allowed("")
    assert PROJECT["license"] == "Apache-2.0"


def test_every_data_file_has_a_stated_origin() -> None:
    data = ROOT / "mlx_streamexperts" / "data"
    rows = [r.split("|") for r in (data / "README.md").read_text().splitlines() if r[:3] == "| `"]
    stated = {n: (origin, licence) for _, ns, origin, licence, _ in rows for n in ns.split("`")}
    for file in (f for f in data.rglob("*") if f.is_file() and f.name != "README.md"):
        name = str(file.relative_to(data))
        of = [v for pattern, v in stated.items() if fnmatch(name, pattern)]
        assert len(of) == 1, name
        assert of[0][0].strip() and of[0][1].strip() == PROJECT["license"]
    assert "licences of the text" in (data / "demo" / "README.md").read_text()


def test_bounds_are_those_that_are_tested() -> None:
    """Every dependency has a lower and an upper one; the workflow runs the oldest mlx-lm."""
    assert all(">=" in d and ",<" in d for d in PROJECT["dependencies"])
    lowest = next(d for d in PROJECT["dependencies"] if d.startswith("mlx-lm"))
    oldest = re.search(r">=([\d.]+)", lowest)
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert oldest is not None and f'"=={oldest[1]}"' in workflow
    python = PROJECT["requires-python"].removeprefix(">=")
    assert f"Python {python} or newer" in (ROOT / "docs" / "guide.md").read_text()
    assert f'python: "{python}"' in workflow


def test_the_workflow_runs_metal_and_linux_oldest_and_newest() -> None:
    """Each file of it is YAML, and each job has a machine and something to do."""
    files = (ROOT / ".github" / "workflows").glob("*.yml")
    jobs = {k: v for f in files for k, v in yaml.safe_load(f.read_text())["jobs"].items()}
    assert all(job["runs-on"] and job["steps"] for job in jobs.values())
    versions: dict[str, set[str]] = {}
    for run in jobs["suite"]["strategy"]["matrix"]["include"]:
        versions.setdefault(run["os"].split("-")[0], set()).add(run["mlx-lm"])
    lowest = next(d for d in PROJECT["dependencies"] if d.startswith("mlx-lm"))
    newest = ""  # that the bounds let in
    assert newest in versions["macos"]
    assert versions["ubuntu"] == {newest, "==" + lowest.split(">=")[1].split(",")[0]}
    steps = [str(s.get("run")) for s in jobs["suite"]["steps"]]
    assert any("pytest" in s for s in steps) and any("matrix.mlx-lm" in s for s in steps)


def test_a_release_is_tried_and_published_without_a_secret() -> None:
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert (jobs["try"]["needs"], jobs["publish"]["needs"]) == ("build", "try")
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and "secrets." not in text
    assert {*jobs["try"]["strategy"]["matrix"]["os"]} == {"macos-15", "ubuntu-24.04"}


def test_issue_templates_ask_for_what_doctor_says() -> None:
    files = [*(ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")]
    forms = [yaml.safe_load(f.read_text()) for f in files if f.name != "config.yml"]
    assert len(forms) == 3
    for form in forms:
        parts = [p for p in form["body"] if p["type"] != "markdown"]
        assert len({p["id"] for p in parts}) == len(parts)
        asked = [p for p in parts if "doctor --json" in p["attributes"]["label"]]
        assert asked and all(p["validations"]["required"] for p in asked)


def test_reports_that_were_sent_become_a_table(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"schema": "x"}')
    sent = [*(ROOT / "docs" / "report").glob("*.json"), tmp_path / "half.json"]
    command = [sys.executable, str(ROOT / "benchmarks" / "reports.py"), *map(str, sent)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "half.json: left out" in done.stderr
    head, line, *rows = done.stdout.splitlines()
    assert len(rows) == len(sent) - 1
    assert all(r.count("|") == head.count("|") == line.count("|") for r in rows)
    assert "| demo | 10MB | 25% |" in done.stdout


def test_pre_commit_runs_the_linters_that_continuous_integration_runs() -> None:
    """From the environment, so that both have the versions of the dev extra."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    tools = [x.removeprefix(".venv/bin/") for x in lines if x.startswith(".venv/bin/")]
    linters = [re.sub(r" --check| \.", "", t) for t in tools if not t.startswith("pip")]
    assert [hook["entry"] for hook in hooks] == linters
    dev = PROJECT["optional-dependencies"]["dev"]
    assert {"pre-commit", *(x.split()[0] for x in linters)} <= set(dev)


def test_versions_agree_and_what_they_mean_is_said() -> None:
    assert mlx_streamexperts.__version__ == PROJECT["version"]
    assert f"## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
    assert "Semantic versioning." in (ROOT / "CONTRIBUTING.md").read_text()
    assert "## Reporting" in (ROOT / "SECURITY.md").read_text()


def test_every_test_that_the_table_of_faults_names_exists() -> None:
    text = (ROOT / "docs" / "faults.md").read_text()
    named = re.findall(r"`(test_\w+)\.py::(\w+)`", text)
    assert len(named) > 40
    known: dict[str, set[str]] = {}
    for file, test in named:
        if file not in known:
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text())
            known[file] = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        assert test in known[file], f"{file}.py has no {test}"

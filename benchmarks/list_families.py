"""List every mixture-of-experts family of the installed mlx-lm and mlx-vlm: streams, or is refused.

    python benchmarks/list_families.py            # a minute or two
    python benchmarks/list_families.py --write    # the same, and the table of docs/models.md anew

The exit status is 1 if a family is unknown.

A family is a module of mlx-lm, or a package of mlx-vlm, whose source builds experts out of
`switch_layers`. Each tiny configuration in tests/families.py and tests/vlm_families.py is loaded
through `patch`, 4-bit, as a user would: it streams, or the refusal says why. A family is unknown
if no configuration builds its classes and no table there says why it has none.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_streamexperts import StreamConfig, UnsupportedModelError, patch
from mlx_streamexperts._progress import progress_bar

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
import families as lm  # noqa: E402
import vlm_families as vlm  # noqa: E402

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"
LIBRARIES = ("mlx-lm", "mlx-vlm")
STREAMS, REFUSED, UNKNOWN = "streams", "refused", "unknown"
_SOURCE = re.compile(r"\bswitch_layers\b|\bSwitch(GLU|MLP|Linear)\(")
_NO_FAMILY = {"switch_layers"}
_OWN_EXPERTS = {"dbrx"}  # experts without a switch linear
_CONFIG = StreamConfig(progress=False)


@dataclass
class Family:
    """What is known of a family in one library.

    Attributes:
        status: `STREAMS`, `REFUSED` or `UNKNOWN`.
        why: the reason of a refusal.
        classes: names of the modules that own its switch linears.
        pictures: it has a tower for pictures.
    """

    status: str
    why: str = ""
    classes: set[str] = field(default_factory=set)
    pictures: bool = False

    def __str__(self) -> str:
        if self.status == REFUSED:
            return f"refused, because {self.why}"
        return f"{self.status} ({', '.join(sorted(self.classes))})" if self.classes else self.status


def sources(library: str) -> dict[str, str]:
    """The source of each family of an installed library, by name; {} if it is not installed."""
    name = library.replace("-", "_") + ".models"
    try:
        folder = Path(importlib.import_module(name).__path__[0])
    except ImportError:
        return {}
    if library == "mlx-lm":
        return {f.stem: f.read_text() for f in folder.glob("*.py")}
    packages = (f for f in folder.iterdir() if f.is_dir())
    return {f.name: "".join(p.read_text() for p in sorted(f.glob("*.py"))) for f in packages}


def with_experts(library: str) -> set[str]:
    """Names of the families whose source builds experts."""
    found = {n for n, text in sources(library).items() if _SOURCE.search(text)}
    return (found | (_OWN_EXPERTS & sources(library).keys())) - _NO_FAMILY


def configurations(library: str) -> dict[str, str]:
    """The tiny configurations of a library, each with the family that it belongs to."""
    if library == "mlx-lm":
        from mlx_lm.utils import MODEL_REMAPPING

        kinds = {n: c["model_type"] for n, c in {**lm.METAL_FAMILIES, **lm.FAMILIES}.items()}
        return {n: MODEL_REMAPPING.get(kind, kind) for n, kind in kinds.items()}
    from mlx_vlm.utils import get_model_type

    return {n: get_model_type(f.config) for n, f in vlm.FAMILIES.items()}


def aliases(library: str) -> dict[str, str]:
    """Further names of families (`model_type`), each with the module that loads it."""
    names: dict[str, str] = {}
    with contextlib.suppress(ImportError):
        utils: Any = importlib.import_module(library.replace("-", "_") + ".utils")
        names = getattr(utils, "MODEL_REMAPPING", {})
    return {a: f for a, f in names.items() if a.lower() != f.lower()}


def examine(library: str, name: str, folder: Path) -> tuple[Family, set[str]]:
    """Load a tiny configuration through `patch`; returns the result and the modules it came from.

    Args:
        library: one of `LIBRARIES`.
        name: one of its configurations.
        folder: where to write the checkpoint.
    """
    utils: Any = importlib.import_module(library.replace("-", "_") + ".utils")
    if library == "mlx-lm":
        lm.build(name, folder)
    else:
        vlm.make_vlm_checkpoint(folder, name, bits=4)
    stock = utils.load_model(folder, lazy=True)
    model: nn.Module = stock[0] if isinstance(stock, tuple) else stock
    found, modules = Family(STREAMS), dict(model.named_modules())
    origins = set()
    for path in vlm.switches(model) if library == "mlx-vlm" else lm.switches(model):
        found.classes.add(type(modules[path]).__name__)
        for owner in (path, path.rpartition(".")[0]):
            origins |= {k.__module__ for k in type(modules[owner]).__mro__}
    found.pictures = name in vlm.OMITTED or any(
        part in path for path in modules for part in ("vision", "visual", "vit")
    )
    try:
        with patch(cache="1GB", config=_CONFIG) as patched:
            utils.load_model(folder, lazy=True)
        patched.streams[0].close()
    except UnsupportedModelError as e:
        found.status, found.why = REFUSED, reason(str(e))
    return found, origins


def reason(message: str) -> str:
    """A refusal in few words."""
    if kind := re.search(r" is a (\w+), and experts of that kind", message):
        return f"its experts are called in a way of their own (`{kind[1]}`)"
    if "mlx_streamexperts.convert" in message:
        return "the library computes its tables while loading"
    return message.partition(": ")[2].partition(". ")[0]


def survey(library: str, names: set[str] | None = None) -> dict[str, Family]:
    """Every mixture-of-experts family of a library, by name.

    Args:
        library: one of `LIBRARIES`.
        names: examine only these families; default: all.
    """
    if not sources(library):
        return {}
    kinds = configurations(library)
    families = with_experts(library) | set(kinds.values())
    if names is not None:
        families &= names
    todo = [(n, f) for n, f in kinds.items() if f in families]
    found: dict[str, Family] = {}
    origins: set[str] = set()
    with quiet(), progress_bar(library, sys.stderr.isatty(), len(todo), " families") as bar:
        for name, family in todo:
            with tempfile.TemporaryDirectory() as folder:
                result, modules = examine(library, name, Path(folder))
            mx.clear_cache()
            origins |= modules
            # Of several configurations of a family, the first refusal counts.
            if family not in found or found[family].status == STREAMS:
                found[family] = result
            bar.update(1)
    for name, why in (lm.NOT_BUILT if library == "mlx-lm" else vlm.NOT_BUILT).items():
        if name in families and name not in found:
            found[name] = Family(REFUSED, why.partition(":")[0])
    parts = {m.split(".")[2] for m in origins if m.startswith(library.replace("-", "_"))}
    for name in families:
        if name not in found and name not in parts:  # parts belong to families found already
            found[name] = Family(UNKNOWN)
    return {name.lower(): found[name] for name in sorted(found, key=str.lower)}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without compilation for the CPU, which takes seconds a family, and without warnings."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    mx.disable_compile()
    try:
        yield
    finally:
        mx.enable_compile()
        logging.disable(before)


def versions() -> str:
    return " and ".join(f"{x} {metadata.version(x)}" for x in LIBRARIES)


def table(found: dict[str, dict[str, Family]]) -> str:
    """The generated part of docs/models.md.

    Args:
        found: the families of each library.
    """
    lines = [
        f"With {versions()}:",
        "",
        "| family (`model_type`) | published models | mlx-lm | mlx-vlm (extra `vlm`) | pictures |",
        "|---|---|---|---|---|",
    ]
    reasons: dict[str, int] = {}

    def cell(library: str, name: str) -> str:
        family = found[library].get(aliases(library).get(name, name).lower())
        if family is None:
            return "no"
        if family.status != REFUSED:
            return family.status
        return f"refused [{reasons.setdefault(family.why, len(reasons) + 1)}]"

    rows = {name for library in LIBRARIES for name in found[library]}
    others: dict[str, set[str]] = {}
    for library in LIBRARIES:
        for alias, name in aliases(library).items():
            if alias not in rows:
                others.setdefault(name.lower(), set()).add(f"`{alias}`")
    for name in sorted(rows):
        cells = [cell(library, name) for library in LIBRARIES]
        seen = found["mlx-vlm"].get(name)
        pictures = "yes" if seen and seen.pictures and seen.status == STREAMS else "no"
        names = ", ".join([f"`{name}`", *sorted(others.get(name, ()))])
        lines.append(
            f"| {names} | {PUBLISHED.get(name, '')} | {cells[0]} | {cells[1]} | {pictures} |"
        )
    lines.append("")
    lines += [f"{number}. {why[0].upper()}{why[1:]}." for why, number in reasons.items()]
    return "\n".join(lines) + "\n"


def write_page(found: dict[str, dict[str, Family]]) -> None:
    """Replace the generated part of docs/models.md."""
    text = PAGE.read_text()
    head, _, rest = text.partition(BEGIN)
    PAGE.write_text(head + BEGIN + table(found) + END + rest.partition(END)[2])


# What people look for under a family's name: total and active parameters as their makers state.
PUBLISHED = {
    "deepseek_v3": "DeepSeek V3, R1 (671B, 37B active), Kimi K2 (1T, 32B active)",
    "deepseek_v32": "DeepSeek V3.2 (671B, 37B active)",
    "deepseek_v4": "DeepSeek V4 Flash (284B, 13B active)",
    "ernie4_5_moe": "ERNIE 4.5 (21B, 300B)",
    "glm4_moe": "GLM-4.5 (355B, 32B active), 4.5-Air (106B, 12B active)",
    "glm5_next": "GLM-5.3-Flash (321B, 18B active)",
    "glm_moe_dsa": "GLM-5 (744B, 40B active)",
    "gpt_oss": "gpt-oss (21B, 117B)",
    "kimi_k25": "Kimi K2.5 (1T, 32B active)",
    "llama4": "Llama 4 Scout (109B), Maverick (400B), 17B active",
    "minimax": "MiniMax-M2 (230B, 10B active)",
    "mixtral": "Mixtral 8x7B (47B), 8x22B (141B)",
    "qwen3_5_moe": "Qwen3.5 (397B, 17B active)",
    "qwen3_moe": "Qwen3 (30B, 3B active; 235B, 22B active)",
    "qwen3_next": "Qwen3-Next (80B, 3B active)",
    "qwen3_vl_moe": "Qwen3-VL (30B, 235B)",
    "qwen4_exp": "Qwen3.8-Flash-Next (125B, 6B active, and 51B of n-gram tables)",
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status: 1 if a family is unknown."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="update the table in docs/models.md")
    args = parser.parse_args(argv)
    found = {library: survey(library) for library in LIBRARIES}
    for library, families in found.items():
        if not families:
            print(f"{library} is not installed", file=sys.stderr)
        for name, family in families.items():
            print(f"{library:8} {name:24} {family}")
    unknown = [f"{x} {n}" for x in found for n, f in found[x].items() if f.status == UNKNOWN]
    if args.write:
        write_page(found)
    if unknown:
        print(
            f"error: unknown: {', '.join(unknown)}. CONTRIBUTING.md says how to add a family.",
            file=sys.stderr,
        )
    return 1 if unknown or not all(found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())

"""Every mixture of experts of mlx-vlm, streamed at several cache sizes and compared bit by bit.

    pip install '.[cpu,vlm]'
    python benchmarks/vlm_exactness.py --out docs/vlm-exactness.md [FAMILY ...]

Each tiny random checkpoint of `tests/vlm_families.py` is written in float32, 4 bits, mixed bits
(the last projection at 8) and 4 bits with bfloat16 activations. Stock mlx-vlm and the streamed
model run a prompt of 40 tokens, blocks of 5 and single tokens. Every logit must have the same bits,
and every cache that does not hold all experts must have missed some. Takes 7 minutes on one core.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_vlm.utils
import numpy as np

from mlx_streamexperts import StreamConfig, UnsupportedModelError, patch, stream
from mlx_streamexperts._loading import discover
from mlx_streamexperts._memory import model_graph

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import families as lm
from vlm_families import FAMILIES, METAL_FAMILIES, TEXT, make_vlm_checkpoint, picture, run

KINDS: dict[str, dict[str, Any]] = {
    "float32": {},
    "4 bits": {"bits": 4},
    "mixed bits": {"bits": "mixed"},
    "4 bits, bfloat16": {"bits": 4, "dtype": mx.bfloat16},
}
TOKENS = lm.token_stream(TEXT, 60, 0)
PROMPT = 40


@dataclass
class Result:
    """What became of one checkpoint.

    Attributes:
        reason: why it is refused or cannot run; empty otherwise.
        sizes: slots of a layer, misses, and whether every logit was the same.
        picture: whether the logits after a picture were the same; None if none was tried.
    """

    reason: str = ""
    sizes: list[tuple[int, int, bool]] = field(default_factory=list)
    picture: bool | None = None

    @property
    def good(self) -> bool:
        """Is it as promised?"""
        exact = all(same for _, _, same in self.sizes) and self.picture is not False
        missed = all(misses > 0 for _, misses, _ in self.sizes[:-1])
        return bool(self.reason) or (exact and missed)

    def __str__(self) -> str:
        if self.reason:
            return self.reason
        cells = [f"{n}: {misses}{'' if same else ' DIFFERS'}" for n, misses, same in self.sizes]
        return ", ".join(cells)


def logits(model: Any, family: str, with_picture: bool = False) -> list[np.ndarray]:
    """Logits of a prompt, then single tokens; of the prompt again, then blocks; or of a picture."""
    if not with_picture:
        singles = run(model, TOKENS[: PROMPT + 8], PROMPT)
        return singles + run(model, TOKENS[: PROMPT + 10], PROMPT, 5)
    ids, given = picture(family) or ([], {})
    tokens = np.concatenate([TOKENS[:2], ids, TOKENS[2:30]])
    return run(model, tokens, len(tokens) - 3, **given)


def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    """Are all bits equal?"""
    return all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def compare(folder: Path, family: str, kind: str) -> Result:
    """Run one checkpoint, stock and streamed at several cache sizes."""
    make_vlm_checkpoint(folder, family, **KINDS[kind])
    with patch(cache="100MB", config=StreamConfig(progress=False)):
        try:
            model = mlx_vlm.utils.load_model(folder)
        except UnsupportedModelError as e:
            return Result(f"refused: {str(e).removeprefix(f'{folder}: ')}")
    stock = mlx_vlm.utils.load_model(folder)
    expected = logits(stock, family)
    expert_stream, result = stream(model), Result()
    most = max(x.experts for x in expert_stream.layers)
    with_picture = kind == "float32" and picture(family) is not None
    for part in (0, 0.5, 1 - 1 / most, 1):
        needs = expert_stream.needs()
        counts = [max(n.minimum, int(part * n.experts)) for n in needs]
        expert_stream.resize(sum(c * n.expert_bytes for c, n in zip(counts, needs, strict=True)))
        expert_stream.reset()
        equal = same(logits(model, family), expected)
        slots = expert_stream.layers[0].cache.slots
        result.sizes.append((slots, expert_stream.stats().cache.misses, equal))
        if with_picture and part == 0:
            result.picture = same(logits(model, family, True), logits(stock, family, True))
    expert_stream.close()
    return result


def results(chosen: list[str], kind: str) -> Iterator[tuple[str, Result]]:
    """The result of each family, as they come."""
    for family in chosen:
        if family in METAL_FAMILIES and not mx.metal.is_available():
            yield family, Result(f"not run: {METAL_FAMILIES[family]}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            yield family, compare(Path(folder) / "model", family, kind)


def page(table: dict[str, dict[str, Result]]) -> str:
    """The page: a row for each family."""
    exact = sum(bool(r.sizes) and r.good for kinds in table.values() for r in kinds.values())
    ran = sum(bool(r.sizes) for kinds in table.values() for r in kinds.values())
    seen = [kinds["float32"].picture for kinds in table.values()]
    lines = [
        "# Exactness of mlx-vlm's families",
        "",
        f"Written by `python benchmarks/vlm_exactness.py` with mlx-vlm {version('mlx-vlm')}, MLX "
        f"{mx.__version__} on {mx.default_device()}.",
        "Each checkpoint is tiny and random. Stock and streamed models run a prompt of 40 tokens, "
        "blocks of 5 tokens and single tokens; all logits are compared bit by bit. A cell lists "
        "slots of a layer and the misses with them: from the fewest slots to all experts.",
        "",
        f"{exact} of {ran} checkpoints have the bits of stock mlx-vlm at every cache size, with "
        f"misses at every size but the last. After a picture, {sum(x is True for x in seen)} of "
        f"{sum(x is not None for x in seen)} families have them, with the fewest slots.",
        "",
        "| family | " + " | ".join(KINDS) + " | picture |",
        "|---" * (len(KINDS) + 2) + "|",
    ]
    for family, kinds in table.items():
        reasons = {r.reason for r in kinds.values()}
        first = kinds["float32"]
        shown = {None: "", True: "exact", False: "DIFFERS"}[first.picture]
        if len(reasons) == 1 and first.reason:
            cells = [first.reason, *[""] * len(KINDS)]
        else:
            cells = [*(str(r) for r in kinds.values()), shown]
        lines.append(f"| `{family}` | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare the families and write the page; exit with 1 if one is not as promised."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("families", nargs="*", help="families; default: all")
    parser.add_argument("--out", type=Path, help="write the page here")
    arguments = parser.parse_args()
    mx.disable_compile()  # for a CPU it compiles C++, 20 s for some families
    logging.disable(logging.WARNING)
    # The caches are stated: tracing each family's footprint would take minutes.
    discover.measure = lambda _, switches, config: model_graph._estimate(switches, config)  # type: ignore[attr-defined]
    chosen = arguments.families or list(FAMILIES)
    table: dict[str, dict[str, Result]] = {family: {} for family in chosen}
    for kind in KINDS:
        for family, result in results(chosen, kind):
            table[family][kind] = result
            with contextlib.suppress(BrokenPipeError):
                print(f"{family:24} {kind:18} {result}", flush=True)
    if arguments.out:
        arguments.out.write_text(page(table))
    bad = [f"{f}, {k}" for f, kinds in table.items() for k, r in kinds.items() if not r.good]
    if bad:
        sys.exit("not exact, or without misses: " + "; ".join(bad))


if __name__ == "__main__":
    main()

"""The tiny checkpoints are what they claim: stock mlx-vlm loads and runs them, and they route."""

import fnmatch
import inspect
import re
from pathlib import Path

import families as lm
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import vlm_families
from mlx.utils import tree_flatten
from vlm_families import (
    FAMILIES,
    METAL_FAMILIES,
    NOT_BUILT,
    OMITTED,
    TEXT,
    construct,
    make_vlm_checkpoint,
    picture,
    projections,
    run,
    switches,
)

mlx_vlm = pytest.importorskip("mlx_vlm", reason="mlx-vlm is not installed: it is the extra `vlm`")
utils = pytest.importorskip("mlx_vlm.utils")

pytestmark = [
    pytest.mark.usefixtures("not_compiled"),
    pytest.mark.skipif(
        tuple(int(n) for n in mlx_vlm.__version__.split(".")[:3]) < vlm_families.VERSION,
        reason="the list of families is that of mlx-vlm 0.7.10: older ones lack some",
    ),
]


TOKENS = lm.token_stream(TEXT, 7, 0)


def unsupported(family: str) -> str | None:
    if family in METAL_FAMILIES and not mx.metal.is_available():
        return METAL_FAMILIES[family]
    return None


def written(folder: Path) -> dict[str, mx.array]:
    return {k: v for shard in folder.glob("*.safetensors") for k, v in mx.load(str(shard)).items()}


def assert_runs(model: nn.Module) -> list[np.ndarray]:
    logits = run(model, TOKENS, 6)
    assert len(logits) == 2
    assert all(np.isfinite(part).all() for part in logits)
    assert logits[0].std() > 0.1
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_mlx_vlm_loads_and_runs_it(family: str, tmp_path: Path) -> None:
    folder = make_vlm_checkpoint(tmp_path / family, family)
    model = utils.load_model(folder)
    loaded, saved = dict(tree_flatten(model.parameters())), written(folder)
    assert loaded.keys() == saved.keys()
    assert all(mx.array_equal(loaded[name], saved[name]) for name in saved)
    if reason := unsupported(family):
        pytest.skip(reason)
    logits = assert_runs(model)
    for again in (model, utils.load_model(folder)):
        for one, other in zip(logits, run(again, TOKENS, 6), strict=True):
            assert np.array_equal(one, other)


@pytest.mark.parametrize("family", [name for name in FAMILIES if picture(name)])
def test_a_picture_changes_what_follows(family: str, tmp_path: Path) -> None:
    if reason := unsupported(family):
        pytest.skip(reason)
    model = utils.load_model(make_vlm_checkpoint(tmp_path / family, family))
    ids, given = picture(family) or ([], {})
    tokens = np.concatenate([TOKENS[:2], ids, TOKENS[2:]])
    seen = run(model, tokens, len(tokens) - 1, **given)
    blind = run(model, tokens, len(tokens) - 1)
    for one, other, again in zip(
        seen, blind, run(model, tokens, len(tokens) - 1, **given), strict=True
    ):
        assert np.isfinite(one).all()
        assert np.array_equal(one, again)
        # mistral_large3 takes deepseek_v3's language model, which ignores inputs_embeds.
        assert np.array_equal(one, other) == (family == "mistral_large3")


@pytest.mark.parametrize("bits", [pytest.param(4, marks=pytest.mark.full), "mixed"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_experts_load_as_written(family: str, bits: int | str, tmp_path: Path) -> None:
    folder = make_vlm_checkpoint(tmp_path / family, family, bits=bits)
    model = utils.load_model(folder)
    loaded, saved = dict(tree_flatten(model.parameters())), written(folder)
    assert loaded.keys() == saved.keys()
    modules = dict(model.named_modules())
    for path, names in switches(model).items():
        own = projections(names)
        for name in own:
            linear = modules[f"{path}.{name}"]
            wanted = 8 if bits == "mixed" and name == own[-1] else 4
            # muse_spark keeps the experts of its first and last layers.
            assert getattr(linear, "bits", None) == wanted or family == "muse_spark"
    if reason := unsupported(family):
        pytest.skip(reason)
    if bits == "mixed":
        assert_runs(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_recorded_of_a_family_is_so(family: str) -> None:
    facts = FAMILIES[family]
    model = construct(facts.config)
    modules = dict(model.named_modules())
    owners = [modules[path] for path in switches(model)]
    assert owners
    assert {type(owner).__name__ for owner in owners} == set(facts.switches)
    parameters = list(inspect.signature(type(owners[0]).__call__).parameters)[1:]
    if type(owners[0]).__name__ == "SwitchGLU":  # it takes more than most layers pass
        parameters = parameters[: len(facts.call)]
    assert tuple(parameters) == facts.call
    if facts.forward:
        assert model.language_model is modules[facts.forward]
        forward = inspect.signature(type(model.language_model).__call__).parameters
        assert list(forward)[1] == facts.ids or forward[facts.ids]
        assert facts.embeddings in forward
    for pattern in facts.tables:
        assert [
            path
            for path, module in modules.items()
            if fnmatch.fnmatch(path, pattern) and isinstance(module, nn.Embedding)
        ], pattern


def test_no_family_is_forgotten() -> None:
    packages = Path(mlx_vlm.__file__).parent / "models"
    source = {
        folder.name: "".join(file.read_text() for file in folder.glob("*.py"))
        for folder in packages.iterdir()
        if folder.is_dir()
    }
    experts = {name for name, text in source.items() if re.search(r"\bswitch_layers\b", text)}
    built = {utils.get_model_type(family.config) for family in FAMILIES.values()}
    # Packages that others take their language model from, and that no config names.
    parts = {"lfm2", "mistral4"}
    assert experts <= built | NOT_BUILT.keys() | parts
    assert built <= source.keys()
    assert not built & NOT_BUILT.keys()
    assert OMITTED.keys() | METAL_FAMILIES.keys() <= FAMILIES.keys()

"""What would leave the experts out is refused by name, and the model is as it was afterwards."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
import pytest
from conftest import all_experts, load_streamed
from mlx.utils import tree_flatten, tree_unflatten

from mlx_streamexperts import StreamConfig, UnsupportedModelError, stream

X = mx.array(families.token_stream(families.VOCAB, 5, seed=4))[None]


@pytest.fixture(scope="module", params=["qwen3_moe", "gpt_oss", "granitemoe"])
def folder(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Path:
    return checkpoint(request.param)


@pytest.fixture(scope="module", params=["half", "resident", "running ahead"])
def model(request: pytest.FixtureRequest, folder: Path) -> Iterator[nn.Module]:
    run_ahead = "on" if request.param == "running ahead" else "off"
    config = StreamConfig(progress=False, prefetch="off", run_ahead=run_ahead)
    model = load_streamed(folder, 1 << 40, config)
    with stream(model) as s:
        if request.param != "resident":
            s.resize(all_experts(s) // 2)
        yield model


@pytest.fixture
def experts_path(model: nn.Module) -> str:
    return stream(model).layers[-1].name


@pytest.fixture(autouse=True)
def the_model_is_as_it_was(model: nn.Module) -> Iterator[None]:
    before = model(X)
    mx.eval(before)
    yield
    assert mx.array_equal(before, model(X))


def holders(model: nn.Module) -> list[nn.Module]:
    """The model, and everything on the way to its last layer's experts, these included."""
    node: Any = model
    found = [node]
    for part in stream(model).layers[-1].name.split("."):
        node = node[int(part)] if isinstance(node, list) else node[part]
        if isinstance(node, nn.Module):
            found.append(node)
    return found


CALLS: dict[str, Callable[[nn.Module, Path], Any]] = {
    "save_weights": lambda m, out: m.save_weights(str(out / "w.safetensors")),
    "set_dtype": lambda m, out: m.set_dtype(mx.bfloat16),
    "nn.quantize": lambda m, out: nn.quantize(m, bits=8, group_size=32),
    "apply": lambda m, out: m.apply(lambda a: a),
    "deepcopy": lambda m, out: copy.deepcopy(m),
    "pickle": lambda m, out: pickle.dumps(m),
}


@pytest.mark.parametrize("what", CALLS)
def test_what_would_leave_the_experts_out(what: str, model: nn.Module, tmp_path: Path) -> None:
    """Of the model, of a layer, of a block, of the experts themselves."""
    said = "copied or pickled" if what in ("deepcopy", "pickle") else f"^{what}: .*experts"
    assert len(holders(model)) >= 4
    for module in holders(model):
        with pytest.raises(UnsupportedModelError, match=said):
            CALLS[what](module, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("strict", [True, False])
def test_experts_are_not_loaded_over(
    strict: bool, model: nn.Module, experts_path: str, folder: Path, tmp_path: Path
) -> None:
    stock, _ = mlx_lm.utils.load_model(folder)
    every: Any = tree_flatten(stock.parameters())
    some = [(k, v) for k, v in every if k.startswith(experts_path + ".")][:1]
    assert some
    file = tmp_path / "w.safetensors"
    mx.save_safetensors(str(file), dict(every))
    for weights in (every, some, str(file)):
        with pytest.raises(UnsupportedModelError, match=r"^load_weights, .*\.\d+\..*: The experts"):
            model.load_weights(weights, strict)
    for weights in (every, some):
        with pytest.raises(UnsupportedModelError, match=r"^update, "):
            model.update(tree_unflatten(weights), strict)


def test_what_leaves_the_experts_alone_works(model: nn.Module) -> None:
    before = {k: v for k, v in tree_flatten(model.parameters())}
    assert model.freeze() is model.unfreeze() is model.train() is model.eval() is model
    assert model.update(model.parameters()) is model
    trunk = list(before.items())
    assert model.load_weights(trunk) is model
    assert model.load_weights(trunk[:2], strict=False) is model
    assert model.apply(lambda a: a * 1, lambda m, k, v: k == "nothing") is model
    embedding = model.model.embed_tokens
    embedding.set_dtype(embedding.parameters().get("scales", X).dtype)  # holds no experts
    nn.quantize(model, class_predicate=lambda path, module: False)
    after: Any = tree_flatten(model.parameters())
    assert {k for k, _ in after} == set(before)
    assert mx.eval(model.parameters(), model.trainable_parameters()) is None
    assert len(model.modules()) > len(model.layers)
    assert isinstance(repr(model), str)


def test_a_filter_may_choose_what_else_there_is(model: nn.Module) -> None:
    """Norms, say; the experts have none."""
    touched: list[int] = []

    def note(a: mx.array) -> mx.array:
        touched.append(a.size)
        return a

    def norms(module: nn.Module, key: str, value: Any) -> bool:
        below = isinstance(value, (dict, list))
        return below or (isinstance(module, nn.RMSNorm) and key == "weight")

    model.apply(note, norms)
    assert len(touched) >= 2 * len(model.layers)


def block(model: nn.Module, path: str) -> Any:
    """What calls the experts at a path."""
    node: Any = model
    for part in path.split(".")[:-1]:
        node = node[int(part)] if isinstance(node, list) else node[part]
    return node


H = mx.random.normal((1, 3, families.HIDDEN), key=mx.random.key(0))
TRANSFORMS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "mx.compile": lambda m, b: mx.compile(lambda x: m(x))(X),
    "mx.vmap": lambda m, b: mx.vmap(lambda h: b(h))(mx.stack([H, 2 * H])),
    "mx.grad": lambda m, b: mx.grad(lambda h: b(h).sum())(H),
    "mx.jvp": lambda m, b: mx.jvp(lambda h: b(h), [H], [H])[1][0],
    "nn.value_and_grad": lambda m, b: nn.value_and_grad(m, lambda x: m(x).sum())(X),
}


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("what", TRANSFORMS)
def test_transformations_say_so(
    what: str, model: nn.Module, experts_path: str, folder: Path
) -> None:
    """Where nothing has to be read they may do what stock's do; a trainer never gets anything."""
    try:
        got = outcome(what, model, experts_path)
    except UnsupportedModelError as e:
        said = str(e)
        assert "inside mx.compile, mx.vmap or a gradient" in said
        assert "--adapter-path" in said
    else:
        assert all(x.resident for x in stream(model).layers)
        assert what != "nn.value_and_grad"
        expected = outcome(what, mlx_lm.utils.load_model(folder)[0], experts_path)
        assert isinstance(got, str) == isinstance(expected, str)
        assert got == expected if isinstance(got, str) else mx.allclose(got, expected, rtol=1e-4)


def outcome(what: str, model: nn.Module, path: str) -> Any:
    """What comes of it, or what MLX says that it cannot do yet."""
    try:
        result = TRANSFORMS[what](model, block(model, path))
        mx.eval(result)
    except RuntimeError as e:
        return str(e)
    return result

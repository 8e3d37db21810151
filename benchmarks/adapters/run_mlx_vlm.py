"""mlx-vlm's own expert offload, from the folder that `python -m mlx_vlm.moe_offload` writes.

Its budget is one for all layers; an expert is the lazily loaded arrays of its own tensors, stacked
anew for each call. Prompts go through mlx-lm's `generate_step` in the chunks of all others.
"""

from pathlib import Path
from typing import Any

from measure import Session, main
from mlx_vlm.moe_offload import repack
from mlx_vlm.utils import load_model


class TextModel:
    """mlx-vlm's model as mlx-lm's functions call one: tokens in, logits out."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.layers, self.make_cache = model.layers, model.make_cache

    def __call__(self, tokens: Any, cache: Any = None) -> Any:
        return self._model(tokens, cache=cache).logits


class OffloadSession(Session):
    def __init__(self, model: Any, files: list[Path]) -> None:
        super().__init__(TextModel(model), files)
        self.store = model.moe_offload_store

    def slot_bytes(self) -> int:
        return int(self.store.stats()["resident_bytes"])

    def report(self) -> dict:
        return self.store.stats()


def open_session(job: dict) -> Session:
    folder = Path(job["store"])
    model = load_model(folder, expert_cache_gb=job["cache_bytes"] / 1e9)
    return OffloadSession(model, sorted((folder / "experts").iterdir()))


def pack(job: dict) -> None:
    repack(job["checkpoint"], job["store"])


if __name__ == "__main__":
    main(open_session, pack)

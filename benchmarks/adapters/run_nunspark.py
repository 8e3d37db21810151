"""nunspark: its own engine over its own pieces, one file an expert.

Its budget is for everything it streams, experts in a share of it; here the share is set so that its
expert region has the given bytes, all layers together, and its dense parts lie pinned beside it.
Besides it holds one whole layer of experts as scatter buffers, which are not counted.
Options: `lookahead` (its prefetch by the next layer's router), `bulk_warm` (parallel reads of a
decode step's experts).
"""

import tempfile
from pathlib import Path

import mlx.core as mx
from measure import Session, main
from nunspark.engine import StreamingEngine
from nunspark.generate import _open_kv_store, _prefill
from nunspark.manifest import Manifest
from nunspark.packer import pack as nunspark_pack


class NunsparkSession(Session):
    def __init__(self, engine: StreamingEngine, files: list[Path]) -> None:
        self.engine, self.files = engine, files
        self.kv = _open_kv_store(engine, tempfile.mkdtemp(), 10**12, True, None)

    def prefill(self, tokens: list[int]) -> mx.array:
        logits = _prefill(self.engine, tokens, self.kv)[0]
        mx.eval(logits)
        return logits

    def step(self, token: int) -> mx.array:
        logits = self.engine.forward(mx.array([[token]]), kv=self.kv)[0, -1]
        mx.eval(logits)
        return logits

    def slot_bytes(self) -> int:
        return self.engine.cache._expert_bytes + self.engine.cache._staging_bytes

    def report(self) -> dict:
        buffers = self.engine._scatter_bufs or {}
        return {
            "expert_region_bytes": self.engine.cache._expert_budget,
            "scatter_buffer_bytes": sum(b.nbytes for b in buffers.values()),
            **{k: v for k, v in self.engine.cache.stats().items() if not k.startswith("_")},
        }


def open_session(job: dict) -> Session:
    root = Path(job["store"])
    manifest = Manifest.load(root / "manifest.json")
    pieces = [p for p in manifest.pieces if p.piece_id.startswith("layer_")]
    files = [root / p.file for p in pieces if "_expert_" in p.piece_id]
    dense = sum((root / p.file).stat().st_size for p in pieces if "_expert_" not in p.piece_id)
    budget = job["cache_bytes"] + dense + 1024
    options = job["options"]
    engine = StreamingEngine(
        root, manifest, budget, expert_cache_frac=(job["cache_bytes"] + 0.5) / budget,
        lookahead_prefetch=options.get("lookahead", False),
        decode_bulk_warm=options.get("bulk_warm", False),
    )  # fmt: skip
    return NunsparkSession(engine, files)


def pack(job: dict) -> None:
    nunspark_pack(job["checkpoint"], job["store"])


if __name__ == "__main__":
    main(open_session, pack)

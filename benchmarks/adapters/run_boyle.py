"""boyle, reading the checkpoint, or its colocated store (`boyle build`).

Its `load` sets the macOS flag F_NOCACHE on every file, which Python on Linux does not know, so that
it stops with AttributeError. Its other path (memmap) is 4 times slower by its own account. To
measure its fast path, the missing constant is given a harmless meaning: F_SETFD with the argument 1
sets close-on-exec, and reads then go through the page cache. The slots of each layer are given to
`apply_expert_offload` directly, since `load` takes a budget for the whole process.
"""

import fcntl
from pathlib import Path

import mlx.core as mx
import mlx_lm.utils
from boyle import _runtime as boyle
from boyle.build import build_store
from measure import RefusedError, Session, expert_files, main, no_read_ahead


class BoyleSession(Session):
    def switches(self) -> list:
        return [m for m in self.model.modules() if isinstance(m, boyle.OffloadSwitchGLU)]

    def slot_bytes(self) -> int:
        parts = [p for m in self.switches() for t in m.cache.resident.values() for p in t]
        return sum(p.nbytes for p in parts if p is not None)

    def report(self) -> dict:
        return boyle.offload_stats(self.model)


def open_session(job: dict) -> Session:
    no_read_ahead(".bin" if job.get("store") else ".safetensors")
    if not hasattr(fcntl, "F_NOCACHE") and job["options"].get("shim", True):
        fcntl.F_NOCACHE = fcntl.F_SETFD
    folder, store = Path(job["checkpoint"]), job.get("store")
    model, _ = mlx_lm.utils.load_model(folder, lazy=True)
    layers = job["layers"]
    wrapped = boyle.apply_expert_offload(
        model, folder, capacity_plan=[job["slots"]] * layers, io_workers=8, direct=True,
        colo_dir=store,
    )  # fmt: skip
    if wrapped != layers:
        _, reason = boyle._resolve_store_view(
            *next(
                (glu, boyle.CheckpointExpertStore(folder), path)
                for _, _, glu, path in boyle._iter_switch_glus(model)
            )
        )
        raise RefusedError(f"streams {wrapped} of {layers} layers, the rest resident: {reason}")
    mx.eval(model.parameters())
    return BoyleSession(model, [Path(store) / "colo.bin"] if store else expert_files(folder))


def pack(job: dict) -> None:
    build_store(job["checkpoint"], job["store"], progress=lambda *_: None)


if __name__ == "__main__":
    main(open_session, pack)

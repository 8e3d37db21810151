"""mlx-streamexperts, in place or from a packed store.

Options: `bypass` (page cache), anything else of `StreamConfig` by its name.
"""

from pathlib import Path

import mlx_lm.utils
from measure import Session, expert_files, main

from mlx_streamexperts import StreamConfig, patch, stream
from mlx_streamexperts.pack import main as pack_main


class OurSession(Session):
    def slot_bytes(self) -> int:
        return sum(x.cache.slots * x.expert_bytes for x in stream(self.model).layers)

    def report(self) -> dict:
        s = stream(self.model).stats()
        return {
            "hits": s.cache.hits, "misses": s.cache.misses, "bytes": s.read.bytes,
            "prefetched": s.cache.prefetched, "wasted": s.cache.wasted,
            "wait_seconds": s.read.wait_seconds, "seconds": s.seconds,
            "waves": s.waves, "overlapped": s.overlapped,
            "bypasses_page_cache": stream(self.model).bypasses_page_cache,
            "drive_bytes": s.read.drive_bytes,
        }  # fmt: skip


def open_session(job: dict) -> Session:
    folder, store = Path(job["checkpoint"]), job.get("store")
    config = StreamConfig(cache=job["cache_bytes"], store=store, progress=False, **job["options"])
    with patch(config=config):
        model, _ = mlx_lm.utils.load_model(folder)
    files = sorted(p for p in Path(store).iterdir() if p.is_file()) if store else None
    copies = [f for m in job["options"].get("mirrors", ()) for f in expert_files(Path(m))]
    return OurSession(model, [*(files or expert_files(folder)), *copies])


def pack(job: dict) -> None:
    arguments = ["--model", job["checkpoint"], "--out", job["store"], "--no-progress"]
    if pack_main(arguments):
        raise RuntimeError("packing failed")


if __name__ == "__main__":
    main(open_session, pack)

"""bigrig, from its packed blob, which is its default for streamed models.

Options: `views` (its default: a resident expert is a view of the file, decode and prefill compute
expert by expert) or not (its `--slot-pool`: slots and gathers).
"""

import json
import mmap
import os
import sys
from pathlib import Path

JOB = json.loads(Path(sys.argv[1]).read_text())
for name in ("BIGRIG_VIEWS_PREFILL", "BIGRIG_VIEWS_DECODE"):
    os.environ[name] = "1" if JOB["options"].get("views", True) else "0"
os.environ["BIGRIG_HOME"] = str(Path(JOB["store"]).parent / "bigrig-home")

from bigrig_engine import stream  # noqa: E402
from measure import Session, main, no_read_ahead  # noqa: E402


class BigrigSession(Session):
    def __init__(self, model, files, handle) -> None:
        super().__init__(model, files)
        self.handle = handle

    def slot_bytes(self) -> int:
        return sum(p.nbytes() for p in self.handle.pools)

    def forget(self) -> None:
        """Only experts that its pool does not hold: the others are its cache."""
        regions = self.handle.manifest["regions"]
        for mapped, *_ in self.handle.fetcher.store._maps.values():
            for pool in self.handle.pools:
                for expert in range(pool.n_experts):
                    if pool.g2s[expert] < 0:
                        start, length = regions[f"{pool.layer}:{expert}"]
                        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
                        whole = (start + length - first) // mmap.PAGESIZE * mmap.PAGESIZE
                        mapped.madvise(mmap.MADV_DONTNEED, first, whole)

    def report(self) -> dict:
        return self.handle.stats()


def open_session(job: dict) -> Session:
    no_read_ahead(".blob")
    blob = os.path.join(job["store"], "experts.blob")
    model, _, handle = stream.load_streaming(
        job["checkpoint"], blob, capacity=job["slots"], threads=8, verbose=False
    )
    return BigrigSession(model, [Path(blob)], handle)


def pack(job: dict) -> None:
    os.makedirs(job["store"], exist_ok=True)
    stream.ensure_packed(job["checkpoint"], os.path.join(job["store"], "experts.blob"), False)


if __name__ == "__main__":
    main(open_session, pack)

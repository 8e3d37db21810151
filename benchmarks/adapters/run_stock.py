"""Stock mlx-lm with everything resident."""

from pathlib import Path

import mlx_lm.utils
from measure import Session, expert_files, main


def open_session(job: dict) -> Session:
    model, _ = mlx_lm.utils.load_model(Path(job["checkpoint"]))
    return Session(model, expert_files(Path(job["checkpoint"])))


if __name__ == "__main__":
    main(open_session)

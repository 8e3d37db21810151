"""The headers of a model, without its weights.

A Hub repository's safetensors headers are fetched by ranged requests and written into sparse files
of the true size, so that everything that works on a local folder's headers works on them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfFileSystem
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from mlx_lm.utils import hf_repo_to_path

from .._errors import CheckpointError
from .checkpoint import MAX_HEADER_BYTES

SMALL_FILES = (".json", ".py", ".jinja", ".txt", ".model", ".tiktoken")


@contextmanager
def had(path_or_hf_repo: str | Path, otherwise: str) -> Iterator[None]:
    """Something of the Hub's is fetched.

    Args:
        path_or_hf_repo: of what.
        otherwise: what to say of it where it cannot be had; the reason follows.

    Raises:
        CheckpointError: it cannot be had.
    """
    try:
        yield
    except (HfHubHTTPError, HFValidationError, OSError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(f"{path_or_hf_repo} {otherwise}: {reason}") from e


@contextmanager
def headers_only(path_or_hf_repo: str) -> Iterator[tuple[Path, bool]]:
    """A folder with the model's headers and small files.

    Args:
        path_or_hf_repo: a model folder, or a Hugging Face repository.

    Yields:
        The folder, and whether it holds the weights too: a local folder or a repository that has
        been downloaded is used as it is; else a temporary folder is made, and removed at the end.

    Raises:
        CheckpointError: it is neither, or a header cannot be what it claims.
    """
    if (local := _local(path_or_hf_repo)) is not None:
        yield local, True
        return
    folder = Path(tempfile.mkdtemp(prefix="mlx-streamexperts-headers-"))
    try:
        with had(
            path_or_hf_repo, "is neither a model folder nor a repository whose headers can be had"
        ):
            _fetch(path_or_hf_repo, folder)
        yield folder, False
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _local(path_or_hf_repo: str) -> Path | None:
    """The folder with the weights, if they are on this machine."""
    if Path(path_or_hf_repo).exists():
        return Path(path_or_hf_repo)
    try:
        return hf_repo_to_path(path_or_hf_repo)
    except (OSError, HFValidationError):  # not in the cache, or only in part
        return None


def _fetch(repo: str, folder: Path) -> None:
    hub = HfFileSystem()
    for entry in cast(list[dict[str, Any]], hub.ls(repo, detail=True)):
        name, size = Path(entry["name"]).name, int(entry["size"] or 0)
        if entry["type"] != "file":
            continue
        if name.startswith("model") and name.endswith(".safetensors"):
            # Blocks of 1 MiB: a header of a few hundred kilobytes is one request.
            with hub.open(entry["name"], "rb", block_size=1 << 20) as remote:
                start = remote.read(8)
                length = int.from_bytes(start, "little")
                if length > min(MAX_HEADER_BYTES, max(0, size - 8)):
                    raise CheckpointError(
                        f"{repo}/{name}: the header claims {length} bytes; not a safetensors file"
                    )
                header = remote.read(length)
            with (folder / name).open("wb") as local:
                local.write(start + header)
                local.truncate(size)
        elif name.endswith(SMALL_FILES) and size < MAX_HEADER_BYTES:
            (folder / name).write_bytes(hub.cat_file(entry["name"]))

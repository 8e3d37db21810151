"""A model's safetensors headers without its weights.

The headers of a Hub repository are fetched by ranged requests and written into sparse files of the
true size, so that all code that reads the headers of a local folder can read these.
"""

from __future__ import annotations

import re
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

_HUB_ERRORS: Any = HfHubHTTPError.__bases__  # the HTTP library's: no connection, for example
_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")  # ORG/NAME; everything else is a path
SMALL_FILES = (".json", ".py", ".jinja", ".txt", ".model", ".tiktoken")


@contextmanager
def fetching(path_or_hf_repo: str | Path, otherwise: str) -> Iterator[None]:
    """Turn errors of fetching from the Hub into a `CheckpointError`.

    Args:
        path_or_hf_repo: where the message starts.
        otherwise: how it goes on; the reason follows.

    Raises:
        CheckpointError: something cannot be fetched.
    """
    if not _REPOSITORY.fullmatch(str(path_or_hf_repo)) and not Path(path_or_hf_repo).exists():
        raise CheckpointError(f"{path_or_hf_repo}: there is no such folder")
    try:
        yield
    except (*_HUB_ERRORS, HFValidationError, OSError) as e:
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise CheckpointError(f"{path_or_hf_repo} {otherwise}: {reason}") from e


@contextmanager
def headers_only(path_or_hf_repo: str) -> Iterator[tuple[Path, bool]]:
    """Make a folder with the model's headers and small files.

    A local folder or a repository that has been downloaded is used as it is. Otherwise a temporary
    folder is made, and removed at the end.

    Args:
        path_or_hf_repo: a model folder, or a Hugging Face repository.

    Yields:
        The folder, and whether it holds the weights too.

    Raises:
        CheckpointError: it is neither, or a header is not what it claims to be.
    """
    if (local := _local(path_or_hf_repo)) is not None:
        yield local, True
        return
    folder = Path(tempfile.mkdtemp(prefix="mlx-streamexperts-headers-"))
    try:
        with fetching(
            path_or_hf_repo, "is neither a model folder nor a repository that can be fetched"
        ):
            _fetch(path_or_hf_repo, folder)
        yield folder, False
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _local(path_or_hf_repo: str) -> Path | None:
    """The folder with the weights, if it is on this machine."""
    if Path(path_or_hf_repo).exists():
        return Path(path_or_hf_repo)
    try:
        return hf_repo_to_path(path_or_hf_repo)
    except (OSError, HFValidationError):  # not in the cache, or only partly
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

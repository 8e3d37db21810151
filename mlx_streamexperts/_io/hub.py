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

from huggingface_hub.errors import HFValidationError
from mlx_lm.utils import hf_repo_to_path

from .._errors import CheckpointError
from .checkpoint import MAX_HEADER_BYTES, is_weights, read_index
from .remote import HUB_ERRORS, Repository, first_line

_REPOSITORY = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(@[\w./-]+)?")  # ORG/NAME, @REVISION; else a path
_HEADER_GUESS = 1 << 20  # a header of a few hundred kilobytes is one request
SMALL_FILES = (".json", ".jsonl", ".py", ".jinja", ".txt", ".model", ".tiktoken")


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
    except (*HUB_ERRORS, HFValidationError, OSError) as e:
        raise CheckpointError(f"{path_or_hf_repo} {otherwise}: {first_line(e)}") from e


@contextmanager
def headers_only(path_or_hf_repo: str) -> Iterator[tuple[Path, bool]]:
    """Make a folder with the model's headers and small files.

    A local folder or a repository that has been downloaded is used as it is. Otherwise a temporary
    folder is made, and removed at the end. A repository of which only a part was downloaded, such
    as the tokenizer, counts as downloaded if the Hub cannot be reached.

    Args:
        path_or_hf_repo: a model folder, or a Hugging Face repository.

    Yields:
        The folder, and whether it holds the weights too.

    Raises:
        CheckpointError: it is neither, or a header is not what it claims to be.
    """
    local = _local(path_or_hf_repo)
    if local is not None and (Path(path_or_hf_repo).exists() or _is_whole(local)):
        yield local, True
        return
    temporary = Path(tempfile.mkdtemp(prefix="mlx-streamexperts-headers-"))
    folder = temporary
    try:
        try:
            with fetching(
                path_or_hf_repo, "is neither a model folder nor a repository that can be fetched"
            ):
                fetch_headers(Repository(path_or_hf_repo), temporary)
        except CheckpointError:
            if local is None:
                raise
            folder = local
        yield folder, folder is local
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _local(path_or_hf_repo: str) -> Path | None:
    """The folder of a model, if it is on this machine; of a repository perhaps only a part."""
    if Path(path_or_hf_repo).exists():
        return Path(path_or_hf_repo)
    try:
        return hf_repo_to_path(path_or_hf_repo)
    except (OSError, HFValidationError):  # not in the cache, or only partly
        return None


def _is_whole(folder: Path) -> bool:
    """Does a downloaded repository have weights, all those that its index names among them?"""
    shards = any(is_weights(file.name) for file in folder.iterdir())
    return shards and all((folder / name).exists() for name in read_index(folder).values())


def fetch_headers(repository: Repository, folder: Path) -> None:
    """Write a repository's headers and small files into a folder; other bytes are holes.

    Raises:
        CheckpointError: a header is not what it claims to be, or as `Repository.read`.
    """
    for name, file in sorted(repository.files.items()):
        if is_weights(name):
            data = repository.read(name, 0, min(_HEADER_GUESS, file.size))
            end = 8 + int.from_bytes(data[:8], "little")
            if end > min(8 + MAX_HEADER_BYTES, file.size):
                raise CheckpointError(
                    f"{repository.name}/{name}: the header claims {end - 8} bytes; not a "
                    "safetensors file"
                )
            if end > len(data):
                data += repository.read(name, len(data), end)
            with (folder / name).open("wb") as local:
                local.write(data[:end])
                local.truncate(file.size)
        elif name.endswith(SMALL_FILES) and file.size < MAX_HEADER_BYTES:
            (folder / name).write_bytes(repository.read(name))

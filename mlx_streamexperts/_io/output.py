"""An output folder: one process writes it at a time, and each file in it is whole or not there.

Two converters that resume the same folder would each write the other's unfinished shards. A lock
that the system drops with its process keeps them apart, so that none is left of a killed one.
"""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .._errors import StreamError
from .._osinfo import try_lock

LOCK = ".mlx-streamexperts.lock"


@contextmanager
def exclusive(folder: Path, doing: str) -> Iterator[None]:
    """Create `folder` and be the only one that writes into it, in this process or any other.

    The lock's file goes when the work ends, and so does a folder that was created and stayed empty.

    Args:
        folder: where output goes.
        doing: what others are told is going on, for example "converting".

    Raises:
        StreamError: another process or thread is writing there (says which), or the folder cannot
            be written.
    """
    created = [p for p in (folder, *folder.parents) if not p.exists()]
    fd = _acquire(folder / LOCK)
    try:
        if fd is not None:
            os.ftruncate(fd, 0)  # what a killed process left
            os.pwrite(fd, f"{doing}, process {os.getpid()}".encode(), 0)
        yield
    finally:
        if fd is not None:
            (folder / LOCK).unlink(missing_ok=True)  # before the lock is gone: it may be another's
            os.close(fd)
        with suppress(OSError):  # it holds something now
            for path in created:
                path.rmdir()


def check_not_written(folder: Path, purpose: str) -> None:
    """Refuse a source that another process is still writing.

    Raises:
        StreamError: it is; says by which process.
    """
    try:
        fd = try_lock(folder / LOCK, create=False)
    except OSError:  # no lock there, or a folder that only may be read: nobody is writing
        return
    if fd is None:
        raise StreamError(_busy(folder / LOCK, f"wait for it before {purpose}"))
    os.close(fd)


def _acquire(file: Path) -> int | None:
    """The lock's descriptor; None on a file system that has no locks."""
    while True:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            fd = try_lock(file)
        except FileNotFoundError:  # another one that ended took its empty folder along
            continue
        except OSError as e:
            if e.filename is not None:  # locking itself names none
                raise StreamError(f"{e.filename}: cannot be written: {e.strerror}") from e
            warnings.warn(
                f"{file.parent}: this file system has no locks ({e.strerror}); see to it that "
                "nothing else writes there",
                stacklevel=2,
            )
            return None
        if fd is None:
            raise StreamError(_busy(file, "wait for it, or choose another folder"))
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), file.stat()):
                return fd
        os.close(fd)  # its owner removed it between our opening and locking it


def _busy(file: Path, advice: str) -> str:
    who = ""
    with suppress(OSError):
        who = file.read_text(errors="replace")[:200]
    return f"{file.parent}: in use ({who or 'another process is starting there'}): {advice}"


UNWRITTEN = "the recording could not be written ({}), and there is none: make room, record again"

_claimed: set[str] = set()
_claims = threading.Lock()


def claim(file: Path) -> Path:
    """Be the only recording of this process into a file, until `release`.

    Returns:
        What it is called until it is whole.

    Raises:
        StreamError: another one is under way.
    """
    with _claims:
        if os.path.abspath(file) in _claimed:
            raise StreamError(
                f"{file}: another recording into it is under way: choose another name"
            )
        _claimed.add(os.path.abspath(file))
    return partial_name(file)


def release(file: Path) -> None:
    """Undo `claim`."""
    with _claims:
        _claimed.discard(os.path.abspath(file))


@contextmanager
def whole(file: Path) -> Iterator[Path]:
    """Write a file under another name first: it is whole, or as it was before.

    Yields:
        That name. The file there is put in place at the end; after an error it goes.
    """
    partial = partial_name(file)
    try:
        yield partial
        partial.replace(file)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def partial_name(file: Path) -> Path:
    """What a file is called until it is whole."""
    return file.with_name(file.name + ".partial")


def write_json(file: Path, content: dict[str, Any], indent: int | None = 4) -> None:
    """Under a temporary name first: the file is whole or not there."""
    with whole(file) as partial, partial.open("w") as f:
        json.dump(content, f, indent=indent)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` last through a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

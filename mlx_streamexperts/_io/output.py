"""Output folders and files: one process writes a folder at a time, and no file is half written.

Two converters that resume the same folder would overwrite each other's unfinished shards. The lock
that keeps them apart belongs to the process, so the system drops it when the process is killed.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .._errors import StreamError

_ATTEMPTS = 100  # to lock a folder that others keep removing
LOCK = ".mlx-streamexperts.lock"


@contextmanager
def exclusive(folder: Path, doing: str) -> Iterator[None]:
    """Create `folder` and keep every other writer out of it, in this process and others.

    The lock file is removed at the end, and so are folders that were created and stayed empty.

    Args:
        folder: where output goes.
        doing: what others are told, for example "converting".

    Raises:
        StreamError: another process or thread is writing there (the message says which), or the
            folder cannot be written.
    """
    created = [p for p in (folder, *folder.parents) if not p.exists()]
    fd = _acquire(folder / LOCK)
    try:
        if fd is not None:
            os.ftruncate(fd, 0)  # a killed process may have left its name
            os.pwrite(fd, f"{doing}, process {os.getpid()}".encode(), 0)
        yield
    finally:
        if fd is not None:
            # While the lock is held; afterwards the file may be another writer's.
            (folder / LOCK).unlink(missing_ok=True)
            os.close(fd)
        with suppress(OSError):  # it is not empty
            for path in created:
                path.rmdir()


def check_not_written(folder: Path, purpose: str) -> None:
    """Refuse a source that another process is still writing.

    Raises:
        StreamError: another process is writing it; the message says which.
    """
    try:
        fd = try_lock(folder / LOCK, create=False)
    except OSError:  # there is no lock file, or the folder is read-only: nobody is writing
        return
    if fd is None:
        raise StreamError(_busy(folder / LOCK, f"wait for it before {purpose}"))
    os.close(fd)


def try_lock(file: Path, create: bool = True) -> int | None:
    """Take the lock of a file. The system drops it when this process ends or is killed.

    Args:
        file: its content does not matter.
        create: create the file if it is missing; otherwise it is opened for reading only.

    Returns:
        A descriptor that holds the lock until it is closed; None if another descriptor holds it, of
        this process or another.

    Raises:
        OSError: the file cannot be opened, or its file system has no locks.
    """
    fd = os.open(file, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    except BaseException:
        os.close(fd)
        raise
    return fd


def _acquire(file: Path) -> int | None:
    """A descriptor that holds the lock; None on a file system without locks."""
    for attempt in itertools.count():
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            fd = try_lock(file)
        except FileNotFoundError as e:
            if attempt == _ATTEMPTS:  # so do some file systems say that they take no folders
                raise StreamError(f"{file.parent}: cannot be created: {e.strerror}") from e
            continue  # another writer ended and removed its empty folder
        except OSError as e:
            if e.filename is not None:  # errors of locking itself name no file
                raise StreamError(f"{e.filename}: cannot be written: {e.strerror}") from e
            warnings.warn(
                f"{file.parent}: this file system has no locks ({e.strerror}); make sure that "
                "nothing else writes there",
                stacklevel=2,
            )
            return None
        if fd is None:
            raise StreamError(_busy(file, "wait for it, or choose another folder"))
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), file.stat()):
                return fd
        os.close(fd)  # its owner removed the file after we opened it and before we locked it
    raise AssertionError


def _busy(file: Path, advice: str) -> str:
    who = ""
    with suppress(OSError):
        who = file.read_text(errors="replace")[:200]
    return f"{file.parent}: in use ({who or 'another process is starting there'}): {advice}"


UNWRITTEN = "the recording could not be written ({}) and is lost: make room, record again"

_claimed: set[str] = set()
_claims = threading.Lock()


def claim(file: Path) -> Path:
    """Reserve a file for one recording of this process, until `release`.

    Returns:
        The name to write to until the recording is complete.

    Raises:
        StreamError: another recording into the file is under way.
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
    """Replace a file completely or not at all, by writing under another name first.

    Yields:
        That name. The file there is moved into place at the end, and removed after an error.
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
    """Name of a file until it is complete."""
    return file.with_name(file.name + ".partial")


def write_json(file: Path, content: dict[str, Any], indent: int | None = 4) -> None:
    """Write a JSON file completely or not at all."""
    write_text(file, json.dumps(content, indent=indent))


def write_text(file: Path, text: str) -> None:
    """Write a file in UTF-8 completely or not at all."""
    with whole(file) as partial, partial.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` survive a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)

"""Reads byte ranges of one commit of a Hub repository.

URL, token, endpoint and HTTP session are huggingface_hub's. What arrives is never trusted: a range
is either returned whole, or an error names the repository, the file and what was wrong with the
answer. Files are written by others.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers

from .._errors import CheckpointError

_log = logging.getLogger(__name__)

HUB_ERRORS: Any = HfHubHTTPError.__bases__
"""Of the HTTP library that huggingface_hub uses: no connection, for example."""

_AT_ONCE = 8
_PIECE_BYTES = 16 << 20  # a redirect and a round trip, 0.2 s, are little beside it at 20 MB/s each
_PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that may be gone the next time
_TRIES = 9  # without a byte: 1 + 2 + 4 + ... + 60 s are three minutes
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0  # seconds


class Span(NamedTuple):
    """Bytes `begin` to `end` of a file of the repository."""

    name: str
    begin: int
    end: int


@dataclass
class RemoteFile:
    """What the Hub says about a file.

    Attributes:
        size: bytes.
        sha256: of its content, in hexadecimal; None if the Hub does not know it (small files).
        etag: what the Hub's answers call this content; None before the first.
    """

    size: int
    sha256: str | None
    etag: str | None = None


class Repository:
    """One commit of a Hub repository: whatever is uploaded later is not seen.

    Args:
        repo: name of the repository, if wanted with `@` and a branch, tag or commit.

    Attributes:
        name: the repository's name.
        commit: the commit's hash.
        files: files at the top of the repository, by name.

    Raises:
        One of `HUB_ERRORS`: the repository cannot be reached. `hub.fetching` turns them into ours.
        CheckpointError: a file's size is none.
    """

    def __init__(self, repo: str) -> None:
        self.name, _, revision = repo.partition("@")
        self._api = HfApi()
        info = self._api.model_info(self.name, revision=revision or None, files_metadata=True)
        self.commit = str(info.sha)
        self.files: dict[str, RemoteFile] = {}
        for file in info.siblings or ():
            if "/" not in file.rfilename:
                sha256 = None if file.lfs is None else file.lfs.sha256
                size = 0 if file.size is None else file.size
                if type(size) is not int or size < 0:
                    raise CheckpointError(
                        f"{self.name}: {file.rfilename}: the Hub says that it has {size!r} bytes"
                    )
                self.files[file.rfilename] = RemoteFile(size, sha256)
        self._stopped = threading.Event()

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytearray:
        """Read a range of a file, by default all of it.

        A connection that breaks, an answer that ends early and a server that is busy are tried
        again, with growing pauses, from the first byte that is missing.

        Raises:
            CheckpointError: the server refuses, does not answer ranges, answers another range,
                names another size or other content than before, or sends nothing for three minutes.
        """
        end = self.files[name].size if end is None else end
        into = memoryview(bytearray(end - begin))
        got, fruitless, pause = 0, 0, 0.0
        while got < len(into):
            before, reason = got, "the answer ended early"
            try:
                with self._answer(name, begin + got, end) as answer:
                    if answer.status_code in _PASSING:
                        reason = f"status {answer.status_code}"
                        pause = _seconds(answer.headers.get("Retry-After"))
                    else:
                        self._check(name, answer, begin + got, end)
                        for data in answer.iter_raw():
                            if self._stopped.is_set():
                                raise _StoppedError
                            if got + len(data) > len(into):
                                raise self._refused(name, "the server sends more than was asked")
                            into[got : got + len(data)] = data
                            got += len(data)
            except OfflineModeIsEnabled as e:  # it would stay so
                raise self._refused(name, first_line(e)) from e
            except HUB_ERRORS as e:
                reason = first_line(e)
            if got == len(into):
                break
            fruitless = 0 if got > before else fruitless + 1
            if fruitless >= _TRIES:
                raise self._refused(name, f"nothing arrives any more: {reason}")
            if fruitless:
                pause = max(pause, min(_LONGEST_WAIT, _FIRST_WAIT * 2 ** (fruitless - 1)))
                _log.warning("%s: %s; trying again in %.0f s", name, reason, pause)
                if self._stopped.wait(pause):
                    raise _StoppedError
            pause = 0.0
        return into.obj  # type: ignore[return-value]

    def read_all(self, spans: Sequence[Span], skip: int = 0) -> Iterator[tuple[Span, bytearray]]:
        """Read ranges, several at once; yields their pieces in order.

        Pieces are always the same, so that a later run can go on behind the first `skip` of them.

        Raises:
            CheckpointError: as `read`.
        """
        wanted = islice(pieces(spans), skip, None)
        pending: deque[tuple[Span, Future[bytearray]]] = deque()
        self._stopped.clear()
        pool = ThreadPoolExecutor(_AT_ONCE, "hub")
        try:
            while True:
                for span in islice(wanted, _AT_ONCE - len(pending)):
                    pending.append((span, pool.submit(self.read, *span)))
                if not pending:
                    return
                span, arriving = pending.popleft()
                yield span, arriving.result()
        finally:
            self._stopped.set()  # reads under way end at the next bytes
            pool.shutdown(cancel_futures=True)
            self._stopped.clear()

    def _answer(self, name: str, begin: int, end: int) -> Any:
        headers = build_hf_headers()
        headers |= {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        url = hf_hub_url(self.name, name, revision=self.commit, endpoint=self._api.endpoint)
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        return get_session().stream("GET", url, headers=headers, timeout=timeout)

    def _check(self, name: str, answer: Any, begin: int, end: int) -> None:
        """Refuse an answer that is not the range that was asked for, of the file that it was."""
        size = self.files[name].size
        if answer.status_code == 416:
            raise self._refused(name, f"the Hub says {size:,} bytes, but the file ends earlier")
        if answer.status_code >= 400:
            why = answer.headers.get("X-Error-Message") or answer.reason_phrase
            raise self._refused(name, f"the server answers with status {answer.status_code}, {why}")
        # The Hub sends most requests on to another server, whose tags are its own.
        hub = answer.history[0].headers if answer.history else answer.headers
        etag = (hub.get("X-Linked-Etag") or hub.get("ETag") or "").removeprefix("W/").strip('"')
        known = self.files[name].etag
        if known is None:
            self.files[name].etag = etag
        elif known != etag:
            raise self._refused(
                name, f"the file changed meanwhile (its ETag was {known}, now it is {etag})"
            )
        if answer.status_code == 200 and (begin, end) == (0, size):
            length = answer.headers.get("Content-Length")
            total = None if length is None else int(length)
        elif answer.status_code == 206:
            said = answer.headers.get("Content-Range", "")
            match = re.fullmatch(r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15}|\*)", said)
            if match is None or int(match[1]) != begin or not begin <= int(match[2]) < end:
                raise self._refused(
                    name, f"asked for bytes {begin}-{end - 1}, the server sends {said!r}"
                )
            total = None if match[3] == "*" else int(match[3])
        else:
            raise self._refused(
                name,
                f"the server answers a request for a part with status {answer.status_code}: it "
                "cannot send parts of files. Download the model, then `pack --replace` it",
            )
        if total not in (None, size):
            raise self._refused(name, f"the Hub says {size:,} bytes, the server {total:,}")

    def _refused(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.name}/{name}: {why}")


def first_line(error: BaseException) -> str:
    """What went wrong; messages of HTTP libraries go on with advice for programmers."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _StoppedError(Exception):
    """Nobody waits for this read any more."""


def pieces(spans: Sequence[Span]) -> Iterator[Span]:
    """The ranges in pieces, each of which is one request."""
    for name, begin, end in spans:
        for at in range(begin, end, _PIECE_BYTES):
            yield Span(name, at, min(end, at + _PIECE_BYTES))


def _seconds(retry_after: str | None) -> float:
    """What a server asks to wait, at most five minutes; a date counts as nothing."""
    asked = re.fullmatch("[0-9]{1,9}", retry_after or "")
    return min(300.0, float(asked[0])) if asked else 0.0

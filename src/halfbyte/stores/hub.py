"""A repository of the Hugging Face Hub at one commit, read by ranges, with the login that huggingface_hub has."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from halfbyte.checkpoint.files import reason
from halfbyte.errors import CheckpointError, HalfbyteError, UnconvertibleError
from halfbyte.stores.remote import RemoteFile, RemoteStore
from halfbyte.stores.retry import PASSING, PassingError, asked_wait, retrying

TIMEOUT = 60.0
"""Seconds without a byte after which a request is sent again."""
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
# what servers of signed URLs say when a signature is no longer valid
_EXPIRED = (400, 401, 403, 410)
_WHOLE_BYTES = 16 << 20


class HubStore(RemoteStore):
    """The files of ``repository`` at ``commit``. Signed URLs are renewed when they expire.

    A file that is no longer what the listing said is an UnconvertibleError; what cannot be read, a CheckpointError.
    """

    def __init__(self, repository: str, commit: str, files: Mapping[str, RemoteFile]) -> None:
        super().__init__(repository, files)
        self.commit = commit
        self._signed: dict[str, str] = {}
        self._signing: dict[str, threading.Lock] = {}

    @classmethod
    def open(cls, repository: str, revision: str | None = None) -> HubStore:
        """Resolve a branch, tag or commit, and list what the repository holds there."""
        try:
            info = retrying(lambda: _model_info(repository, revision))
        except Exception as error:  # network, permission, validation: each layer of the library has its own type
            at = f" at revision {revision}" if revision else ""
            raise CheckpointError(
                f"{repository} is no local path and cannot be fetched from the hub{at}"
                f" ({type(error).__name__}: {reason(error)})"
            ) from error
        files = {}
        for sibling in info.siblings or ():
            sha256 = sibling.lfs["sha256"] if sibling.lfs else None
            files[sibling.rfilename] = RemoteFile(sibling.size or 0, sha256 or sibling.blob_id, sha256)
        return cls(repository, info.sha, files)

    def fetch(self, name: str, offset: int, size: int) -> bytes:
        """Read a range; waits and tries again where the hub is busy or the line breaks."""
        try:
            return retrying(lambda: self._fetch(name, offset, size))
        except PassingError as error:
            raise CheckpointError(f"{name} of {self.place} cannot be read from the hub ({error})") from error

    def _fetch(self, name: str, offset: int, size: int) -> bytes:
        url = self._location(name)
        headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        with _opened(url, {**headers, **self._login(url)}) as response:
            status = response.status_code
            if status in _EXPIRED and not self._is_hub(url):
                with self._lock:
                    if self._signed.get(name) == url:
                        del self._signed[name]
                raise PassingError(f"a signed URL is refused with status {status}", 0.0)
            self._check(response, name)
            if status == 206:
                data = _body(response)
                start = response.headers.get("content-range", "").removeprefix("bytes ").partition("-")[0]
                if start not in ("", str(offset)):
                    raise PassingError(f"the bytes from {start} came instead of those from {offset}")
            elif self.files[name].bytes <= _WHOLE_BYTES:
                data = _body(response)[offset : offset + size]
            else:
                raise PassingError("the server answers with whole files where ranges are asked for")
        if len(data) != size:
            raise PassingError(f"the line broke after {len(data)} of {size} bytes")
        return data

    def _location(self, name: str) -> str:
        """Where the bytes of a file are: a signed URL for large ones, the hub itself for small ones."""
        with self._lock:
            lock = self._signing.setdefault(name, threading.Lock())
        with lock:  # one thread asks, the others wait for its answer
            known = self._signed.get(name)
            if known is None:
                known = self._signed[name] = self._resolve(name)
            return known

    def _resolve(self, name: str) -> str:
        from huggingface_hub import constants

        url = f"{constants.ENDPOINT}/{self.place}/resolve/{self.commit}/{quote(name)}"
        for _ in range(_MOST_REDIRECTS):
            with _opened(url, {"Range": "bytes=0-0", "Accept-Encoding": "identity", **self._login(url)}) as response:
                self._check(response, name)
                self._check_revision(response, name)
                if response.status_code not in _REDIRECTS:
                    return url
                url = urljoin(url, response.headers["location"])
            if not self._is_hub(url):
                return url
        raise PassingError(f"more than {_MOST_REDIRECTS} redirects")

    def _check(self, response: Any, name: str) -> None:
        status = response.status_code
        if status in PASSING:
            raise PassingError(f"status {status}", asked_wait(response.headers.get("retry-after")))
        if status in (401, 403):
            raise CheckpointError(
                f"{name} of {self.place} may not be read with this login (status {status}); log in with `hf auth "
                "login`, and ask for access on the repository's page"
            )
        if status in (404, 410):
            raise CheckpointError(
                f"{name} is no longer in {self.place} at {self.commit}; the repository, the revision or the file was "
                "removed"
            )
        if status == 416:
            raise self._changed(name)
        if status >= 400:
            raise CheckpointError(f"{name} of {self.place} cannot be read from the hub (status {status})")

    def _check_revision(self, response: Any, name: str) -> None:
        """Refuse a file that is another one than the listing says."""
        headers = response.headers
        commit = headers.get("x-repo-commit")
        etag = (headers.get("x-linked-etag") or headers.get("etag") or "").removeprefix("W/").strip('"')
        size = headers.get("x-linked-size")
        file = self.files[name]
        if (commit and commit != self.commit) or (etag and file.etag and etag != file.etag):
            raise self._changed(name)
        if size and size.isdecimal() and int(size) != file.bytes:
            raise self._changed(name)

    def _changed(self, name: str) -> HalfbyteError:
        return UnconvertibleError(
            f"{name} of {self.place} changed after the plan was made, so the output would mix two models; start again"
        )

    def _login(self, url: str) -> dict[str, str]:
        """The token's header for the hub itself; signed URLs carry their own permission."""
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        return build_hf_headers(library_name="halfbyte") if self._is_hub(url) else {}

    @staticmethod
    def _is_hub(url: str) -> bool:
        from huggingface_hub import constants

        return urlsplit(url).netloc == urlsplit(constants.ENDPOINT).netloc

    def __getstate__(self) -> dict[str, object]:
        """Without signed URLs, which every process asks for itself."""
        return {key: value for key, value in super().__getstate__().items() if key not in ("_signed", "_signing")}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Begin without signed URLs."""
        super().__setstate__(state)
        self._signed, self._signing = {}, {}


def _model_info(repository: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi, constants

    try:
        return HfApi(endpoint=constants.ENDPOINT).model_info(repository, revision=revision, files_metadata=True)
    except Exception as error:
        response = getattr(error, "response", None)
        if response is None and _is_network(error):
            raise PassingError(reason(error)) from error
        if response is not None and response.status_code in PASSING:
            raise PassingError(reason(error), asked_wait(response.headers.get("retry-after"))) from error
        raise


def _is_network(error: BaseException) -> bool:
    """Whether an exception of requests or httpx says that a line broke."""
    names = {kind.__name__ for kind in type(error).__mro__}
    if "OfflineModeIsEnabled" in names:
        return False
    return isinstance(error, ConnectionError | TimeoutError) or bool(
        names & {"TransportError", "ConnectionError", "Timeout", "ChunkedEncodingError", "ProtocolError"}
    )


@contextmanager
def _opened(url: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """A response whose body is not read yet, redirects not followed; PassingError where the line breaks."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session: Any = get_session()
    try:
        if hasattr(session, "stream"):  # httpx, which huggingface_hub uses since 1.0
            opened = session.stream("GET", url, headers=headers, follow_redirects=False, timeout=TIMEOUT)
        else:
            opened = session.get(url, headers=headers, allow_redirects=False, timeout=TIMEOUT, stream=True)
        with opened as response:
            yield response
    except Exception as error:
        if isinstance(error, HalfbyteError | PassingError) or not _is_network(error):
            raise
        raise PassingError(reason(error)) from error


def _body(response: Any) -> bytes:
    return bytes(response.read() if hasattr(response, "iter_raw") else response.content)

"""Download a file: an interrupted download goes on, a wrong one is removed.

While a file `f` is incomplete it is `f.part`, beside `f.part.json` with what identifies the copy of
the server (its ETag or date). A second call continues where the first one ended if the server still
has that copy, and begins anew otherwise.
"""

import hashlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchard.errors import DataError

_CHUNK = 1 << 20
_ATTEMPTS = 5
_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Checksum:
    """Digest that the publisher of a file states."""

    algorithm: str
    """Name of the algorithm in `hashlib`."""
    digest: str
    """Digest in hexadecimal digits."""


def download(
    url: str,
    path: Path,
    *,
    checksum: Checksum | None = None,
    tick: Callable[[int], None] = lambda _: None,
    wait_s: float = 1.0,
) -> str:
    """Download a file and return its SHA-256.

    A lost connection is taken up again, at most five times in a row without a byte, after pauses
    that double.

    Args:
        url: address of the file.
        path: file to write; an existing one is replaced once the new one is complete.
        checksum: digest to verify.
        tick: progress callback, called with the number of bytes received.
        wait_s: first pause in seconds.

    Raises:
        DataError: the server refuses, the connection is lost for good (what came is kept), or the
            checksum is wrong (the file is removed).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    failures = 0
    while True:
        before = _size(part)
        try:
            _receive(url, part, tick)
            break
        except urllib.error.HTTPError as error:
            error.close()
            if error.code < 500:
                raise DataError(
                    f"{url} answers {error.code} {error.reason}; the publisher may have moved it: "
                    f"put the file at {path} by hand and run the command again"
                ) from error
            reason: Exception = error
        except (OSError, http.client.HTTPException) as error:
            reason = error
        failures = failures + 1 if _size(part) == before else 0
        if failures == _ATTEMPTS:
            raise DataError(
                f"the download of {url} was interrupted after {_size(part)} bytes ({reason}); run "
                f"the command again to continue, or put the file at {path} by hand"
            ) from reason
        time.sleep(wait_s * 2 ** max(0, failures - 1))
    sha256 = _digest(part, "sha256")
    if checksum is not None:
        got = sha256 if checksum.algorithm == "sha256" else _digest(part, checksum.algorithm)
        if got != checksum.digest.lower():
            _forget(part)
            raise DataError(
                f"{url} has {checksum.algorithm} {got}, its publisher states {checksum.digest}; "
                "the file was removed, run the command again"
            )
    part.replace(path)
    _forget(part)
    return sha256


def fetch_text(url: str) -> str:
    """Return the text of a small file.

    Raises:
        DataError: the server refuses or cannot be reached.
    """
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as reply:
            return reply.read(_CHUNK).decode()
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        raise DataError(f"{url} cannot be read ({error})") from error


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    return _digest(path, "sha256")


def _receive(url: str, part: Path, tick: Callable[[int], None]) -> None:
    """Receive the rest of a file, or all of it where the server has another copy by now.

    Raises:
        OSError, http.client.HTTPException: the connection broke or the server refuses; what came
            is in `part`.
    """
    identity = part.with_name(f"{part.name}.json")
    known = json.loads(identity.read_text()) if part.is_file() and identity.is_file() else {}
    tag, total = known.get("tag"), known.get("total")
    received = _size(part) if tag else 0
    if received and received == total:
        return
    request = urllib.request.Request(url, headers={"Accept-Encoding": "identity"})
    if received and tag:
        request.add_header("Range", f"bytes={received}-")
        request.add_header("If-Range", tag)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
        if reply.status != http.HTTPStatus.PARTIAL_CONTENT:
            received = 0
            length = reply.headers.get("Content-Length")
            total = None if length is None else int(length)
            # A weak ETag does not promise equal bytes, so it cannot continue a download.
            etag = reply.headers.get("ETag") or ""
            tag = reply.headers.get("Last-Modified") if etag[:2] in ("", "W/") else etag
            identity.write_text(json.dumps({"tag": tag, "total": total}))
        with part.open("ab" if received else "wb") as file:
            while chunk := reply.read(_CHUNK):
                file.write(chunk)
                received += len(chunk)
                tick(len(chunk))
    if total is not None and received != total:
        raise ConnectionError(f"received {received} of {total} bytes")


def _size(path: Path) -> int:
    """Return the size of a file, 0 if it does not exist."""
    return path.stat().st_size if path.is_file() else 0


def _forget(part: Path) -> None:
    """Remove an incomplete file and what identifies it."""
    part.unlink(missing_ok=True)
    part.with_name(f"{part.name}.json").unlink(missing_ok=True)


def _digest(path: Path, algorithm: str) -> str:
    """Return a digest of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()

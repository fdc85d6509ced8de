"""Downloads from a server of the test's own, which breaks off, refuses and changes its file."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from orchard.data.remote.download import Checksum, download, fetch_text
from orchard.errors import DataError

CONTENT = bytes(range(256)) * 40


@dataclass
class Published:
    """File that the server offers, and its behavior."""

    content: bytes = CONTENT
    tag: str | None = '"1"'
    breaks: list[int] = field(default_factory=list[int])
    """Bytes after which the next replies break off."""
    status: int = 200
    asked: list[str | None] = field(default_factory=list[str | None])
    """Range of each request."""
    url: str = ""


@pytest.fixture
def published() -> Iterator[Published]:
    state = Published()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            begin, wanted = 0, self.headers.get("Range")
            state.asked.append(wanted)
            if state.status != 200:
                self.send_error(state.status)
                return
            partial = wanted is not None and self.headers.get("If-Range") == state.tag
            if wanted is not None and partial:
                begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            body = state.content[begin:]
            self.send_response(206 if partial else 200)
            self.send_header("Content-Length", str(len(body)))
            if state.tag:
                self.send_header("ETag", state.tag)
            self.end_headers()
            self.wfile.write(body[: state.breaks.pop(0)] if state.breaks else body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_port}/log.csv"
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def get(published: Published, tmp_path: Path) -> Callable[..., str]:
    def _get(checksum: Checksum | None = None) -> str:
        path = tmp_path / "raw" / "log.csv"
        return download(published.url, path, checksum=checksum, wait_s=0.001)

    return _get


def test_a_download_that_breaks_off_goes_on_where_it_was(
    published: Published, get: Callable[..., str], tmp_path: Path
) -> None:
    published.breaks = [3000, 10]
    assert get() == hashlib.sha256(CONTENT).hexdigest()
    assert published.asked == [None, "bytes=3000-", "bytes=3010-"]
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == ["log.csv"]


def test_a_server_that_sends_nothing_more_ends_it_and_a_second_call_goes_on(
    published: Published, get: Callable[..., str], tmp_path: Path
) -> None:
    published.breaks = [3000, 0, 0, 0, 0, 0]
    with pytest.raises(DataError, match="was interrupted after 3000 bytes"):
        get()
    assert not (tmp_path / "raw" / "log.csv").exists()
    get()
    assert published.asked[-1] == "bytes=3000-"
    assert (tmp_path / "raw" / "log.csv").read_bytes() == CONTENT


@pytest.mark.parametrize("tag", ['"2"', None, 'W/"2"'])
def test_a_file_that_changed_meanwhile_begins_anew(
    published: Published, get: Callable[..., str], tmp_path: Path, tag: str | None
) -> None:
    published.breaks = [3000, 0, 0, 0, 0, 0]
    with pytest.raises(DataError):
        get()
    published.content, published.tag = CONTENT[::-1], tag
    get()
    assert (tmp_path / "raw" / "log.csv").read_bytes() == CONTENT[::-1]


def test_a_copy_that_cannot_be_identified_is_never_continued(
    published: Published, get: Callable[..., str]
) -> None:
    published.tag, published.breaks = 'W/"1"', [3000]
    get()
    assert published.asked == [None, None]


def test_a_wrong_checksum_removes_the_file(
    published: Published, get: Callable[..., str], tmp_path: Path
) -> None:
    right = hashlib.md5(CONTENT).hexdigest()
    with pytest.raises(DataError, match="its publisher states 00"):
        get(Checksum(algorithm="md5", digest="00"))
    assert list((tmp_path / "raw").iterdir()) == []
    get(Checksum(algorithm="md5", digest=right.upper()))


def test_a_file_that_was_moved_is_said_to_be(published: Published, get: Callable[..., str]) -> None:
    published.status = 404
    with pytest.raises(DataError, match=r"answers 404 .* put the file at .*log.csv by hand"):
        get()
    assert len(published.asked) == 1
    with pytest.raises(DataError, match="cannot be read"):
        fetch_text(published.url)


def test_a_server_that_fails_is_asked_again(published: Published, get: Callable[..., str]) -> None:
    published.status = 503
    with pytest.raises(DataError, match="503"):
        get()
    assert len(published.asked) == 5

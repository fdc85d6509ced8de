"""Clients against an HTTP server: what they ask, how they try again, what they write."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from orchard.data.synthetic import WorldParams
from orchard.errors import DataError
from orchard.feedback.schema import EVENTS
from orchard.simulation import clients
from orchard.simulation.clients import Asking, visit, write_events
from orchard.simulation.synthetic_users import SyntheticUsers, UserParams, users_of_world


class Shop:
    """Fake endpoint that shows the items 0 to k - 1 and fails each request `failures` times."""

    def __init__(self, *, failures: int = 0, status: int = 503) -> None:
        self.failures, self.status = failures, status
        self.bodies: dict[str, list[dict[str, Any]]] = {}

    def answer(self, request_id: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        tries = self.bodies.setdefault(request_id, [])
        tries.append(body)
        if len(tries) <= self.failures:
            return self.status, {"detail": "no"}
        return 200, {"items": [{"item_id": item} for item in range(body["k"])]}


@contextmanager
def listening(shop: Shop) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            status, answer = shop.answer(self.headers["x-request-id"], body)
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> SyntheticUsers:
    monkeypatch.setattr(clients, "_PAUSE_S", 0.0)
    world = WorldParams(num_items=60, num_users=80, level_size=(4, 5, 6))
    return users_of_world(world, UserParams(requests=30))


@pytest.mark.slow
def test_a_share_of_the_visits_explores_with_single_draws(users: SyntheticUsers) -> None:
    shop = Shop()
    with listening(shop) as url:
        answered = visit(users, 0, Asking(url=url, k=4))
    assert 5 < answered.explored.sum() < 25
    for number, explored in enumerate(answered.explored):
        (body,) = shop.bodies[f"w0-{number}"]
        assert body["history"] == answered.visits.history_of(number)
        assert body["user"] == str(answered.visits.user[number])
        drawn = (body["k"], body.get("width"), body.get("decoder"))
        assert drawn == ((1, 1, "beam_sample") if explored else (4, None, None))
    assert answered.failed == 0
    assert len(answered.events) > 0
    assert set(answered.events["request_id"]) <= {f"w0-{number}" for number in range(30)}


@pytest.mark.slow
def test_a_request_that_fails_is_sent_again_under_its_id(users: SyntheticUsers) -> None:
    shop = Shop(failures=2)
    with listening(shop) as url:
        answered = visit(users, 0, Asking(url=url))
    assert answered.failed == 0
    assert {len(tries) for tries in shop.bodies.values()} == {3}


@pytest.mark.slow
def test_refusals_and_silence_are_errors(users: SyntheticUsers) -> None:
    with listening(Shop(failures=9, status=422)) as url, pytest.raises(DataError, match="422"):
        visit(users, 0, Asking(url=url))
    with listening(Shop(failures=9)) as url, pytest.raises(DataError, match="none of 30"):
        visit(users, 0, Asking(url=url))


@pytest.mark.slow
def test_events_are_written_in_the_agreed_columns(users: SyntheticUsers, tmp_path: Path) -> None:
    with listening(Shop()) as url:
        answered = visit(users, 0, Asking(url=url))
    path = write_events(tmp_path / "events", "w0", answered.events)
    assert pl.read_parquet(path).schema == EVENTS
    assert [file.name for file in path.parent.iterdir()] == ["w0.parquet"]

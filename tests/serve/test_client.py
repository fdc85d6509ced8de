"""Clients against a running endpoint, and against replicas that die."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import uvicorn

import orchard
from orchard.errors import OrchardError
from serve.calls import ClientError
from serve.catalog.schema import DeltaRequest, NewItem
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics
from tests.fixtures.endpoint import TOKEN, settings


@pytest.fixture
def url(folder: Path) -> Iterator[str]:
    """Address of an endpoint that runs in a thread."""
    app = create_app(open_service(folder, settings(folder), InMemoryMetrics()))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not (server.started and server.servers):
        assert thread.is_alive()
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_both_clients_return_what_the_endpoint_answers(url: str) -> None:
    body = {"history": [3, 17], "k": 5, "explain": "levels"}
    plain = httpx.post(f"{url}/v1/recommend", json=body).json()
    with orchard.Client(url) as client:
        answer = client.recommend([3, 17], k=5, explain="levels")
        scored = client.score([3, 17], [item.item_id for item in answer.items], order=True)
        assert client.item(3).item_id == 3
        assert client.catalog().items == 40
        assert client.policy().variants[0].name == "main"
        assert [item.item_id for item in client.recommend(user="ann", k=2).items]

    async def ask() -> list[int]:
        async with orchard.AsyncClient(url) as client:
            again = await client.recommend([3, 17], k=5)
            assert (await client.catalog()).digest
            assert (await client.policy()).variants
            assert (await client.item(4)).item_id == 4
            assert (await client.score([3], [4])).items[0].item_id == 4
            return [item.item_id for item in again.items]

    items = [item["item_id"] for item in plain["items"]]
    assert [item.item_id for item in answer.items] == items == asyncio.run(ask())
    assert answer.items[0].levels is not None
    assert [item.item_id for item in scored.items] == items
    assert scored.items[0].score == pytest.approx(answer.items[0].score, abs=1e-5)


def test_refusals_are_errors_with_their_status(url: str) -> None:
    with orchard.Client(url) as client:
        with pytest.raises(ClientError, match=r"width = 5000 exceeds") as refused:
            client.recommend([3], width=5000)
        assert isinstance(refused.value, OrchardError)
        assert refused.value.status == 422
        assert refused.value.problem is not None
        assert refused.value.problem.type == "urn:orchard:problem:unsuitable"
        with pytest.raises(ClientError, match="item 4000 is not in the catalog") as unknown:
            client.item(4000)
        assert unknown.value.status == 404
        with pytest.raises(ClientError, match="k: Input should be greater than or equal to 1"):
            client.recommend([3], k=0)
        with pytest.raises(ClientError, match="colour: Extra inputs are not permitted"):
            client.recommend([3], colour="red")
        with pytest.raises(ClientError, match="bearer token") as closed:
            client.change_catalog(DeltaRequest(remove=[3]))
        assert closed.value.status == 401


def test_an_operator_changes_the_catalog_with_the_token(url: str) -> None:
    with orchard.Client(url, token=TOKEN) as client:
        delta = DeltaRequest(remove=[3], add=[NewItem(item_id=900, sid=[1, 1, 1])])
        assert client.change_catalog(delta).version == 1
        assert client.activate("latest").variants[0].pinned is False

    async def change() -> int:
        async with orchard.AsyncClient(url, token=TOKEN) as client:
            await client.activate("latest")
            return (await client.change_catalog(DeltaRequest(remove=[4]))).version

    assert asyncio.run(change()) == 2


def test_no_endpoint_is_an_error_that_says_so() -> None:
    with (
        orchard.Client("http://127.0.0.1:1") as client,
        pytest.raises(ClientError, match="did not answer /v1/catalog") as nobody,
    ):
        client.catalog()
    assert nobody.value.status == 0


class Replicas:
    """Servers behind one address, the first of which dies under its requests."""

    def __init__(self, die: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.seen: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["content-length"]))
                self.do_GET()

            def do_GET(self) -> None:
                outer.seen.append(self.path)
                if len(outer.seen) == 1:
                    die(self)
                    return
                body = json.dumps({"variants": [], "added_later": 1}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Stay silent."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)

    def __enter__(self) -> str:
        self.thread.start()
        return f"http://127.0.0.1:{self.server.server_port}"

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    handler.close_connection = True


def answer_as_proxy(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(500)
    handler.send_header("content-length", "0")
    handler.end_headers()


def refuse(handler: BaseHTTPRequestHandler) -> None:
    body = json.dumps(
        {"type": "a", "title": "Too many", "status": 503, "detail": "wait", "instance": "1"}
    ).encode()
    handler.send_response(503)
    handler.send_header("content-type", "application/problem+json")
    handler.send_header("content-length", str(len(body)))
    handler.send_header("retry-after", "7")
    handler.end_headers()
    handler.wfile.write(body)


@pytest.mark.slow
@pytest.mark.parametrize("die", [hang_up, answer_as_proxy])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_reading_request_is_sent_once_more_where_a_replica_died(
    die: Callable[[BaseHTTPRequestHandler], None], asynchronous: bool
) -> None:
    replicas = Replicas(die)
    with replicas as address:
        if asynchronous:

            async def ask() -> int:
                async with orchard.AsyncClient(address) as client:
                    return len((await client.policy()).variants)

            assert asyncio.run(ask()) == 0
        else:
            with orchard.Client(address) as client:
                assert client.policy().variants == []
    assert replicas.seen == ["/v1/policy"] * 2


@pytest.mark.slow
@pytest.mark.parametrize("die", [hang_up, answer_as_proxy])
def test_a_change_is_never_sent_twice(die: Callable[[BaseHTTPRequestHandler], None]) -> None:
    replicas = Replicas(die)
    with (
        replicas as address,
        orchard.Client(address, token="t") as client,
        pytest.raises(ClientError),
    ):
        client.activate("latest")
    assert len(replicas.seen) == 1


@pytest.mark.slow
def test_what_the_endpoint_itself_refuses_is_not_repeated() -> None:
    replicas = Replicas(refuse)
    with (
        replicas as address,
        orchard.Client(address) as client,
        pytest.raises(ClientError, match="Too many") as refused,
    ):
        client.recommend([3])
    assert (refused.value.status, refused.value.retry_after_s) == (503, 7.0)
    assert len(replicas.seen) == 1


@pytest.mark.slow
def test_something_else_than_an_endpoint_is_named() -> None:
    replicas = Replicas(answer_as_proxy)
    with (
        replicas as address,
        orchard.Client(address) as client,
        pytest.raises(ClientError, match="is not one of an Orchard endpoint"),
    ):
        client.catalog()


@pytest.mark.slow
def test_a_client_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, orchard; orchard.Client('http://here'); "
        "sys.exit(bool({'torch', 'ray', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

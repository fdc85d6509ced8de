"""The middleware around an application that returns the size of the body."""

import asyncio
from collections.abc import AsyncGenerator, Mapping

import httpx
import pytest
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from serve.catalog.schema import DeltaRequest
from serve.errors import ApiError
from serve.http import middleware
from serve.http.middleware import RequestMiddleware
from serve.schema import RecommendRequest

TOKEN = "a-token"
refused_errors: list[ApiError] = []


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


async def pieces(count: int, size: int, pause_s: float = 0.0) -> AsyncGenerator[bytes]:
    """Yield a body in chunks, without a declared length."""
    for _ in range(count):
        await asyncio.sleep(pause_s)
        yield b"x" * size


def post(
    path: str, content: bytes | AsyncGenerator[bytes], headers: Mapping[str, str] | None = None
) -> httpx.Response:
    async def ask() -> httpx.Response:
        application = RequestMiddleware(echo, token_env="TEST_TOKEN", refused=refused_errors.append)
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return await client.post(path, content=content, headers=headers)

    return asyncio.run(ask())


def test_a_body_in_pieces_arrives_whole() -> None:
    assert post("/v1/recommend", pieces(10, 1000)).text == "10000"


@pytest.mark.parametrize(
    ("path", "mebibytes"), [("/v1/recommend", 1), ("/v1/recommend:batch", 8), ("/anything", 1)]
)
def test_a_body_is_read_up_to_the_bound_of_its_route(path: str, mebibytes: int) -> None:
    assert post(path, pieces(mebibytes, 1 << 20)).status_code == 200
    for too_much in (pieces(mebibytes + 1, 1 << 20), b"x" * ((mebibytes << 20) + 1)):
        refused = post(path, too_much)
        assert refused.status_code == 413
        assert refused.json()["detail"] == f"send at most {mebibytes << 20} bytes"
        assert refused.headers["x-request-id"] == refused.json()["instance"]


def test_a_slow_body_times_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(middleware, "_BODY_S", 0.05)
    late = post("/v1/recommend", pieces(1000, 10, pause_s=0.01))
    assert late.status_code == 408
    assert late.json()["type"] == "urn:orchard:problem:too-late"


@pytest.mark.parametrize("path", sorted(middleware.OPERATOR))
def test_a_body_is_not_read_without_the_token(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_TOKEN", TOKEN)
    read = []
    refused_errors.clear()

    async def counted_body() -> AsyncGenerator[bytes]:
        read.append(1)
        yield b"{"

    refused = post(path, counted_body(), {"authorization": "Bearer wrong"})
    assert (refused.status_code, read) == (401, [])
    assert refused.headers["www-authenticate"] == "Bearer"
    assert [error.kind for error in refused_errors] == ["unauthorised"]
    assert post(path, counted_body(), {"authorization": f"Bearer {TOKEN}"}).text == "1"


@pytest.mark.parametrize(
    "sent",
    [[b"mine-1"], [b"mine-1", b"mine-1"], [b"mine-1", b"other"], [b"x" * 3000], [b"\xff\xfe"],
     [b"a b"], [b""], []],
)  # fmt: skip
@pytest.mark.parametrize("doubled", [False, True])
def test_a_response_has_one_request_id_and_only_a_valid_one_is_taken_over(
    sent: list[bytes], doubled: bool
) -> None:
    received: list[list[bytes]] = []

    async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
        """Echo every ID, as Serve's proxy does."""
        ids = [value for name, value in scope["headers"] if name == b"x-request-id"]
        received.append(ids)
        response = PlainTextResponse("")
        response.raw_headers += [(b"X-Request-ID", value) for value in ids * (1 + doubled)]
        await response(scope, receive, send)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(middleware.RequestIdMiddleware(proxy))
        async with httpx.AsyncClient(transport=transport, base_url="http://shop") as client:
            return await client.get("/", headers=[(b"x-request-id", value) for value in sent])

    (given,) = asyncio.run(ask()).headers.get_list("x-request-id")
    assert received == [[given.encode()]]
    assert (given == "mine-1") == (set(sent) == {b"mine-1"})
    assert len(given) <= 100
    assert [each.cls for each in middleware.proxy_middlewares()] == [middleware.RequestIdMiddleware]


def test_validation_of_a_body_stops_at_its_first_error() -> None:
    for body in ({"history": ["x"] * 10_000}, {f"key{n}": n for n in range(100_000)}):
        with pytest.raises(ValidationError) as failure:
            RecommendRequest.model_validate(body)
        assert failure.value.error_count() == 1
    with pytest.raises(ValidationError) as failure:
        DeltaRequest.model_validate({"add": [{"item_id": "x", "sid": []}] * 1000})
    assert failure.value.error_count() == 1

"""The fuzz of the endpoint, small, and that it would notice."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from fastapi import FastAPI, Response

from orchard.testing import tiny_setup
from serve.catalog.schema import ItemInfo

pytest.importorskip("schemathesis", reason="schemathesis (requirements/dev.txt) is not installed")

from benchmarks.speed import serve_fuzz


@pytest.mark.nightly
def test_no_request_from_the_document_brings_the_endpoint_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHARD_SERVE_TOKEN", serve_fuzz.TOKEN)
    world = tiny_setup(level_size=(5, 4, 6), num_items=40)
    found = serve_fuzz.attack(world, tmp_path, 400)
    assert +found.wrong == {}, found.examples
    assert sum(found.status.values()) >= 400
    assert {200, 401, 422} <= found.status.keys()
    assert found.status[200] >= 0.5 * sum(found.status.values()), found.status


@pytest.mark.slow
def test_an_endpoint_that_errs_is_found_out() -> None:
    @asynccontextmanager
    async def nothing(_: FastAPI) -> AsyncGenerator[None]:
        yield

    app = FastAPI(lifespan=nothing)

    @app.get("/broken/{number}")
    async def broken(number: int) -> ItemInfo:
        raise RuntimeError("never answered")

    @app.get("/odd/{number}", response_model=ItemInfo)
    async def odd(number: int) -> Response:
        return Response('{"item_id": "File \\"/tmp/x.py\\""}', media_type="application/json")

    found = serve_fuzz.send(app, 60)
    assert found.wrong.keys() == {"server_error", "leak", "schema"}
    assert found.examples["server_error"].startswith("GET /broken/")

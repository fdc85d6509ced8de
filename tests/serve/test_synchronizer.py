"""New items over HTTP: assigned, written as ordinary deltas, and served from the next search on."""

import asyncio
import json
import shutil
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchard.settings import ServeConfig
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics
from serve.service import Service
from tests.fixtures.bundles import WIDTH, save_carrying_policy, write_shop

OPERATOR = {"authorization": "Bearer a-token"}
TITLE = "red oak lamp"


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHARD_SERVE_TOKEN", "a-token")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_carrying_policy(write_shop(tmp_path / "shop"), tmp_path / "policy")
    return tmp_path / "policy"


@asynccontextmanager
async def served(folder: Path) -> AsyncGenerator[tuple[httpx.AsyncClient, Service]]:
    config = ServeConfig(poll_interval_s=3600.0, width=100)
    service = open_service(folder, config, InMemoryMetrics())
    app = create_app(service)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://shop") as client,
    ):
        yield client, service


def run(work: Callable[[], Awaitable[None]]) -> None:
    async def once() -> None:
        await work()

    asyncio.run(once())


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/v1/catalog/delta", json=body, headers=OPERATOR)


async def shown(client: httpx.AsyncClient) -> dict[int, list[int]]:
    """Return the items that a search finds, with their semantic IDs."""
    answer = await client.post("/v1/recommend", json={"history": [9, 11], "k": 100})
    assert answer.status_code == 200, answer.text
    return {item["item_id"]: item["sid"] for item in answer.json()["items"]}


@pytest.mark.slow
def test_a_title_is_assigned_served_kept_and_read_by_other_replicas(folder: Path) -> None:
    async def work() -> None:
        async with served(folder) as (client, service), served(folder) as (other, replica):
            before = await shown(client)
            assert 900 not in before
            new = {"item_id": 900, "title": TITLE}
            dry = (await post(client, add=[new], dry_run=True)).json()
            assert dry["dry_run"]
            assert 900 not in await shown(client)
            answer = (await post(client, add=[new])).json()
            assert (answer["version"], answer["assigned"]) == (1, dry["assigned"])
            assert answer["bundle"] == service.catalog_store.assigner.digest != ""
            (item,) = answer["assigned"]
            assert len(item["neighbors"]) == 5
            assert item["distance"] < 1.5
            assert (await shown(client))[900] == item["sid"]
            assert (await client.get("/v1/catalog")).json()["assigned"] == []
            assert (await client.get("/v1/items/900")).json()["sid"] == item["sid"]
            # The ledger names the semantic ID, so that replicas need no bundle to read it.
            (entry,) = folder.parent.glob("serve/*/deltas/000000001.json")
            assert json.loads(entry.read_text())["delta"] == {"add": [{**new, "sid": item["sid"]}]}
            await replica.poll()
            assert (await shown(other))[900] == item["sid"]
            await post(other, remove=[900])
            assert 900 not in await shown(other)
        async with served(folder) as (client, _):
            again = (await post(client, add=[{"item_id": 900, "title": "black chair"}])).json()
            assert again["assigned"][0]["sid"] == item["sid"]
            assert again["assigned"][0]["source"] == "kept"
            assert (await shown(client)) == before | {900: item["sid"]}

    run(work)


@pytest.mark.slow
def test_two_appends_at_once_get_different_ids(folder: Path) -> None:
    async def work() -> None:
        async with served(folder) as (client, _), served(folder) as (other, replica):
            first, second = await asyncio.gather(
                *(post(client, add=[{"item_id": i, "title": TITLE}]) for i in (900, 901))
            )
            assert {first.status_code, second.status_code} == {200}
            assert {first.json()["version"], second.json()["version"]} == {1, 2}
            ids = [answer.json()["assigned"][0]["sid"] for answer in (first, second)]
            assert ids[0] != ids[1]
            # A replica that has not heard of the latest deltas when it writes its own.
            state = replica._synchronizer._shared_state  # pyright: ignore[reportPrivateUsage]
            read = state.catch_up
            state.catch_up = lambda store: store.current  # type: ignore[method-assign]
            late = await post(other, add=[{"item_id": 902, "title": TITLE}])
            state.catch_up = read  # type: ignore[method-assign]
            assert late.status_code == 409
            assert "another replica created version 1" in late.json()["detail"]
            assert 902 not in await shown(other)
            late = await post(other, add=[{"item_id": 902, "title": TITLE}])
            assert late.json()["assigned"][0]["sid"] not in ids
            assert len(await shown(other)) == 63

    run(work)


@pytest.mark.slow
def test_items_that_cannot_be_assigned_are_refused_in_one_sentence(
    folder: Path, tmp_path: Path
) -> None:
    embedded = tmp_path / "embedded" / "policy"
    save_carrying_policy(write_shop(tmp_path / "x", embedded=True), embedded)

    async def refused(folder: Path, item: dict[str, Any]) -> str:
        async with served(folder) as (client, service):
            content = json.dumps({"add": [{"item_id": 900, **item}]})
            headers = OPERATOR | {"content-type": "application/json"}
            answer = await client.post("/v1/catalog/delta", content=content, headers=headers)
            assert answer.status_code == 422
            assert service.catalog_store.current.version == 0
            assert not list(folder.parent.glob("serve/*/deltas/*.json"))
            problem = answer.json()
            return problem["detail"] + str(problem.get("errors", ""))

    async def work() -> None:
        assert "no word of the title" in await refused(folder, {"title": "wolpertinger"})
        assert "neither sid nor title" in await refused(folder, {})
        for vector, message in (
            ([0.0] * WIDTH, "is zero, or too short"),
            ([1.0] * 3, f"has 3 dimensions, those of the tokenizer bundle have {WIDTH}"),
            ([float("nan")] * WIDTH, "embedding"),
            ("AAAA", "embedding"),
        ):
            assert message in await refused(embedded, {"embedding": vector})

    run(work)


@pytest.mark.slow
def test_a_bundle_that_cannot_be_used_is_named_and_the_policy_serves(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "sids" / "codebooks.safetensors").write_bytes(b"no tensors")

    async def damaged() -> None:
        async with served(folder) as (client, _):
            assert len(await shown(client)) == 60
            answer = await post(client, add=[{"item_id": 900, "title": TITLE}])
            assert answer.status_code == 422
            detail = answer.json()["detail"]
            assert "the tokenizer bundle is not used" in detail
            assert str(tmp_path) not in detail
            assert (await client.get("/v1/catalog")).json()["bundle"] == ""
            explicit = await post(client, add=[{"item_id": 900, "sid": [0, 0]}])
            assert (explicit.status_code, explicit.json()["assigned"]) == (200, [])

    run(damaged)
    assert "codebooks.safetensors is damaged or was changed" in caplog.text


@pytest.mark.slow
def test_an_archived_policy_serves_with_the_bundle_that_the_state_keeps(folder: Path) -> None:
    async def work() -> None:
        async with served(folder) as (client, service):
            digest = service.catalog_store.assigner.digest
            first = (await post(client, add=[{"item_id": 900, "title": TITLE}])).json()
        assert not list(folder.parent.glob("serve/*/policies/main/*/sids"))
        shutil.rmtree(folder)
        folder.mkdir()
        async with served(folder) as (client, service):
            assert service.catalog_store.assigner.digest == digest
            await post(client, remove=[900])
            again = await post(client, add=[{"item_id": 900, "title": TITLE}])
            assert again.json()["assigned"][0]["sid"] == first["assigned"][0]["sid"]
            twin = await post(client, add=[{"item_id": 901, "title": TITLE}])
            assert twin.json()["assigned"][0]["source"] == "bundle"

    run(work)

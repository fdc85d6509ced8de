"""Events at the endpoint: counted beside the searches, shared by replicas, read back at a start."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from orchard.guide import fit
from orchard.guide.events import with_events
from orchard.guide.guide import Guide
from orchard.testing import TinySetup
from serve.catalog.schema import EventsRequest
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics
from serve.service import Service
from serve.testing import export_policy
from tests.fixtures.endpoint import OPERATOR, recommend, settings, shown
from tests.fixtures.guides import random_rows


@pytest.fixture
def guide(shop_world: TinySetup) -> Guide:
    """A guide that wants what its experts have counted, and knows half of the items."""
    guide = fit.count(shop_world.catalog, random_rows(shop_world.catalog, seed=3))
    weight = [2.0 if term.expert == "transitions" else 0.0 for term in guide.terms]
    return fit.with_weights(guide, [*weight, 0.1, 0.0])


@pytest.fixture
def guided(folder: Path, shop_world: TinySetup, guide: Guide) -> Path:
    return export_policy(shop_world, folder, step=3, guide=guide)


@asynccontextmanager
async def replica(
    folder: Path, **changes: Any
) -> AsyncGenerator[tuple[httpx.AsyncClient, Service]]:
    service = open_service(folder, settings(folder, **changes), InMemoryMetrics())
    app = create_app(service)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://shop") as client,
    ):
        yield client, service


def run(work: Callable[[AsyncExitStack], Awaitable[None]]) -> None:
    async def once() -> None:
        async with AsyncExitStack() as stack:
            await work(stack)

    asyncio.run(once())


async def count(client: httpx.AsyncClient, *events: tuple[list[int], int], **more: Any) -> Any:
    body = {"events": [{"history": h, "item": i} for h, i in events], **more}
    response = await client.post("/v1/events", json=body, headers=OPERATOR)
    assert response.status_code == 200, response.text
    return response.json()


def test_what_was_bought_after_a_history_is_recommended_after_it(
    guided: Path, guide: Guide
) -> None:
    async def work(stack: AsyncExitStack) -> None:
        client, service = await stack.enter_async_context(replica(guided))
        before = await recommend(client, history=[30, 31], k=40, width=50)
        wanted = shown(before)[-1]
        answer = await count(client, *[([30, 31], wanted)] * 20)
        assert answer == {"version": 1, "events": 20, "unknown_items": 0}
        after = await recommend(client, history=[30, 31], k=40, width=50, explain="levels")
        assert shown(after).index(wanted) < shown(before).index(wanted)
        # As the guide that has counted these events itself.
        slot = service.slots["main"]
        expected = with_events(guide, slot.events)
        assert slot.guide is not None
        assert slot.guide.digest == expected.digest != guide.digest
        explained = next(i for i in after["items"] if i["item_id"] == wanted)
        assert explained["guide"]["summands"]["transitions"] > 0
        scores = {item["item_id"]: item["score"] for item in before["items"]}
        assert all(
            item["score"] == pytest.approx(scores[item["item_id"]], abs=1e-5)
            for item in after["items"]
        )
        (variant,) = (await client.get("/v1/policy")).json()["variants"]
        assert (variant["guide"], variant["guide_events"]) == (guide.digest, 20)

    run(work)


def test_a_new_item_is_found_after_its_first_event(guided: Path) -> None:
    async def work(stack: AsyncExitStack) -> None:
        client, _ = await stack.enter_async_context(replica(guided))
        info = await count(client, ([12, 4], 900))
        assert info["unknown_items"] == 1  # not there yet
        catalog = (await client.get("/v1/catalog")).json()
        taken = {tuple((await client.get(f"/v1/items/{i}")).json()["sid"]) for i in range(40)}
        free = next(
            sid for sid in np.ndindex(*catalog["level_size"]) if tuple(map(int, sid)) not in taken
        )
        delta = {"add": [{"item_id": 900, "sid": [int(c) for c in free], "title": "new"}]}
        response = await client.post("/v1/catalog/delta", json=delta, headers=OPERATOR)
        assert response.status_code == 200, response.text
        with_event = await recommend(client, history=[12, 4], k=41, width=60)
        await count(client, forget=True)
        without = await recommend(client, history=[12, 4], k=41, width=60)
        assert shown(with_event).index(900) < shown(without).index(900)
        assert shown(with_event).index(900) < 10

    run(work)


def test_replicas_follow_and_a_restart_reads_events_back(guided: Path) -> None:
    history, item = [30, 31], 17

    async def work(stack: AsyncExitStack) -> None:
        first, one = await stack.enter_async_context(replica(guided, cache_s=60.0))
        second, other = await stack.enter_async_context(replica(guided, cache_s=60.0))
        before = shown(await recommend(second, history=history, k=40, width=50))
        await count(first, *[(history, item)] * 5)
        await other.poll()
        after = shown(await recommend(second, history=history, k=40, width=50))
        assert after != before  # the cache does not answer for other counts
        assert after == shown(await recommend(first, history=history, k=40, width=50))
        # Events of the second come after those of the first, which it has not looked at.
        await count(first, ([2], 3))
        assert await count(second, ([4], 5)) == {"version": 3, "events": 7, "unknown_items": 0}
        await one.poll()
        third, restarted = await stack.enter_async_context(replica(guided))
        await recommend(first, history=history)
        await recommend(third, history=history)
        digests = {
            service.slots["main"].guide.digest  # pyright: ignore[reportOptionalMemberAccess]
            for service in (one, restarted)
        }
        assert len(digests) == 1
        assert shown(await recommend(third, history=history, k=40, width=50)) == shown(
            await recommend(first, history=history, k=40, width=50)
        )

    run(work)


def test_a_damaged_file_of_events_is_refused_and_named(
    guided: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(stack: AsyncExitStack) -> None:
        client, service = await stack.enter_async_context(replica(guided))
        await count(client, ([2], 3))
        (path,) = guided.parent.glob("serve/*/events/000000001.json")
        tree = json.loads(path.read_text())
        assert tree["delta"]["events"] == [{"history": [2], "item": 3}]
        (path.parent / "000000002.json").write_text("{")
        await service.poll()
        assert "000000002.json" in caplog.text
        body = {"events": [{"history": [4], "item": 5}]}
        response = await client.post("/v1/events", json=body, headers=OPERATOR)
        assert response.status_code == 503
        assert "ledger of the events is damaged after version 1" in response.json()["detail"]
        assert shown(await recommend(client, history=[2]))  # answers go on

    run(work)


def test_events_need_the_token_and_a_guide(guided: Path, folder: Path) -> None:
    async def work(stack: AsyncExitStack) -> None:
        client, _ = await stack.enter_async_context(replica(guided))
        body = {"events": [{"history": [4], "item": 5}]}
        assert (await client.post("/v1/events", json=body)).status_code == 401
        nothing = await client.post("/v1/events", json={}, headers=OPERATOR)
        assert nothing.status_code == 422
        plain, _ = await stack.enter_async_context(
            replica(guided, guide=False, state=guided.parent / "other")
        )
        refused = await plain.post("/v1/events", json=body, headers=OPERATOR)
        assert refused.status_code == 422
        assert "no policy of this endpoint has a guide" in refused.json()["detail"]

    run(work)


def test_only_the_items_that_count_are_written(guided: Path) -> None:
    async def work(stack: AsyncExitStack) -> None:
        client, _ = await stack.enter_async_context(replica(guided))
        await count(client, ([i % 40 for i in range(300)], 3))
        (path,) = guided.parent.glob("serve/*/events/000000001.json")
        (event,) = EventsRequest.model_validate(json.loads(path.read_text())["delta"]).events
        assert event.history == [i % 40 for i in range(250, 300)]

    run(work)


def test_a_new_policy_counts_the_events_too(
    guided: Path, shop_world: TinySetup, guide: Guide
) -> None:
    async def work(stack: AsyncExitStack) -> None:
        client, service = await stack.enter_async_context(replica(guided))
        await count(client, *[([30, 31], 17)] * 5)
        later = replace(guide, popularity_weight=0.3)
        later.save(guided / "guide")
        await service.poll()
        await recommend(client, history=[30])
        slot = service.slots["main"]
        assert slot.guide is not None
        assert slot.guide_digest == later.digest
        assert slot.guide.digest == with_events(later, slot.events).digest

    run(work)

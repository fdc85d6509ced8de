"""Routes that change what is served: deltas of the catalog, activation of policies."""

import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from orchard.policy import weights
from orchard.testing import TinySetup
from serve import factory
from serve.factory import open_service
from serve.metrics import InMemoryMetrics
from serve.service import Service
from tests.fixtures.endpoint import (
    OPERATOR,
    TOKEN,
    recommend,
    served,
    settings,
    shown,
    trained_further,
)


def test_attributes_of_another_type_are_refused_and_change_nothing(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        headers = {"content-type": "application/json", **OPERATOR}
        for value in ("NaN", "Infinity", "1e999", '"75.0"', "3.5", "true"):
            body = f'{{"update": [{{"item_id": 1, "attributes": {{"price": {value}}}}}]}}'
            refused = await client.post("/v1/catalog/delta", content=body, headers=headers)
            assert refused.status_code == 422, value
        assert service.catalog_store.current.version == 0
        body = {"update": [{"item_id": 5, "attributes": {"price": 1, "stock": True}}]}
        assert (
            await client.post("/v1/catalog/delta", json=body, headers=OPERATOR)
        ).status_code == 200
        item = (await client.get("/v1/items/5")).json()
        assert item["filters"] == ["cheap", "stocked"]

    served(folder, work)


def test_a_damaged_ledger_keeps_the_catalog_and_refuses_the_next_delta(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        await client.post("/v1/catalog/delta", json={"remove": [1]}, headers=OPERATOR)
        (first,) = folder.parent.glob("serve/*/deltas/000000001.json")
        broken = first.with_name("000000002.json")
        broken.write_text("")
        for _ in range(2):
            await service.poll()
        assert "000000002.json is empty; restore it from a backup" in caplog.text
        assert caplog.text.count("000000002.json") == 1
        info = (await client.get("/v1/catalog")).json()
        assert info["version"] == 1
        assert info["deltas_refused"] == "the ledger of the catalog is damaged after version 1"
        service._set_gauges()
        assert isinstance(service.metrics, InMemoryMetrics)
        assert service.metrics.gauges["orchard_serve_catalogue_refused",] == 1
        refused = await client.post("/v1/catalog/delta", json={"remove": [2]}, headers=OPERATOR)
        assert refused.status_code == 503
        assert 1 not in shown(await recommend(client, history=[3], k=40))
        broken.unlink()
        taken = await client.post("/v1/catalog/delta", json={"remove": [2]}, headers=OPERATOR)
        assert (taken.status_code, taken.json()["deltas_refused"]) == (200, "")

    served(folder, work)


def test_deltas_and_activations_need_the_token(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        for header in (
            "",
            "Bearer",
            "Bearer ",
            "Bearer wrong",
            f"Basic {TOKEN}",
            TOKEN,
            "Bearer é",
        ):
            for path, body in (
                ("/v1/catalog/delta", {"remove": [1]}),
                ("/v1/events", {"forget": True}),
                ("/v1/policy:activate", {"version": "latest"}),
            ):
                response = await client.post(
                    path, json=body, headers={"authorization": header.encode()}
                )
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
        assert service.catalog_store.current.version == 0
        assert isinstance(service.metrics, InMemoryMetrics)
        assert service.metrics.total("orchard_serve_refused") == 21
        monkeypatch.setenv("ORCHARD_SERVE_TOKEN", "")
        closed = await client.post(
            "/v1/catalog/delta", json={"remove": [1]}, headers={"authorization": "Bearer "}
        )
        assert closed.status_code == 401

    served(folder, work)


@pytest.mark.slow
def test_a_delta_shows_in_the_next_answer_and_can_be_taken_back(folder: Path) -> None:
    async def change(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
        response = await client.post("/v1/catalog/delta", json=body, headers=OPERATOR)
        assert response.status_code == 200, response.text
        return response.json()

    async def work(client: httpx.AsyncClient, service: Service) -> None:
        first = shown(await recommend(client, history=[3], k=40))
        removed = first[0]
        dry = await change(client, remove=[removed], dry_run=True)
        assert (dry["version"], dry["items"], dry["dry_run"]) == (1, 39, True)
        assert shown(await recommend(client, history=[3], k=40)) == first
        await change(client, remove=[removed], add=[{"item_id": 99, "sid": [4, 3, 5]}])
        after = await recommend(client, history=[3], k=41)
        assert set(shown(after)) == set(first) - {removed} | {99}
        assert after["catalog"].startswith("1-")
        assert (await client.get(f"/v1/items/{removed}")).status_code == 404
        stale = await client.post(
            "/v1/catalog/delta", json={"remove": [5], "base_version": 0}, headers=OPERATOR
        )
        assert stale.status_code == 409
        bad = await client.post("/v1/catalog/delta", json={"remove": [777]}, headers=OPERATOR)
        assert bad.status_code == 422
        assert (await change(client, rollback_to=0))["version"] == 2
        assert shown(await recommend(client, history=[3], k=40)) == first

    served(folder, work)


@pytest.mark.slow
def test_replicas_share_deltas_and_later_ones_read_them_all(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        other = open_service(folder, settings(folder), InMemoryMetrics())
        await other.start()
        for body in ({"remove": [1, 2]}, {"add": [{"item_id": 99, "sid": [0, 0, 0]}]},
                     {"rollback_to": 1}, {"remove": [3]}):  # fmt: skip
            response = await client.post("/v1/catalog/delta", json=body, headers=OPERATOR)
            assert response.status_code == 200
        await other.poll()
        late = open_service(folder, settings(folder), InMemoryMetrics())
        await late.start()
        for replica in (other, late):
            assert replica.catalog_store.current.version == 4
            live = replica.catalog_store.current.snapshot
            assert set(live.catalog.item_id[live.live]) == set(range(40)) - {1, 2, 3}
            await replica.close()

    served(folder, work)


@pytest.mark.slow
def test_the_endpoint_follows_training_pins_and_goes_back(
    folder: Path, shop_world: TinySetup
) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        first = await recommend(client, history=[3, 4], k=40)
        trained_further(shop_world, folder, step=4)
        await service.poll()
        second = await recommend(client, history=[3, 4], k=40)
        assert second["policy"].startswith("4-")
        assert [i["score"] for i in second["items"]] != [i["score"] for i in first["items"]]
        body = {"version": first["policy"]}
        response = await client.post("/v1/policy:activate", json=body, headers=OPERATOR)
        assert response.status_code == 200, response.text
        again = await recommend(client, history=[3, 4], k=40)
        assert again["policy"] == first["policy"]
        assert [i["score"] for i in again["items"]] == [i["score"] for i in first["items"]]
        trained_further(shop_world, folder, step=5)
        await service.poll()
        assert (await recommend(client, history=[3]))["policy"] == first["policy"]  # pinned
        other = open_service(folder, settings(folder), InMemoryMetrics())
        await other.start()
        assert str(other.slots["main"].version) == first["policy"]
        await other.close()
        latest = {"version": "latest"}
        await client.post("/v1/policy:activate", json=latest, headers=OPERATOR)
        await service.poll()
        assert (await recommend(client, history=[3]))["policy"].startswith("5-")
        unknown = {"version": "77-abc"}
        refused = await client.post("/v1/policy:activate", json=unknown, headers=OPERATOR)
        assert refused.status_code == 404

    served(folder, work)


@pytest.mark.slow
def test_a_policy_exported_while_the_endpoint_starts_is_found(
    folder: Path, shop_world: TinySetup, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = factory.engine_of

    def slow(*args: Any) -> Any:
        trained_further(shop_world, folder, step=4)
        return make(*args)

    async def work(client: httpx.AsyncClient, service: Service) -> None:
        assert (await recommend(client, history=[3]))["policy"].startswith("3-")
        assert service.slots["main"].kept == []  # the folder contains another policy
        await service.poll()
        assert (await recommend(client, history=[3]))["policy"].startswith("4-")
        (kept,) = service.slots["main"].kept
        assert kept.startswith("4-")

    monkeypatch.setattr(factory, "engine_of", slow)
    served(folder, work)


def test_a_kept_policy_under_another_name_is_not_activated(
    folder: Path, shop_world: TinySetup
) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        (first,) = service.slots["main"].kept
        (copy,) = folder.parent.rglob(first)
        copy.rename(copy.with_name("7-0123abcd"))
        body = {"version": "7-0123abcd"}
        response = await client.post("/v1/policy:activate", json=body, headers=OPERATOR)
        assert response.status_code == 404
        assert "damaged" in response.text

    served(folder, work)


@pytest.mark.slow
def test_the_newest_versions_are_kept_and_can_be_activated(
    folder: Path, shop_world: TinySetup
) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        slot = service.slots["main"]
        for step in (4, 5, 6):
            trained_further(shop_world, folder, step=step)
            await service.poll()
        assert [version.split("-")[0] for version in slot.kept] == ["5", "6"]
        body = {"version": slot.kept[0]}
        await client.post("/v1/policy:activate", json=body, headers=OPERATOR)
        assert str(slot.version).startswith("5-")

    served(folder, work, versions=2)


@pytest.mark.slow
def test_a_policy_that_is_not_what_it_says_is_not_followed(
    folder: Path, shop_world: TinySetup
) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        first = (await recommend(client, history=[3]))["policy"]
        trained_further(shop_world, folder, step=4, spoil=True)
        await service.poll()
        assert (await recommend(client, history=[3]))["policy"] == first
        (main,) = (await client.get("/v1/policy")).json()["variants"]
        assert "their folder names 00000000" in main["refused"]
        shutil.rmtree(folder)
        await service.poll()
        assert (await recommend(client, history=[3]))["policy"] == first
        # A switch is undone if the engine scores differently from the model.
        trained_further(shop_world, folder, step=6)
        slot = service.slots["main"]
        install = slot.inference_engine.load_weights

        def broken(version: Any, values: Any) -> None:
            name = next(iter(values))
            torn = values | {name: values[name] * (0.5 if version.step == 6 else 1.0)}
            slot.inference_engine.load_weights = install  # type: ignore[method-assign]
            weights.restore(slot.inference_engine._model, torn)  # type: ignore[attr-defined]
            slot.inference_engine.version = version  # type: ignore[misc]

        slot.inference_engine.load_weights = broken  # type: ignore[method-assign]
        before = [i["score"] for i in (await recommend(client, history=[3]))["items"]]
        await service.poll()
        after = await recommend(client, history=[3])
        assert after["policy"] == first
        assert [i["score"] for i in after["items"]] == before
        assert "away from policy 6-" in slot.refused

    served(folder, work)

"""The endpoint over HTTP, in-process and without Ray."""

import asyncio
import json
import shutil
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from orchard.catalog import catalog as catalogs
from orchard.errors import CheckpointError, ConfigError, EngineError
from orchard.policy import weights
from orchard.settings import FilterConfig, ServeConfig, VariantConfig
from orchard.testing import TinySetup, tiny_setup
from serve import factory
from serve.catalog.schema import DeltaRequest
from serve.factory import open_service
from serve.http.routes import create_app
from serve.metrics import InMemoryMetrics
from serve.policies.ab_test import assign_variant
from serve.schema import RecommendResponse
from serve.service import Service
from serve.testing import export_policy

T = TypeVar("T")
TOKEN = "a-token-of-the-operator"
OPERATOR = {"authorization": f"Bearer {TOKEN}"}
RENAMED = {
    "catalogue": "catalog", "asked": "requested", "fewer": "shortfall_reason",
    "unknown": "unknown_items",
}  # fmt: skip
"""Old to new fields of a response."""


@pytest.fixture
def folder(shop_world: TinySetup, tmp_path: Path) -> Path:
    """Export a policy as training does, with all files that the settings can refer to."""
    export_policy(shop_world, tmp_path / "policy", step=3)
    ids = np.arange(40)
    pq.write_table(
        pa.table({"item_id": ids, "price": ids % 7, "stock": ids % 2 == 0}),
        tmp_path / "attributes.parquet",
    )
    pq.write_table(pa.table({"item_id": ids, "count": 40 - ids}), tmp_path / "popularity.parquet")
    pq.write_table(
        pa.table({"user_id": ["ann", "bob"], "history": [[1, 2, 3], [30]]}),
        tmp_path / "histories.parquet",
    )
    return tmp_path / "policy"


@pytest.fixture(autouse=True)
def _token(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ORCHARD_SERVE_TOKEN", TOKEN)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings(folder: Path, **changes: Any) -> ServeConfig:
    parent = folder.parent
    defaults: dict[str, Any] = {
        "attributes": parent / "attributes.parquet",
        "popularity": parent / "popularity.parquet",
        "histories": parent / "histories.parquet",
        "filters": {
            "cheap": FilterConfig(column="price", op="<", value=3),
            "stocked": FilterConfig(column="stock"),
        },
        "poll_interval_s": 3600.0,  # the tests poll themselves
    }
    return ServeConfig(**(defaults | changes))


def served(
    folder: Path, work: Callable[[httpx.AsyncClient, Service], Awaitable[T]], **changes: Any
) -> T:
    """Run `work` against a started endpoint and return its result."""

    async def run() -> T:
        service = open_service(folder, settings(folder, **changes), InMemoryMetrics())
        app = create_app(service)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://shop") as client,
        ):
            return await work(client, service)

    return asyncio.run(run())


async def recommend(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/recommend", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def shown(answer: dict[str, Any]) -> list[int]:
    return [item["item_id"] for item in answer["items"]]


def test_a_request_is_answered_with_items_versions_and_cost(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        response = await client.post(
            "/v1/recommend",
            json={"history": [3, 17, 5], "k": 5, "explain": "levels"},
            headers={"x-request-id": "mine-1"},
        )
        answer = response.json()
        assert response.headers["x-request-id"] == "mine-1"
        assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4, 5]
        assert (answer["returned"], answer["source"]) == (5, "policy")
        assert (answer["shortfall_reason"], answer["requested"]) == ("", 5)
        assert answer["unknown_items"] == 0
        for old, new in RENAMED.items():
            assert answer[old] == answer[new]
        assert RecommendResponse.model_validate(answer).model_dump(mode="json") == answer
        assert answer["policy"] == str(service.slots["main"].version)
        assert answer["policy"].startswith("3-")
        assert answer["catalog"].startswith("0-")
        assert answer["cost"]["forward_tokens"] > 0
        levels = answer["items"][0]["levels"]
        assert sum(level["logprob"] for level in levels) == pytest.approx(
            answer["items"][0]["score"], abs=1e-5
        )
        tree = (await recommend(client, history=[3], explain="tree"))["tree"]
        assert tree[0]["parent"] == -1
        plain = await recommend(client, history=[3])
        assert plain["tree"] is None
        assert plain["items"][0]["levels"] is None

    served(folder, work)


def test_what_is_excluded_or_filtered_is_never_shown(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        everything = await recommend(client, history=[3, 17, 5], k=40)
        assert sorted(shown(everything)) == list(range(40))
        filtered = await recommend(
            client, history=[3, 18, 5], k=40, filters=["cheap", "stocked"], exclude=[0, 7, 14],
            exclude_seen=True,
        )  # fmt: skip
        allowed = {i for i in range(40) if i % 7 < 3 and i % 2 == 0} - {0, 7, 14, 3, 18, 5}
        assert set(shown(filtered)) == allowed
        assert filtered["shortfall_reason"] == "exhausted"
        nothing = await recommend(client, history=[1], exclude=list(range(40)))
        assert (nothing["items"], nothing["shortfall_reason"]) == ([], "exhausted")
        capped = await recommend(client, history=[1], k=40, per_prefix=1)
        assert len({item["sid"][0] for item in capped["items"]}) == len(capped["items"])
        assert service.metrics.total("orchard_serve_illegal") == 0

    served(folder, work)


def test_users_are_answered_from_the_history_store(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        answer = await recommend(client, user="ann")
        assert shown(answer) == shown(await recommend(client, history=[1, 2, 3]))
        response = await client.post("/v1/recommend", json={"user": "eve"})
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"

    served(folder, work)


def test_a_batch_answers_or_refuses_each_by_itself(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        body = {"requests": [{"history": [1]}, {"history": [2], "k": 1000}, {"history": [1]}]}
        answers = (await client.post("/v1/recommend:batch", json=body)).json()["responses"]
        assert shown(answers[0]) == shown(answers[2]) == shown(await recommend(client, history=[1]))
        assert answers[1]["status"] == 422
        assert answers[1]["detail"] == "k = 1000 exceeds 512; ask for fewer items"

    served(folder, work)


def test_items_catalog_policy_and_health_can_be_looked_at(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        catalog = catalogs.load(folder / "catalogue")
        item = (await client.get("/v1/items/39")).json()
        assert item["sid"] == catalog.codes[39].tolist()
        assert 0 in item["shares_sid_with"]  # the tiny catalog's collision
        assert item["filters"] == []
        assert (await client.get("/v1/items/4000")).status_code == 404
        assert (await client.get("/v1/items/99999999999999999999999")).status_code == 404
        info = (await client.get("/v1/catalog")).json()
        assert (info["items"], info["version"], info["filters"]) == (40, 0, ["cheap", "stocked"])
        (main,) = (await client.get("/v1/policy")).json()["variants"]
        assert (main["step"], main["share"], main["kept"]) == (3, 1.0, [main["policy"]])
        assert main["decoders"] == ["beam", "beam_sample", "ved"]
        for path in ("/healthz", "/readyz", "/openapi.json", "/docs", "/"):
            assert (await client.get(path)).status_code == 200, path
        assert (await client.get("/nothing")).headers["content-type"] == "application/problem+json"

    served(folder, work)


def test_methods_and_content_types_are_answered_by_the_book(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        for path in ("/healthz", "/readyz", "/v1/catalog", "/v1/items/39", "/docs", "/"):
            shown, head = await client.get(path), await client.head(path)
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["content-length"] == shown.headers["content-length"]
        for method, path, allowed in (
            ("POST", "/v1/catalog", "GET, HEAD"), ("GET", "/v1/recommend", "POST"),
            ("HEAD", "/v1/recommend", "POST"), ("DELETE", "/v1/items/3", "GET, HEAD"),
            ("PUT", "/v1/catalog/delta", "POST"), ("GET", "/v1/policy:activate", "POST"),
            ("OPTIONS", "/healthz", "GET, HEAD"), ("PATCH", "/v1/explore/main", "POST"),
        ):  # fmt: skip
            refused = await client.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, allowed), path
        body = b'{"history": [3]}'
        for path in ("/v1/recommend", "/v1/recommend:batch", "/v1/explore/main"):
            for headers in (
                {}, {"content-type": "text/plain"}, {"content-type": "json"},
                {"content-type": "application/x-www-form-urlencoded"},
                {"content-type": "application/json; charset=utf-16"},
                {"content-type": "application/json", "content-encoding": "gzip"},
            ):  # fmt: skip
                refused = await client.post(path, content=body, headers=headers)
                assert refused.status_code == 415, headers
                assert refused.json()["type"] == "urn:orchard:problem:unsupported-media"
        for kind in ("application/json", "Application/JSON; Charset=UTF-8", "application/ld+json"):
            taken = await client.post("/v1/recommend", content=body, headers={"content-type": kind})
            assert taken.status_code == 200, kind

    served(folder, work)


@pytest.mark.parametrize("written", ["1_0", "1%0A", "%201", "+1", "01", "-0", "1.0", "٣", "1e1"])
def test_an_item_id_is_digits_alone(folder: Path, written: str) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        assert (await client.get(f"/v1/items/{written}")).status_code == 422
        assert (await client.get("/v1/items/10")).json()["item_id"] == 10

    served(folder, work)


@pytest.mark.parametrize("temperature", [5e-324, 1e-320, 1e-307, 1e-200, 1e-9])
def test_any_temperature_above_zero_can_be_sampled_at(folder: Path, temperature: float) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        greedy = await recommend(client, history=[3], k=3)
        body = {"decoder": "beam_sample", "temperature": temperature, "seed": 1}
        drawn = await recommend(client, history=[3], k=3, **body)
        assert shown(drawn)[:1] == shown(greedy)[:1]

    served(folder, work)


def test_text_that_is_no_unicode_is_refused_as_a_problem(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        headers = {"content-type": "application/json"}
        for body in (
            rb'{"history": [1], "\ud800": 1}',
            rb'{"history": [1], "filters": ["\ud800"]}',
        ):
            refused = await client.post("/v1/recommend", content=body, headers=headers)
            assert refused.status_code == 422
            assert refused.headers["content-type"] == "application/problem+json"
        delta = rb'{"add": [{"item_id": 99, "sid": [0, 0, 0], "title": "\ud800"}]}'
        refused = await client.post("/v1/catalog/delta", content=delta, headers=headers | OPERATOR)
        assert refused.status_code == 422

    served(folder, work)


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "Bearer ", "bEaReR"])
def test_the_scheme_of_a_token_may_be_in_any_case(folder: Path, scheme: str) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        response = await client.post(
            "/v1/catalog/delta",
            json={"remove": [1]},
            headers={"authorization": f"{scheme} {TOKEN}"},
        )
        assert response.status_code == 200

    served(folder, work)


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


def test_an_endpoint_whose_searches_fail_is_not_ready(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        def broken(*_: object) -> None:
            raise EngineError("it cannot search")

        engine = service.slots["main"].inference_engine
        engine.run = broken  # type: ignore[method-assign, assignment]
        for _ in range(3):
            assert (await client.get("/readyz")).status_code == 200
            assert (await recommend(client, history=[3]))["fallback"] == "engine"
        assert (await client.get("/readyz")).status_code == 503
        del engine.run  # type: ignore[attr-defined]
        assert (await recommend(client, history=[3]))["source"] == "policy"
        assert (await client.get("/readyz")).status_code == 200

    served(folder, work)


def test_the_log_says_what_the_version_that_answered_restricted(
    folder: Path, tmp_path: Path
) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        draw: dict[str, Any] = {"decoder": "beam_sample", "width": 1, "k": 1, "seed": 1}
        search = service._scheduler._search  # pyright: ignore[reportPrivateUsage]

        def meanwhile(*args: Any) -> Any:
            results = search(*args)
            delta = DeltaRequest.model_validate({"remove": [1]})
            service.catalog_store.activate(service.catalog_store.apply(delta))
            return results

        service._scheduler._search = meanwhile  # type: ignore[method-assign]
        await recommend(client, history=[777, *range(8), 888, 12], **draw)
        service._scheduler._search = search  # type: ignore[method-assign]
        await recommend(client, history=[3], **draw)

    served(folder, work, exposure=tmp_path / "log")
    first, second = pq.read_table(tmp_path / "log").to_pylist()
    assert (first["restricted"], first["catalogue"][:2]) == (False, "0-")
    assert (second["restricted"], second["catalogue"][:2]) == (True, "1-")
    assert first["history"] == [*range(8), 12]  # as the policy read it


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
                ("/v1/policy:activate", {"version": "latest"}),
            ):
                response = await client.post(
                    path, json=body, headers={"authorization": header.encode()}
                )
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
        assert service.catalog_store.current.version == 0
        assert isinstance(service.metrics, InMemoryMetrics)
        assert service.metrics.total("orchard_serve_refused") == 14
        monkeypatch.setenv("ORCHARD_SERVE_TOKEN", "")
        closed = await client.post(
            "/v1/catalog/delta", json={"remove": [1]}, headers={"authorization": "Bearer "}
        )
        assert closed.status_code == 401

    served(folder, work)


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


def trained_further(world: TinySetup, folder: Path, *, step: int, spoil: bool = False) -> None:
    """Replace the exported policy with another one, as training does."""
    values = weights.snapshot(world.model)
    name = next(iter(values))
    changed = values | {name: values[name] + 0.05 * step}
    try:
        weights.restore(world.model, changed)
        export_policy(world, folder, step=step, digest="0" * 64 if spoil else None)
    finally:
        weights.restore(world.model, values)


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


def test_variants_split_users_and_shadows_only_log(
    folder: Path, shop_world: TinySetup, tmp_path: Path
) -> None:
    trained_further(shop_world, tmp_path / "other", step=9)
    trained_further(shop_world, tmp_path / "dark", step=8)
    variants = {
        "b": VariantConfig(policy=tmp_path / "other", share=0.5),
        "dark": VariantConfig(policy=tmp_path / "dark", shadow=True),
    }

    async def work(client: httpx.AsyncClient, service: Service) -> None:
        users = [f"user-{i}" for i in range(6)]
        answers = [await recommend(client, history=[3], user=user, k=2) for user in users]
        again = [await recommend(client, history=[3], user=user, k=2) for user in users]
        names = [answer["variant"] for answer in answers]
        assert names == [answer["variant"] for answer in again]
        assert set(names) == {"main", "b"}
        for answer in answers:
            assert answer["policy"].startswith("9-" if answer["variant"] == "b" else "3-")

    served(folder, work, variants=variants, exposure=tmp_path / "log")
    log = pq.read_table(tmp_path / "log").to_pylist()
    assert sum(row["shadow"] for row in log) == 24
    assert {row["variant"] for row in log if row["shadow"]} == {"dark"}
    assert len({row["request_id"] for row in log}) == 12
    for row in log:
        assert sum(row["logprob"]) == pytest.approx(row["score"], abs=1e-5)
        assert row["history"] == [3]


def test_the_hash_of_users_keeps_to_the_shares() -> None:
    users = [str(user) for user in range(4000)]
    first = [assign_variant(user, {"b": 0.2, "c": 0.3}, "salt") for user in users]
    assert first.count("b") == pytest.approx(800, abs=100)
    assert first.count("c") == pytest.approx(1200, abs=100)
    grown = [assign_variant(user, {"b": 0.2, "c": 0.4}, "salt") for user in users]
    for before, after in zip(first, grown, strict=True):
        assert before == after or (before, after) == ("main", "c")
    assert [assign_variant(u, {"b": 0.2, "c": 0.3}, "other") for u in users] != first
    assert assign_variant(None, {"b": 1.0}, "salt") == "main"


def test_late_answers_are_popular_items_and_say_so(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        late = await recommend(client, history=[3], k=4, exclude=[1], deadline_ms=1e-6)
        assert (late["source"], late["fallback"]) == ("popularity", "deadline")
        assert shown(late) == [0, 2, 3, 4]
        assert late["items"][0]["score"] is None
        assert service.metrics.total("orchard_serve_fallbacks") == 1
        assert (await recommend(client, history=[3], deadline_ms=60_000))["source"] == "policy"

    served(folder, work)

    async def without(client: httpx.AsyncClient, service: Service) -> None:
        response = await client.post("/v1/recommend", json={"history": [3], "deadline_ms": 1e-6})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1

    served(folder, without, popularity=None)


def test_cached_answers_are_marked_and_end_with_their_versions(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        first = await recommend(client, history=[3])
        second = await recommend(client, history=[3])
        assert (first["source"], second["source"]) == ("policy", "cache")
        assert shown(first) == shown(second)
        drawn = [await recommend(client, history=[3], decoder="beam_sample") for _ in range(2)]
        assert [a["source"] for a in drawn] == ["policy", "policy"]
        assert drawn[0]["seed"] != drawn[1]["seed"]
        body = {"remove": [shown(first)[0]]}
        await client.post("/v1/catalog/delta", json=body, headers=OPERATOR)
        third = await recommend(client, history=[3])
        assert third["source"] == "policy"
        assert shown(first)[0] not in shown(third)
        assert service.metrics.total("orchard_serve_cache_hits") == 1

    served(folder, work, cache_s=60.0)


def test_a_full_cache_forgets_what_came_first(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        histories = [[3], [4], [4], [3]]
        source = [(await recommend(client, history=history))["source"] for history in histories]
        assert source == ["policy", "policy", "cache", "policy"]

    served(folder, work, cache_s=60.0, cache_size=1)


def test_a_full_queue_answers_429_with_a_time_to_retry(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        body = {"history": [3], "width": 40}
        responses = await asyncio.gather(
            *(client.post("/v1/recommend", json=body) for _ in range(12))
        )
        codes = [response.status_code for response in responses]
        assert set(codes) == {200, 429}
        refused = responses[codes.index(429)]
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["type"] == "urn:orchard:problem:overloaded"

    served(folder, work, width=40, max_width=40, max_k=40, budget=40, queue=120)


def test_settings_that_do_not_fit_the_policy_are_refused(
    folder: Path, shop_world: TinySetup, tmp_path: Path
) -> None:
    filters = {"odd": FilterConfig(column="size", value=1)}
    with pytest.raises(ConfigError, match=r"serve\.filters\.odd\.column = 'size'"):
        open_service(folder, settings(folder, filters=filters), InMemoryMetrics())
    export_policy(tiny_setup(num_items=30), tmp_path / "foreign", step=1)
    foreign = {"b": VariantConfig(policy=tmp_path / "foreign", share=0.1)}
    with pytest.raises(CheckpointError, match="was trained on catalog"):
        open_service(folder, settings(folder, variants=foreign), InMemoryMetrics())
    other = export_policy(shop_world, tmp_path / "other", step=1)
    facts = json.loads((other / "policy.json").read_text())
    (other / "policy.json").write_text(json.dumps(facts | {"max_history": 3}))
    longer = {"b": VariantConfig(policy=other, share=0.1)}
    with pytest.raises(ConfigError, match=r"max_history = 3, the main policy with 10"):
        open_service(folder, settings(folder, variants=longer), InMemoryMetrics())

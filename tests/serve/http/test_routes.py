"""The endpoint over HTTP, in-process and without Ray."""

from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from orchard.catalog import catalog as catalogs
from orchard.errors import EngineError
from serve.schema import RecommendResponse
from serve.service import Service
from tests.fixtures.endpoint import OPERATOR, TOKEN, recommend, served, shown

RENAMED = {
    "catalogue": "catalog", "asked": "requested", "fewer": "shortfall_reason",
    "unknown": "unknown_items",
}  # fmt: skip
"""Old to new fields of a response."""


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


async def score(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/score", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_given_items_have_the_scores_that_a_search_gives_them(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        whole = await recommend(client, history=[3, 17, 5], k=40, width=100, explain="levels")
        expected = {item["item_id"]: item for item in whole["items"]}
        ids = [7, 31, 7, 0, 25, 39]
        answer = await score(client, history=[3, 17, 5], items=ids, explain="levels")
        assert [item["item_id"] for item in answer["items"]] == ids
        for item in answer["items"]:
            same = expected[item["item_id"]]
            assert item["score"] == pytest.approx(same["score"], abs=1e-5)
            assert (item["sid"], item["title"]) == (same["sid"], same["title"])
            codes = [level["logprob"] for level in item["levels"]]
            assert codes == pytest.approx([v["logprob"] for v in same["levels"]], abs=1e-5)
            assert item["rank"] is None
        assert answer["policy"] == str(service.slots["main"].version)
        assert answer["catalog"] == whole["catalog"]
        everything = await score(client, history=[3, 17, 5], items=list(range(40)), order=True)
        scores = [item["score"] for item in everything["items"]]
        assert scores == sorted(scores, reverse=True)
        assert [item["rank"] for item in everything["items"]] == list(range(1, 41))
        assert all(item["levels"] is None for item in everything["items"])
        assert service.metrics.total("orchard_serve_requests") == 3

    served(folder, work)


def test_items_without_a_score_come_last_and_wrong_requests_are_refused(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        answer = await score(client, history=[3, 999], items=[888, 5, 2**62], order=True)
        assert [item["item_id"] for item in answer["items"]] == [5, 888, 2**62]
        assert [item["rank"] for item in answer["items"]] == [1, None, None]
        assert answer["items"][1] == {
            "item_id": 888, "score": None, "sid": [], "title": "", "rank": None, "levels": None
        }  # fmt: skip
        assert answer["unknown_items"] == 1
        nothing = await score(client, history=[], items=[777])
        assert nothing["items"][0]["score"] is None
        removed = await client.post("/v1/catalog/delta", json={"remove": [5]}, headers=OPERATOR)
        assert removed.status_code == 200
        assert (await score(client, history=[3], items=[5]))["items"][0]["score"] is None
        for body in (
            {"history": [1], "items": []}, {"items": [1]}, {"history": [1], "items": [1.5]},
            {"history": [1], "items": [1] * 1001}, {"history": [1], "items": [1], "k": 3},
        ):  # fmt: skip
            assert (await client.post("/v1/score", json=body)).status_code == 422, body

    served(folder, work)


def test_scores_wait_in_a_bounded_queue(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        refused = await client.post("/v1/score", json={"history": [1], "items": list(range(40))})
        assert refused.status_code == 429
        assert "39" in refused.json()["detail"]
        assert (await score(client, history=[1], items=[1, 2]))["items"][0]["score"] < 0

    served(folder, work, width=8, max_width=16, max_k=16, budget=32, queue=39)


def test_equal_scores_are_ranked_by_popularity(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        catalog = service.catalog_store.current.catalog
        place = service.catalog_store.current.by_popularity.tolist()
        leaf, count = np.unique(catalog.leaf_of_item, return_counts=True)
        twins = np.flatnonzero(catalog.leaf_of_item == leaf[count > 1][0])
        ids = catalog.item_id[twins].tolist()
        ranked = (await score(client, history=[1], items=ids, order=True))["items"]
        assert len({item["score"] for item in ranked}) == 1
        rows = [int(np.flatnonzero(catalog.item_id == item["item_id"])[0]) for item in ranked]
        if service.catalog_store.current.popularity:
            assert [place.index(row) for row in rows] == sorted(place.index(row) for row in rows)
        else:
            assert [item["item_id"] for item in ranked] == ids

    served(folder, work)

"""Service: variants, shadows, fallbacks, the cache and the bound of its queue."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest

from orchard.errors import CheckpointError, ConfigError
from orchard.settings import FilterConfig, VariantConfig
from orchard.testing import TinySetup, tiny_setup
from serve.catalog.schema import DeltaRequest
from serve.factory import open_service
from serve.metrics import InMemoryMetrics
from serve.service import Service
from serve.testing import export_policy
from tests.fixtures.endpoint import OPERATOR, recommend, served, settings, shown, trained_further


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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_full_cache_forgets_what_came_first(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        histories = [[3], [4], [4], [3]]
        source = [(await recommend(client, history=history))["source"] for history in histories]
        assert source == ["policy", "policy", "cache", "policy"]

    served(folder, work, cache_s=60.0, cache_size=1)


@pytest.mark.slow
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


def test_a_width_for_each_level_is_used_raised_and_capped(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        facts = {"history": [3, 17], "k": 2, "per_prefix": 100}
        answer, one = await recommend(client, **facts), await recommend(client, **facts, width=20)
        assert (answer["width"], one["width"]) == (20, 20)
        assert answer["cost"]["forward_tokens"] < one["cost"]["forward_tokens"]
        # No level is below k: all items are found.
        assert (await recommend(client, history=[3, 17], k=40, exclude=[1]))["returned"] == 39
        sampled = await recommend(client, history=[3], k=2, decoder="beam_sample", seed=3)
        assert sampled["width"] == 20

    served(folder, work, width=[2, 4, 20], max_width=50, max_k=50)
    with pytest.raises(ConfigError, match=r"serve.width = \[2, 4\] has 2 numbers"):
        served(folder, work, width=[2, 4])


def test_an_answer_is_that_of_the_whole_beam_with_fewer_tokens(folder: Path) -> None:
    async def work(client: httpx.AsyncClient, service: Service) -> None:
        for exclude in ([], [1, 2, 30]):
            facts = {"history": [3, 17], "k": 2, "width": 40, "exclude": exclude}
            early = await recommend(client, **facts)
            whole = await recommend(client, **facts, per_prefix=100)
            assert early["items"] == whole["items"]
            assert early["cost"]["forward_tokens"] < whole["cost"]["forward_tokens"]

    served(folder, work)


def test_histories_that_grow_are_counted_and_answered_alike(folder: Path) -> None:
    async def ask(client: httpx.AsyncClient, service: Service) -> list[list[int]]:
        metrics = service.metrics
        assert isinstance(metrics, InMemoryMetrics)
        lists = [
            shown(await recommend(client, history=[3, 17, 5, 8][:size])) for size in range(1, 5)
        ]
        hits = metrics.total("orchard_serve_prefix_hits")
        tokens = metrics.total("orchard_serve_prefix_tokens")
        kept = metrics.gauges.get(("orchard_serve_prefix_bytes", "main"), 0.0)
        if service.config.prefix_cache_mib:
            assert (hits, tokens) == (4, 1 + 4 + 7 + 10)  # the warm-up has searched <bos>
            assert 0 < kept <= 2**20
        else:
            assert (hits, tokens, kept) == (0, 0, 0.0)
        return lists

    assert served(folder, ask) == served(folder, ask, prefix_cache_mib=1.0)

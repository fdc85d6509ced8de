"""Guides of served policies: loaded, switched, refused and carried along with their policy."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchard.guide.guide import MATRICES, Guide
from orchard.settings import ServeConfig, VariantConfig
from orchard.testing import TinySetup, tiny_setup
from serve.catalog.schema import DeltaRequest
from serve.errors import UnprocessableError
from serve.factory import open_service
from serve.http.info import policy_info
from serve.metrics import InMemoryMetrics
from serve.schema import ActivateRequest, RecommendRequest, RecommendResponse, VariantInfo
from serve.service import Service
from serve.testing import export_policy
from tests.fixtures.guides import random_guide
from tests.serve.policies.test_slot import further

HISTORY = [3, 17, 5]


@pytest.fixture
def guide(shop_world: TinySetup) -> Guide:
    guide = replace(random_guide(shop_world.catalog, seed=2), exclude_seen=True)
    return replace(guide, policy=shop_world.version.digest)


@pytest.fixture
def folder(shop_world: TinySetup, guide: Guide, tmp_path: Path) -> Path:
    return export_policy(shop_world, tmp_path / "policy", step=3, guide=guide)


def served(folder: Path, work: Callable[[Service], Awaitable[None]], **changes: Any) -> None:
    """Run `work` against a started service that polls when told to."""

    async def run() -> None:
        settings = ServeConfig(poll_interval_s=3600.0, **changes)
        service = open_service(folder, settings, InMemoryMetrics())
        await service.start()
        await work(service)
        await service.close()

    asyncio.run(run())


async def ask(service: Service, **changes: Any) -> RecommendResponse:
    """Ask for every item that may be shown."""
    request = RecommendRequest(**({"history": HISTORY, "k": 40} | changes))
    return await service.recommend(request, "id")


def shown(answer: RecommendResponse) -> list[int]:
    return [item.item_id for item in answer.items]


def variant_info(service: Service, name: str = "main") -> VariantInfo:
    return next(one for one in policy_info(service).variants if one.name == name)


@pytest.mark.slow
def test_requests_follow_the_guide_unless_they_say_otherwise(folder: Path, guide: Guide) -> None:
    async def work(service: Service) -> None:
        info = variant_info(service)
        assert (info.guide, info.guide_notes) == (guide.digest, [])
        assert info.decoders == ["beam", "beam_sample", "ved", "guided"]
        answer, beam = await ask(service), await ask(service, decoder="beam")
        assert (answer.decoder, answer.proved) == ("guided", True)
        assert (beam.decoder, beam.proved) == ("beam", None)
        assert answer.seed is None
        assert shown(answer) != shown(beam)
        assert not set(HISTORY) & {*shown(answer), *shown(beam)}
        assert set(HISTORY) <= set(shown(await ask(service, exclude_seen=False)))
        assert set(HISTORY) <= set(shown(await ask(service, decoder="beam_sample", width=40)))
        # Score and log-probability are the policy's own.
        own = {item.item_id: item.score for item in beam.items}
        for item in (await ask(service, explain="levels")).items:
            assert item.score == pytest.approx(own[item.item_id], abs=1e-5)
            assert sum(v.logprob for v in item.levels or []) == pytest.approx(item.score, abs=1e-5)
            assert item.guide is not None

    served(folder, work)


@pytest.mark.slow
def test_a_guide_may_be_switched_off_for_all_or_for_a_variant(folder: Path, guide: Guide) -> None:
    async def off(service: Service) -> None:
        assert variant_info(service).guide == ""
        answer = await ask(service)
        assert answer.decoder == "beam"
        assert set(HISTORY) <= set(shown(answer))
        with pytest.raises(UnprocessableError, match="decoder guided needs a policy with a guide"):
            await ask(service, decoder="guided")

    async def compare(service: Service) -> None:
        assert variant_info(service).guide == guide.digest
        assert variant_info(service, "plain").guide == ""
        request = RecommendRequest(history=HISTORY, k=40)
        assert (await service.explore(request, "main")).decoder == "guided"
        assert (await service.explore(request, "plain")).decoder == "beam"

    served(folder, off, guide=False)
    served(folder, compare, variants={"plain": VariantConfig(policy=folder, guide=False)})


@pytest.mark.slow
def test_a_policy_and_its_guide_switch_together(
    folder: Path, shop_world: TinySetup, guide: Guide
) -> None:
    async def work(service: Service) -> None:
        first = await ask(service)
        further(shop_world, folder, 4)  # an export without a guide
        await service.poll()
        second = await ask(service)
        assert (second.policy[:2], second.decoder) == ("4-", "beam")
        random_guide(shop_world.catalog, seed=9).save(folder / "guide")
        await service.poll()  # the same weights, now with a guide
        assert (await ask(service)).decoder == "guided"
        assert variant_info(service).guide == random_guide(shop_world.catalog, seed=9).digest
        await service.activate(ActivateRequest(version=first.policy))
        back = await ask(service)
        assert (back.policy, shown(back)) == (first.policy, shown(first))
        assert variant_info(service).guide == guide.digest
        await service.activate(ActivateRequest(version=second.policy))
        assert variant_info(service).guide == random_guide(shop_world.catalog, seed=9).digest

    served(folder, work)


def test_a_guide_of_a_policy_since_replaced_serves_and_says_so(
    folder: Path, shop_world: TinySetup, guide: Guide
) -> None:
    replace(guide, policy="f" * 64).save(folder / "guide")

    async def work(service: Service) -> None:
        assert (await ask(service)).decoder == "guided"
        (note,) = variant_info(service).guide_notes
        assert "fitted with the policy ffffffff" in note

    served(folder, work)


@pytest.mark.parametrize("kind", ["other catalog", "damaged", "negative scores"])
def test_a_guide_that_cannot_be_used_is_named_and_the_policy_serves(
    folder: Path, guide: Guide, kind: str
) -> None:
    if kind == "other catalog":
        random_guide(tiny_setup(seed=9).catalog, seed=1).save(folder / "guide")
    elif kind == "damaged":
        (folder / "guide" / MATRICES).write_bytes(b"no tensors")
    else:
        expert = guide.experts[0]
        wrong = replace(expert)
        object.__setattr__(wrong, "strength", expert.strength - 9)
        replace(guide, experts=(wrong, *guide.experts[1:])).save(folder / "guide")
    says = {
        "other catalog": "was fitted on catalog", "damaged": "is damaged",
        "negative scores": "gives the score -",
    }[kind]  # fmt: skip

    async def work(service: Service) -> None:
        answer = await ask(service)
        assert (answer.source, answer.decoder) == ("policy", "beam")
        (note,) = variant_info(service).guide_notes
        assert "the guide is not used" in note
        assert says in note
        assert str(folder) not in note

    served(folder, work)


def test_a_guide_that_gets_damaged_under_the_endpoint_serves_on(folder: Path, guide: Guide) -> None:
    async def work(service: Service) -> None:
        before = await ask(service)
        (folder / "guide" / MATRICES).write_bytes(b"no tensors")
        await service.poll()
        after = await ask(service)
        assert (after.decoder, shown(after)) == ("guided", shown(before))
        assert "is damaged" in variant_info(service).guide_notes[0]

    served(folder, work)


@pytest.mark.slow
def test_a_delta_carries_the_guide_along(folder: Path, guide: Guide) -> None:
    async def work(service: Service) -> None:
        before = await ask(service, explain="levels")
        rewards = {item.item_id: item.guide and item.guide.reward for item in before.items}
        gone = shown(before)[0]
        taken = {tuple(row) for row in service.catalog_store.current.catalog.codes.tolist()}
        sid = next(
            (a, b, c) for a in range(5) for b in range(4) for c in range(6)
            if (a, b, c) not in taken
        )  # fmt: skip
        delta = {"remove": [gone], "add": [{"item_id": 900, "sid": list(sid), "title": "new"}]}
        await service.change(DeltaRequest.model_validate(delta))
        after = await ask(service, explain="levels")
        assert after.decoder == "guided"
        assert after.proved
        assert set(shown(after)) == {*shown(before), 900} - {gone}
        for item in after.items:
            assert item.guide is not None
            if item.item_id == 900:
                assert not any(item.guide.summands.values())
            else:
                assert item.guide.reward == pytest.approx(rewards[item.item_id], abs=1e-5)
        assert variant_info(service).guide == guide.digest
        await service.change(DeltaRequest(rollback_to=0))
        assert shown(await ask(service)) == shown(before)

    served(folder, work)


@pytest.mark.slow
def test_answers_of_another_guide_do_not_come_from_the_cache(
    folder: Path, shop_world: TinySetup
) -> None:
    async def work(service: Service) -> None:
        assert [(await ask(service)).source for _ in range(2)] == ["policy", "cache"]
        random_guide(shop_world.catalog, seed=9).save(folder / "guide")
        await service.poll()
        assert (await ask(service)).source == "policy"

    served(folder, work, cache_s=60.0)


@pytest.mark.slow
def test_a_wider_search_follows_where_nothing_is_proved(folder: Path) -> None:
    async def narrow(service: Service) -> None:
        assert (await ask(service, k=3, width=3)).proved is False

    async def wide(service: Service) -> None:
        answer = await ask(service, k=3, width=3)
        assert answer.proved
        assert answer.returned == 3

    served(folder, narrow)
    served(folder, wide, wide=40)

"""Stored weights that are lost, and published again."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayTaskError

from cluster.actors.weights import PublishedWeights, fetch, fetch_value, load, load_all, repeated
from orchard.errors import ActorError, OrchardError, WeightsLostError
from orchard.policy.transfer import LOST
from orchard.types import PolicyVersion, StoredTransfer, Update

VERSION = PolicyVersion(step=3, digest="new")


def stored(digest: str, place: str) -> StoredTransfer:
    return StoredTransfer(digest=digest, ref=place)


LOST_ONE = PublishedWeights(policy=VERSION, stored=stored("new", "gone"))
AGAIN = PublishedWeights(policy=VERSION, stored=stored("new", "here"))


class Answer:
    """Answer of an actor, as Ray gives it."""

    def __init__(self, outcome: PolicyVersion | Exception) -> None:
        self.outcome = outcome

    def future(self) -> Any:
        import concurrent.futures

        future: Any = concurrent.futures.Future()
        if isinstance(self.outcome, Exception):
            future.set_exception(self.outcome)
        else:
            future.set_result(self.outcome)
        return future


class Actor:
    """Actor to which the weights in the place `gone` are lost."""

    def __init__(self, error: OrchardError) -> None:
        self.error, self.asked = error, list[str]()
        self.load_weights = self

    def remote(self, version: PolicyVersion, weights: StoredTransfer, _: object) -> Answer:
        self.asked.append(weights.ref)
        if weights.ref == "gone":
            return Answer(RayTaskError("load_weights", "traceback", self.error))
        return Answer(version)


def again() -> Callable[[], Any]:
    async def publish() -> PublishedWeights:
        return AGAIN

    return publish


def test_an_actor_to_which_weights_are_lost_gets_them_as_they_are_published_again() -> None:
    actor = Actor(WeightsLostError(LOST))
    version = asyncio.run(load(actor, LOST_ONE, timeout_s=9.0, again=again()))
    assert (version.step, version.digest) == (3, "new")
    assert actor.asked == ["gone", "here"]
    with pytest.raises(RayTaskError):
        asyncio.run(load(Actor(ActorError("else")), LOST_ONE, timeout_s=9.0, again=again()))


def test_all_actors_of_a_pool_get_them_and_must_report_their_version() -> None:
    asked = list[str]()

    class Pool:
        name = "rollout"

        def __init__(self, found: str) -> None:
            self.found = found

        async def broadcast(
            self, _: str, version: PolicyVersion, weights: StoredTransfer, *__: object, **___: Any
        ) -> list[PolicyVersion]:
            asked.append(weights.ref)
            if weights.ref == "gone":
                raise WeightsLostError(LOST)
            return [version, replace(version, digest=self.found)]

    pool: Any = Pool("new")
    assert asyncio.run(load_all(pool, LOST_ONE, timeout_s=9.0, again=again())) == 2
    assert asked == ["gone", "here"]
    pool = Pool("old")
    with pytest.raises(ActorError, match="rollout actor holds policy 3-old after 3-new was"):
        asyncio.run(load_all(pool, AGAIN, timeout_s=9.0, again=again()))


def test_a_repeated_update_has_the_lost_version_or_none() -> None:
    weights, average = stored("new", "here"), stored("average", "there")
    update = Update(
        policy=VERSION, metrics={}, weights=weights,
        eval_weights=(replace(VERSION, digest="average"), average),
    )  # fmt: skip
    assert repeated(LOST_ONE, update).stored is weights
    lost_average = replace(LOST_ONE, policy=replace(VERSION, digest="average"))
    assert repeated(lost_average, update).stored is average
    with pytest.raises(WeightsLostError, match="the same command resumes"):
        repeated(replace(LOST_ONE, policy=replace(VERSION, digest="other")), update)


def test_values_that_are_at_hand_are_not_fetched() -> None:
    values = {"norm": np.ones(3, np.float32)}
    assert asyncio.run(fetch(values)) is values
    assert asyncio.run(fetch_value(values)) is values

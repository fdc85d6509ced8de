"""Evaluations by real Ray actors where an actor is lost."""

from collections.abc import Callable

import numpy as np
import pytest
import ray

from cluster.training.controller import Controller
from cluster.training.run import prepare
from orchard.policy import model
from orchard.policy.weights import digest, snapshot
from orchard.settings import Config
from orchard.types import PolicyVersion
from tests.fixtures.begun import in_a_controller, untrained

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


def test_an_actor_lost_during_an_evaluation_is_replaced_by_one_of_the_same_policy(
    settings: Callable[..., Config],
) -> None:
    untrained(settings())
    run = prepare(settings("evaluate.batch_size=8", "rollout.max_restarts=1"), "evaluate")
    first, other = (model.create(run.config.model, run.tokenizer, seed=s) for s in (0, 1))

    async def scenario(controller: Controller) -> None:
        async def ranks(advance: Callable[[], None] | None = None) -> list[int]:
            weights = snapshot(other)
            policy = PolicyVersion(step=0, digest=digest(weights))
            found = await controller.evaluate(
                run.test, np.arange(64), policy=policy, weights=weights, beams=10, advance=advance
            )
            return found.ranks.sid.tolist()

        def lose() -> None:
            ranking = controller.ranking
            if ranking is not None and ranking.restarts == 0:
                ray.kill(ranking.actors[0])

        weights = snapshot(first)
        await controller.sync_weights(PolicyVersion(step=0, digest=digest(weights)), weights)
        calm = await ranks()
        assert await ranks(advance=lose) == calm
        assert controller.ranking is not None
        assert controller.ranking.restarts == 1

    in_a_controller(scenario, run)

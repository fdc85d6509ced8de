"""Shown items are scored as the policy would have drawn them."""

import numpy as np

from orchard.testing import tiny_prompts, tiny_setup
from rollout.engine.torch import TorchEngine
from rollout.search.logged import logged
from rollout.search.score_items import score_items


def test_the_candidate_is_the_target_under_the_current_policy() -> None:
    world = tiny_setup(num_items=40)
    prompts = tiny_prompts(world.catalog, [3, 1, 2])
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    found = logged(engine, prompts, world.catalog)
    leaf = world.catalog.leaf_of_item[prompts.target]
    assert found.leaf.tolist() == leaf.tolist()
    assert found.start.tolist() == [0, 1, 2, 3]
    wanted, _ = score_items(engine, prompts, leaf)
    np.testing.assert_allclose(found.logprob, wanted, atol=1e-5)
    np.testing.assert_allclose(found.score, wanted.sum(1), atol=1e-5)

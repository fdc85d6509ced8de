import numpy as np

from orchard.testing import TinySetup
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.score_items import score_items


def test_given_items_have_the_log_probabilities_that_a_search_gives_them(
    world: TinySetup, engine: TorchEngine
) -> None:
    found = beam(engine, world.prompts, width=100)
    first = world.catalog.trie.path(world.catalog.trie.leaf_node)[:, 0].numpy()
    draw = np.random.default_rng(0)
    for _ in range(6):
        place = found.start[:-1] + draw.integers(found.count)
        logprob, root = score_items(engine, world.prompts, found.leaf[place])
        assert np.allclose(logprob, found.logprob[place], atol=1e-5)
        for prompt, leaf_logprob in enumerate(world.leaf_logprob):
            mass = np.bincount(first - first.min(), np.exp(leaf_logprob))
            assert np.allclose(np.exp(root[prompt]), mass, atol=1e-5)

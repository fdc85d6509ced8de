import numpy as np

from orchard import ragged
from orchard.testing import TinySetup
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.score_items import score_items, score_leaves


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


def test_many_items_of_a_prompt_are_scored_in_one_tree(
    world: TinySetup, engine: TorchEngine
) -> None:
    found = beam(engine, world.prompts, width=100)
    draw = np.random.default_rng(1)
    count = np.arange(len(world.prompts)) * 4  # none for the first prompt
    place = [low + draw.integers(high - low, size=n) for low, high, n in
             zip(found.start, found.start[1:], count, strict=False)]  # fmt: skip
    chosen, start = np.concatenate(place), ragged.starts(count)
    scored = score_leaves(engine, world.prompts, leaf=found.leaf[chosen], start=start)
    assert np.array_equal(scored.node, found.node[chosen])
    assert np.allclose(scored.logprob, found.logprob[chosen], atol=1e-5)
    assert np.allclose(scored.score, found.score[chosen], atol=1e-5)
    # No prefix is forwarded twice, and no prefix of other items.
    whole = score_leaves(engine, world.prompts, leaf=found.leaf, start=found.start)
    assert scored.cost.forward_tokens <= whole.cost.forward_tokens
    assert whole.cost.forward_tokens == beam(engine, world.prompts, width=100).cost.forward_tokens

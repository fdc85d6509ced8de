"""Groups completed by their target: exact log-probabilities, sizes kept, nothing else changed."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from orchard.settings import RolloutConfig
from orchard.testing import TinySetup, tiny_setup, tiny_title_setup
from orchard.types import Prompts
from rollout.actor import RolloutWorker
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.engine.torch import TorchEngine
from rollout.search.add_target import score_leaf, search_with_target
from rollout.search.beam import beam
from rollout.search.draws import sample
from rollout.search.sampling import beam_sample, dynamic

Find = Callable[[DecodingBackend, Prompts], Candidates]
SEARCHES = ("beam", "beam_sample", "sample", "dynamic")


def search_of(kind: str, world: TinySetup, count: int) -> Find:
    """A search of the kind for so many candidates."""
    drawn = {"temperature": 1.0, "seed": 3}
    return {
        "beam": partial(beam, width=count),
        "beam_sample": partial(beam_sample, width=count, **drawn),
        "sample": partial(sample, count=count, **drawn),
        "dynamic": partial(dynamic, catalog=world.catalog, count=count, **drawn),
    }[kind]


@pytest.mark.slow
def test_a_followed_leaf_has_its_brute_force_probability(
    world: TinySetup, engine: TorchEngine
) -> None:
    trie = world.catalog.trie
    for leaf in range(trie.num_leaves):
        wanted = np.full(len(world.prompts), leaf)
        found = score_leaf(engine, world.prompts, wanted)
        assert found.leaf.tolist() == wanted.tolist()
        expected = [logprob[leaf] for logprob in world.leaf_logprob]
        np.testing.assert_allclose(found.score, expected, atol=1e-5)
        np.testing.assert_allclose(found.logprob.sum(1), found.score, atol=1e-6)


def test_a_followed_leaf_is_what_a_beam_of_everything_finds(
    world: TinySetup, engine: TorchEngine
) -> None:
    every = beam(engine, world.prompts, width=100)
    for prompt in range(len(world.prompts)):
        rows = np.arange(every.start[prompt], every.start[prompt + 1])
        alone = world.prompts.select(np.full(len(rows), prompt))
        found = score_leaf(engine, alone, every.leaf[rows])
        assert np.array_equal(found.node, every.node[rows])
        np.testing.assert_allclose(found.logprob, every.logprob[rows], atol=1e-5)


@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("count", [1, 4])
def test_every_group_holds_its_target_and_keeps_its_size_order_and_best(
    world: TinySetup, engine: TorchEngine, kind: str, count: int
) -> None:
    find = search_of(kind, world, count)
    before = find(engine, world.prompts)
    after = search_with_target(engine, world.prompts, search_fn=find, catalog=world.catalog)
    target = world.catalog.leaf_of_item[world.prompts.target]
    assert np.array_equal(after.start, before.start)
    added = 0
    for prompt, leaf_logprob in enumerate(world.leaf_logprob):
        rows = slice(after.start[prompt], after.start[prompt + 1])
        old, new = before.leaf[rows].tolist(), after.leaf[rows].tolist()
        if target[prompt] in old:
            assert new == old
        else:
            added += 1
            assert sorted(new) == sorted([*old[:-1], target[prompt]])
        np.testing.assert_allclose(after.score[rows], leaf_logprob[new], atol=1e-5)
        assert (np.diff(after.score[rows]) <= 0).all()
    assert added > 0
    assert after.cost.counts == {"added": added}


def test_groups_that_hold_every_target_are_left_as_they_are(
    world: TinySetup, engine: TorchEngine
) -> None:
    everything = partial(beam, width=world.catalog.trie.num_leaves)
    found = search_with_target(engine, world.prompts, search_fn=everything, catalog=world.catalog)
    alone = everything(engine, world.prompts)
    np.testing.assert_array_equal(found.leaf, alone.leaf)
    assert "added" not in found.cost.counts


def test_titles_are_followed_through_their_forced_tokens() -> None:
    world = tiny_title_setup(["red pen", "red", "blue pen", "red pencil"])
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    target = world.catalog.leaf_of_item[world.prompts.target]
    found = score_leaf(engine, world.prompts, target)
    expected = [logprob[leaf] for logprob, leaf in zip(world.leaf_logprob, target, strict=True)]
    np.testing.assert_allclose(found.score, expected, atol=1e-5)


def test_an_actor_adds_targets_where_it_is_told_to(tmp_path: Path) -> None:
    world = tiny_setup()
    folder = world.save(tmp_path)
    config = RolloutConfig(engine="torch", group_size=3, batch_size=2, threads=1, add_target=True)
    given = (folder, world.tokenizer, 0)
    trees = RolloutWorker(config, *given).search(world.prompts, 0)
    target = world.catalog.leaf_of_item[world.prompts.target]
    hit = trees.leaf == target[trees.prompt_of_candidate]
    assert np.bincount(trees.prompt_of_candidate[hit], minlength=len(target)).tolist() == [1] * 4
    plain = RolloutWorker(config.model_copy(update={"add_target": False}), *given)
    missed = plain.search(world.prompts, 0).leaf == target[trees.prompt_of_candidate]
    assert missed.sum() < 4
    assert trees.cost.counts["added"] == 4 - missed.sum()
    # Evaluation never sees a target.
    assert "added" not in RolloutWorker(config, *given).rank(world.prompts, 3).cost.counts


def test_the_values_of_a_guided_search_stay_and_that_of_an_added_target_is_unknown(
    world: TinySetup, engine: TorchEngine
) -> None:
    def valued(engine: DecodingBackend, prompts: Prompts) -> Candidates:
        found = beam(engine, prompts, width=3)
        return replace(found, value=np.where(found.node >= 0, 0.5, np.nan).astype(np.float32))

    found = search_with_target(engine, world.prompts, search_fn=valued, catalog=world.catalog)
    assert found.value is not None
    unknown = np.isnan(found.value).all(1)
    target = world.catalog.leaf_of_item[world.prompts.target]
    assert unknown.sum() == found.cost.counts["added"]
    assert (found.leaf == target[np.repeat(np.arange(4), np.diff(found.start))])[unknown].all()

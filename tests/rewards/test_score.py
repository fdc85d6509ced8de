"""The weighted sum, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchard.catalog.catalog import Catalog
from orchard.errors import CatalogError, ConfigError, DataError
from orchard.feedback.utilities import Examples, PrefixUtilities, fit_utilities
from orchard.scorers import checkpoint, listwise_ranker, sasrec
from orchard.testing import tiny_catalog, tiny_policy, tiny_prompts
from orchard.types import PolicyVersion, SearchTrees
from rewards.registry import REWARDS, RewardContext
from rewards.score import preload, score_trees
from rewards.transition_counts import count_transitions
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees
from tests.fixtures.guides import random_guide, random_rows
from tests.fixtures.registries import Borrow

VERSION = PolicyVersion(step=0, digest="0" * 64)


def random_utilities(catalog: Catalog) -> PrefixUtilities:
    """Utilities of four requests without history."""
    return fit_utilities(
        catalog.trie,
        Examples(
            history=np.zeros(0, np.int64),
            start=np.zeros(5, np.int64),
            target=np.arange(4),
            row_start=np.arange(5),
            leaf=np.arange(4),
            reward=np.ones(4),
            weight=np.ones(4),
        ),
    )


@pytest.fixture(scope="module")
def world() -> tuple[SearchTrees, Catalog]:
    """Trees of a tiny search, each with its target among the candidates."""
    catalog = tiny_catalog()
    model, vocabulary = tiny_policy(catalog)
    prompts = tiny_prompts(catalog, [3, 1, 2])
    engine = TorchEngine(model, vocabulary, VERSION)
    trees = build_search_trees(prompts, beam(engine, prompts, width=6), vocabulary, VERSION)
    hit = catalog.item_of_leaf[catalog.leaf_start[trees.leaf[trees.candidate_start[:-1] + 2]]]
    return replace(trees, prompts=replace(prompts, target=hit)), catalog


def everything(catalog: Catalog, folder: Path) -> RewardContext:
    """All that any reward looks up."""
    draw = np.random.default_rng(0)
    sizes = {
        "num_items": len(catalog),
        "max_history": 4,
        "hidden_size": 8,
        "layers": 1,
        "heads": 2,
    }
    leaves = {"num_leaves": catalog.trie.num_leaves}
    for kind, model, own in (
        (sasrec.KIND, sasrec.SasRec(**sizes), {}),
        (listwise_ranker.KIND, listwise_ranker.ListwiseRanker(**sizes, **leaves), leaves),
    ):
        model.trained[:] = True
        checkpoint.save(
            model, folder / kind, kind=kind, catalog=catalog, sizes=sizes | own, facts={}
        )
    return RewardContext(
        catalog=catalog,
        embedding=draw.normal(size=(len(catalog), 4)).astype(np.float32),
        popularity=draw.integers(9, size=len(catalog)),
        transitions=count_transitions(
            np.array([0, 1, 1]),
            np.array([0, 1, 3]),
            np.array([1, 0]),
            num_leaves=catalog.trie.num_leaves,
            decay=0.5,
        ),
        folder=folder,
        utilities=random_utilities(catalog),
        guide=random_guide(catalog, seed=0),
        rows=random_rows(catalog, seed=0),
        first_row=0,
    )


def test_the_reward_is_the_weighted_sum_of_its_parts(world: tuple[SearchTrees, Catalog]) -> None:
    trees, catalog = world
    scored = score_trees(trees, catalog, {"rule": 2.0, "ranking": 0.5, "prefix": 0.0})
    assert scored.parts["rule"].sum() == 3
    assert set(scored.parts) == {"rule", "ranking", "prefix"}
    np.testing.assert_allclose(
        scored.reward, 2.0 * scored.parts["rule"] + 0.5 * scored.parts["ranking"], rtol=1e-6
    )


def test_every_listed_reward_gives_one_finite_number_per_candidate(
    world: tuple[SearchTrees, Catalog], tmp_path: Path
) -> None:
    trees, catalog = world
    scored = score_trees(trees, everything(catalog, tmp_path), dict.fromkeys(REWARDS, 1.0))
    assert all(part.shape == scored.reward.shape for part in scored.parts.values())
    assert np.isfinite(scored.reward).all()


@pytest.mark.parametrize(
    ("name", "hint"), [("rankin", "did you mean ranking"), ("zzz", "choose from rule, ranking")]
)
def test_an_unknown_reward_is_refused_with_a_hint(
    world: tuple[SearchTrees, Catalog], name: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        score_trees(*world, {"rule": 1.0, name: 1.0})


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_reward_that_is_not_finite_is_refused_by_name(
    world: tuple[SearchTrees, Catalog], borrow: Borrow, value: float
) -> None:
    def broken(trees: SearchTrees, known: RewardContext) -> np.ndarray:
        part = np.zeros(len(trees.leaf), np.float32)
        part[7] = value
        return part

    borrow(REWARDS).register("broken")(broken)
    with pytest.raises(DataError, match=rf"reward broken is {value} .* prompt 1 "):
        score_trees(*world, {"rule": 1.0, "broken": 0.0})


def test_trees_of_another_catalog_are_refused(world: tuple[SearchTrees, Catalog]) -> None:
    with pytest.raises(CatalogError, match="same items file"):
        score_trees(world[0], tiny_catalog(seed=1), {"rule": 1.0})


@pytest.mark.parametrize(
    ("name", "said"),
    [("semantic", "set data.embeddings"), ("popularity_debias", "how often each item is a target")],
)
def test_a_reward_without_what_it_looks_up_is_refused_before_there_is_anything_to_score(
    world: tuple[SearchTrees, Catalog], tmp_path: Path, name: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        preload({"rule": 1.0, name: 0.5}, RewardContext(catalog=world[1]))
    preload({"rule": 1.0, name: 0.5}, everything(world[1], tmp_path))


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_an_embedding_without_a_direction_is_refused_by_item(
    world: tuple[SearchTrees, Catalog], tmp_path: Path, value: float
) -> None:
    known = everything(world[1], tmp_path)
    assert known.embedding is not None
    known.embedding[7] = value
    with pytest.raises(DataError, match=r"the embedding of item 7 has length .* \(1 of 30 items"):
        preload({"semantic": 1.0}, known)

"""The examples of docs/extending.md work as printed; docs/rewards.md has all rewards."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from learner import surrogates
from learner.advantage import estimators
from orchard.settings import LearnerConfig, RolloutConfig
from orchard.testing import tiny_catalog, tiny_setup
from orchard.types import SearchTrees
from rewards.registry import REWARDS
from rewards.score import score_trees
from rollout.engine.torch import TorchEngine
from rollout.search import registry
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees
from tests.fixtures.registries import Borrow

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "extending.md").read_text()
SEARCH, ESTIMATOR, LOSS, REWARD = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def as_written(code: str) -> None:
    """Short, and run as it stands."""
    assert len(code.splitlines()) <= 35
    exec(code, dict[str, Any]())  # what the page tells a reader to write


def test_the_search_keeps_every_second_candidate(borrow: Borrow) -> None:
    borrow(registry.SEARCHES)
    as_written(SEARCH)
    world = tiny_setup()
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    config = RolloutConfig(group_size=3)
    given = registry.SearchContext(config=config, engine=engine, tokenizer=world.tokenizer, seed=0)
    found = registry.make_search("spread", given)(world.prompts)
    whole = beam(engine, world.prompts, width=6)
    for b in range(len(world.prompts)):
        ours = found.leaf[found.candidate_start[b] : found.candidate_start[b + 1]]
        assert ours.tolist() == whole.leaf[whole.start[b] : whole.start[b + 1] : 2].tolist()
    assert np.diff(found.candidate_start).max() == 3


def test_the_estimator_compares_with_the_median(borrow: Borrow) -> None:
    borrow(estimators.ESTIMATORS)
    as_written(ESTIMATOR)
    world = tiny_setup()
    engine = TorchEngine(world.model, world.tokenizer, world.version)
    found = beam(engine, world.prompts, width=5)
    trees = build_search_trees(world.prompts, found, world.tokenizer, world.version)
    scored = score_trees(trees, world.catalog, {"prefix": 1.0})
    credit = estimators.ESTIMATORS["median"](scored, 1e-4)
    inside = scored.trees.paths() >= 0
    prompt = scored.trees.prompt_of_candidate
    for b in range(len(scored.trees)):
        own = prompt == b
        middle = np.median(scored.reward[own])
        expected = np.sign(scored.reward[own] - middle)
        np.testing.assert_array_equal(credit.advantage[own], expected[:, None] * inside[own])
    assert np.isclose(credit.weight.sum(), 1)
    assert credit.advantage.any()


def test_the_loss_has_no_clip(borrow: Borrow) -> None:
    borrow(surrogates.LOSSES)
    as_written(LOSS)
    log_ratio = torch.tensor([2.0, -3.0], requires_grad=True)
    ratios = surrogates.RatioTerms(log_ratio, torch.tensor([1.0, 0.5]), torch.tensor([0.0, -2.0]))
    found = surrogates.LOSSES["plain"](ratios, LearnerConfig())
    torch.testing.assert_close(found.term, torch.tensor([1.0, -1.5]) * log_ratio.exp())
    assert not found.clipped.any()


def test_the_reward_pays_for_what_is_not_in_the_history(
    trees_with: Callable[..., SearchTrees], borrow: Borrow
) -> None:
    borrow(REWARDS)
    as_written(REWARD)
    catalog = tiny_catalog()
    leaf = catalog.leaf_of_item
    trees = trees_with(catalog, [leaf[[1, 2]], leaf[[1, 2]]], targets=[0, 0])
    trees = replace(trees, prompts=replace(trees.prompts, history=np.array([1, 4, 2, 5])))
    assert score_trees(trees, catalog, {"fresh": 1.0}).reward.tolist() == [0, 1, 1, 0]


def test_every_reward_has_a_row() -> None:
    page = (DOCS / "rewards.md").read_text()
    assert set(REWARDS) <= set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))

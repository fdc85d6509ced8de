"""The examples of docs/extending.md work as printed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from learner.advantage import estimators
from orchard.settings import RolloutConfig
from orchard.testing import tiny_setup
from rewards.score import score_trees
from rollout.engine.torch import TorchEngine
from rollout.search import registry
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
SEARCH, ESTIMATOR = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def as_written(code: str) -> None:
    """Short, and run as it stands."""
    assert len(code.splitlines()) <= 35
    exec(code, dict[str, Any]())  # what the page tells a reader to write


def test_the_search_keeps_every_second_candidate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rollout.search.registry.SEARCHES", dict(registry.SEARCHES))
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


def test_the_estimator_compares_with_the_median(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learner.advantage.estimators.ESTIMATORS", dict(estimators.ESTIMATORS))
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

"""The page on rewards: its table is complete and its example works as printed."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchard.testing import tiny_catalog
from orchard.types import SearchTrees
from rewards.registry import REWARDS
from rewards.score import score_trees

PAGE = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()


def test_every_reward_has_a_row() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert set(REWARDS) <= set(rows)


def test_the_example_is_short_and_is_a_reward(
    trees_with: Callable[..., SearchTrees], monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(code.splitlines()) <= 30
    monkeypatch.setattr("rewards.registry.REWARDS", dict(REWARDS))
    names: dict[str, Any] = {}
    exec(code, names)  # what the page tells a reader to write
    catalog = tiny_catalog()
    leaf = catalog.leaf_of_item
    trees = trees_with(catalog, [leaf[[1, 2]], leaf[[1, 2]]], targets=[0, 0])
    prompts = replace(trees.prompts, history=np.array([1, 4, 2, 5]))
    trees = replace(trees, prompts=prompts)
    monkeypatch.setitem(REWARDS, "fresh", names["fresh"])
    assert score_trees(trees, catalog, {"fresh": 1.0}).reward.tolist() == [0, 1, 1, 0]

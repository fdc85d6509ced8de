"""Expected groups that teach, from the ranks of an evaluation."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.planning.teaching import teaching_groups
from orchard import config
from orchard.evaluation import ranking
from orchard.evaluation.ranking import TargetRanks
from orchard.settings import Config
from orchard.testing import make_evaluation

SPARSE = {"rewards": {"weights": {"rule": 1.0, "ranking": 1.0}}}


def settings(**changes: Any) -> Config:
    tree: dict[str, Any] = {"name": "toy", "data": {"path": "data"}, **SPARSE}
    tree["rollout"] = {"group_size": 4}
    tree["learner"] = {"prompts_per_step": 100}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        tree[section] = {**tree.get(section, {}), name: value}
    return config.parse(tree)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """Evaluation of lists of ten: of twenty targets four are among the first four candidates."""
    sid = np.full(20, TargetRanks.MISS, np.int64)
    sid[:6] = 0, 1, 3, 2, 4, 9
    made = replace(
        make_evaluation(0.0, num_rows=20), ranks=TargetRanks(sid=sid, item=sid), width=10
    )
    ranking.write(made, path := tmp_path / "warm_start.json")
    return path


def test_groups_teach_where_the_target_is_among_their_candidates(evaluation: Path) -> None:
    found = teaching_groups(settings(), evaluation)
    assert found is not None
    assert (found.hits, found.groups, found.draws) == (0.2, 20.0, 5)
    first, remedy = found.lines(settings())
    assert "20.0% of the held-out rows among 4 candidates: of 100 groups about 20" in first
    assert "learner.max_draws = 5" in remedy
    drawn = teaching_groups(settings(learner__max_draws=4), evaluation)
    assert drawn is not None
    assert drawn.groups == 80.0
    assert len(drawn.lines(settings())) == 1
    (hinted,) = found.lines(settings(rollout__hints=2))
    assert hinted.endswith("without a hint")


@pytest.mark.parametrize(
    "changes",
    [
        {"rewards__weights": {"rule": 1.0, "transition": 0.5}},
        {"learner__estimator": "sibling"},
        {"rollout__add_target": True},
        {"rollout__group_size": 11},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_there_is_no_estimate_where_a_hit_is_not_waited_for(
    evaluation: Path, changes: dict[str, Any]
) -> None:
    assert teaching_groups(settings(**changes), evaluation) is None
    assert teaching_groups(settings(), evaluation.with_name("other.json")) is None

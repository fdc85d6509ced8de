"""Fitting the models of rewards from a run file, without Ray."""

import json
from pathlib import Path

import pytest

from cluster.cli import app as cli
from cluster.training.run import prepare
from orchard import config
from rewards.registry import RewardContext
from rewards.score import preload
from tests.fixtures.runs import TinyRun


@pytest.fixture
def world(tiny_run: TinyRun) -> Path:
    scorer = {"epochs": 2, "hidden_size": 8}
    return tiny_run(rewards={"collaborative": scorer, "listwise": {**scorer, "list_size": 4}})


def test_a_scorer_is_fitted_measured_and_found_by_the_reward(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["fit", "collaborative", str(world)])
    assert "hr@10/item" in capsys.readouterr().out
    about = json.loads((world.parent / "runs/toy/collaborative/model.json").read_text())
    assert about["sizes"]["num_items"] == 60
    assert 0 <= about["facts"]["ndcg@10/item"] <= about["facts"]["hr@10/item"] <= 1


@pytest.mark.slow
def test_a_list_evaluator_is_fitted_measured_and_found_by_the_reward(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["fit", "listwise", str(world)])
    assert "hit@1/list" in capsys.readouterr().out
    folder = world.parent / "runs/toy"
    facts = json.loads((folder / "listwise/model.json").read_text())["facts"]
    assert 0 <= facts["hit@1/list"] <= 1
    assert facts["chance"] == 0.25
    run = prepare(config.load(world), "sft")
    preload({"listwise": 1.0}, RewardContext(catalog=run.catalog, folder=folder))


@pytest.mark.parametrize("name", ["rule", "nonsense"])
def test_a_reward_without_a_model_has_nothing_to_fit(
    world: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", name, str(world)])
    assert "choose from collaborative, listwise, critic, guide" in capsys.readouterr().err

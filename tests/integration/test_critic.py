"""The prefix critic from its settings to the search that it guides; RLlib and torch backends."""

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.cli import app as cli
from cluster.training.run import prepare
from orchard import config
from orchard.data.prompts import make_prompts
from orchard.errors import ConfigError
from rollout.actor import RolloutWorker
from tests.fixtures.begun import untrained
from tests.fixtures.runs import TinyRun


@pytest.fixture
def file(tiny_run: TinyRun) -> Path:
    return tiny_run(
        critic={"epochs": 2, "hidden_size": 8, "layers": 1, "lr": 1e-2},
        rollout={
            "engine": "torch", "search": "ved", "group_size": 6, "threads": 1,
            "ved": {"guide": "critic", "budget": 17, "width": 4},
        },
    )  # fmt: skip


@pytest.mark.slow
def test_a_fitted_critic_guides_a_policy_that_has_no_head(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = config.load(file)
    untrained(settings)
    with pytest.raises(ConfigError, match="critic needs a fitted model.*orchard fit critic"):
        prepare(settings, "train")
    cli.main(["fit", "critic", str(file)])
    assert "explained" in capsys.readouterr().out
    run = prepare(settings, "train")
    assert run.critic is not None
    given = (run.config.rollout, run.policy, run.tokenizer, 0)
    prompts = make_prompts(run.tokenizer, run.train, np.arange(8))
    trees = RolloutWorker(*given, run.critic).search(prompts, seed=0)
    assert trees.value is not None
    inside = np.flatnonzero((trees.step > 0) & np.isfinite(trees.value))
    said = run.critic.values(prompts)(
        trees.prompt_of_node[inside], torch.from_numpy(trees.state[inside])
    )
    np.testing.assert_allclose(trees.value[inside], said, atol=1e-5)
    assert trees.cost.forward_tokens <= 8 * 16
    assert prepare(settings, "sft").critic is None  # who warm-starts needs none

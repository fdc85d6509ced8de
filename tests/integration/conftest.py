"""Fixtures: a run of five steps, and its undisturbed twin."""

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.training.loop import train
from orchard import config
from orchard.data.synthetic import WorldParams, write_world
from orchard.settings import Config
from orchard.types import PolicyVersion
from tests.fixtures.begun import begin, counted, in_a_controller
from tests.fixtures.runs import TinyRun, write_tiny_run


@pytest.fixture(scope="session")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run file of five steps on the torch engine, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "data", WorldParams(num_items=60, num_users=80, level_size=(4, 5, 6)))
    return write_tiny_run(
        folder,
        rollout={"engine": "torch", "group_size": 4, "batch_size": 4, "threads": 1},
        learner={"steps": 5, "prompts_per_step": 8, "threads": 1, "lr": 5e-3},
        evaluate={"every": 0, "test_rows": 8, "beams": 4, "valid_beams": 10},
        checkpoint={"every": 1, "keep": 9},
    )


@pytest.fixture(scope="session")
def twin(run_file: Path, ray_cluster: None) -> tuple[PolicyVersion, dict[str, list[float]]]:
    """Run without failures, as the reference."""
    run = begin(run_file, "name=twin")
    return in_a_controller(train, run), counted(run)


@pytest.fixture
def settings(data: Path, tiny_run: TinyRun) -> Callable[..., Config]:
    """Return the settings of a few steps on the torch engine, with dotted changes."""
    path = tiny_run(
        data={"path": str(data)},
        model={"hidden_size": 32, "intermediate_size": 32},
        sft={"epochs": 2, "valid_rows": 40, "valid_beams": 10, "lr": 5e-3},
        rollout={"engine": "torch", "group_size": 6, "batch_size": 4, "threads": 1},
        learner={"steps": 4, "prompts_per_step": 16, "threads": 1, "lr": 5e-3},
        evaluate={"every": 2, "valid_rows": 20, "valid_beams": 10},
        checkpoint={"every": 2},
    )
    return lambda *changes: config.load(path, changes)

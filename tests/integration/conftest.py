"""Fixtures: a run of five steps, and its undisturbed twin."""

from pathlib import Path

import pytest

from cluster.training.loop import train
from orchard.data.synthetic import WorldParams, write_world
from orchard.types import PolicyVersion
from tests.fixtures.begun import begin, counted, in_a_controller
from tests.fixtures.runs import write_tiny_run


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

"""A killed worker, SIGTERM and a killed driver: the run goes on as its undisturbed twin."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster.training.controller import Controller
from cluster.training.loop import train
from cluster.training.run import Run, prepare
from orchard import config
from orchard.errors import RunInterrupted
from orchard.policy.store import PolicyFacts
from orchard.tracking.metrics_log import read_metrics
from orchard.types import PolicyVersion
from tests.fixtures.begun import begin, counted, in_a_controller, updates

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]

ROOT = Path(__file__).parents[2]


def run_of(run_file: Path, name: str) -> Run:
    """Load a run that has started already."""
    return prepare(config.load(run_file, [f"name={name}"]), "train")


def untimed(run: Run) -> dict[str, list[float]]:
    """Return all metrics of a run's updates that do not depend on time."""
    log = read_metrics(run.dir / "metrics.jsonl")["train"]
    timed = ("_s", "_per_s")
    return {name: series.value.tolist() for name, series in log.items() if not name.endswith(timed)}


def checkpoint_of(run: Run, number: int) -> dict[str, Any]:
    folder = run.dir / "checkpoints" / "learner-train" / f"job_{number:06d}"
    return torch.load(folder / "learner.pt", weights_only=True)


def leaves(tree: Any, path: str = "") -> dict[str, Any]:
    """Return the values in nested dictionaries and lists by path."""
    if isinstance(tree, dict):
        pairs = [(str(key), part) for key, part in tree.items()]
    elif isinstance(tree, list | tuple):
        pairs = [(str(key), part) for key, part in enumerate(tree)]
    else:
        return {path: tree}
    return {k: v for key, part in pairs for k, v in leaves(part, f"{path}/{key}").items()}


def assert_same_state(run: Run, other: Run, number: int) -> None:
    """Assert that weights, optimizer and schedule after a job are equal bit for bit."""
    expected, actual = (leaves(checkpoint_of(each, number)) for each in (run, other))
    assert expected.keys() == actual.keys()
    assert sum(isinstance(value, torch.Tensor) for value in expected.values()) > 20
    for name, value in expected.items():
        same = torch.equal(value, actual[name]) if torch.is_tensor(value) else value == actual[name]
        assert same, name


class Elsewhere:
    """Runner of commands with a separate Ray, which it cleans up."""

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self.ray = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # sockets want short paths

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        hidden = ("RAY_ADDRESS", "PYTEST_CURRENT_TEST")
        inherited = {name: value for name, value in os.environ.items() if name not in hidden}
        own = {"PYTHONPATH": str(ROOT), "RAY_TMPDIR": self.ray, "ORCHARD_TEST": self.mark}
        ended = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=inherited | own,
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        self.clean()
        return ended

    def clean(self) -> None:
        """Kill the processes that a killed driver has left, identified by their mark."""
        for process in psutil.process_iter():
            try:
                mine = process.environ().get("ORCHARD_TEST") == self.mark
            except psutil.Error:
                continue
            if mine:
                process.kill()


@pytest.fixture
def elsewhere() -> Iterator[Elsewhere]:
    made = Elsewhere()
    yield made
    made.clean()
    shutil.rmtree(made.ray, ignore_errors=True)


@pytest.mark.nightly
def test_a_killed_learner_worker_comes_back_and_ends_where_its_twin_does(
    run_file: Path, twin: tuple[PolicyVersion, dict[str, list[float]]]
) -> None:
    run = begin(run_file, "name=worker", "checkpoint.every=2")

    async def scenario(controller: Controller) -> PolicyVersion:
        work = asyncio.ensure_future(train(controller))
        await updates(run, 3)
        for process in psutil.Process().children(recursive=True):
            if "RayTrainWorker" in process.name() + " ".join(process.cmdline()):
                process.kill()
        last = await work
        assert controller.learner.restarts >= 1
        return last

    last = in_a_controller(scenario, run)
    assert (last.digest, counted(run)) == (twin[0].digest, twin[1])


@pytest.mark.nightly
def test_sigterm_saves_and_the_same_command_ends_where_its_twin_does(
    run_file: Path, twin: tuple[PolicyVersion, dict[str, list[float]]]
) -> None:
    run = begin(run_file, "name=stopped", "checkpoint.every=100")

    async def scenario(controller: Controller) -> None:
        work = asyncio.ensure_future(train(controller))
        await updates(run, 2)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(RunInterrupted, match="saved; the same command resumes"):
            await work

    in_a_controller(scenario, run)
    before = counted(run)["learner/surrogate"]
    assert 2 <= len(before) < 5
    saved = list((run.dir / "checkpoints" / "learner-train").glob("job_*"))
    assert [folder.name for folder in saved] == [f"job_{len(before):06d}"]
    last = in_a_controller(train, run)
    assert (last.digest, counted(run)) == (twin[0].digest, twin[1])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "deaths",
    [
        (("publish", 2),),
        pytest.param(
            (("rollout", 1), ("rewards", 2), ("learn", 3), ("publish", 4), ("save", 4)),
            marks=pytest.mark.nightly,  # six launches
        ),
    ],
    ids=["while weights are published", "in every phase"],
)
def test_a_driver_killed_during_a_step_ends_where_its_twin_does(
    deaths: Sequence[tuple[str, int]],
    run_file: Path,
    twin: tuple[PolicyVersion, dict[str, list[float]]],
    elsewhere: Elsewhere,
) -> None:
    run = begin(run_file, "name=killed")
    command = ("train", str(run_file), "name=killed")
    record = run.dir / "checkpoints" / "learner-train" / "checkpoint_manager_snapshot.json"
    # Each launch resumes what the one before it left. Its policy has so many updates then.
    for phase, step in deaths:
        ended = elsewhere.run("tests/integration/dying.py", phase, str(step), *command)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        logged = read_metrics(run.dir / "metrics.jsonl")["train"]["learner/surrogate"]
        # A step is logged once its weights are published.
        assert logged.step.tolist()[-1] == step - (phase == "publish")
        if phase == "learn":  # Ray Train writes this in place, and may be killed in between
            os.truncate(record, record.stat().st_size // 2)
    ended = elsewhere.run("-m", "cluster.cli", *command)
    assert ended.returncode == 0, ended.stderr
    other = run_of(run_file, "twin")
    assert_same_state(run, other, 5)
    assert untimed(run) == untimed(other)
    assert PolicyFacts.read(run.result) == PolicyFacts.read(other.result)

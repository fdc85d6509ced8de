"""Failures, timeouts and wrong answers in a run, which ends with the same weights or an error."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest
import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors.pool import Pool
from cluster.training.controller import Controller, start_controller
from cluster.training.loop import train
from cluster.training.run import Run, prepare
from cluster.training.run_dir import open_run_dir, save_policy
from orchard import config
from orchard.data.synthetic import WorldParams, write_world
from orchard.errors import ActorError, CheckpointError, ConfigError, DataError, RunInterrupted
from orchard.policy import model
from orchard.policy.store import PolicyFacts
from orchard.policy.weights import digest, snapshot
from orchard.settings import Config
from orchard.tracking.metrics_log import read_metrics
from orchard.types import PolicyVersion, SearchTrees
from rollout.actor import RolloutWorker
from tests.fixtures.runs import write_tiny_run

T = TypeVar("T")

ROOT = Path(__file__).parents[2]
WORLD = WorldParams(num_items=60, num_users=80, level_size=(4, 5, 6))
COUNTED = ("learner/surrogate", "learner/grad_norm", "rewards/mean", "rollout/forward_tokens")

on_ray = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run file of five steps on the torch engine, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "data", WORLD)
    return write_tiny_run(
        folder,
        rollout={"engine": "torch", "group_size": 4, "batch_size": 4, "threads": 1},
        learner={"steps": 5, "prompts_per_step": 8, "threads": 1, "lr": 5e-3},
        evaluate={"every": 0, "test_rows": 8, "beams": 4, "valid_beams": 10},
        checkpoint={"every": 1, "keep": 9},
    )


def begin(run_file: Path, *changes: str) -> Run:
    """Create a run whose SFT policy has random weights."""
    settings: Config = config.load(run_file, changes)
    begun = prepare(settings, "sft")
    open_run_dir(begun)
    first = model.create(settings.model, begun.tokenizer, seed=0)
    save_policy(
        begun, begun.result, PolicyVersion(step=0, digest=digest(snapshot(first))), snapshot(first)
    )
    return prepare(settings, "train")


def run_of(run_file: Path, name: str) -> Run:
    """Load a run that has started already."""
    return prepare(config.load(run_file, [f"name={name}"]), "train")


def in_a_controller(phase: Callable[[Controller], Awaitable[T]], run: Run) -> T:
    async def work() -> T:
        async with start_controller(run) as controller:
            return await phase(controller)

    return asyncio.run(work())


def counted(run: Run) -> dict[str, list[float]]:
    """Return selected metrics of a run that do not depend on time."""
    log = read_metrics(run.dir / "metrics.jsonl")["train"]
    return {name: log[name].value.tolist() for name in COUNTED}


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


async def updates(run: Run, count: int) -> None:
    """Wait until the run's metrics contain ``count`` updates of the policy."""

    def done() -> int:
        phases = read_metrics(path) if path.exists() else {}
        series = phases.get("train", {}).get("learner/surrogate")
        return 0 if series is None else len(series.value)

    path = run.dir / "metrics.jsonl"
    while done() < count:
        await asyncio.sleep(0.02)


@pytest.fixture(scope="module")
def twin(run_file: Path, ray_cluster: None) -> tuple[PolicyVersion, dict[str, list[float]]]:
    """Run without failures, as the reference."""
    run = begin(run_file, "name=twin")
    return in_a_controller(train, run), counted(run)


def test_storage_that_takes_no_writes_is_refused_before_any_actor(run_file: Path) -> None:
    (run_file.parent / "file").write_text("in the way")
    settings = config.load(run_file, [f"output={run_file.parent / 'file'}"])
    with pytest.raises(ConfigError, match="cannot be written: Not a directory; set output to"):
        open_run_dir(prepare(settings, "sft"))


class Liar:
    """Reward actor with injected faults."""

    def __init__(self, fault: str) -> None:
        self.fault = fault

    async def score(self, trees: SearchTrees) -> None:
        if self.fault == "raises":
            raise ValueError("no such item")
        if self.fault == "nan":
            raise DataError("reward liar is nan for leaf 3 of prompt 1")
        await asyncio.sleep(3600)


def numb(mark: Path) -> Any:
    """Rollout actor of which the first one verifies new weights but keeps the old ones."""

    class Numb(RolloutWorker):
        def load_weights(self, *arguments: Any) -> PolicyVersion:
            if not mark.exists():
                from rollout.engine import torch as engine

                mark.touch()
                engine.restore = lambda *_: None
            return super().load_weights(*arguments)

    return ray.remote(Numb)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """File system with room for a few checkpoints of a tiny policy."""
    ended = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=288k", "tmpfs", str(tmp_path)],
        capture_output=True, check=False,
    )  # fmt: skip
    if ended.returncode:
        pytest.skip("this user may not mount a small file system to fill up")
    yield tmp_path
    subprocess.run(["umount", "--lazy", str(tmp_path)], check=True)


@ray.remote(num_cpus=8)
class Hog:
    """Actor that holds the first node's CPUs, so that a run must use the second."""


@pytest.fixture
def second_node(ray_cluster: None) -> Iterator[psutil.Process]:
    """Second raylet of the session's Ray, besides a full first one."""
    context = ray.get_runtime_context()
    here = NodeAffinitySchedulingStrategy(context.get_node_id(), soft=False)
    hog: Any = Hog.options(scheduling_strategy=here, name="hog").remote()
    ray.get(hog.__ray_ready__.remote())
    start = subprocess.Popen(
        [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=8",
         f"--address={context.gcs_address}", "--object-store-memory=100000000"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    node = psutil.Process(start.pid)
    while sum(one["Alive"] for one in ray.nodes()) < 2:
        assert start.poll() is None, "ray start has ended"
        time.sleep(0.2)
    yield node
    ray.kill(hog)
    started = [node, *node.children(recursive=True)] if node.is_running() else []
    for process in started:
        with suppress(psutil.Error):
            process.kill()
    start.wait(30)


class TestOnRay:
    pytestmark = on_ray

    def test_a_full_disk_ends_in_one_sentence_and_costs_no_older_checkpoint(
        self,
        run_file: Path,
        small_disk: Path,
        twin: tuple[PolicyVersion, dict[str, list[float]]],
    ) -> None:
        run = begin(run_file, "name=full")
        (run.dir / "checkpoints").symlink_to(small_disk)
        with pytest.raises(CheckpointError, match="No space left on device; .* is whole") as said:
            in_a_controller(train, run)
        done = len(counted(run)["learner/surrogate"])
        assert f"checkpoint of job {done} cannot be written" in str(said.value)
        folders = sorted((small_disk / "learner-train").glob("job_*"))
        assert [folder.name for folder in folders] == [f"job_{n:06d}" for n in range(1, done)]
        assert 1 < done < 5
        remount = ["mount", "-o", "remount,size=100m", str(small_disk)]
        subprocess.run(remount, check=True)
        last = in_a_controller(train, run)
        assert (last.digest, counted(run)) == (twin[0].digest, twin[1])

    @pytest.mark.timeout(900)  # a dead node is noticed after missed heartbeats
    def test_what_lived_on_a_lost_node_comes_back_elsewhere(
        self,
        run_file: Path,
        twin: tuple[PolicyVersion, dict[str, list[float]]],
        second_node: psutil.Process,
    ) -> None:
        run = begin(run_file, "name=node", "checkpoint.every=2")

        async def scenario(controller: Controller) -> PolicyVersion:
            work = asyncio.ensure_future(train(controller))
            await updates(run, 3)
            ray.kill(ray.get_actor("hog"))
            for process in second_node.children(recursive=True):
                if process.name() == "raylet":
                    process.kill()
            last = await work
            assert controller.rollout is not None
            assert controller.rollout.restarts >= 1
            assert controller.learner.restarts >= 1
            return last

        last = in_a_controller(scenario, run)
        assert sum(one["Alive"] for one in ray.nodes()) == 1
        assert (last.digest, counted(run)) == (twin[0].digest, twin[1])

    def test_a_holder_that_kept_its_old_weights_is_replaced_before_it_searches(
        self,
        run_file: Path,
        twin: tuple[PolicyVersion, dict[str, list[float]]],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        run = begin(run_file, "name=numb")
        monkeypatch.setattr("cluster.training.controller.RolloutActor", numb(tmp_path / "mark"))

        async def scenario(controller: Controller) -> PolicyVersion:
            last = await train(controller)
            assert controller.rollout is not None
            assert controller.rollout.restarts == 1
            assert controller.rollout.failures["load_weights", "unfit"] == 1
            return last

        last = in_a_controller(scenario, run)
        assert (last.digest, counted(run)) == (twin[0].digest, twin[1])

    def test_a_reward_actor_killed_in_the_middle_of_a_step_costs_nothing(
        self, run_file: Path
    ) -> None:
        async def scenario(controller: Controller) -> None:
            policy = controller.run.policy
            values = snapshot(model.load(policy))
            await controller.sync_weights(PolicyVersion(step=0, digest=digest(values)), values)
            assert controller.rewards is not None
            calm = await controller.scored_trees(0)
            disturbed = asyncio.ensure_future(controller.scored_trees(0))
            await asyncio.sleep(0)
            ray.kill(controller.rewards.actors[0])
            after = await disturbed
            assert controller.rewards.restarts == 1
            assert controller.rewards.failures["score", "died"] >= 1
            np.testing.assert_array_equal(after.reward, calm.reward)

        in_a_controller(scenario, begin(run_file, "name=reward"))

    def test_rewards_that_raise_or_hang_end_in_an_error_that_names_them(
        self, run_file: Path
    ) -> None:
        faulty: Any = ray.remote(num_cpus=0)(Liar)

        async def scenario(controller: Controller) -> None:
            values = snapshot(model.load(controller.run.policy))
            await controller.sync_weights(PolicyVersion(step=0, digest=digest(values)), values)
            honest = controller.rewards
            cases = (
                ("raises", ActorError, "rewards.score raised ValueError: no such item"),
                ("nan", DataError, "reward liar is nan"),
                ("hangs", ActorError, "rewards.score failed 2 times, last with TimeoutError"),
            )
            for fault, kind, said in cases:
                controller.rewards = Pool(
                    "rewards", lambda _, fault=fault: faulty.remote(fault), size=1, queue=8,
                    timeout_s=5.0, retries=1, max_restarts=9, start_timeout_s=300.0,
                )  # fmt: skip
                await controller.rewards.ready()
                with pytest.raises(kind, match=said):
                    await controller.scored_trees(0)
                controller.rewards.close()
            controller.rewards = honest

        in_a_controller(scenario, begin(run_file, "name=lies", "rollout.batch_size=8"))

    def test_a_killed_learner_worker_comes_back_and_ends_where_its_twin_does(
        self, run_file: Path, twin: tuple[PolicyVersion, dict[str, list[float]]]
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

    def test_sigterm_saves_and_the_same_command_ends_where_its_twin_does(
        self, run_file: Path, twin: tuple[PolicyVersion, dict[str, list[float]]]
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
        self,
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

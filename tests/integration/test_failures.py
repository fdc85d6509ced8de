"""Faults of actors, nodes and disks in a run, which ends with the same weights or an error."""

import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.actors.pool import Pool
from cluster.training.controller import Controller
from cluster.training.loop import train
from orchard.errors import ActorError, DataError
from orchard.policy import model
from orchard.policy.weights import digest, snapshot
from orchard.types import PolicyVersion, SearchTrees
from rollout.actor import RolloutWorker
from tests.fixtures.begun import begin, counted, in_a_controller, updates

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


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


def numb(mark: Path) -> type[RolloutWorker]:
    """Rollout worker of which the first one verifies new weights but keeps the old ones."""

    class Numb(RolloutWorker):
        def load_weights(self, *arguments: Any) -> PolicyVersion:
            if not mark.exists():
                from rollout.engine import torch as engine

                mark.touch()
                engine.restore = lambda *_: None
            return super().load_weights(*arguments)

    return Numb


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


def test_a_run_in_one_process_equals_its_twin_on_ray(
    run_file: Path, twin: tuple[PolicyVersion, dict[str, list[float]]]
) -> None:
    run = begin(run_file, "name=here", "cluster.in_process=true")
    last = in_a_controller(train, run)
    assert (last.digest, counted(run)) == (twin[0].digest, twin[1])
    checkpoints = run.dir / "checkpoints" / "learner-train"
    for number in (4, 5):
        shutil.rmtree(checkpoints / f"job_{number:06d}")
    again = begin(run_file, "name=here")  # on Ray, from the third update
    last = in_a_controller(train, again)
    assert (last.digest, counted(again)) == (twin[0].digest, twin[1])
    assert (checkpoints / "job_000005").is_dir()


@pytest.mark.nightly
def test_a_run_goes_on_without_the_checkpoints_that_a_full_disk_refuses(
    run_file: Path,
    small_disk: Path,
    twin: tuple[PolicyVersion, dict[str, list[float]]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = begin(run_file, "name=full")
    (run.dir / "checkpoints").symlink_to(small_disk)
    last = in_a_controller(train, run)
    assert (last.digest, counted(run)) == (twin[0].digest, twin[1])
    said = [line for line in caplog.messages if "No space left on device" in line]
    names = {path.name for path in (small_disk / "learner-train").iterdir()}
    whole = sorted(name for name in names if "job" in name)
    done = len(whole)
    assert whole == [f"job_{number:06d}" for number in range(1, done + 1)]
    assert 1 < done < 5
    assert all(f"the one of job {done} is whole" in line for line in said)
    assert [f"checkpoint of job {number} cannot" in line for number, line in
            enumerate(said, start=done + 1)] == [True] * (5 - done)  # fmt: skip
    remount = ["mount", "-o", "remount,size=100m", str(small_disk)]
    subprocess.run(remount, check=True)
    last = in_a_controller(train, run)  # from the newest one
    assert (last.digest, counted(run)) == (twin[0].digest, twin[1])
    assert (small_disk / "learner-train" / "job_000005").is_dir()


@pytest.mark.nightly
@pytest.mark.timeout(900)  # a dead node is noticed after missed heartbeats
def test_what_lived_on_a_lost_node_comes_back_elsewhere(
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
    run_file: Path,
    twin: tuple[PolicyVersion, dict[str, list[float]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    run = begin(run_file, "name=numb")
    monkeypatch.setattr("cluster.training.controller.RolloutWorker", numb(tmp_path / "mark"))

    async def scenario(controller: Controller) -> PolicyVersion:
        last = await train(controller)
        assert controller.rollout is not None
        assert controller.rollout.restarts == 1
        assert controller.rollout.failures["load_weights", "unfit"] == 1
        return last

    last = in_a_controller(scenario, run)
    assert (last.digest, counted(run)) == (twin[0].digest, twin[1])


def test_a_reward_actor_killed_in_the_middle_of_a_step_costs_nothing(run_file: Path) -> None:
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


@pytest.mark.nightly
def test_rewards_that_raise_or_hang_end_in_an_error_that_names_them(run_file: Path) -> None:
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

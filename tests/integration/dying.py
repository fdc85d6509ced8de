"""Run the command line, and kill the driver in the middle of one phase of one step.

    python dying.py PHASE STEP train RUN.toml ...

A program for tests: what it puts in the place of actors and workers travels to them by value. The
process that kills the driver does nothing more, as if its machine had gone as well.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cluster.training.controller
import learner.workers.trainer_handle
from cluster.cli import app as cli
from learner.trainer import Trainer
from orchard.types import PolicyVersion, Prompts, ScoredTrees, SearchTrees
from rewards.actor import RewardWorker
from rollout.actor import RolloutWorker

DRIVER = os.getpid()
PHASE, STEP = sys.argv[1], int(sys.argv[2])


def at(phase: str, step: int) -> bool:
    return phase == PHASE and step == STEP


def die(*_: object) -> None:
    os.kill(DRIVER, signal.SIGKILL)
    time.sleep(3600)


class DyingSearcher(RolloutWorker):
    def search(self, prompts: Prompts, seed: int, *arguments: Any, **options: Any) -> SearchTrees:
        found = super().search(prompts, seed, *arguments, **options)
        if at("rollout", found.policy.step):
            die()
        return found


class DyingJudge(RewardWorker):
    def score(self, trees: SearchTrees) -> ScoredTrees:
        scored = super().score(trees)
        if at("rewards", trees.policy.step):
            die()
        return scored


def dying_work(task: dict[str, Any]) -> None:
    from learner import checkpoint
    from learner.workers.ray_trainer import worker_loop

    update: Callable[..., Any] = Trainer._update  # pyright: ignore[reportPrivateUsage]
    write = checkpoint.write

    def dying_update(self: Trainer, *arguments: object) -> object:
        if at("learn", self.updates):
            self.optimizer.step = die  # the gradients are there, the weights have not moved
        return update(self, *arguments)

    def dying_write(state: dict[str, Any], folder: Path) -> None:
        write(state, folder)
        if at("save", state["number"]):  # to a storage that tears what it was writing
            for file in folder.iterdir():
                os.truncate(file, file.stat().st_size // 2)
            die()

    Trainer._update = dying_update  # pyright: ignore
    checkpoint.write = dying_write  # type: ignore[assignment]
    worker_loop(task)


class DyingHouse(cluster.training.controller.Controller):
    async def sync_weights(self, policy: PolicyVersion, *rest: Any) -> None:
        if at("publish", policy.step):
            die()
        await super().sync_weights(policy, *rest)


if __name__ == "__main__":
    cluster.training.controller.RolloutWorker = DyingSearcher
    cluster.training.controller.RewardWorker = DyingJudge
    cluster.training.controller.Controller = DyingHouse
    learner.workers.trainer_handle.worker_loop = dying_work
    cli.main(sys.argv[3:])

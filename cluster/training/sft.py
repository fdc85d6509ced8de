"""Run SFT: epochs over user sequences, of which the best policy is kept."""

import time

import numpy as np

from cluster.console import Progress
from cluster.training.best_checkpoint import SCORE, BestCheckpoint
from cluster.training.controller import AGAIN, Controller
from cluster.training.run import Run
from orchard.errors import RunInterrupted
from orchard.tracking.metrics_log import FILE, read_metrics
from orchard.types import PolicyVersion


async def sft(controller: Controller) -> PolicyVersion:
    """Train until the limit of epochs, minutes or patience, and return the last version.

    The exported policy is that of the epoch with the best validation score.
    """
    run, settings = controller.run, controller.run.config.sft
    update = await controller.learner.start()
    policy = update.policy
    controller.metrics_logger.rewind("sft", policy.step)
    since_best, elapsed_s = progress_so_far(run)
    best_checkpoint = await BestCheckpoint.open(
        controller, num_rows=settings.valid_rows, beams=settings.valid_beams
    )
    with Progress("warm start", total=settings.epochs, done=policy.step) as progress:
        while (
            policy.step < settings.epochs
            and since_best < settings.patience
            and not 0 < settings.minutes <= elapsed_s / 60
        ):
            start = time.perf_counter()
            update = await controller.learner.epoch()
            policy, before = update.policy, best_checkpoint.best
            await controller.sync_weights(policy, update.weights)
            metrics = {f"sft/{name}": value for name, value in update.metrics.items()}
            metrics |= await best_checkpoint.evaluate_and_keep(update)
            since_best = 0 if best_checkpoint.best > before else since_best + 1
            elapsed_s += time.perf_counter() - start
            controller.metrics_logger.log(
                "sft", policy.step, metrics | {"sft/elapsed_s": elapsed_s}
            )
            progress.advance(metrics)
            await controller.learner.save()
            if controller.stopping.is_set() and policy.step < settings.epochs:
                raise RunInterrupted(f"stopped after epoch {policy.step}, and saved; {AGAIN}")
    return policy


def progress_so_far(run: Run) -> tuple[int, float]:
    """Return the epochs since the best one and the seconds spent, from the logged metrics."""
    path = run.dir / FILE
    log = read_metrics(path).get("sft", {}) if path.is_file() else {}
    scores, elapsed = log.get(f"evaluate/{SCORE}"), log.get("sft/elapsed_s")
    since_best = len(scores.value) - 1 - int(np.argmax(scores.value)) if scores else 0
    return since_best, float(elapsed.value[-1]) if elapsed else 0.0

"""The supervised warm start: epochs over user sequences, the best of them kept."""

import time

import numpy as np

from cluster.console import Progress
from cluster.training.best_checkpoint import SCORE, Champion
from cluster.training.controller import AGAIN, House
from cluster.training.run import Run
from orchard.errors import Stopped
from orchard.tracking.metrics_log import FILE, read_metrics
from orchard.types import PolicyVersion


async def sft(house: House) -> PolicyVersion:
    """Train until the epochs, the minutes or the patience run out; returns the last version.

    The exported policy is the one of the epoch that ranks the validation rows best.
    """
    run, settings = house.run, house.run.config.sft
    policy = await house.learner.start()
    house.logbook.rewind("sft", policy.step)
    since_best, elapsed_s = progress_so_far(run)
    champion = await Champion.of(house, num_rows=settings.valid_rows, beams=settings.valid_beams)
    with Progress("warm start", total=settings.epochs, done=policy.step) as progress:
        while (
            policy.step < settings.epochs
            and since_best < settings.patience
            and not 0 < settings.minutes <= elapsed_s / 60
        ):
            begin = time.perf_counter()
            update = await house.learner.epoch()
            policy, before = update.policy, champion.best
            await house.publish(policy, house.learner.weights)
            metrics = {f"sft/{name}": value for name, value in update.metrics.items()}
            metrics |= await champion.consider()
            since_best = 0 if champion.best > before else since_best + 1
            elapsed_s += time.perf_counter() - begin
            house.logbook.log("sft", policy.step, metrics | {"sft/elapsed_s": elapsed_s})
            progress.advance(metrics)
            await house.save()
            if house.stopping.is_set() and policy.step < settings.epochs:
                raise Stopped(f"stopped after epoch {policy.step}, and saved; {AGAIN}")
    return policy


def progress_so_far(run: Run) -> tuple[int, float]:
    """Epochs since the best one, and seconds spent, as the logbook has them."""
    path = run.dir / FILE
    log = read_metrics(path).get("sft", {}) if path.is_file() else {}
    scores, elapsed = log.get(f"evaluate/{SCORE}"), log.get("sft/elapsed_s")
    since_best = len(scores.value) - 1 - int(np.argmax(scores.value)) if scores else 0
    return since_best, float(elapsed.value[-1]) if elapsed else 0.0

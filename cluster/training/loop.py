"""Run the RL training loop: search, score, learn, publish; evaluate and checkpoint when due.

    prompts --> rollout --> rewards --> pack --> learner --+--> publish --> rollout
                 trees       scored      batch    version  |
                                                           +--> evaluate, checkpoint, log

Only `RolloutStream` is concurrent. `update` restarts the learner's workers and pools replace failed
actors, so the loop contains no failure handling.
"""

import logging
import time

from cluster.console import Progress
from cluster.training.best_checkpoint import BestCheckpoint
from cluster.training.controller import AGAIN, Controller
from cluster.training.hit_shares import HitShares
from cluster.training.rollout_stream import RolloutStream
from cluster.training.search_examples import save_search_examples
from learner.advantage.estimators import group_statistics
from learner.batch.pack import make_batch
from orchard.errors import RunInterrupted
from orchard.evaluation.diagnostics import diagnose
from orchard.types import PolicyVersion, ScoredTrees, Update
from rewards.steps import step_statistics


async def train(controller: Controller) -> PolicyVersion:
    """Train the policy for `learner.steps` updates, and return its last version."""
    run = controller.run
    steps = run.config.learner.steps
    if run.config.model.value_head:
        logging.getLogger("orchard").info(
            "the value head's step rewards compare %s",
            "codes" if run.embedding is None else "item embeddings",
        )
    update = await controller.learner.start()
    policy = update.policy
    controller.metrics_logger.rewind("train", policy.step)
    await controller.sync_weights(policy, update.weights, update.probe_logprobs)
    best_checkpoint = await BestCheckpoint.open(
        controller,
        num_rows=run.config.evaluate.valid_rows if run.config.evaluate.every else 0,
        beams=run.config.evaluate.valid_beams,
    )
    if policy.step == 0:
        controller.metrics_logger.log("train", 0, await best_checkpoint.evaluate_and_keep(update))
    hit_shares = HitShares(controller)
    stream = RolloutStream(
        controller.scored_trees,
        first=policy.step,
        last=steps,
        max_lag=run.config.cluster.max_off_policy_steps,
        stop=controller.stopping,
    )
    with Progress("training", total=steps, done=policy.step) as progress:
        stream.start_allowed_by(policy)
        clock = PhaseTimer()
        async for scored in stream:
            clock.mark("wait_s")
            batch = make_batch(scored, run.tokenizer, run.config.learner)
            clock.mark("pack_s")
            lag = policy.step - batch.policy.step
            evaluated = due(policy.step + 1, run.config.evaluate.every, steps)
            update = await controller.learner.update(batch, needs_eval=evaluated)
            policy = update.policy
            clock.mark("learn_s")
            await controller.sync_weights(policy, update.weights, update.probe_logprobs)
            clock.mark("publish_s")
            stream.start_allowed_by(policy)
            metrics = step_metrics(scored, update, lag, steps=run.config.rewards.steps)
            metrics |= controller.restarts() | clock.seconds()
            hit_shares.add_training(scored.trees)
            if evaluated:
                metrics |= await best_checkpoint.evaluate_and_keep(update)
                if run.config.evaluate.every:
                    metrics |= await hit_shares.search_valid(policy.step)
            controller.metrics_logger.log("train", policy.step, metrics)
            progress.advance(metrics)
            clock = PhaseTimer()
            if due(policy.step, run.config.checkpoint.every, steps):
                # Save after logging, so that no checkpoint is newer than the log: a resumed run
                # rewrites the entries after its checkpoint. The next searches already run.
                await controller.learner.save()
                clock.mark("save_s")
    await stream.close()
    if policy.step < steps:
        await controller.learner.close(save=True)
        raise RunInterrupted(f"stopped after update {policy.step} of {steps}, and saved; {AGAIN}")
    await save_search_examples(controller)
    return policy


def due(step: int, every: int, last: int) -> bool:
    """Return whether `step` is the last or a multiple of `every`; 0 means the last only."""
    return step == last or (every > 0 and step % every == 0)


def step_metrics(
    scored: ScoredTrees, update: Update, lag: int, *, steps: str = "match"
) -> dict[str, float]:
    """Return the metrics of a step, named by package; `steps` is the kind of its step rewards."""
    statistics = group_statistics(scored) | step_statistics(scored, steps)
    cost, num_prompts = scored.trees.cost, len(scored.trees)
    # Dynamic sampling and hints search more prompts than are trained on.
    searched = cost.counts.get("drawn", num_prompts) + cost.counts.get("hint_searches", 0)
    names = {"reward_mean": "rewards/mean", "hit_share": "rewards/hit_rate"}
    metrics = {
        names.get(name, f"rewards/{name.removeprefix('mean_')}"): value
        for name, value in statistics.items()
    }
    metrics |= diagnose(scored)
    if "proved" in cost.counts:  # by guided searches
        metrics["rollout/proved"] = cost.counts["proved"] / searched
    metrics |= {f"learner/{name}": value for name, value in update.metrics.items()}
    return metrics | {
        "rollout/prompts": float(num_prompts),
        "rollout/candidates": float(len(scored.reward)),
        "rollout/forward_tokens": float(cost.forward_tokens),
        "rollout/leaf_tokens": float(cost.leaf_tokens),
        "rollout/prefill_tokens": float(cost.prefill_tokens),
        "rollout/passes": float(cost.passes),
        "rollout/search_s": cost.seconds,
        "rollout/prompts_per_s": searched / cost.seconds if cost.seconds else 0.0,
        "rollout/lag_versions": float(lag),
    }


class PhaseTimer:
    """Timer that splits elapsed time into consecutive phases."""

    def __init__(self) -> None:
        """Start the timer."""
        self._begin = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}
        """Seconds of each phase so far."""

    def mark(self, name: str) -> None:
        """Assign the time since the last mark to the phase `name`."""
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """Return the seconds of all phases and of the whole step as metrics."""
        laps = {f"cluster/{name}": value for name, value in self.laps.items()}
        return laps | {"cluster/step_s": time.perf_counter() - self._begin}

"""Keep the best policy version by its score on validation rows, never on the test split."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from cluster.actors.weights import fetch, fetch_value
from cluster.training.controller import Controller
from cluster.training.run_dir import save_policy, saved_policy
from orchard.errors import WeightsLostError
from orchard.policy.store import PolicyFacts
from orchard.policy.weights import Weights
from orchard.types import PolicyVersion, StoredTransfer, Update

SCORE = "ndcg@10/sid"
"""Validation metric that selects the best version."""


@dataclass
class BestCheckpoint:
    """Best policy of a phase, kept as an export in the run folder."""

    controller: Controller
    rows: Int64[np.ndarray, " R"]
    """Validation rows of the score; without rows the newest version is always the best."""
    beams: int
    """Beam width of the validation searches."""
    best: float = float("-inf")
    """Best score so far."""

    @classmethod
    async def open(cls, controller: Controller, *, num_rows: int, beams: int) -> "BestCheckpoint":
        """Create the best checkpoint of a phase, or continue the one in the run folder.

        A policy that was scored on other rows, on another validation file or with another beam
        width is scored again.
        """
        run = controller.run
        generator = np.random.Generator(np.random.Philox(key=[run.config.seed, 2**32]))
        rows = np.sort(generator.permutation(len(run.valid))[:num_rows])
        best_checkpoint = cls(controller=controller, rows=rows, beams=beams)
        saved = PolicyFacts.read(run.result)
        facts, split = saved.measurements, run.valid.digest
        best_checkpoint.best = facts.get("valid_score", float("-inf"))
        settings = {"valid_rows": float(len(rows)), "valid_beams": float(beams)}
        changed = any(facts.get(name, current) != current for name, current in settings.items())
        if facts and (changed or saved.data.get("valid", split) != split):
            best_checkpoint.best, _ = await best_checkpoint._evaluate(
                *saved_policy(run, run.result)
            )
        return best_checkpoint

    async def _evaluate(
        self, policy: PolicyVersion, weights: Weights | StoredTransfer
    ) -> tuple[float, dict[str, float]]:
        """Return the score of a version, and its metrics for the log."""
        if len(self.rows) == 0:
            return float(policy.step), {}
        evaluation = await self.controller.evaluate(
            self.controller.run.valid, self.rows, policy=policy, weights=weights, beams=self.beams
        )
        metrics = {f"evaluate/{name}": e.mean for name, e in evaluation.metrics.items()}
        metrics |= {f"evaluate/{name}": value for name, value in evaluation.extra.items()}
        return evaluation.metrics[SCORE].mean, metrics

    async def evaluate_and_keep(self, update: Update) -> dict[str, float]:
        """Score the policy of an update, export it if it is the best, and return the metrics."""
        policy, weights = update.to_evaluate
        score, metrics = await self._evaluate(policy, weights)
        if score > self.best:
            self.best = score
            await self._keep(update, score)
        return metrics

    async def _keep(self, update: Update, score: float) -> None:
        """Export the policy of an update, which the learner repeats if it was lost meanwhile."""
        try:
            await self._export(update, score)
        except WeightsLostError:
            await self._export(await self.controller.learner.again(update.policy.step), score)

    async def _export(self, update: Update, score: float) -> None:
        """Export the policy of an update."""
        policy, weights = update.to_keep
        save_policy(
            self.controller.run,
            self.controller.run.result,
            policy,
            await fetch(weights),
            await fetch_value(update.adapter) or {},
            valid_score=score,
            valid_rows=float(len(self.rows)),
            valid_beams=float(self.beams),
        )

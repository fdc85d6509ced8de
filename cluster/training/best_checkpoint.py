"""The best version so far, judged on validation rows. The test split plays no part in it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from cluster.training.controller import Controller
from cluster.training.run_dir import save_policy, saved_policy
from orchard.policy.store import PolicyFacts
from orchard.policy.weights import Weights
from orchard.types import PolicyVersion

SCORE = "ndcg@10/sid"


@dataclass
class BestCheckpoint:
    """Keeps the best policy of a phase exported in the run folder."""

    controller: Controller
    rows: Int64[np.ndarray, " R"]
    """Validation rows that judge; none means that the newest version is always the best."""
    beams: int
    best: float = float("-inf")

    @classmethod
    async def of(cls, controller: Controller, *, num_rows: int, beams: int) -> "BestCheckpoint":
        """The best checkpoint of a phase, continued from the run folder where there is one.

        One that was judged on other rows or by narrower searches is judged again.
        """
        run = controller.run
        generator = np.random.Generator(np.random.Philox(key=[run.config.seed, 2**32]))
        rows = np.sort(generator.permutation(len(run.valid))[:num_rows])
        best_checkpoint = cls(controller=controller, rows=rows, beams=beams)
        facts = PolicyFacts.read(run.result).measurements
        best_checkpoint.best = facts.get("valid_score", float("-inf"))
        by = {"valid_rows": float(len(rows)), "valid_beams": float(beams)}
        if facts and any(facts.get(name, wanted) != wanted for name, wanted in by.items()):
            best_checkpoint.best, _ = await best_checkpoint._judge(*saved_policy(run, run.result))
        return best_checkpoint

    async def _judge(
        self, policy: PolicyVersion, weights: Weights
    ) -> tuple[float, dict[str, float]]:
        """The score of a version, and the figures for the log."""
        if len(self.rows) == 0:
            return float(policy.step), {}
        found = await self.controller.evaluate(
            self.controller.run.valid, self.rows, policy=policy, weights=weights, beams=self.beams
        )
        figures = {f"evaluate/{name}": e.mean for name, e in found.metrics.items()}
        figures |= {f"evaluate/{name}": value for name, value in found.extra.items()}
        return found.metrics[SCORE].mean, figures

    async def evaluate_and_keep(self) -> dict[str, float]:
        """Judge what the learner keeps and export it if it is the best; the figures for the log."""
        policy, weights = self.controller.learner.eval_weights
        score, figures = await self._judge(policy, weights)
        if score > self.best:
            self.best = score
            save_policy(
                self.controller.run,
                self.controller.run.result,
                policy,
                weights,
                valid_score=score,
                valid_rows=float(len(self.rows)),
                valid_beams=float(self.beams),
            )
        return figures

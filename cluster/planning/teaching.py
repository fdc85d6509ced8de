"""Estimate how many groups of a training step will teach, from an evaluation of the warm start."""

import math
from dataclasses import dataclass
from pathlib import Path

from learner.advantage.estimators import ESTIMATORS
from orchard.evaluation import ranking
from orchard.settings import Config
from rewards.registry import REWARDS


@dataclass(frozen=True, slots=True, kw_only=True)
class TeachingGroups:
    """Expected groups with a spread of rewards at the first step."""

    hits: float
    """Share of held-out rows whose target is among `group_size` candidates of a beam."""
    groups: float
    """Expected number of groups of a step that teach, after `learner.max_draws`."""
    draws: int
    """Smallest `learner.max_draws` that is expected to fill a step with groups that teach."""

    def lines(self, config: Config) -> list[str]:
        """Return what the plan prints: the estimate, and what raises it."""
        learner, size = config.learner, config.rollout.group_size
        text = (
            f"the warm start has the target of {self.hits:.1%} of the held-out rows among {size} "
            f"candidates: of {learner.prompts_per_step} groups about {self.groups:.0f} will teach"
        )
        if config.rollout.hints:
            return [f"{text} without a hint"]
        if self.groups >= 0.6 * learner.prompts_per_step:
            return [text]
        return [
            text,
            f"to fill them, set rollout.hints, learner.max_draws = {self.draws}, or a reward with "
            "partial credit (docs/troubleshooting.md)",
        ]


def teaching_groups(config: Config, evaluation: Path) -> TeachingGroups | None:
    """Estimate the groups that teach; None where rewards or credit do not wait for a hit.

    Groups on rows that the warm start was trained on have more hits at first, because it knows
    their targets by heart.

    Args:
        config: settings of the run.
        evaluation: evaluation of the warm start on held-out rows; None is returned if it does not
            exist, or if its lists are narrower than a group.

    Raises:
        DataError: the evaluation is damaged.
    """
    learner, size = config.learner, config.rollout.group_size
    paid = [name for name, weight in config.rewards.weights.items() if weight]
    waits = all(REWARDS.facts(name).needs_hit for name in paid)
    waits &= ESTIMATORS.facts(learner.estimator).by_group and not config.rollout.add_target
    if not waits or not evaluation.is_file():
        return None
    measured = ranking.read(evaluation)
    if measured.width < size:
        return None
    hits = float((measured.ranks.sid < size).mean())
    prompts = learner.prompts_per_step
    draws = math.ceil(1 / hits) if hits else learner.max_draws
    groups = min(float(prompts), learner.max_draws * prompts * hits)
    return TeachingGroups(hits=hits, groups=groups, draws=draws)

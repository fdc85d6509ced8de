"""Compare how often searches hit the target of training rows and of held-out rows.

A policy that knows its training rows by heart hits their targets more often than those of rows to
come, and then learns little from them. As many validation rows as a step has prompts are searched
as in training at each evaluation; they are drawn anew each time.

Shapes:  B prompts
"""

import asyncio
import logging
import math

import numpy as np
from jaxtyping import Int64

from cluster.training.controller import Controller
from cluster.training.rollout_stream import request_size
from cluster.training.run import Run
from orchard.data.prompts import make_prompts, rows_of_step
from orchard.types import SearchTrees

CLEARLY = 3.0
"""Standard errors by which the share of training rows must exceed the other one for a warning."""
_SEED = 1 << 34
"""Added to the run's seed, for draws that no other part of the run makes."""

_log = logging.getLogger("orchard")


class HitShares:
    """Hits and groups of training rows and of held-out rows since the command started."""

    def __init__(self, controller: Controller) -> None:
        """Start with no group of either."""
        self._controller = controller
        self._train = np.zeros(2, np.int64)
        self._valid = np.zeros(2, np.int64)
        self._warned = False

    def add_training(self, trees: SearchTrees) -> None:
        """Count the groups of a training step."""
        self._train += hits(trees, self._controller.run), len(trees)

    async def search_valid(self, step: int) -> dict[str, float]:
        """Search validation rows with the current policy, and return their hit share for the log.

        Warns, once, if training rows are hit clearly more often.
        """
        run, rollout = self._controller.run, self._controller.rollout
        assert rollout is not None, "only the training phase has rollout actors"
        config = run.config
        num_rows = min(config.learner.prompts_per_step, len(run.valid))
        rows = np.sort(
            rows_of_step(step, num_rows=len(run.valid), per_step=num_rows, seed=config.seed + _SEED)
        )
        size = request_size(config.rollout, num_rows)
        seed = config.seed * 1_000_003 + step + _SEED
        found: list[SearchTrees] = await asyncio.gather(
            *(
                rollout.call(
                    "search", make_prompts(run.tokenizer, run.valid, rows[i : i + size]), seed
                )
                for i in range(0, num_rows, size)
            )
        )
        hit = sum(hits(trees, run) for trees in found)
        self._valid += hit, num_rows
        if not self._warned and (text := warning(self._train, self._valid, run)) is not None:
            self._warned = True
            _log.warning("%s", text)
        return {"rollout/hit_share_valid": hit / num_rows}


def hits(trees: SearchTrees, run: Run) -> int:
    """Return the number of groups that hold their target."""
    prompt = trees.prompt_of_candidate
    target = run.catalog.leaf_of_item[trees.prompts.target]
    return len(np.unique(prompt[trees.leaf == target[prompt]]))


def warning(train: Int64[np.ndarray, " 2"], valid: Int64[np.ndarray, " 2"], run: Run) -> str | None:
    """Return a sentence if training rows are hit clearly more often than held-out rows.

    Args:
        train: number of hits, and of groups, of training rows.
        valid: those of held-out rows.
        run: the run, whose fresh rows decide on the advice.
    """
    (hit, of), (held_hit, held_of) = train.tolist(), valid.tolist()
    is_feedback = run.rows is not run.train and run.rows is not run.fresh
    if not of or not held_of or is_feedback:  # what was shown is likely under the policy
        return None
    share, held_share = hit / of, held_hit / held_of
    pooled = (hit + held_hit) / (of + held_of)
    error = math.sqrt(pooled * (1 - pooled) * (1 / of + 1 / held_of))
    if share - held_share <= CLEARLY * error:
        return None
    remedy = (
        "lower learner.steps, or add rows to data.fresh"
        if run.rows is run.fresh
        else 'set learner.rows = "auto"'
        if run.fresh is not None
        else "give it rows that the warm start has not seen: data.fresh, or data.hold_back with a "
        "new warm start"
    )
    return (
        f"the groups of {100 * share:.1f} % of the training prompts hold their target, and of "
        f"{100 * held_share:.1f} % of held-out rows: the policy has memorized its prompts and "
        f"learns little from them; {remedy}"
    )

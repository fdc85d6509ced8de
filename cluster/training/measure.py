"""What the candidates of held-out rows are worth, as an evaluation.

Shapes:  R rows
"""

import dataclasses

import numpy as np
from jaxtyping import Int64

from cluster.training.run import Run
from orchard.data.prompts import Split
from orchard.evaluation import ranking
from orchard.evaluation.ranking import Evaluation
from orchard.types import PolicyVersion
from rollout.candidates import Candidates


def measure(
    run: Run,
    split: Split,
    rows: Int64[np.ndarray, " R"],
    found: Candidates,
    beams: int,
    policy: PolicyVersion,
) -> Evaluation:
    """Ranks of the targets among the candidates, their metrics, and what the search cost."""
    items = run.catalog
    leaf_items = np.diff(items.leaf_start)
    ranks = ranking.target_ranks(
        leaf=found.leaf,
        start=found.start,
        leaf_items=leaf_items[found.leaf],
        target_leaf=items.leaf_of_item[split.target[rows]],
        target_position=items.place_in_leaf[split.target[rows]],
    )
    extra = {
        "coverage@10": ranking.coverage(
            leaf=found.leaf, num_leaves=items.trie.num_leaves, start=found.start, k=10
        ),
        "diversity": ranking.diversity(path=found.node, start=found.start),
        "short_lists": float((np.diff(found.start) < beams).mean()),
        **{
            f.name: float(getattr(found.cost, f.name))
            for f in dataclasses.fields(found.cost)
            if f.name != "counts"
        },
        **{name: float(count) for name, count in found.cost.counts.items()},
    }
    return Evaluation(
        metrics=ranking.metrics(
            ranks, width=beams, resamples=run.config.evaluate.resamples, seed=run.config.seed
        ),
        ranks=ranks,
        row=rows,
        width=beams,
        seconds=found.cost.seconds,
        policy=str(policy),
        catalog=items.digest,
        extra=extra,
    )

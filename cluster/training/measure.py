"""Compute the evaluation of the candidates of held-out rows.

Shapes:  R rows
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

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
    candidates: Candidates,
    beams: int,
    policy: PolicyVersion,
    further: Mapping[str, str] = MappingProxyType({}),
) -> Evaluation:
    """Compute the ranks of the targets among the candidates, their metrics and the search cost.

    `further` are settings that the search depends on besides `search_settings`.
    """
    catalog = run.catalog
    items_per_leaf = np.diff(catalog.leaf_start)  # number of items of each leaf
    ranks = ranking.target_ranks(
        leaf=candidates.leaf,
        start=candidates.start,
        leaf_items=items_per_leaf[candidates.leaf],
        target_leaf=catalog.leaf_of_item[split.target[rows]],
        target_position=catalog.place_in_leaf[split.target[rows]],
    )
    proved: dict[str, float] = {}
    if candidates.proved is not None:
        proved["proved@10"] = float(candidates.proved.mean())
    extra = {
        "coverage@10": ranking.coverage(
            leaf=candidates.leaf, num_leaves=catalog.trie.num_leaves, start=candidates.start, k=10
        ),
        "diversity": ranking.diversity(path=candidates.node, start=candidates.start),
        "short_lists": float((np.diff(candidates.start) < beams).mean()),
        **{
            f.name: float(getattr(candidates.cost, f.name))
            for f in dataclasses.fields(candidates.cost)
            if f.name != "counts"
        },
        **proved,
        **{name: float(count) for name, count in candidates.cost.counts.items()},
    }
    return Evaluation(
        metrics=ranking.metrics(
            ranks, width=beams, resamples=run.config.evaluate.resamples, seed=run.config.seed
        ),
        ranks=ranks,
        row=rows,
        split=split.digest,
        width=beams,
        seconds=candidates.cost.seconds,
        policy=str(policy),
        catalog=catalog.digest,
        extra=extra,
        search={**search_settings(run), **further},
    )


def search_settings(run: Run) -> dict[str, str]:
    """Return the settings besides the width that the candidates of an evaluation depend on."""
    config = run.config
    settings = {
        "data.max_history": config.data.max_history,
        "evaluate.engine": config.evaluate.engine,
        "evaluate.think": config.evaluate.think,
        "rollout.dtype": config.rollout.dtype,
    }
    if config.data.context:
        settings["data.context"] = ", ".join(config.data.context)
    if config.evaluate.think:
        settings["rollout.think.block_tokens"] = config.rollout.think.block_tokens
    return {name: str(value) for name, value in settings.items()}

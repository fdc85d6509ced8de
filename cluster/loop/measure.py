"""Measure policies on the feedback of a window: realized reward, off-policy estimate, guards.

Only single draws have a known probability: rows decoded by `beam_sample` with width 1 at
temperature 1, with nothing excluded. A draw that showed several items of one semantic ID is one
decision with the sum of their rewards.
"""

from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from cluster.loop.gate import Measured
from cluster.loop.judge import judge
from orchard.data.histories import history_prompts
from orchard.evaluation.bootstrap import Estimate, estimates
from orchard.policy.store import Policy
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam

_RESAMPLES = 1000
_LIST_WIDTH = 10
"""Number of items of the lists whose coverage is measured."""
_MOST_LISTS = 256
"""Maximum number of lists whose coverage is measured."""


def draws_of(rows: pl.DataFrame) -> pl.DataFrame:
    """Return the single draws among feedback rows, one row each, with their whole reward."""
    usable = rows.filter(
        (pl.col("decoder") == "beam_sample") & (pl.col("width") == 1)
        & (pl.col("temperature") == 1.0) & (pl.col("source") == "policy")
        & ~pl.col("restricted") & pl.col("logprob").list.len().fill_null(0).gt(0)
    )  # fmt: skip
    return usable.group_by("request_id", maintain_order=True).agg(
        pl.col("history", "item_id", "logprob", "policy").sort_by("rank").first(),
        pl.col("reward").sum(),
    )


def realized(rows: pl.DataFrame, policy: str | None = None) -> Estimate | None:
    """Return the mean reward per draw, of one policy version or of all; None without any draw."""
    draws = draws_of(rows)
    if policy is not None:
        draws = draws.filter(pl.col("policy") == policy)
    return None if draws.is_empty() else _mean(draws["reward"].to_numpy())


def reward_per_request(rows: pl.DataFrame) -> Estimate | None:
    """Return the mean over requests of the sum of their rewards; None without any request."""
    earned = rows.group_by("request_id", maintain_order=True).agg(pl.col("reward").sum())["reward"]
    return None if earned.is_empty() else _mean(earned.to_numpy())


def measure_policy(folder: Path, rows: pl.DataFrame, *, estimator: str = "dr") -> Measured | None:
    """Measure a policy on the feedback of a window; None if the window holds no single draws.

    Args:
        folder: folder of the policy.
        rows: feedback rows.
        estimator: estimate of `orchard.evaluation.off_policy` that the reward is.
    """
    draws = draws_of(rows)
    if draws.is_empty():
        return None
    policy = Policy.open(folder)
    tokenizer, catalog = policy.tokenizer, policy.tokenizer.catalog
    engine = TorchEngine(policy.model, tokenizer, policy.version)
    found, listed = catalog.lookup(draws["item_id"].to_numpy().astype(np.int64))
    # The policy shows the first item of a leaf first: it draws no other one.
    shows = listed & (catalog.place_in_leaf[found] == 0)
    history, max_history = draws["history"].to_list(), policy.facts.max_history
    value, first = judge(
        engine, tokenizer, row=np.where(shows, found, -1), history=history,
        logprob=draws["logprob"].to_list(), reward=draws["reward"].to_numpy().astype(np.float64),
        max_history=max_history,
    )  # fmt: skip
    prompts, _ = history_prompts(tokenizer, history[:_MOST_LISTS], max_history=max_history)
    width = min(_LIST_WIDTH, catalog.trie.num_leaves)
    leaf = engine.run(partial(beam, width=width), prompts).leaf
    probability = np.exp(first.astype(np.float64))
    return Measured(
        reward=value.value[estimator],
        effective=value.effective,
        entropy=float(-(probability * np.maximum(first, -1e4)).sum(axis=1).mean()),
        coverage=len(np.unique(leaf)),
        illegal=int(((leaf < 0) | (leaf >= catalog.trie.num_leaves)).sum()),
    )


def _mean(values: np.ndarray) -> Estimate:
    """Return a mean with its bootstrap interval."""
    table = values.astype(np.float64)[:, None]
    return estimates(["reward"], table, resamples=_RESAMPLES, seed=0)["reward"]

"""Count the experts of a guide, and fit its weights to the lists of a policy.

The weights come from a conditional logit over the candidates of validation rows: the probability
of the target among them is the softmax of a weighted sum of log p and the guide's features. All
weights are divided by that of log p, so that log p + r ranks as the fitted model does.

Shapes:  B prompts   B1 = B + 1   C candidates   R rows with a hit   R1 = R + 1   A features
         Q queried pairs
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from scipy.optimize import minimize

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.errors import DataError
from orchard.guide.expert import LeafRows
from orchard.guide.guide import Guide, Term
from orchard.guide.registry import EXPERTS
from orchard.types import Prompts

REPEATS_EXCLUDED_BELOW = 0.01
"""Share of training targets in their own history below which lists leave the history out."""


def count(
    catalog: Catalog,
    rows: LeafRows,
    names: Sequence[str] = tuple(EXPERTS),
    *,
    most: int = 0,
    exclude_seen: bool | None = None,
) -> Guide:
    """Count the named experts and the popularity in training rows; all weights are 0.

    Args:
        catalog: the catalog whose leaves are counted.
        rows: the training rows.
        names: experts, by their names in the registry.
        most: pairs kept of each leaf, the strongest; 0 keeps all.
        exclude_seen: whether lists leave out the history; by default if the target of fewer than
            1 % of the rows is in its own history.

    Raises:
        ConfigError: an expert is unknown, or its scores are negative or not finite.
    """
    for name in names:
        EXPERTS.check_name(name, "guide.experts")
    if exclude_seen is None:
        exclude_seen = rows.repeat_rate < REPEATS_EXCLUDED_BELOW
    return Guide(
        catalog=catalog,
        experts=tuple(replace(EXPERTS[n](rows), name=n).strongest(most) for n in names),
        terms=tuple(Term(expert=n, scale=eps) for n in names for eps in EXPERTS.facts(n).scales),
        popularity=rows.popularity,
        exclude_seen=exclude_seen,
        rows=rows.digest,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Lists:
    """Candidates of the policy for a batch of prompts."""

    prompts: Prompts
    start: Int64[np.ndarray, " B1"]
    leaf: Int64[np.ndarray, " C"]
    score: Float64[np.ndarray, " C"]
    """Log-probability of each candidate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """A guide with fitted weights, and how the fit went."""

    guide: Guide
    hits: int
    """Rows whose target is among the candidates, which the fit learns from."""
    likelihood_weight: float
    """Fitted weight of log p, by which the others were divided."""


def fit_weights(guide: Guide, lists: Sequence[Lists], *, ridge: float = 1e-3) -> Fitted:
    """Fit the weights of a guide by a conditional logit over lists of held-out rows.

    Raises:
        DataError: no list holds its target, or the policy's likelihood does not help to find it.
    """
    tables = [_choices(guide, batch) for batch in lists]
    table = np.concatenate([part[0] for part in tables])
    is_target = np.concatenate([part[1] for part in tables])
    start = ragged.starts(np.concatenate([np.diff(part[2]) for part in tables]))
    if len(start) == 1:
        num_rows = sum(len(batch.prompts) for batch in lists)
        raise DataError(
            f"no target of {num_rows} validation rows is among its candidates, so the weights "
            "of a guide cannot be fitted; train the policy longer, or raise guide.beams"
        )
    columns = np.ones(table.shape[1], np.bool_)
    columns[-1] = not guide.exclude_seen  # the history is never in a list
    weight = np.zeros(table.shape[1])
    weight[columns] = _logit(table[:, columns], is_target, start, ridge)
    if weight[0] <= 0:
        raise DataError(
            f"the likelihood of the policy has weight {weight[0]:.3g} in {len(start) - 1} rows, so "
            "the other weights cannot be relative to it; train the policy longer, or raise "
            "guide.rows"
        )
    fitted = with_weights(guide, (weight[1:] / weight[0]).tolist())
    return Fitted(guide=fitted, hits=len(start) - 1, likelihood_weight=float(weight[0]))


def with_weights(guide: Guide, weight: Sequence[float]) -> Guide:
    """Return the guide with the weights of its features, in the order of `features`."""
    terms = tuple(
        replace(term, weight=float(w)) for term, w in zip(guide.terms, weight[:-2], strict=True)
    )
    return replace(
        guide, terms=terms, popularity_weight=float(weight[-2]), seen_weight=float(weight[-1])
    )


def features(
    guide: Guide,
    prompts: Prompts,
    prompt: Int64[np.ndarray, " Q"],
    leaf: Int64[np.ndarray, " Q"],
) -> Float64[np.ndarray, "Q A"]:
    """Return what the weights of a guide multiply: terms, log(1 + popularity), in the history.

    All are 0 after a history that no expert knows.
    """
    scores = guide.scores(prompts)
    place, reached = scores.lookup(prompt, leaf)
    table = np.zeros((len(leaf), len(guide.terms) + 2))
    at = place[reached]
    for index, (term, column) in enumerate(zip(guide.terms, guide.column, strict=True)):
        table[reached, index] = np.log1p(scores.score[at, column] / term.scale)
    table[reached, -1] = scores.seen[at]
    table[:, -2] = np.log1p(guide.popularity[leaf])
    table[~scores.known[prompt]] = 0.0
    return table


def _choices(
    guide: Guide, lists: Lists
) -> tuple[Float64[np.ndarray, "C A"], Bool[np.ndarray, " C"], Int64[np.ndarray, " R1"]]:
    """Return log p and features, the target, and the bounds of the rows whose list has it."""
    prompts, leaf_of_item = lists.prompts, guide.catalog.leaf_of_item
    prompt, leaf, score = ragged.row_of(lists.start), lists.leaf, lists.score
    if guide.exclude_seen:
        history = leaf_of_item[prompts.history]
        fresh = ~ragged.contains(history, prompts.history_start, prompt, leaf)
        prompt, leaf, score = prompt[fresh], leaf[fresh], score[fresh]
    is_target = leaf == leaf_of_item[prompts.target][prompt]
    hit = np.bincount(prompt[is_target], minlength=len(prompts)) > 0
    used = hit[prompt]
    prompt, leaf, score, is_target = prompt[used], leaf[used], score[used], is_target[used]
    table = np.column_stack([score, features(guide, prompts, prompt, leaf)])
    size = np.bincount(prompt, minlength=len(prompts))[hit]
    return table, is_target, ragged.starts(size)


def _logit(
    table: Float64[np.ndarray, "C A"],
    is_target: Bool[np.ndarray, " C"],
    start: Int64[np.ndarray, " R1"],
    ridge: float,
) -> Float64[np.ndarray, " A"]:
    """Maximize the mean log-likelihood of the targets, less ridge times the squared weights."""
    owner, num_rows = ragged.row_of(start), len(start) - 1

    def loss(weight: Float64[np.ndarray, " A"]) -> tuple[float, Float64[np.ndarray, " A"]]:
        utility = table @ weight
        peak = np.maximum.reduceat(utility, start[:-1])
        share = np.exp(utility - peak[owner])
        total = np.add.reduceat(share, start[:-1])
        share /= total[owner]
        value = float((np.log(total) + peak).sum() - utility[is_target].sum()) / num_rows
        slope = table.T @ (share - is_target) / num_rows
        return value + ridge * float(weight @ weight), slope + 2 * ridge * weight

    first = np.zeros(table.shape[1])
    first[0] = 1.0
    result: Any = minimize(loss, first, jac=True, method="L-BFGS-B")
    return result.x

"""Score given items of one history with a policy, in one tree. Independent of HTTP and Ray."""

from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Bool, Int64

from rollout.candidates import Candidates
from rollout.engine.protocol import SearchRunner
from rollout.search.score_items import score_leaves
from serve.catalog.store import CatalogVersion
from serve.decoding.recommender import Query, levels_of, read_queries
from serve.schema import ScoredItem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScoredItems:
    """Scores of given items after one history."""

    items: list[ScoredItem]
    """Items in the given order, those without a score included."""
    candidates: Candidates
    """Distinct leaves of the items, with the cost of scoring them."""
    unknown_items: int
    """Number of history items that the catalog does not contain."""
    catalog: str
    """Name of the catalog version."""
    policy: str = ""
    """Version of the policy, which the caller knows."""


def score(
    runner: SearchRunner,
    catalog_version: CatalogVersion,
    query: Query,
    item_id: Int64[np.ndarray, " M"],
    *,
    max_history: int,
) -> ScoredItems:
    """Score items, whether or not a search would show them.

    Items that the catalog version does not contain, or has removed, have no score. Items that share
    a semantic ID share the score.

    Args:
        runner: engine of the policy, whose catalog is that of `catalog_version`.
        catalog_version: catalog to score in.
        query: history; what it excludes is not considered.
        item_id: items to score.
        max_history: number of history items that the policy reads.

    Raises:
        EngineError: the engine cannot run the history, or its policy has diverged.
    """
    catalog = catalog_version.catalog
    row, is_known = catalog.lookup(item_id)
    is_known = is_known & catalog_version.snapshot.live[row]
    leaf, leaf_of_item = np.unique(catalog.leaf_of_item[row[is_known]], return_inverse=True)
    prompts, unknown_items = read_queries(catalog_version, [query], max_history)
    start = np.array([0, len(leaf)])
    found = runner.run(partial(score_leaves, leaf=leaf, start=start), prompts)
    return ScoredItems(
        items=_items(catalog_version, query, item_id, row, is_known, found, leaf_of_item),
        candidates=found,
        unknown_items=unknown_items[0],
        catalog=catalog_version.name,
    )


def _items(
    catalog_version: CatalogVersion,
    query: Query,
    item_id: Int64[np.ndarray, " M"],
    row: Int64[np.ndarray, " M"],
    is_known: Bool[np.ndarray, " M"],
    candidates: Candidates,
    candidate: Int64[np.ndarray, " K"],
) -> list[ScoredItem]:
    """Return the items with the scores of their leaves; `candidate` is that of each known item."""
    catalog = catalog_version.catalog
    known = iter(candidate.tolist())
    items = list[ScoredItem]()
    for place, one in enumerate(item_id.tolist()):
        if not is_known[place]:
            items.append(ScoredItem(item_id=one, score=None, sid=[], title=""))
            continue
        index, item_row = next(known), int(row[place])
        items.append(ScoredItem.model_construct(
            item_id=one, score=float(candidates.score[index]),
            sid=catalog_version.plain_sid(item_row), title=catalog.title[item_row], rank=None,
            levels=levels_of(catalog_version, item_row, candidates, index)
            if query.levels else None,
        ))  # fmt: skip
    return items


def rank_by_score(catalog_version: CatalogVersion, scored: ScoredItems) -> ScoredItems:
    """Return the items best first with their ranks, those without a score last and unranked.

    Items of equal scores, such as those that share a semantic ID, come in the order of their
    popularity and of the catalog where the catalog has popularities, else in the given order.
    """
    items, popularity = scored.items, catalog_version.popularity
    count, place = np.zeros(len(items)), np.arange(len(items))
    if popularity:
        known = [i for i, item in enumerate(items) if item.score is not None]
        ids = np.array([items[i].item_id for i in known], dtype=np.int64)
        count[known] = [popularity.get(item, 0.0) for item in ids.tolist()]
        place[known] = catalog_version.catalog.lookup(ids)[0]
    scores = np.array([np.inf if item.score is None else -item.score for item in items])
    order = np.lexsort((place, -count, scores)).tolist()
    ranked = [
        items[i].model_copy(update={"rank": None if items[i].score is None else rank})
        for rank, i in enumerate(order, start=1)
    ]
    return replace(scored, items=ranked)

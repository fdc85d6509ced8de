"""Histories in, ranked items out: one batch, one search. Knows neither HTTP nor Ray nor the clock.

All queries of a batch share decoder, width and filters, so that an answer is that of its query
alone, whatever the batch. What is excluded is excluded inside the search: a list is short only
where nothing else may be shown or the beam was asked to be narrower than the list.

Shapes:  B queries   H history items   X excluded rows   C candidates   M items
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float, Float32, Int, Int64

from orchard import ragged
from orchard.settings import VedConfig
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend, SearchRunner
from rollout.item_filter import ItemFilter
from rollout.search.beam import beam
from rollout.search.sampling import beam_sample
from rollout.search.ved.search import ved
from serve.catalog.store import CatalogVersion, FilteredItems
from serve.schema import Decoder, Item, Level


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchKey:
    """What the queries of one batch have in common."""

    decoder: Decoder
    width: int
    filters: tuple[str, ...]
    temperature: float = 1.0
    trace: int | None = None
    """Of a query whose search is to be written down, and which is therefore searched alone: a
    number of its own."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Query:
    """A request whose defaults are settled."""

    history: Int64[np.ndarray, " H"]
    """Item ids, oldest first."""
    k: int
    exclude: Int64[np.ndarray, " X"]
    """Item ids, the history among them where it is excluded."""
    per_prefix: int | None
    seed: int
    levels: bool


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankedItems:
    """The answer to one query."""

    items: list[Item]
    leaf: list[int]
    """Of each item."""
    fewer: str
    unknown: int


def recommend(
    runner: SearchRunner,
    catalog_version: CatalogVersion,
    queries: Sequence[Query],
    kind: BatchKey,
    *,
    max_history: int,
) -> tuple[list[RankedItems], Candidates]:
    """The items of each query, and what was searched.

    Raises:
        UnsuitableError: there is no such filter.
        EngineError: the engine cannot search for the batch, or its policy has diverged.
        ConfigError: the guided search has no budget for its beam.
    """
    offer = catalog_version.offer(kind.filters)
    prompts, unknown = read_queries(catalog_version, queries, max_history)
    gone = [excluded_rows(catalog_version, offer, query) for query in queries]
    leaves = [full_leaves(catalog_version, offer, rows) for rows in gone]
    allowed = ItemFilter(
        view=offer.view,
        excluded=np.concatenate([np.zeros(0, np.int64), *leaves]),
        excluded_start=ragged.starts(np.array([len(one) for one in leaves])),
    )
    found = runner.run(search_of(kind, queries, allowed), prompts)
    answers = [
        rank_items(
            catalog_version,
            offer,
            query,
            kind,
            found.select(np.array([row])),
            gone[row],
            unknown[row],
        )
        for row, query in enumerate(queries)
    ]
    return answers, found


def read_queries(
    catalog_version: CatalogVersion, queries: Sequence[Query], max_history: int
) -> tuple[Prompts, list[int]]:
    """What the policy reads of each query, and how many of its items are unknown.

    The random numbers of a query come from its own seed, which takes the place of the row number.
    """
    kept: list[Int64[np.ndarray, " H"]] = []
    unknown: list[int] = []
    for query in queries:
        row, known = catalog_version.catalog.find(query.history)
        kept.append(row[known][-max_history:])
        unknown.append(int((~known).sum()))
    history = np.concatenate([np.zeros(0, np.int64), *kept])
    start = ragged.starts(np.array([len(rows) for rows in kept]))
    token, token_start = catalog_version.tokenizer.encode_history(history, start)
    prompts = Prompts(
        id=np.array([query.seed for query in queries], dtype=np.int64),
        target=np.zeros(len(queries), dtype=np.int64),
        history=history,
        history_start=start,
        token=token,
        token_start=token_start,
    )
    return prompts, unknown


def excluded_rows(
    catalog_version: CatalogVersion, offer: FilteredItems, query: Query
) -> Int64[np.ndarray, " X"]:
    """Distinct rows of the items on offer that the query excludes."""
    row, known = catalog_version.catalog.find(query.exclude)
    row = np.unique(row[known])
    return row[offer.items[row]]


def full_leaves(
    catalog_version: CatalogVersion, offer: FilteredItems, rows: Int64[np.ndarray, " X"]
) -> Int64[np.ndarray, " K"]:
    """Leaves all of whose items on offer are among the rows: those the search must not find."""
    leaf, count = np.unique(catalog_version.catalog.leaf_of_item[rows], return_counts=True)
    return leaf[count == offer.per_leaf[leaf]]


def search_of(
    kind: BatchKey, queries: Sequence[Query], allowed: ItemFilter
) -> Callable[[DecodingBackend, Prompts], Candidates]:
    """The decoder's search for the batch."""
    if kind.decoder == "beam":
        return partial(beam, width=kind.width, allowed=allowed)
    if kind.decoder == "beam_sample":
        return partial(
            beam_sample, width=kind.width, temperature=kind.temperature, seed=0, allowed=allowed
        )
    return partial(_guided, width=kind.width, count=kind.width, allowed=allowed)


def _guided(
    engine: DecodingBackend, prompts: Prompts, *, width: int, count: int, allowed: ItemFilter
) -> Candidates:
    """A guided search with what a beam of that width forwards: half for its own beam."""
    depth = engine.trie.depth
    settings = VedConfig(width=max(1, width // 2), budget=1 + width * max(1, depth - 1))
    return ved(engine, prompts, settings, count=count, seed=0, allowed=allowed)


def rank_items(
    catalog_version: CatalogVersion,
    offer: FilteredItems,
    query: Query,
    kind: BatchKey,
    found: Candidates,
    gone: Int64[np.ndarray, " X"],
    unknown: int,
) -> RankedItems:
    """The first k items of the candidates of one query."""
    catalog = catalog_version.catalog
    row, start = ragged.take(catalog.item_of_leaf, catalog.leaf_start, found.leaf)
    candidate = ragged.owners(start)
    shown = offer.items[row] & ~np.isin(row, gone)
    row, candidate = row[shown], candidate[shown]
    capped = 0
    if query.per_prefix is not None:
        kept = places_among(found.node[candidate, 0]) < query.per_prefix
        capped = int((~kept).sum())
        row, candidate = row[kept], candidate[kept]
    row, candidate = row[: query.k], candidate[: query.k]
    fewer = ""
    if len(row) < query.k:
        if len(row) == offer.total - len(gone):
            fewer = "exhausted"
        elif capped:
            fewer = "per_prefix"
        else:
            fewer = "budget" if kind.decoder == "ved" else "width"
    items = [
        Item.model_construct(
            rank=rank,
            item_id=int(catalog.item_id[item]),
            score=float(found.score[one]),
            sid=catalog_version.plain_sid(item),
            title=catalog.title[item],
            levels=levels_of(catalog_version, item, found, one) if query.levels else None,
        )
        for rank, (item, one) in enumerate(
            zip(row.tolist(), candidate.tolist(), strict=True), start=1
        )
    ]
    return RankedItems(
        items=items, leaf=found.leaf[candidate].tolist(), fewer=fewer, unknown=unknown
    )


def popular_items(
    catalog_version: CatalogVersion, query: Query, filters: tuple[str, ...]
) -> RankedItems:
    """The most popular items that the query allows, for when the policy cannot answer."""
    offer = catalog_version.offer(filters)
    gone = excluded_rows(catalog_version, offer, query)
    row = catalog_version.by_popularity
    row = row[offer.items[row] & ~np.isin(row, gone)]
    few = row[: query.k]
    if query.per_prefix is not None:
        row = row[places_among(catalog_version.catalog.codes[row, 0]) < query.per_prefix]
        few = row[: query.k]
    items = [
        Item.model_construct(
            rank=rank, item_id=int(catalog_version.catalog.item_id[item]), score=None,
            sid=catalog_version.plain_sid(item), title=catalog_version.catalog.title[item],
            levels=None,
        )
        for rank, item in enumerate(few.tolist(), start=1)
    ]  # fmt: skip
    short = len(few) < query.k
    everything = len(few) == offer.total - len(gone)
    return RankedItems(
        items=items,
        leaf=catalog_version.catalog.leaf_of_item[few].tolist(),
        fewer=("exhausted" if everything else "per_prefix") if short else "",
        unknown=0,
    )


def levels_of(
    catalog_version: CatalogVersion, item: int, found: Candidates, one: int
) -> list[Level]:
    """Code, log-probability and value at every level of a candidate."""
    codes = catalog_version.catalog.codes[item]
    value: Float[np.ndarray, " D"] | None = None if found.value is None else found.value[one]
    logprob: Float32[np.ndarray, " D"] = found.logprob[one]
    return [
        Level.model_construct(
            code=int(codes[level]),
            logprob=float(logprob[level]),
            value=None if value is None or np.isnan(value[level]) else float(value[level]),
        )
        for level in range(int((codes >= 0).sum()))
    ]


def places_among(group: Int[np.ndarray, " M"]) -> Int64[np.ndarray, " M"]:
    """How many earlier entries are of the same group, for each entry."""
    order = np.argsort(group, kind="stable")
    place = np.empty(len(group), dtype=np.int64)
    first = np.flatnonzero(np.diff(group[order], prepend=group[order][:1] - 1))
    start = np.append(first, len(group))
    place[order] = ragged.places(start) if len(group) else np.zeros(0, np.int64)
    return place

"""Batched recommendation: encode histories, search once, rank items. Independent of HTTP and Ray.

All queries of a batch share decoder, width and filters, so that the answer to a query does not
depend on its batch. Exclusions are applied inside the search: a list is short only if no other item
may be shown or the beam is narrower than the list.

Shapes:  B queries   H history items   X excluded rows   C candidates   M items
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float, Float32, Int, Int64

from orchard import ragged
from orchard.context import GivenContext
from orchard.data.histories import history_prompts
from orchard.guide.guide import Guide
from orchard.settings import VedConfig
from orchard.settings.widths import Width, widest
from orchard.types import Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend, SearchRunner
from rollout.item_filter import ItemFilter
from rollout.search.beam import beam
from rollout.search.guided import wider_unless_proved
from rollout.search.sampling import beam_sample
from rollout.search.ved.search import ved
from serve.catalog.store import CatalogVersion, FilteredItems
from serve.decoding.explain import explain_guide
from serve.decoding.trace import Trace
from serve.schema import Decoder, Item, Level, Shortfall


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchKey:
    """Search parameters shared by the queries of one batch."""

    decoder: Decoder
    width: Width
    wide: int = 0
    """Width of a second search of the guided decoder where nothing is proved; 0 for none."""
    prove: int = 0
    """Number of items that the guided decoder proves to be the best, where they are."""
    filters: tuple[str, ...]
    temperature: float = 1.0
    trace: int | None = None
    """Unique number of a query whose search is traced, which therefore forms a batch alone."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Query:
    """Request-specific input of a search."""

    history: Int64[np.ndarray, " H"]
    """Item ids, oldest first."""
    k: int
    exclude: Int64[np.ndarray, " X"]
    """Item ids, including the history if it is excluded."""
    per_prefix: int | None
    seed: int
    levels: bool
    explain: bool = False
    """Whether the guide's share in each item is wanted."""
    context: GivenContext | None = None
    """Context of the history; unknown if it is left out."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RankedItems:
    """Ranked items of one query."""

    items: list[Item]
    leaf: list[int]
    """Trie leaf of each item."""
    shortfall_reason: Shortfall
    """Reason for fewer than k items; empty if there are k."""
    unknown_items: int
    """Number of history items that the catalog does not contain."""
    proved: bool | None = None
    """Whether the items are proved to be the best; None if the search does not prove it."""


def recommend(
    runner: SearchRunner,
    catalog_version: CatalogVersion,
    queries: Sequence[Query],
    kind: BatchKey,
    *,
    max_history: int,
    trace: Trace | None = None,
    guide: Guide | None = None,
) -> tuple[list[RankedItems], Candidates]:
    """Return the ranked items of each query and the candidates of the whole batch.

    The search is recorded in `trace`, where one is given. The decoder `guided` ranks by log p + V
    of the `guide`, by log p alone without one.

    Raises:
        UnprocessableError: a filter does not exist.
        EngineError: the engine cannot search the batch, or its policy has diverged.
        ConfigError: the budget of the value-guided search is too small for its beam.
    """
    filtered = catalog_version.filtered_items(kind.filters)
    prompts, unknown_items = read_queries(catalog_version, queries, max_history)
    excluded = [excluded_rows(catalog_version, filtered, query) for query in queries]
    # Leaves that the search must not reach, per query.
    leaves = [full_leaves(catalog_version, filtered, rows) for rows in excluded]
    allowed = ItemFilter(
        view=filtered.view,
        excluded=np.concatenate([np.zeros(0, np.int64), *leaves]),
        excluded_start=ragged.starts(np.array([len(rows) for rows in leaves])),
    )
    search_fn = search_of(kind, allowed, guide, _most_leaves(queries, kind))
    candidates = runner.run(search_fn if trace is None else trace.of(search_fn), prompts)
    ranked = [
        rank_items(
            catalog_version,
            filtered,
            query,
            kind,
            candidates.select(np.array([query_index])),
            excluded[query_index],
            unknown_items[query_index],
        )
        for query_index, query in enumerate(queries)
    ]
    if kind.decoder == "guided" and guide is not None:
        for index, query in enumerate(queries):
            if query.explain and ranked[index].items:
                prompt = prompts.select(np.array([index]))
                items = explain_guide(guide, prompt, ranked[index].items, ranked[index].leaf)
                ranked[index] = replace(ranked[index], items=items)
    return ranked, candidates


def read_queries(
    catalog_version: CatalogVersion, queries: Sequence[Query], max_history: int
) -> tuple[Prompts, list[int]]:
    """Return the prompt of each query and the number of its history items not in the catalog.

    The prompt id is the seed of the query, so that its random numbers do not depend on the batch.
    """
    return history_prompts(
        catalog_version.tokenizer,
        [query.history for query in queries],
        max_history=max_history,
        prompt_id=np.array([query.seed for query in queries], dtype=np.int64),
        contexts=[query.context for query in queries],
    )


def excluded_rows(
    catalog_version: CatalogVersion, filtered: FilteredItems, query: Query
) -> Int64[np.ndarray, " X"]:
    """Return the distinct catalog rows of the filtered items that the query excludes."""
    rows, in_catalog = catalog_version.catalog.lookup(query.exclude)
    rows = np.unique(rows[in_catalog])
    return rows[filtered.items[rows]]


def full_leaves(
    catalog_version: CatalogVersion, filtered: FilteredItems, rows: Int64[np.ndarray, " X"]
) -> Int64[np.ndarray, " K"]:
    """Return the leaves whose filtered items are all among the rows; the search must skip them."""
    leaf, count = np.unique(catalog_version.catalog.leaf_of_item[rows], return_counts=True)
    return leaf[count == filtered.per_leaf[leaf]]


def _most_leaves(queries: Sequence[Query], kind: BatchKey) -> int | None:
    """Return the most leaves that an answer needs; None where a cap or a trace may need all.

    Every leaf has an item that may be shown.
    """
    needs_all = kind.trace is not None or any(query.per_prefix is not None for query in queries)
    return None if needs_all else max(query.k for query in queries)


def search_of(
    kind: BatchKey, allowed: ItemFilter, guide: Guide | None, count: int | None
) -> partial[Candidates]:
    """Return the search function of the batch's decoder, of whose beam `count` leaves are used."""
    width = widest(kind.width)
    if kind.decoder == "ved":
        return partial(_ved, width=width, count=width, allowed=allowed)
    if kind.decoder == "beam_sample":
        return partial(
            beam_sample, width=width, temperature=kind.temperature, seed=0, allowed=allowed
        )
    # One pass a level: a pass of few tokens takes about as long as one of many.
    by_level = {"width": kind.width, "count": count, "second_pass": False, "allowed": allowed}
    if kind.decoder == "beam":
        return partial(beam, **by_level)
    guided = by_level | {"prove": kind.prove, "guide": guide}
    if kind.wide:
        return partial(wider_unless_proved, wide=kind.wide, **guided)
    return partial(beam, **guided)


def _ved(
    engine: DecodingBackend, prompts: Prompts, *, width: int, count: int, allowed: ItemFilter
) -> Candidates:
    """Run a value-guided search with the forward budget of a beam of that width.

    Half of the width goes to the initial likelihood beam.
    """
    depth = engine.trie.depth
    settings = VedConfig(width=max(1, width // 2), budget=1 + width * max(1, depth - 1))
    return ved(engine, prompts, settings, count=count, seed=0, allowed=allowed)


def rank_items(
    catalog_version: CatalogVersion,
    filtered: FilteredItems,
    query: Query,
    kind: BatchKey,
    candidates: Candidates,
    excluded: Int64[np.ndarray, " X"],
    unknown_items: int,
) -> RankedItems:
    """Return the first k items of the candidates of one query."""
    catalog = catalog_version.catalog
    # Catalog rows of the items of all candidates, best candidate first, items in catalog order.
    rows, start = ragged.take(catalog.item_of_leaf, catalog.leaf_start, candidates.leaf)
    # Candidate of each of those items.
    candidate_of = ragged.row_of(start)
    shown = filtered.items[rows] & ~np.isin(rows, excluded)
    rows, candidate_of = rows[shown], candidate_of[shown]
    num_capped = 0
    if query.per_prefix is not None:
        # Node at depth 1 stands for the first code.
        kept = places_among(candidates.node[candidate_of, 0]) < query.per_prefix
        num_capped = int((~kept).sum())
        rows, candidate_of = rows[kept], candidate_of[kept]
    rows, candidate_of = rows[: query.k], candidate_of[: query.k]
    shortfall_reason: Shortfall = ""
    if len(rows) < query.k:
        if len(rows) == filtered.total - len(excluded):
            shortfall_reason = "exhausted"
        elif num_capped:
            shortfall_reason = "per_prefix"
        else:
            shortfall_reason = "budget" if kind.decoder == "ved" else "width"
    proved = None
    if candidates.proved is not None:
        # With a cap, items may come from candidates after those that are proved.
        last = int(candidate_of[-1]) if len(rows) else -1
        proved = shortfall_reason == "exhausted" or (
            not shortfall_reason and bool(candidates.proved[0]) and last < kind.prove
        )
    items = [
        Item.model_construct(
            rank=rank,
            item_id=int(catalog.item_id[row]),
            score=float(candidates.score[candidate_index]),
            sid=catalog_version.plain_sid(row),
            title=catalog.title[row],
            levels=levels_of(catalog_version, row, candidates, candidate_index)
            if query.levels
            else None,
            guide=None,
        )
        for rank, (row, candidate_index) in enumerate(
            zip(rows.tolist(), candidate_of.tolist(), strict=True), start=1
        )
    ]
    return RankedItems(
        items=items,
        leaf=candidates.leaf[candidate_of].tolist(),
        shortfall_reason=shortfall_reason,
        unknown_items=unknown_items,
        proved=proved,
    )


def popular_items(
    catalog_version: CatalogVersion, query: Query, filters: tuple[str, ...]
) -> RankedItems:
    """Return the most popular allowed items, the fallback if the policy cannot answer."""
    catalog = catalog_version.catalog
    filtered = catalog_version.filtered_items(filters)
    excluded = excluded_rows(catalog_version, filtered, query)
    # Catalog rows of the allowed items, most popular first.
    rows = catalog_version.by_popularity
    rows = rows[filtered.items[rows] & ~np.isin(rows, excluded)]
    if query.per_prefix is not None:
        rows = rows[places_among(catalog.codes[rows, 0]) < query.per_prefix]
    rows = rows[: query.k]
    items = [
        Item.model_construct(
            rank=rank, item_id=int(catalog.item_id[row]), score=None,
            sid=catalog_version.plain_sid(row), title=catalog.title[row], levels=None,
            guide=None,
        )
        for rank, row in enumerate(rows.tolist(), start=1)
    ]  # fmt: skip
    shortfall_reason: Shortfall = ""
    if len(rows) < query.k:
        is_exhausted = len(rows) == filtered.total - len(excluded)
        shortfall_reason = "exhausted" if is_exhausted else "per_prefix"
    return RankedItems(
        items=items,
        leaf=catalog.leaf_of_item[rows].tolist(),
        shortfall_reason=shortfall_reason,
        unknown_items=0,
    )


def levels_of(
    catalog_version: CatalogVersion, row: int, candidates: Candidates, candidate_index: int
) -> list[Level]:
    """Return code, log-probability and value at every level of an item's semantic ID."""
    codes = catalog_version.catalog.codes[row]
    value: Float[np.ndarray, " D"] | None = (
        None if candidates.value is None else candidates.value[candidate_index]
    )
    logprob: Float32[np.ndarray, " D"] = candidates.logprob[candidate_index]
    return [
        Level.model_construct(
            code=int(codes[level]),
            logprob=float(logprob[level]),
            value=None if value is None or np.isnan(value[level]) else float(value[level]),
        )
        for level in range(int((codes >= 0).sum()))
    ]


def places_among(group: Int[np.ndarray, " M"]) -> Int64[np.ndarray, " M"]:
    """Return for each entry the number of earlier entries of the same group."""
    # Indices sorted by group, in order of appearance within a group.
    order = np.argsort(group, kind="stable")
    count = np.empty(len(group), dtype=np.int64)
    # Start of each group's run in `order`.
    first = np.flatnonzero(np.diff(group[order], prepend=group[order][:1] - 1))
    start = np.append(first, len(group))
    count[order] = ragged.index_in_row(start) if len(group) else np.zeros(0, np.int64)
    return count

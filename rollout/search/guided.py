"""Searches around the guided beam: without the history, and wider where nothing is proved.

Shapes:  B prompts
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np

from orchard.catalog.view import CatalogView
from orchard.guide.values import Valuer
from orchard.settings.widths import Width, last
from orchard.types import Cost, Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.item_filter import ItemFilter
from rollout.search.beam import beam

FilteredSearch = Callable[..., Candidates]
"""Search function with the keyword `allowed`."""


def without_history(
    engine: DecodingBackend, prompts: Prompts, *, search_fn: FilteredSearch, view: CatalogView
) -> Candidates:
    """Run `search_fn` without the leaves of each prompt's own history.

    Args:
        engine: backend with the policy.
        prompts: batch of prompts.
        search_fn: search that takes an `ItemFilter` as `allowed`.
        view: leaves that may be found otherwise.

    Raises:
        CatalogError: the view belongs to another catalog.
    """
    leaf_of_item = engine.tokenizer.catalog.leaf_of_item
    allowed = ItemFilter(
        view=view,
        excluded=leaf_of_item[prompts.history],
        excluded_start=prompts.history_start,
    )
    return search_fn(engine, prompts, allowed=allowed)


def wider_unless_proved(
    engine: DecodingBackend,
    prompts: Prompts,
    *,
    width: Width,
    wide: int,
    prove: int,
    guide: Valuer | None = None,
    count: int | None = None,
    allowed: ItemFilter | None = None,
    second_pass: bool = True,
) -> Candidates:
    """Search with `width`, then again with `wide` for the prompts that are not proved by then.

    A prompt gets up to `count` candidates, by default the larger of `prove` and the last `width`;
    one with fewer than `prove` of them is searched again too. The cost is that of both searches,
    and counts the prompts that were `searched_again`.

    Raises:
        CatalogError, EngineError: as `rollout.search.beam.beam`.
    """
    count = max(last(width), prove) if count is None else count
    search = partial(beam, engine, count=count, prove=prove, guide=guide, second_pass=second_pass)
    narrow = search(prompts, width=width, allowed=allowed)
    assert narrow.proved is not None, "prove must be positive"
    rows = np.flatnonzero(~narrow.proved | (np.diff(narrow.start) < min(prove, count)))
    cost = narrow.cost + Cost(counts={"searched_again": len(rows)})
    if len(rows) == 0:
        return replace(narrow, cost=cost)
    again = search(
        prompts.select(rows), width=wide, allowed=None if allowed is None else allowed.select(rows)
    )
    both = Candidates.concatenate([narrow, again])
    chosen = np.arange(len(prompts))
    chosen[rows] = len(prompts) + np.arange(len(rows))
    return replace(both.select(chosen), cost=cost + again.cost)

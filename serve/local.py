"""A policy in this process, without Ray or HTTP: what `orchard.load` returns.

It answers as the endpoint does, by the same decoder, and shows what a search does below.

Shapes:  H histories   C candidates
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float64
from torch import nn

from orchard.catalog.catalog import Catalog
from orchard.context import GivenContext
from orchard.data.histories import history_prompts
from orchard.errors import ConfigError
from orchard.policy.store import Policy
from orchard.types import PolicyVersion, Prompts, SearchTrees
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search.score_items import score_leaves
from rollout.search_trees import build_search_trees
from serve.catalog.attributes import NOTHING
from serve.catalog.store import CatalogStore
from serve.decoding.recommender import BatchKey, Query, recommend
from serve.policies.read import guide_of
from serve.schema import Item

_log = logging.getLogger("orchard.serve")


class LocalPolicy:
    """A policy with its catalog, ready to recommend, to score items and to show its searches."""

    def __init__(self, policy: Policy, *, device: str = "cpu", dtype: str = "float32") -> None:
        """Take over an open policy; `device` and `dtype` are torch's names."""
        nn.Module.to(policy.model, device=device, dtype=getattr(torch, dtype))
        self._version, self._tokenizer = policy.version, policy.tokenizer
        carried, notes = guide_of(policy)
        self._guide = None if carried is None else carried.own
        for note in notes:
            _log.warning("%s", note)
        self._max_history = policy.facts.max_history or 10
        self._engine = TorchEngine(policy.model, policy.tokenizer, policy.version)
        self._store = CatalogStore(
            policy.tokenizer, attributes=NOTHING, filters={}, popularity={}, keep=0
        )

    @property
    def version(self) -> PolicyVersion:
        """Step and digest of the weights."""
        return self._version

    @property
    def catalog(self) -> Catalog:
        """Items that the policy can recommend, with their codes and titles."""
        return self._tokenizer.catalog

    def recommend(
        self,
        history: Sequence[int],
        k: int = 10,
        *,
        exclude_seen: bool | None = None,
        exclude: Sequence[int] = (),
        width: int | None = None,
        guided: bool | None = None,
        context: GivenContext | None = None,
    ) -> list[Item]:
        """Return the best `k` items after a history, best first.

        With the guide of the policy's folder, items are ranked by their score plus its reward.

        Args:
            history: item ids, oldest first; items that the catalog lacks are passed over.
            k: items to return; fewer come back where no more may be shown.
            exclude_seen: leave out the items of the history; by default as the guide says, and
                not without one.
            exclude: further item ids to leave out.
            width: beam width; by default twice `k`, at least 50.
            guided: search with the guide; by default where there is one.
            context: context that the policy was trained with, by column: a value for each item of
                the history, or one value; what is left out is unknown.

        Raises:
            ConfigError: `k` or `width` is below 1, or the policy has no guide to search with.
            DataError: the policy does not read such context, or it does not fit the history.
        """
        guide = None if guided is False else self._guide
        if guided and guide is None:
            raise ConfigError(
                "the policy has no guide to search with; run `orchard fit guide`, or leave out "
                "guided = True"
            )
        if exclude_seen is None:
            exclude_seen = self._guide is not None and self._guide.exclude_seen
        if k < 1 or (width is not None and width < 1):
            raise ConfigError(f"k = {k} and width = {width} must be at least 1")
        left_out = [*exclude, *(history if exclude_seen else ())]
        query = Query(
            history=np.array(history, np.int64), k=k, exclude=np.array(left_out, np.int64),
            per_prefix=None, seed=0, levels=False, context=context,
        )  # fmt: skip
        key = BatchKey(
            decoder="beam" if guide is None else "guided", prove=k,
            width=width or max(50, 2 * k), filters=(),
        )  # fmt: skip
        (ranked,), _ = recommend(
            self._engine, self._store.current, [query], key,
            max_history=self._max_history, guide=guide,
        )  # fmt: skip
        return ranked.items

    def score(
        self, history: Sequence[int], items: Sequence[int], *, context: GivenContext | None = None
    ) -> Float64[np.ndarray, " C"]:
        """Return the log-probability of each item's code sequence after a history.

        Items that share a sequence share its score. `context` is as in `recommend`.

        Raises:
            DataError: the catalog lacks one of the items, or the policy does not read such context.
        """
        leaf = self.catalog.leaf_of_item[self.catalog.rows(np.array(items, np.int64))]
        prompts = self._prompts([history], [context])
        start = np.array([0, len(leaf)])
        scored = score_leaves(self._engine, prompts, leaf=leaf, start=start)
        return scored.logprob.sum(1, dtype=np.float64)

    def search_trees(
        self,
        histories: Sequence[Sequence[int]],
        *,
        width: int = 16,
        contexts: Sequence[GivenContext | None] | None = None,
    ) -> SearchTrees:
        """Return the tree of an exact beam search for each history, with every log-probability.

        `SearchTrees.leaf` holds catalog leaves; `catalog.item_of_leaf` leads from them to items.
        `contexts` are the contexts of the histories, as in `recommend`.
        """
        prompts = self._prompts(histories, contexts)
        candidates = beam(self._engine, prompts, width=width)
        return build_search_trees(prompts, candidates, self._tokenizer, self.version)

    def _prompts(
        self,
        histories: Sequence[Sequence[int]],
        contexts: Sequence[GivenContext | None] | None = None,
    ) -> Prompts:
        """Histories as the policy reads them, items that the catalog lacks passed over."""
        prompts, _ = history_prompts(
            self._tokenizer, histories, max_history=self._max_history, contexts=contexts
        )
        return prompts


def load(
    folder: str | Path, *, device: str = "cpu", dtype: Literal["float32", "bfloat16"] = "float32"
) -> LocalPolicy:
    """Open a policy folder, verified by its digest, in this process.

    Args:
        folder: a folder that a run or `orchard export` wrote.
        device: torch's name of a device, such as `cuda`.
        dtype: precision of the search.

    Raises:
        DataError: the folder holds no policy.
        CheckpointError: the weights are damaged, or belong to another catalog.
    """
    return LocalPolicy(Policy.open(Path(folder)), device=device, dtype=dtype)

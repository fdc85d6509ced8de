r"""Search below a prefix of the target: `rollout.hints`.

A group without a spread of rewards teaches nothing. HCGRec (arXiv 2608.11980) gives the search of
such a prompt x with the target z the shortest prefix at which its group has one,

    h*(x) = min { h : Var_group[ R | x, z_1..h ] > 0 },

and trains on the codes below it. Here the search is restricted to the leaves below the prefix, so
any search that takes an item filter does it. The hinted codes are marked as forced: they have
log-probability 0 and no part in the policy loss. `learner.hint_weight` can learn them by cross
entropy. `cluster.training.rollout_stream` goes from one depth to the next.

Shapes:  B prompts   C candidates
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from orchard import ragged
from orchard.catalog.trie import Trie
from orchard.catalog.view import CatalogView
from orchard.errors import ConfigError, EngineError
from orchard.settings import RolloutConfig
from orchard.types import Prompts, SearchTrees
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.item_filter import ItemFilter


def check_hints(config: RolloutConfig, trie: Trie) -> None:
    """Raise ConfigError if a hint could hold all codes of an item of the catalog."""
    early = trie.early_leaf[:1]
    shortest = int(trie.depth_of(early)) if len(early) else trie.depth
    if config.hints >= shortest:
        raise ConfigError(
            f"rollout.hints = {config.hints} would give the search all codes of items that have "
            f"{shortest}; set rollout.hints to at most {shortest - 1}",
            code="config.hints_too_deep",
        )


def search_below_hint(
    engine: DecodingBackend,
    prompts: Prompts,
    *,
    search_fn: Callable[..., Candidates],
    view: CatalogView,
    codes: int,
) -> Candidates:
    """Run `search_fn` for the leaves that share the first `codes` codes of each prompt's target.

    Scores and log-probabilities are those of the codes after the hint.

    Args:
        engine: backend with the policy.
        prompts: batch of prompts.
        search_fn: search that takes an `ItemFilter` as `allowed`.
        view: leaves that may be found otherwise.
        codes: number of codes in the hint.

    Raises:
        EngineError: a target has no code after the hint, or `search_fn` raises it.
    """
    trie = engine.trie
    leaf = torch.from_numpy(engine.tokenizer.catalog.leaf_of_item[prompts.target])
    path = trie.path(trie.node_of(leaf.to(trie.code.device)))
    length = (path >= 0).sum(1)
    if bool((length <= codes).any()):
        raise EngineError(
            f"a hint of {codes} codes leaves nothing to search for a target of "
            f"{int(length.min())} codes; lower rollout.hints"
        )
    allowed = ItemFilter(
        view=view,
        excluded=np.zeros(0, np.int64),
        excluded_start=np.zeros(len(prompts) + 1, np.int64),
        prefix=path[:, codes - 1].cpu().numpy(),
    )
    candidates = search_fn(engine, prompts, allowed=allowed)
    logprob = candidates.logprob.copy()
    logprob[:, :codes] = 0
    return replace(candidates, logprob=logprob, score=logprob.sum(1))


def mark_hint(trees: SearchTrees, codes: int) -> SearchTrees:
    """Mark the first `codes` codes of every candidate as given; none where `codes` is 0."""
    given = trees.step[ragged.row_of(trees.token_start)] <= codes
    hinted = np.full(len(trees), codes, np.int64)
    return replace(trees, forced=trees.forced | given, hinted=hinted)

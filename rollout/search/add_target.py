"""Add the target to groups of candidates that missed it: `rollout.add_target`.

Without its target, all rewards of a group are equal under an exact match, so that the group has no
advantage signal. With this setting, the target replaces the worst candidate of such a group. Its
log-probability is the policy's own, from extra forward passes along its path. ReRe's `add_gt`
(arXiv 2510.12211) replaces the last candidate even of a group that already contains the target.

Shapes:  B prompts   D longest sequence   F prompts whose path has not ended
"""

import numpy as np
import torch
from jaxtyping import Int64

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import ROOT
from orchard.types import Cost, Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend, SearchFn
from rollout.search.beam import check_finite, collect, spans


def search_with_target(
    engine: DecodingBackend,
    prompts: Prompts,
    *,
    search_fn: SearchFn,
    catalog: Catalog,
) -> Candidates:
    """Run `search_fn`, and replace the last candidate of each prompt whose target it missed.

    Groups keep their size and stay sorted by score. The cost counts the targets `added`.

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    candidates = search_fn(engine, prompts)
    target = catalog.leaf_of_item[prompts.target]
    prompt_of = ragged.row_of(candidates.start)
    has_target = (
        np.bincount(prompt_of[candidates.leaf == target[prompt_of]], minlength=len(prompts)) > 0
    )
    missed = np.flatnonzero(~has_target)
    if len(missed) == 0:
        return candidates
    added = score_leaf(engine, prompts.select(missed), target[missed])
    count = np.diff(candidates.start)
    # All candidates but the last one of each prompt without its target.
    stays = has_target[prompt_of] | (ragged.index_in_row(candidates.start) < count[prompt_of] - 1)
    # Remaining candidates, followed by the added targets.
    prompt = np.concatenate([prompt_of[stays], missed])
    score = np.concatenate([candidates.score[stays], added.score])
    # Stable: candidates of equal score keep the order of their search.
    order = np.lexsort((-score, prompt))
    value = None
    if candidates.value is not None:
        unknown = np.full(added.logprob.shape, np.nan, np.float32)
        value = np.concatenate([candidates.value[stays], unknown])[order]
    return Candidates(
        start=ragged.starts(np.bincount(prompt, minlength=len(prompts))),
        node=np.concatenate([candidates.node[stays], added.node])[order],
        logprob=np.concatenate([candidates.logprob[stays], added.logprob])[order],
        score=score[order],
        leaf=np.concatenate([candidates.leaf[stays], added.leaf])[order],
        cost=candidates.cost + added.cost + Cost(counts={"added": len(missed)}),
        value=value,
    )


def score_leaf(
    engine: DecodingBackend, prompts: Prompts, leaf: Int64[np.ndarray, " B"]
) -> Candidates:
    """Score one leaf per prompt and return it in the form of a search result.

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    trie, num_prompts = engine.trie, len(prompts)
    end = trie.node_of(torch.from_numpy(leaf).to(trie.code.device))
    path = trie.path(end)
    expansion = check_finite(engine, engine.prefill(prompts))
    cost = Cost(prefill_tokens=len(prompts.token), passes=1)
    # Prompts whose path has not ended, and the trie node that each has reached.
    live = torch.arange(num_prompts, device=path.device)
    node = torch.full_like(live, ROOT)
    logprob = torch.zeros(path.shape, device=path.device)
    while True:
        child = path[live, trie.depth_of(node)]
        # Siblings have consecutive numbers, in the trie as among the expansion's children.
        child_index = expansion.children.start[:-1] + child - trie.first_child(node)
        logprob[live, trie.depth_of(node)] = expansion.logprob[child_index]
        below = trie.descend(child)
        goes_on = (trie.num_children(below) > 0).nonzero().squeeze(1)
        if len(goes_on) == 0:
            break
        token, start = spans(engine, node[goes_on], below[goes_on])
        state, live, node = expansion.state[goes_on], live[goes_on], below[goes_on]
        expansion = check_finite(engine, engine.extend(state, token, start, node))
        cost += Cost(forward_tokens=len(token), passes=1)
    prompt = torch.arange(num_prompts, device=path.device)
    return collect(trie, prompt, end, logprob, logprob.sum(1), num_prompts, cost)

"""Groups that hold their target whatever the search finds: `rollout.add_target`.

A group without its target has rewards that are all alike under an exact match, and teaches nothing.
With the switch on, the target takes the place of the worst candidate of a group that missed it. Its
log-probability is the policy's own, by a forward pass of its own along its path. ReRe's `add_gt`
(arXiv 2510.12211) replaces the last candidate even of a group that holds the target already.

Shapes:  B prompts   D longest sequence   F prompts still on their way
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int64

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.catalog.trie import ROOT
from orchard.types import Cost, Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.search.beam import check_finite, collect, spans


def inject_target(
    engine: DecodingBackend,
    prompts: Prompts,
    *,
    find: Callable[[DecodingBackend, Prompts], Candidates],
    catalog: Catalog,
) -> Candidates:
    """What `find` finds, but where it missed a prompt's target, that instead of the last candidate.

    Groups keep their size and the order of their scores. The cost counts the targets `added`.

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    found = find(engine, prompts)
    target = catalog.leaf_of_item[prompts.target]
    owner = ragged.owners(found.start)
    held = np.bincount(owner[found.leaf == target[owner]], minlength=len(prompts)) > 0
    missed = np.flatnonzero(~held)
    if len(missed) == 0:
        return found
    added = score_leaf(engine, prompts.select(missed), target[missed])
    count = np.diff(found.start)
    stays = held[owner] | (ragged.places(found.start) < count[owner] - 1)
    prompt = np.concatenate([owner[stays], missed])
    score = np.concatenate([found.score[stays], added.score])
    # Stable: candidates of one score keep the order that their search gave them.
    order = np.lexsort((-score, prompt))
    value = None
    if found.value is not None:
        unknown = np.full(added.logprob.shape, np.nan, np.float32)
        value = np.concatenate([found.value[stays], unknown])[order]
    return Candidates(
        start=ragged.starts(np.bincount(prompt, minlength=len(prompts))),
        node=np.concatenate([found.node[stays], added.node])[order],
        logprob=np.concatenate([found.logprob[stays], added.logprob])[order],
        score=score[order],
        leaf=np.concatenate([found.leaf[stays], added.leaf])[order],
        cost=found.cost + added.cost + Cost(counts={"added": len(missed)}),
        value=value,
    )


def score_leaf(
    engine: DecodingBackend, prompts: Prompts, leaf: Int64[np.ndarray, " B"]
) -> Candidates:
    """One given leaf per prompt, as a search would have found it.

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    trie, num_prompts = engine.trie, len(prompts)
    end = trie.node_of(torch.from_numpy(leaf).to(trie.code.device))
    path = trie.path(end)
    expansion = check_finite(engine, engine.prefill(prompts))
    cost = Cost(prefill_tokens=len(prompts.token), passes=1)
    live = torch.arange(num_prompts, device=path.device)
    here = torch.full_like(live, ROOT)
    logprob = torch.zeros(path.shape, device=path.device)
    while True:
        child = path[live, trie.depth_of(here)]
        place = expansion.children.start[:-1] + child - trie.first_child(here)
        logprob[live, trie.depth_of(here)] = expansion.logprob[place]
        below = trie.descend(child)
        on = (trie.num_children(below) > 0).nonzero().squeeze(1)
        if len(on) == 0:
            break
        token, start = spans(engine, here[on], below[on])
        state, live, here = expansion.state[on], live[on], below[on]
        expansion = check_finite(engine, engine.extend(state, token, start, here))
        cost += Cost(forward_tokens=len(token), passes=1)
    owner = torch.arange(num_prompts, device=path.device)
    return collect(trie, owner, end, logprob, logprob.sum(1), num_prompts, cost)

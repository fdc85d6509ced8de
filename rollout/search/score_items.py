"""Score items under a policy: the log-probability of each of their codes.

Shapes:  B prompts (B1 = B + 1)   C items of all prompts   D longest sequence   A legal first codes
"""

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from orchard import ragged
from orchard.catalog.trie import ROOT
from orchard.types import Cost, Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend
from rollout.search.beam import check_finite, spans


def score_items(
    engine: DecodingBackend, prompts: Prompts, leaf: Int64[np.ndarray, " B"]
) -> tuple[Float32[np.ndarray, "B D"], Float32[np.ndarray, "B A"]]:
    """Return log-probabilities of the codes of one leaf per prompt, and of all legal first codes.

    Forced codes and entries past the end have log-probability 0, as in a search.

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    start = np.arange(len(prompts) + 1)
    _, logprob, first, _ = _score(engine, prompts, leaf, start)
    return logprob.cpu().numpy(), first.view(len(prompts), -1).cpu().numpy()


def score_leaves(
    engine: DecodingBackend,
    prompts: Prompts,
    *,
    leaf: Int64[np.ndarray, " C"],
    start: Int64[np.ndarray, " B1"],
) -> Candidates:
    """Score given leaves of each prompt in one tree, as a search that found just them would.

    Prefixes that leaves have in common are forwarded once. The candidates are in the given order.

    Args:
        engine: backend with the policy.
        prompts: batch of prompts.
        leaf: leaves of all prompts; those of a prompt may repeat.
        start: the leaves of prompt b are `start[b] : start[b + 1]`.

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    path, logprob, _, cost = _score(engine, prompts, leaf, start)
    return Candidates(
        start=start,
        node=path.cpu().numpy(),
        logprob=logprob.cpu().numpy(),
        score=logprob.sum(1).cpu().numpy(),
        leaf=leaf,
        cost=cost,
    )


def _score(
    engine: DecodingBackend,
    prompts: Prompts,
    leaf: Int64[np.ndarray, " C"],
    start: Int64[np.ndarray, " B1"],
) -> tuple[Int64[Tensor, "C D"], Float32[Tensor, "C D"], Float32[Tensor, " M"], Cost]:
    """Return paths and log-probabilities of leaves, those of the first codes, and the cost."""
    trie = engine.trie
    expansion = check_finite(engine, engine.prefill(prompts))
    first = expansion.logprob
    path = trie.path(trie.node_of(torch.from_numpy(leaf).to(trie.code.device)))
    prompt = torch.from_numpy(ragged.row_of(start)).to(path.device)
    # [C, D]: parent of each node on the path, its number of children, and whether it is a choice.
    above = torch.cat([torch.full_like(path[:, :1], ROOT), path[:, :-1]], 1)
    fanout = trie.num_children(above.clamp(min=0).reshape(-1)).view(above.shape)
    choice = (path >= 0) & (fanout > 1)
    logprob = torch.zeros(path.shape, device=path.device)
    # Trie node of each leaf's engine state: forced codes after it have not been forwarded yet.
    forwarded, state = above[:, 0], expansion.state[prompt]
    tokens, passes = 0, 1
    for level in range(path.shape[1]):
        rows = choice[:, level].nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        before, node = above[rows, level], path[rows, level]
        query = prompt[rows]  # of each leaf in the expansion: at level 0 it has all prompts
        if level:
            # Leaves of a prompt with the same prefix share one query; any of them stands for all.
            distinct, query = torch.unique(query * trie.num_nodes + before, return_inverse=True)
            one = torch.empty_like(distinct).index_copy(0, query, rows)
            queried = above[one, level]
            token, span_start = spans(engine, forwarded[one], queried)
            expansion = check_finite(engine, engine.extend(state[one], token, span_start, queried))
            state = state.index_copy(0, rows, expansion.state[query])
            forwarded = forwarded.index_copy(0, rows, before)
            tokens, passes = tokens + len(token), passes + 1
        child_index = expansion.children.start[query] + node - trie.first_child(before)
        logprob[rows, level] = expansion.logprob[child_index]
    cost = Cost(prefill_tokens=len(prompts.token), forward_tokens=tokens, passes=passes)
    return path, logprob, first, cost

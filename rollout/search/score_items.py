"""Score items under a policy: the log-probability of each of their codes.

Shapes:  B prompts   D longest sequence   A legal first codes
"""

import numpy as np
import torch
from jaxtyping import Float32, Int64

from orchard.catalog.trie import ROOT
from orchard.types import Prompts
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
    trie = engine.trie
    expansion = check_finite(engine, engine.prefill(prompts))
    path = trie.path(trie.node_of(torch.from_numpy(leaf).to(trie.code.device)))
    # [B, D]: parent of each node on the path, its number of children, and whether it is a choice.
    above = torch.cat([torch.full_like(path[:, :1], ROOT), path[:, :-1]], 1)
    fanout = trie.num_children(above.clamp(min=0).reshape(-1)).view(above.shape)
    choice = (path >= 0) & (fanout > 1)
    logprob = torch.zeros(path.shape, device=path.device)
    first = expansion.logprob.view(len(prompts), -1)
    # Trie node of each prompt's engine state: forced codes after it have not been forwarded yet.
    forwarded, state = above[:, 0], expansion.state
    for level in range(path.shape[1]):
        rows = choice[:, level].nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        before, node = above[rows, level], path[rows, level]
        node_index = rows  # of each row in the expansion: at level 0 it has all prompts
        if level:
            token, start = spans(engine, forwarded[rows], before)
            expansion = check_finite(engine, engine.extend(state[rows], token, start, before))
            state = state.index_copy(0, rows, expansion.state)
            forwarded = forwarded.index_copy(0, rows, before)
            node_index = torch.arange(len(rows), device=path.device)
        child_index = expansion.children.start[node_index] + node - trie.first_child(before)
        logprob[rows, level] = expansion.logprob[child_index]
    return logprob.cpu().numpy(), first.cpu().numpy()

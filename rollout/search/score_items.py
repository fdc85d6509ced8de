"""Given items under a policy: the log-probability of each of their codes.

Shapes:  B prompts   D longest sequence   A codes that an item may begin with
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
    """Log-probability of every code of one leaf per prompt, and of every first code.

    Forced codes and what lies past the end have log-probability 0, as in a search.

    Raises:
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    trie = engine.trie
    expansion = check_finite(engine, engine.prefill(prompts))
    path = trie.path(trie.node_of(torch.from_numpy(leaf).to(trie.code.device)))
    above = torch.cat([torch.full_like(path[:, :1], ROOT), path[:, :-1]], 1)
    fanout = trie.num_children(above.clamp(min=0).reshape(-1)).view(above.shape)
    choice = (path >= 0) & (fanout > 1)
    logprob = torch.zeros(path.shape, device=path.device)
    first = expansion.logprob.view(len(prompts), -1)
    read, state = above[:, 0], expansion.state
    for level in range(path.shape[1]):
        rows = choice[:, level].nonzero().squeeze(1)
        if len(rows) == 0:
            continue
        before, node = above[rows, level], path[rows, level]
        at = rows
        if level:
            token, start = spans(engine, read[rows], before)
            expansion = check_finite(engine, engine.extend(state[rows], token, start, before))
            state = state.index_copy(0, rows, expansion.state)
            read = read.index_copy(0, rows, before)
            at = torch.arange(len(rows), device=path.device)
        place = expansion.children.start[at] + node - trie.first_child(before)
        logprob[rows, level] = expansion.logprob[place]
    return logprob.cpu().numpy(), first.cpu().numpy()

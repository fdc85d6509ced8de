"""Draw independent leaves under the trie: what a policy says when it is sampled.

Shapes:  B prompts   F draws or frontier nodes of all prompts   M legal children of them
         D longest sequence
"""

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from orchard.catalog.trie import ROOT, Children
from orchard.types import Cost, Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend, NextCodeLogprobs
from rollout.item_filter import ItemFilter, PrefixMask, make_prefix_mask
from rollout.search.beam import check_finite, collect, spans
from rollout.search.topk import sort_by_score


def sample(
    engine: DecodingBackend,
    prompts: Prompts,
    *,
    count: int,
    temperature: float,
    seed: int,
    allowed: ItemFilter | None = None,
) -> Candidates:
    """Draw `count` independent leaves per prompt; draws with a common prefix share forward passes.

    Each code is drawn from the policy's distribution to the power `1 / temperature`, renormalized;
    log-probabilities and scores are those of the policy itself. The draws of a prompt depend only
    on `seed` and its id, not on its batch; a larger `count` adds draws and keeps the others.

    With `allowed`, codes are drawn among prefixes of allowed leaves; a prompt without any allowed
    leaf gets no draws.

    Raises:
        CatalogError: `allowed` belongs to another catalog or another batch.
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    trie, num_prompts = engine.trie, len(prompts)
    mask = make_prefix_mask(trie, allowed, num_prompts) if allowed else None
    expansion = check_finite(engine, engine.prefill(prompts))
    cost = Cost(prefill_tokens=len(prompts.token), passes=1)
    root = torch.arange(num_prompts, device=trie.code.device)
    if mask is not None:
        root = root[mask.allows(root, torch.full_like(root, ROOT))]
    uniform = uniforms(prompts.id[root.cpu().numpy()], count, trie.depth, seed).to(root.device)
    # Prompt of each draw, and of each frontier node.
    prompt, frontier_prompt = root.repeat_interleave(count), torch.arange(num_prompts).to(root)
    node = torch.full_like(prompt, ROOT)
    logprob = torch.zeros(len(prompt), trie.depth, device=prompt.device)
    # Draws that are not at a leaf, and the frontier node of each.
    live, frontier_of = torch.arange(len(prompt), device=prompt.device), prompt
    for step in range(trie.depth):
        admitted = _admitted(mask, frontier_prompt, expansion)
        pick = draw(
            expansion.logprob,
            expansion.children,
            admitted,
            frontier_of,
            uniform[live, step],
            temperature,
        )
        child = expansion.children.node[pick]
        logprob[live, trie.depth_of(child) - 1] = expansion.logprob[pick]
        above, below = node[live], trie.descend(child)
        node[live] = below
        goes_on = trie.num_children(below) > 0
        live, frontier_of = live[goes_on], frontier_of[goes_on]
        above, below = above[goes_on], below[goes_on]
        if len(live) == 0:
            break
        # The new frontier: distinct (prompt, node) pairs, and the pair of each live draw.
        distinct, pair_of = torch.unique(prompt[live] * trie.num_nodes + below, return_inverse=True)
        # All draws with the same prefix share one engine state; use any one of them.
        shared = torch.empty_like(distinct).index_copy(
            0, pair_of, torch.arange(len(pair_of)).to(pair_of)
        )
        token, start = spans(engine, above[shared], below[shared])
        before = expansion.state[frontier_of[shared]]
        expansion = check_finite(engine, engine.extend(before, token, start, below[shared]))
        frontier_of, frontier_prompt = pair_of, distinct // trie.num_nodes
        cost += Cost(forward_tokens=len(token), passes=1)
    score = logprob.sum(1)
    order = sort_by_score(prompt, score, node)
    return collect(
        trie, prompt[order], node[order], logprob[order], score[order], num_prompts, cost
    )


def uniforms(
    prompt_id: Int64[np.ndarray, " B"], count: int, depth: int, seed: int
) -> Float64[Tensor, "F D"]:
    """Draw numbers in [0, 1) for each draw and decision, which depend only on (seed, prompt id)."""
    draws = [
        np.random.Generator(np.random.Philox(key=[seed, int(id_)])).random((count, depth))
        for id_ in prompt_id
    ]
    return torch.from_numpy(np.concatenate([np.zeros((0, depth)), *draws]))


def _admitted(
    mask: PrefixMask | None, prompt: Int64[Tensor, " F"], expansion: NextCodeLogprobs
) -> Bool[Tensor, " M"]:
    """Return whether the mask allows each legal child for the prompt of its frontier node."""
    children = expansion.children
    if mask is None:
        return torch.ones_like(children.node, dtype=torch.bool)
    return mask.allows(prompt[children.owner], children.node)


def draw(
    logprob: Float32[Tensor, " M"],
    children: Children,
    admitted: Bool[Tensor, " M"],
    frontier_of: Int64[Tensor, " F"],
    uniform: Float64[Tensor, " F"],
    temperature: float,
) -> Int64[Tensor, " F"]:
    """Draw a child of frontier node `frontier_of[f]` for each draw f, by inverting its CDF.

    Only `admitted` children are drawn, in proportion to their tempered probability. Returns the
    index of each drawn child in `children`.
    """
    owner, start = children.owner, children.start
    least = 1e-200  # a log-probability divided by a smaller number would overflow
    scaled = (logprob.double() / max(temperature, least)).masked_fill(~admitted, float("-inf"))
    peak = scaled.new_full((len(start) - 1,), float("-inf"))
    peak = peak.scatter_reduce(0, owner, scaled, "amax")
    # Unnormalized probabilities, and one CDF over the children of all nodes.
    weight = (scaled - peak[owner]).exp().masked_fill(~admitted, 0.0)
    edge = torch.cat([weight.new_zeros(1), weight.cumsum(0)])
    # Interval of the CDF that belongs to the node of each draw.
    low, high = edge[start[:-1]][frontier_of], edge[start[1:]][frontier_of]
    pick = torch.searchsorted(edge, low + uniform * (high - low), right=True) - 1
    # Rounding may move a number just below 1 past the last admitted child of its node.
    child_index = torch.arange(len(owner), device=owner.device).masked_fill(~admitted, -1)
    last = torch.full_like(start[1:], -1).scatter_reduce(0, owner, child_index, "amax")
    return pick.minimum(last[frontier_of])

"""Search under the trie for many prompts at once, with any engine.

The policy is the softmax over the legal children of a trie node. Codes without an alternative have
log-probability 0 and need no forward pass of their own: inside a sequence they travel with the next
code that is a choice, at its end they are not computed at all.

Shapes:  B prompts   F beams or draws of all prompts   M legal children of them   C candidates
         D longest sequence   S tokens of all spans   F1 = F + 1
"""

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from orchard import ragged
from orchard.catalog.trie import ROOT, Children, Trie
from orchard.errors import EngineError
from orchard.types import Cost, Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend, NextCodeLogprobs
from rollout.item_filter import ItemFilter, PrefixMask, make_prefix_mask
from rollout.search.gumbel import GumbelNoise
from rollout.search.topk import sort_by_score, starts_of_mask, top_k


def beam(
    engine: DecodingBackend,
    prompts: Prompts,
    *,
    width: int,
    noise: GumbelNoise | None = None,
    allowed: ItemFilter | None = None,
) -> Candidates:
    """Exact beam search: at each depth, the `width` best prefixes of each prompt survive.

    Leaves already reached keep competing with their score. Equal scores are ordered by trie node.
    Only prefixes that survive and have a choice to make are forwarded. A prompt gets fewer
    candidates where the catalog has fewer leaves, and never the same one twice. With `noise` the
    prefixes that survive, and the order of the candidates, are the noise's choice instead.

    With `allowed`, prefixes compete only if they lead to a leaf that the prompt may find: it gets
    as many candidates as there are such leaves, up to `width`, and none where there are none.

    Raises:
        CatalogError: `allowed` belongs to another catalog or another batch.
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    trie, num_prompts = engine.trie, len(prompts)
    entry = make_prefix_mask(trie, allowed, num_prompts) if allowed else None
    expansion = check_finite(engine, engine.prefill(prompts))
    tokens, passes = 0, 1
    # The beams of prompt b are `start[b] : start[b + 1]`.
    start = torch.arange(num_prompts + 1, device=trie.code.device)
    prompt = start[:-1]
    node = torch.full_like(prompt, ROOT)
    # The trie node that the engine has read up to: forced codes after it have yet to be sent.
    read, state = node, expansion.state
    score = torch.zeros(num_prompts, device=prompt.device)
    logprob = torch.zeros(num_prompts, trie.depth, device=prompt.device)
    fanout, scored = trie.num_children(node), torch.ones_like(prompt, dtype=torch.bool)
    for level in range(trie.depth):
        source, child, gain, first = _next(trie, node, fanout, scored, expansion)
        start = first[start]  # of the children, from here on
        if entry is not None:
            may = entry.allows(prompt[source], child)
            source, child, gain = source[may], child[may], gain[may]
            start = starts_of_mask(may)[start]
        if noise is None:
            key = score.index_select(0, source) + gain
            kept = top_k(start, key, child, width)
        else:
            key = noise.keys(prompt[source], source, child, gain)
            kept = top_k(start, key, child, width)
            noise.keep(kept)
        start = starts_of_mask(start.diff().clamp(max=width))
        source, node, gain = source[kept], child[kept], gain[kept]
        prompt, score = prompt[source], score[source] + gain
        read, state, logprob = read[source], state[source], logprob[source]
        logprob[:, level] = gain  # 0 where a beam has come to its leaf
        if level + 1 == trie.depth:
            break
        fanout = trie.num_children(node)
        scored = fanout > 1
        ask = scored.nonzero().squeeze(1)
        expansion = None
        if len(ask):
            token, edge = spans(engine, read[ask], node[ask])
            expansion = check_finite(engine, engine.extend(state[ask], token, edge, node[ask]))
            read = torch.where(scored, node, read)
            state = state.index_copy(0, ask, expansion.state)
            tokens, passes = tokens + len(token), passes + 1
    cost = Cost(prefill_tokens=len(prompts.token), forward_tokens=tokens, passes=passes)
    return collect(trie, prompt, node, logprob, score, num_prompts, cost)


def sample(
    engine: DecodingBackend,
    prompts: Prompts,
    *,
    count: int,
    temperature: float,
    seed: int,
    allowed: ItemFilter | None = None,
) -> Candidates:
    """`count` independent draws per prompt; draws that share a prefix share its forward pass.

    Each code is drawn from the policy's distribution to the power `1 / temperature`, renormalised;
    log-probabilities and scores are those of the policy itself. The draws of a prompt depend on
    `seed` and on its id alone: not on its batch, nor on `count` (more draws extend fewer).

    With `allowed`, a code is drawn among those that lead to a leaf that the prompt may find; a
    prompt that may find none gets no draws.

    Raises:
        CatalogError: `allowed` belongs to another catalog or another batch.
        EngineError: a prompt does not fit the engine, or the policy has diverged.
    """
    trie, num_prompts = engine.trie, len(prompts)
    entry = make_prefix_mask(trie, allowed, num_prompts) if allowed else None
    expansion = check_finite(engine, engine.prefill(prompts))
    cost = Cost(prefill_tokens=len(prompts.token), passes=1)
    root = torch.arange(num_prompts, device=trie.code.device)
    if entry is not None:
        root = root[entry.allows(root, torch.full_like(root, ROOT))]
    uniform = uniforms(prompts.id[root.cpu().numpy()], count, trie.depth, seed).to(root.device)
    prompt, frontier = root.repeat_interleave(count), torch.arange(num_prompts).to(root)
    node = torch.full_like(prompt, ROOT)
    logprob = torch.zeros(len(prompt), trie.depth, device=prompt.device)
    live, at = torch.arange(len(prompt), device=prompt.device), prompt
    for step in range(trie.depth):
        may = _admitted(entry, frontier, expansion)
        pick = draw(
            expansion.logprob, expansion.children, may, at, uniform[live, step], temperature
        )
        child = expansion.children.node[pick]
        logprob[live, trie.depth_of(child) - 1] = expansion.logprob[pick]
        above, below = node[live], trie.descend(child)
        node[live] = below
        goes_on = trie.num_children(below) > 0
        live, at, above, below = live[goes_on], at[goes_on], above[goes_on], below[goes_on]
        if len(live) == 0:
            break
        distinct, owner = torch.unique(prompt[live] * trie.num_nodes + below, return_inverse=True)
        # Draws of one prefix agree in everything that follows, so any of them speaks for all.
        voice = torch.empty_like(distinct).index_copy(0, owner, torch.arange(len(owner)).to(owner))
        token, start = spans(engine, above[voice], below[voice])
        before = expansion.state[at[voice]]
        expansion = check_finite(engine, engine.extend(before, token, start, below[voice]))
        at, frontier = owner, distinct // trie.num_nodes
        cost += Cost(forward_tokens=len(token), passes=1)
    score = logprob.sum(1)
    by = sort_by_score(prompt, score, node)
    return collect(trie, prompt[by], node[by], logprob[by], score[by], num_prompts, cost)


def check_finite(engine: DecodingBackend, expansion: NextCodeLogprobs) -> NextCodeLogprobs:
    """The expansion itself; raises EngineError where it holds no numbers to choose by."""
    if not bool(expansion.logprob.sum().isfinite()):
        raise EngineError(
            f"policy {engine.version} gives log-probabilities that are not finite; its training "
            "has diverged: go back to an earlier checkpoint and lower learner.lr"
        )
    return expansion


def _next(
    trie: Trie,
    node: Int64[Tensor, " F"],
    fanout: Int64[Tensor, " F"],
    scored: Bool[Tensor, " F"],
    expansion: NextCodeLogprobs | None,
) -> tuple[Int64[Tensor, " M"], Int64[Tensor, " M"], Float32[Tensor, " M"], Int64[Tensor, " F1"]]:
    """What may follow each beam: the beam's index, the trie node, what that adds to the score.

    Last comes where each beam's own begin. The beams that are `scored` have the expansion's
    children. Of the others, those at a leaf stay where they are, and the rest follow their only
    child.
    """
    if expansion is not None and bool(scored.all()):
        children = expansion.children
        return children.owner, children.node, expansion.logprob, children.start
    below = torch.where(fanout > 0, trie.first_child(node), node)
    first = starts_of_mask(fanout.clamp(min=1))
    source = torch.repeat_interleave(first.diff())
    child = torch.arange(len(source), device=node.device) + (below - first[:-1])[source]
    gain = torch.zeros_like(source, dtype=torch.float32)
    if expansion is not None:
        gain[scored[source]] = expansion.logprob
    return source, child, gain, first


def spans(
    engine: DecodingBackend, above: Int64[Tensor, " F"], node: Int64[Tensor, " F"]
) -> tuple[Int64[Tensor, " S"], Int64[Tensor, " F1"]]:
    """Tokens of the codes that lead from `above` down to `node`."""
    trie = engine.trie
    top = trie.depth_of(above)
    start = starts_of_mask(count := trie.depth_of(node) - top)
    if int(start[-1]) == len(node):  # one code each
        return engine.tokenizer.token_of(node), start
    owner = torch.arange(len(node), device=node.device).repeat_interleave(count)
    level = torch.arange(len(owner), device=node.device) + (top - start[:-1])[owner]
    return engine.tokenizer.token_of(trie.path(node)[owner, level]), start


def uniforms(
    prompt_id: Int64[np.ndarray, " B"], count: int, depth: int, seed: int
) -> Float64[Tensor, "F D"]:
    """Numbers in [0, 1) for each draw and decision, from (seed, prompt id) and nothing else."""
    draws = [
        np.random.Generator(np.random.Philox(key=[seed, int(one)])).random((count, depth))
        for one in prompt_id
    ]
    return torch.from_numpy(np.concatenate([np.zeros((0, depth)), *draws]))


def _admitted(
    entry: PrefixMask | None, prompt: Int64[Tensor, " F"], expansion: NextCodeLogprobs
) -> Bool[Tensor, " M"]:
    """Which legal children may be entered by the prompts of the frontier's nodes."""
    children = expansion.children
    if entry is None:
        return torch.ones_like(children.node, dtype=torch.bool)
    return entry.allows(prompt[children.owner], children.node)


def draw(
    logprob: Float32[Tensor, " M"],
    children: Children,
    may: Bool[Tensor, " M"],
    at: Int64[Tensor, " F"],
    uniform: Float64[Tensor, " F"],
    temperature: float,
) -> Int64[Tensor, " F"]:
    """For each draw the child chosen at node `at[f]` of the frontier, by inverting its CDF.

    Only children that `may` be entered are drawn, in proportion to their probability.
    """
    owner, start = children.owner, children.start
    scaled = (logprob.double() / temperature).masked_fill(~may, float("-inf"))
    peak = scaled.new_full((len(start) - 1,), float("-inf"))
    peak = peak.scatter_reduce(0, owner, scaled, "amax")
    weight = (scaled - peak[owner]).exp().masked_fill(~may, 0.0)
    edge = torch.cat([weight.new_zeros(1), weight.cumsum(0)])
    low, high = edge[start[:-1]][at], edge[start[1:]][at]
    pick = torch.searchsorted(edge, low + uniform * (high - low), right=True) - 1
    # Rounding may carry a number just below 1 past the last child that may be drawn.
    place = torch.arange(len(owner), device=owner.device).masked_fill(~may, -1)
    last = torch.full_like(start[1:], -1).scatter_reduce(0, owner, place, "amax")
    return pick.minimum(last[at])


def collect(
    trie: Trie,
    prompt: Int64[Tensor, " C"],
    node: Int64[Tensor, " C"],
    logprob: Float32[Tensor, "C D"],
    score: Float32[Tensor, " C"],
    num_prompts: int,
    cost: Cost,
) -> Candidates:
    """Candidates of leaves that are grouped by prompt and in order."""
    return Candidates(
        start=ragged.starts(torch.bincount(prompt, minlength=num_prompts).cpu().numpy()),
        node=trie.path(node).cpu().numpy(),
        logprob=logprob.cpu().numpy(),
        score=score.cpu().numpy(),
        leaf=trie.leaf(node).cpu().numpy(),
        cost=cost,
    )

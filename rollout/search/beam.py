"""Beam search under the trie, batched over prompts, with any engine.

The policy is the softmax over the legal children of a trie node. Forced codes, which have no
sibling, have log-probability 0 and need no forward pass of their own: inside a sequence they are
forwarded with the next code that is a choice, at its end they are not forwarded at all.

Shapes:  B prompts   F beams of all prompts   M legal children of them
         C candidates   D longest sequence   S tokens of all spans   F1 = F + 1
"""

from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float32, Float64, Int64
from torch import Tensor

from orchard import ragged
from orchard.catalog.trie import ROOT, Trie
from orchard.errors import EngineError
from orchard.guide.values import Valuer
from orchard.settings.widths import Width, of_levels
from orchard.types import Cost, Prompts
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend, NextCodeLogprobs
from rollout.item_filter import ItemFilter, make_prefix_mask
from rollout.search.continuations import continuations
from rollout.search.gumbel import GumbelNoise
from rollout.search.ranking import Beams, Proof, Ranking, can_win, extend_needed
from rollout.search.topk import row_starts, top_k


def beam(
    engine: DecodingBackend,
    prompts: Prompts,
    *,
    width: Width,
    noise: GumbelNoise | None = None,
    allowed: ItemFilter | None = None,
    guide: Valuer | None = None,
    head: bool = False,
    count: int | None = None,
    prove: int = 0,
    second_pass: bool = True,
) -> Candidates:
    """Run exact beam search: keep the `width` best prefixes of each prompt at each level.

    Leaves reached early keep competing with their score. Ties are broken by trie node. Only kept
    prefixes with more than one child are forwarded. The candidates of a prompt are distinct, and
    fewer than `width` if the catalog has fewer leaves. With `noise`, prefixes are kept and
    candidates ordered by their noisy keys instead of their scores.

    With a `guide`, keys are log p + V: prefixes are kept and candidates ordered by them. Scores
    and log-probabilities stay those of the policy. Where all values are 0, nothing changes.

    With `head`, keys also contain the policy's own value of the last prefix above that was
    forwarded, 0 at the root. Values of the prefixes themselves would take a pass for each of them.

    With `allowed`, only prefixes of allowed leaves compete: a prompt gets as many candidates as it
    has allowed leaves, up to `width`, possibly none.

    Args:
        engine: backend with the policy.
        prompts: batch of prompts.
        width: prefixes kept at each level: one number, or one for each level.
        noise: random keys; not together with a guide.
        allowed: leaves that may be found.
        guide: source of the values V.
        head: whether the value head of the policy adds to the keys; not together with noise.
        count: candidates returned, the first of the last level; all by default. Prefixes that
            cannot lead to one of them are dropped at the level where that is known; with `head`,
            whose values are no bounds, none is.
        prove: number of first candidates that `Candidates.proved` is about, at most `count`; 0
            proves nothing. They are proved to be the best of all allowed leaves if the last of them
            reaches the largest key that was ever dropped, which bounds the keys of leaves below it.
            The cost counts the prompts so `proved`. Must be 0 with `head`.
        second_pass: whether the last level may be forwarded in two passes where `count` is set: the
            best prefixes first, then those that can still lead to one of the first candidates.
            Fewer tokens are forwarded, but a pass of few tokens costs about as much as one of many.

    Raises:
        CatalogError: `allowed` or `guide` belongs to another catalog, or another batch.
        ConfigError: `width` lists another number of levels than the trie has.
        EngineError: a prompt does not fit the engine, the policy has diverged, or `head` is set and
            the policy has no value head that the engine can run.
    """
    assert not (head and prove), "values of the head prove nothing"
    trie, num_prompts = engine.trie, len(prompts)
    widths = of_levels(width, trie.depth)
    count = widths[-1] if count is None else min(count, widths[-1])
    mask = make_prefix_mask(trie, allowed, num_prompts) if allowed else None
    ranking, proof = Ranking(trie, prompts, guide), Proof(trie, num_prompts)
    expansion = check_finite(engine, engine.prefill(prompts))
    tokens, passes = 0, 1
    # The beams of prompt b are `start[b] : start[b + 1]`.
    start = torch.arange(num_prompts + 1, device=trie.code.device)
    prompt = start[:-1]
    node = torch.full_like(prompt, ROOT)
    # Trie node of each beam's engine state: forced codes after it have not been forwarded yet.
    forwarded, state = node, expansion.state
    score = torch.zeros(num_prompts, device=prompt.device)
    logprob = torch.zeros(num_prompts, trie.depth, device=prompt.device)
    # Number of children of each beam's node, and whether the expansion has its children.
    fanout, scored = trie.num_children(node), torch.ones_like(prompt, dtype=torch.bool)
    value = torch.zeros_like(score)  # of the last forwarded prefix of each beam, by the head
    key: Float32[Tensor, " F"] | Float64[Tensor, " F"] = score
    for level in range(trie.depth):
        is_last = level + 1 == trie.depth
        # [M]: beam, trie node and log-probability of each child.
        source, child, gain, child_start = continuations(trie, node, fanout, scored, expansion)
        start = child_start[start]  # now the boundaries of each prompt's children
        if mask is not None:
            admitted = mask.allows(prompt[source], child)
            source, child, gain = source[admitted], child[admitted], gain[admitted]
            start = row_starts(admitted)[start]
        most = count if is_last else widths[level]
        if noise is None:
            above = score.index_select(0, source)
            key = ranking.keys(prompt[source], child, above + gain)
            key = key + value[source] if head else key
            kept = top_k(start, key, child, most)
        else:
            key = noise.keys(prompt[source], source, child, gain)
            kept = top_k(start, key, child, most)
            noise.keep(kept)
        if prove and not is_last:
            proof.drop(prompt[source], key, kept)
        start = row_starts(start.diff().clamp(max=most))
        source, node, gain, key = source[kept], child[kept], gain[kept], key[kept]
        prompt, score, value = prompt[source], score[source] + gain, value[source]
        forwarded, state, logprob = forwarded[source], state[source], logprob[source]
        logprob[:, level] = gain  # 0 for a beam that is at its leaf
        if is_last:
            break
        fanout = trie.num_children(node)
        scored = fanout > 1
        early = count < most and noise is None and not head
        if early and bool(scored.any()):
            beams = Beams(prompt=prompt, node=node, score=score, key=key, scored=scored)
            alive = can_win(trie, ranking, mask, start, beams, count)
            start = row_starts(alive)[start]
            prompt, node, score, key = prompt[alive], node[alive], score[alive], key[alive]
            logprob, fanout, scored = logprob[alive], fanout[alive], scored[alive]
            forwarded, state = forwarded[alive], state[alive]
        rows = scored.nonzero().squeeze(1)
        expansion = None
        if len(rows) == 0:
            continue
        extend = partial(_extend, engine, state, forwarded, node)
        if early and second_pass and level + 2 == trie.depth:
            beams = Beams(prompt=prompt, node=node, score=score, key=key, scored=scored)
            expansion, alive, spent, turns = extend_needed(
                extend, trie, ranking, mask, beams, count
            )
            start = row_starts(alive)[start]
            prompt, node, score, logprob = prompt[alive], node[alive], score[alive], logprob[alive]
            fanout, scored = fanout[alive], scored[alive]
            forwarded, state = forwarded[alive], state[alive]
        else:
            (expansion, spent), turns = extend(rows), 1
            forwarded = torch.where(scored, node, forwarded)
            state = state.index_copy(0, rows, expansion.state)
            if head:
                value = value.index_copy(0, rows, head_values(expansion).to(value))
        tokens, passes = tokens + spent, passes + turns
    cost = Cost(prefill_tokens=len(prompts.token), forward_tokens=tokens, passes=passes)
    if not prove:
        return collect(trie, prompt, node, logprob, score, num_prompts, cost)
    proved = proof.holds(prompt, key, min(prove, count)).cpu().numpy()
    cost = replace(cost, counts={"proved": int(proved.sum())})
    return replace(collect(trie, prompt, node, logprob, score, num_prompts, cost), proved=proved)


def _extend(
    engine: DecodingBackend,
    state: Int64[Tensor, " F"],
    above: Int64[Tensor, " F"],
    node: Int64[Tensor, " F"],
    rows: Int64[Tensor, " R"],
) -> tuple[NextCodeLogprobs, int]:
    """Forward the beams `rows` from the nodes `above` to their nodes; also count the tokens."""
    token, start = spans(engine, above[rows], node[rows])
    return check_finite(engine, engine.extend(state[rows], token, start, node[rows])), len(token)


def check_finite(engine: DecodingBackend, expansion: NextCodeLogprobs) -> NextCodeLogprobs:
    """Return the expansion; raise EngineError if its log-probabilities are not finite."""
    if not bool(expansion.logprob.sum().isfinite()):
        raise EngineError(
            f"policy {engine.version} gives log-probabilities that are not finite; its training "
            "has diverged: go back to an earlier checkpoint and lower the rate that it was trained "
            "with (sft.lr in the warm start, learner.lr after it)"
        )
    return expansion


def head_values(expansion: NextCodeLogprobs) -> Float32[Tensor, " F"]:
    """Return the values of the states; raise EngineError without a value head."""
    if expansion.value is None:
        raise EngineError(
            'rollout.guide = "head" needs a policy with a value head (model.value_head = true) in '
            'an engine that runs it (rollout.decode = "worker")'
        )
    return expansion.value


def spans(
    engine: DecodingBackend, above: Int64[Tensor, " F"], node: Int64[Tensor, " F"]
) -> tuple[Int64[Tensor, " S"], Int64[Tensor, " F1"]]:
    """Return the tokens of the codes from `above` down to `node`, and their boundaries."""
    trie = engine.trie
    top = trie.depth_of(above)
    start = row_starts(count := trie.depth_of(node) - top)
    if int(start[-1]) == len(node):  # one code each
        return engine.tokenizer.token_of(node), start
    # Span of each token, and its column in the path of the span's node.
    span_of = torch.arange(len(node), device=node.device).repeat_interleave(count)
    level = torch.arange(len(span_of), device=node.device) + (top - start[:-1])[span_of]
    return engine.tokenizer.token_of(trie.path(node)[span_of, level]), start


def collect(
    trie: Trie,
    prompt: Int64[Tensor, " C"],
    node: Int64[Tensor, " C"],
    logprob: Float32[Tensor, "C D"],
    score: Float32[Tensor, " C"],
    num_prompts: int,
    cost: Cost,
) -> Candidates:
    """Make candidates of leaves that are grouped by prompt and sorted within each prompt."""
    return Candidates(
        start=ragged.starts(torch.bincount(prompt, minlength=num_prompts).cpu().numpy()),
        node=trie.path(node).cpu().numpy(),
        logprob=logprob.cpu().numpy(),
        score=score.cpu().numpy(),
        leaf=trie.leaf(node).cpu().numpy(),
        cost=cost,
    )

"""Rank prefixes by log p + V, prove that the best leaves were found, and stop when they are.

V(s) is a bound of the reward r of every leaf below a prefix s, and never rises along a path
(`orchard.guide.guide`). So the key log p + V of a prefix bounds the keys log p + r of all leaves
below it. Without a guide V is 0, and the same holds for log p alone.

Shapes:  B prompts   B1 = B + 1   F beams of all prompts   M children of them   G forwarded beams
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from orchard.catalog.trie import Children, Trie
from orchard.errors import CatalogError
from orchard.guide.values import Valuer
from orchard.types import Prompts
from rollout.engine.protocol import NextCodeLogprobs
from rollout.item_filter import PrefixMask
from rollout.search.topk import row_starts, sort_by_score, top_k

_ROUNDING = 1e-4
"""Nats by which bounds from sums of probabilities may be off."""

Extend = Callable[[Int64[Tensor, " G"]], tuple[NextCodeLogprobs, int]]
"""Function that forwards beams, and returns their next codes and the number of tokens."""


class Ranking:
    """Keys by which a beam search ranks the prefixes of a batch: log p, or log p + V."""

    def __init__(self, trie: Trie, prompts: Prompts, guide: Valuer | None) -> None:
        """Read the histories; raise CatalogError if the guide belongs to another catalog."""
        if guide is not None and guide.catalog.digest != trie.catalog:
            raise CatalogError(
                f"the guide is for catalog {guide.catalog.digest[:12]}, the engine searches "
                f"{trie.catalog[:12]}; run `orchard fit guide` for these items"
            )
        self._values = None if guide is None else guide.values(prompts)

    @property
    def is_guided(self) -> bool:
        """Whether keys hold more than log p."""
        return self._values is not None

    def keys(
        self, prompt: Int64[Tensor, " M"], node: Int64[Tensor, " M"], score: Float32[Tensor, " M"]
    ) -> Float32[Tensor, " M"]:
        """Return the key of each trie node, given its log-probability."""
        if self._values is None:
            return score
        value = self._values(prompt.cpu().numpy(), node)
        return score + torch.from_numpy(value).to(score)


class Proof:
    """Largest key that each prompt has dropped, which bounds what it cannot find any more."""

    def __init__(self, trie: Trie, num_prompts: int) -> None:
        """Start with nothing dropped."""
        self._dropped = torch.full((num_prompts,), float("-inf"), device=trie.code.device)

    def drop(
        self,
        prompt: Int64[Tensor, " M"],
        key: Float32[Tensor, " M"] | Float64[Tensor, " M"],
        kept: Int64[Tensor, " F"],
    ) -> None:
        """Record the keys of all prefixes but the `kept` ones."""
        lost = key.float().index_fill(0, kept, float("-inf"))
        self._dropped.scatter_reduce_(0, prompt, lost, "amax")

    def holds(
        self,
        prompt: Int64[Tensor, " F"],
        key: Float32[Tensor, " F"] | Float64[Tensor, " F"],
        k: int,
    ) -> Bool[Tensor, " B"]:
        """Return whether the first `k` candidates of each prompt are the best of all leaves.

        The candidates are grouped by prompt, best first. With fewer than `k` of them, nothing may
        have been dropped.
        """
        count = torch.bincount(prompt, minlength=len(self._dropped))
        first = row_starts(count)[:-1]
        reached = torch.full_like(self._dropped, float("-inf"))
        enough = count >= k
        reached[enough] = key.float()[(first + k - 1)[enough]]
        return reached >= self._dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class Beams:
    """Beams of one level, grouped by prompt, best first."""

    prompt: Int64[Tensor, " F"]
    node: Int64[Tensor, " F"]
    score: Float32[Tensor, " F"]
    key: Float32[Tensor, " F"]
    scored: Bool[Tensor, " F"]
    """Whether the node has several children; below any other is a single leaf."""


def can_win(
    trie: Trie,
    ranking: Ranking,
    mask: PrefixMask | None,
    start: Int64[Tensor, " B1"],
    beams: Beams,
    count: int,
) -> Bool[Tensor, " F"]:
    """Return which beams may still lead to one of the first `count` leaves of their prompt.

    Below every beam is a leaf whose key is at least a bound, and a beam whose key is below `count`
    of these bounds cannot lead further than these leaves. Where a single leaf is below, the bound
    is its key. Without a guide, the best of n leaves has at least 1/n of the probability of the
    prefix, if all of them are allowed.

    Args:
        trie: trie of the search.
        ranking: keys of prefixes.
        mask: allowed leaves; all if None.
        start: the beams of prompt b are `start[b] : start[b + 1]`.
        beams: beams of one level.
        count: number of wanted leaves.
    """
    prompt, node = beams.prompt, beams.node
    enough = start.diff() >= count
    if not bool(enough.any()):
        return torch.ones_like(beams.scored)
    below = trie.leaves_below(node)
    single = (below == 1).nonzero().squeeze(1)
    bound = torch.full_like(beams.key, float("-inf"))
    if not ranking.is_guided:
        whole = torch.ones_like(beams.scored)
        if mask is not None:
            whole = mask.num_allowed(prompt, node) == below
            if mask.below is not None:
                whole = torch.zeros_like(whole)
        bound = torch.where(whole, beams.score - below.log() - _ROUNDING, bound)
    leaf = trie.descend(node[single])
    bound[single] = ranking.keys(prompt[single], leaf, beams.score[single])
    best = top_k(start, bound, node, count)
    first = row_starts(start.diff().clamp(max=count))[:-1]
    least = beams.key.new_full((len(enough),), float("-inf"))
    least[enough] = bound[best[(first + count - 1)[enough]]]
    return beams.key >= least[prompt]


def extend_needed(
    extend: Extend,
    trie: Trie,
    ranking: Ranking,
    mask: PrefixMask | None,
    beams: Beams,
    count: int,
) -> tuple[NextCodeLogprobs, Bool[Tensor, " F"], int, int]:
    """Forward the beams that can lead to one of the first `count` leaves of their prompt.

    The first `count` beams of a prompt go first; another follows only if its key reaches that of
    the leaf at place `count` among those found by then.

    Returns the next codes of the forwarded beams in their order, the beams that are still needed,
    and the numbers of tokens and passes.
    """
    prompt, scored = beams.prompt, beams.scored
    before = row_starts(scored)[:-1]  # scored beams before each beam, of all prompts
    num_prompts = int(prompt[-1]) + 1 if len(prompt) else 0
    of_prompt = row_starts(
        torch.zeros(num_prompts, dtype=torch.long, device=prompt.device).index_add(
            0, prompt, scored.long()
        )
    )
    in_time = scored & (before - of_prompt[prompt] < count)
    rows = in_time.nonzero().squeeze(1)
    expansion, tokens = extend(rows)
    if len(rows) == int(scored.sum()):
        return expansion, torch.ones_like(scored), tokens, 1
    # Leaves known by now: below the forwarded beams, and below those without a choice.
    single = (~scored).nonzero().squeeze(1)
    source = torch.cat([rows[expansion.children.owner], single])
    leaf = torch.cat([expansion.children.node, trie.descend(beams.node[single])])
    gain = torch.cat([expansion.logprob, expansion.logprob.new_zeros(len(single))])
    if mask is not None:
        admitted = mask.allows(prompt[source], leaf)
        source, leaf, gain = source[admitted], leaf[admitted], gain[admitted]
    owner, key = prompt[source], ranking.keys(prompt[source], leaf, beams.score[source] + gain)
    order = sort_by_score(owner, key, leaf)
    found = row_starts(torch.bincount(owner, minlength=num_prompts))
    least = key.new_full((num_prompts,), float("-inf"))
    enough = found.diff() >= count
    least[enough] = key[order[(found[:-1] + count - 1)[enough]]]
    alive = ~scored | in_time | (beams.key >= least[prompt])
    late = (alive & scored & ~in_time).nonzero().squeeze(1)
    if len(late) == 0:
        return expansion, alive, tokens, 1
    second, more = extend(late)
    return _joined(expansion, second, torch.cat([rows, late])), alive, tokens + more, 2


def _joined(
    first: NextCodeLogprobs, second: NextCodeLogprobs, rows: Int64[Tensor, " G"]
) -> NextCodeLogprobs:
    """Return the next codes of two passes in the order of their beams, `rows`."""
    order = rows.argsort()
    count = torch.cat([first.children.start.diff(), second.children.start.diff()])
    before, start = row_starts(count), row_starts(count[order])
    owner = torch.repeat_interleave(count[order])
    # Index of each child among the children of both passes.
    child = torch.arange(len(owner), device=owner.device) + (before[order] - start[:-1])[owner]
    node = torch.cat([first.children.node, second.children.node])[child]
    return NextCodeLogprobs(
        state=torch.cat([first.state, second.state])[order],
        logprob=torch.cat([first.logprob, second.logprob])[child],
        children=Children(node=node, owner=owner, start=start),
    )

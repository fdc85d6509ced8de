"""Segmented top-k: the best entries of each prompt, in a deterministic order.

Shapes:  B prompts   M entries, grouped by prompt   K contenders   F selected entries   R rows
         B1 = B + 1   R1 = R + 1
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def top_k(
    start: Int64[Tensor, " B1"], score: Float[Tensor, " M"], node: Int64[Tensor, " M"], width: int
) -> Int64[Tensor, " F"]:
    """Select the `width` best entries of each prompt.

    The entries of prompt b are `start[b] : start[b + 1]`. The result is sorted by prompt, then by
    descending score, then by ascending node.
    """
    num_prompts, widest = len(start) - 1, int(start.diff().max())
    if widest <= width:
        chosen, surplus = torch.arange(len(score), device=score.device), False
    else:
        chosen, surplus = _contenders(start, score, width, widest)
    if num_prompts == 1:
        return chosen[_by_score(score[chosen], node[chosen])[:width]]
    prompt = torch.searchsorted(start, chosen, right=True) - 1
    order = sort_by_score(prompt, score[chosen], node[chosen])
    if surplus:
        prompt = prompt[order]
        first = row_starts(torch.bincount(prompt, minlength=num_prompts))
        # Rank of each contender within its prompt.
        rank = torch.arange(len(prompt), device=prompt.device) - first[prompt]
        order = order[rank < width]
    return chosen[order]


def _contenders(
    start: Int64[Tensor, " B1"], score: Float[Tensor, " M"], width: int, widest: int
) -> tuple[Int64[Tensor, " K"], bool]:
    """Return the entries no worse than their prompt's `width`-th best, and whether any is surplus.

    Only these are sorted. `widest` is the largest number of entries of a prompt.
    """
    num_prompts, first = len(start) - 1, start[:-1]
    rows = score[None]
    if num_prompts > 1:
        # Position of each entry in a dense table [B, widest], padded with -inf.
        padding = torch.arange(num_prompts, device=start.device) * widest - first
        position = padding.repeat_interleave(start.diff(), output_size=len(score))
        position += torch.arange(len(score), device=start.device)
        rows = score.new_full((num_prompts * widest,), float("-inf"))
        rows = rows.index_copy_(0, position, score).view(num_prompts, widest)
    top = rows.topk(width, sorted=False)
    bound = top.values.amin(1, keepdim=True)  # [B, 1]: the `width`-th best score
    if int((rows >= bound).count_nonzero()) == num_prompts * width:
        return (top.indices + first[:, None]).flatten(), False
    # There are ties at the bound, or prompts with fewer than `width` entries.
    reach = bound.squeeze(1).repeat_interleave(start.diff(), output_size=len(score))
    return (score >= reach).nonzero().squeeze(1), True


def sort_by_score(
    prompt: Int64[Tensor, " M"], score: Float[Tensor, " M"], node: Int64[Tensor, " M"]
) -> Int64[Tensor, " M"]:
    """Return the indices sorted by prompt, then descending score, then ascending node."""
    order = _by_score(score, node)
    return order[prompt[order].argsort(stable=True)]


def _by_score(score: Float[Tensor, " M"], node: Int64[Tensor, " M"]) -> Int64[Tensor, " M"]:
    """Return the indices sorted by descending score, then ascending node."""
    order = node.argsort()
    return order[score[order].argsort(descending=True, stable=True)]


def row_starts(count: Int64[Tensor, " R"] | Bool[Tensor, " R"]) -> Int64[Tensor, " R1"]:
    """Return the boundaries of the rows of a ragged array, from their lengths or from a mask."""
    start = torch.zeros(len(count) + 1, dtype=torch.long, device=count.device)
    torch.cumsum(count, 0, out=start[1:])
    return start

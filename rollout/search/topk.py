"""Which entries of each prompt survive: the best ones, in an order that leaves no choice.

Shapes:  B prompts   M entries, grouped by prompt   K that may survive   F that do   R rows
         B1 = B + 1   R1 = R + 1
"""

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def top_k(
    start: Int64[Tensor, " B1"], score: Float[Tensor, " M"], node: Int64[Tensor, " M"], width: int
) -> Int64[Tensor, " F"]:
    """The `width` best entries of each prompt, by prompt, then falling score, then rising node.

    The entries of prompt b are `start[b] : start[b + 1]`.
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
        first = starts_of_mask(torch.bincount(prompt, minlength=num_prompts))
        place = torch.arange(len(prompt), device=prompt.device) - first[prompt]
        order = order[place < width]
    return chosen[order]


def _contenders(
    start: Int64[Tensor, " B1"], score: Float[Tensor, " M"], width: int, widest: int
) -> tuple[Int64[Tensor, " K"], bool]:
    """The entries that reach the `width`-th place of their prompt, and if they are more than that.

    Only they are ever sorted. `widest` is the largest number of entries of a prompt.
    """
    num_prompts, first = len(start) - 1, start[:-1]
    rows = score[None]
    if num_prompts > 1:
        padding = torch.arange(num_prompts, device=start.device) * widest - first
        place = padding.repeat_interleave(start.diff(), output_size=len(score))
        place += torch.arange(len(score), device=start.device)
        rows = score.new_full((num_prompts * widest,), float("-inf"))
        rows = rows.index_copy_(0, place, score).view(num_prompts, widest)
    top = rows.topk(width, sorted=False)
    bound = top.values.amin(1, keepdim=True)
    if int((rows >= bound).count_nonzero()) == num_prompts * width:
        return (top.indices + first[:, None]).flatten(), False
    # Places are shared, or some prompts have no more entries than there are places.
    reach = bound.squeeze(1).repeat_interleave(start.diff(), output_size=len(score))
    return (score >= reach).nonzero().squeeze(1), True


def sort_by_score(
    prompt: Int64[Tensor, " M"], score: Float[Tensor, " M"], node: Int64[Tensor, " M"]
) -> Int64[Tensor, " M"]:
    """Indices by prompt, then falling score, then rising node."""
    order = _by_score(score, node)
    return order[prompt[order].argsort(stable=True)]


def _by_score(score: Float[Tensor, " M"], node: Int64[Tensor, " M"]) -> Int64[Tensor, " M"]:
    order = node.argsort()
    return order[score[order].argsort(descending=True, stable=True)]


def starts_of_mask(count: Int64[Tensor, " R"] | Bool[Tensor, " R"]) -> Int64[Tensor, " R1"]:
    """Where each row of a ragged array starts, and at last where it ends."""
    start = torch.zeros(len(count) + 1, dtype=torch.long, device=count.device)
    torch.cumsum(count, 0, out=start[1:])
    return start

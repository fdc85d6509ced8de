"""Compute log-probabilities over a whole vocabulary, in parts that bound the memory.

Shapes:  F distinct queries   E choices   D hidden width   V tokens of the vocabulary
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MAX_LOGITS = 2**26
"""Largest number of logits that exist at once, of which a few float32 copies are alive."""


def vocabulary_logprobs(
    hidden: Float[Tensor, "F D"],
    head: Float[Tensor, "V D"],
    query: Int64[Tensor, " E"],
    token: Int64[Tensor, " E"],
    divisor: Float32[Tensor, " F"] | None = None,
    *,
    max_logits: int = MAX_LOGITS,
) -> tuple[Float32[Tensor, " E"], Float32[Tensor, " F"]]:
    """Return the log-probability of each choice and the entropy of each query (without gradient).

    More than `max_logits` logits are computed in parts, and once more in the backward pass, so that
    the logits of one part are alive at a time.

    Args:
        hidden: last hidden state of each query.
        head: weight of the language-model head.
        query: query of each choice.
        token: chosen token of each choice.
        divisor: temperature of each query; 1 without it.
        max_logits: largest number of logits of a part, which has at least one query.
    """
    size = max(1, max_logits // len(head))
    if len(hidden) <= size:
        return _part(hidden, head, query, token, divisor)
    order = query.argsort(stable=True)  # choices by query
    edges = torch.arange(0, len(hidden) + size, size, device=query.device).clamp(max=len(hidden))
    bounds = torch.searchsorted(query[order], edges).tolist()
    logprobs, entropies = list[Tensor](), list[Tensor]()
    for index, (low, high) in enumerate(pairwise(bounds)):
        rows, choices = slice(index * size, (index + 1) * size), order[low:high]
        part = (
            hidden[rows],
            head,
            query[choices] - index * size,
            token[choices],
            None if divisor is None else divisor[rows],
        )
        logprob, entropy = checkpoint(_part, *part, use_reentrant=False, preserve_rng_state=False)
        logprobs.append(logprob)
        entropies.append(entropy)
    # back to the order of the choices
    return torch.cat(logprobs)[order.argsort()], torch.cat(entropies)


def _part(
    hidden: Float[Tensor, "F D"],
    head: Float[Tensor, "V D"],
    query: Int64[Tensor, " E"],
    token: Int64[Tensor, " E"],
    divisor: Float32[Tensor, " F"] | None,
) -> tuple[Float32[Tensor, " E"], Float32[Tensor, " F"]]:
    """Compute `vocabulary_logprobs` at once."""
    logit = (hidden @ head.T.to(hidden.dtype)).float()
    if divisor is not None:
        logit = logit / divisor[:, None]
    logprob = logit.log_softmax(-1)
    entropy = -(logprob.exp() * logprob).detach().sum(-1)
    return logprob[query, token], entropy

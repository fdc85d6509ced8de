"""Compute the policy's log-probabilities of the choices in a packed batch.

Shapes:  B rows   S slots   E choices   F distinct queries behind them   D hidden width
         V states   P states of the longest path   Q candidates
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor
from transformers import PreTrainedModel

from learner.tree_states import tree_states
from learner.vocabulary import vocabulary_logprobs
from orchard.arrays import map_arrays
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import child_logprobs, head_weight
from orchard.types import SearchTrees, TrainBatch


def to_tensors(batch: TrainBatch, device: torch.device | str = "cpu") -> TrainBatch[Tensor]:
    """Copy the batch's arrays to a device, integers widened to the int64 that indexing needs."""

    def convert(array: np.ndarray) -> Tensor:
        tensor = torch.tensor(array)
        return (tensor if tensor.is_floating_point() else tensor.long()).to(device)

    return map_arrays(batch, convert)


def choice_logprobs(
    model: PreTrainedModel,
    batch: TrainBatch[Tensor],
    tokenizer: ItemTokenizer,
    distribution: Literal["trie", "full"] = "trie",
    *,
    temperature: float = 1.0,
) -> tuple[Float32[Tensor, " E"], Float32[Tensor, " E"]]:
    """Return each choice's log-probability and its distribution's entropy (without gradient).

    Under "trie" a code is normalized over its legal siblings, under "full" over the whole
    vocabulary. Free text is always normalized over the whole vocabulary, at the temperature that
    it was drawn with.
    """
    hidden, head = tree_states(model, batch), head_weight(model)
    return score_choices(hidden, head, batch, tokenizer, distribution, temperature=temperature)


def score_choices(
    hidden: Float[Tensor, "B S D"],
    head: Float[Tensor, "tokens D"],
    batch: TrainBatch[Tensor],
    tokenizer: ItemTokenizer,
    distribution: Literal["trie", "full"] = "trie",
    *,
    temperature: float = 1.0,
) -> tuple[Float32[Tensor, " E"], Float32[Tensor, " E"]]:
    """Compute what `choice_logprobs` returns from the last hidden state of every slot."""
    is_text = batch.state == SearchTrees.FREE_TEXT
    over_vocabulary = is_text if distribution == "trie" else torch.ones_like(is_text)
    # indices of the choices normalized over legal siblings, and over the whole vocabulary
    in_trie = (~over_vocabulary).nonzero().squeeze(1)
    in_vocabulary = over_vocabulary.nonzero().squeeze(1)
    queries = _distinct_queries(hidden, batch, in_trie)
    query = queries.of_choice
    # log-probability of every legal child of every query's node, flat
    logprob, children = child_logprobs(queries.hidden, queries.state, head, tokenizer)
    # Children are consecutive nodes, so a child's index among its siblings is a difference.
    first_child = tokenizer.trie.child_start
    chosen = children.start[query] + batch.chosen[in_trie] - first_child[batch.state[in_trie]]
    entropy_term = -(logprob.exp() * logprob).detach()
    trie_entropy = entropy_term.new_zeros(len(queries.state))
    trie_entropy = trie_entropy.index_add(0, children.owner, entropy_term)[query]
    logprob = logprob[chosen]

    queries = _distinct_queries(hidden, batch, in_vocabulary)
    query = queries.of_choice
    token = batch.chosen.clone()
    token[~is_text] = tokenizer.token_of(batch.chosen[~is_text])
    divisor = None
    if temperature != 1:
        divisor = torch.where(queries.state == SearchTrees.FREE_TEXT, temperature, 1.0)
    token_logprob, vocabulary_entropy = vocabulary_logprobs(
        queries.hidden, head, query, token[in_vocabulary], divisor
    )
    # Joined even where one is empty: a batch without choices still has a gradient, zero.
    logprob = torch.cat([logprob, token_logprob])
    # back to the order of the batch's choices
    order = torch.cat([in_trie, in_vocabulary]).argsort()
    return logprob[order], torch.cat([trie_entropy, vocabulary_entropy[query]])[order]


class _Queries(NamedTuple):
    """Distinct (slot, trie node) pairs that predict a set of choices."""

    hidden: Float[Tensor, "F D"]
    """Hidden state of each query's slot."""
    state: Int64[Tensor, " F"]
    """Trie node of each query, or FREE_TEXT."""
    of_choice: Int64[Tensor, " E"]
    """Index of each choice's query."""


def _distinct_queries(
    hidden: Float[Tensor, "B S D"], batch: TrainBatch[Tensor], choice: Int64[Tensor, " E"]
) -> _Queries:
    """Find the distinct queries behind the choices.

    Siblings share a query, so their distribution is evaluated once.
    """
    state = batch.state[choice]
    # slot among the slots of all rows
    slot = batch.row[choice] * hidden.shape[1] + batch.query_slot[choice]
    # One integer per pair; state + 1 is never negative, since FREE_TEXT is -1.
    num_states = state.max() + 2 if len(choice) else 1
    key, query = torch.unique(slot * num_states + state + 1, return_inverse=True)
    return _Queries(hidden.flatten(0, 1)[key // num_states], key % num_states - 1, query)

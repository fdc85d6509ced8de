"""The policy's log-probabilities of a packed batch's choices.

Shapes:  B rows   S slots   E choices   F distinct predictors of them   D hidden width
         V states   P states of the longest path   Q candidates
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor
from transformers import PreTrainedModel

from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import child_logprobs, head_weight, hidden_states
from orchard.types import SearchTrees, SequenceTargets, TrainBatch, ValueTargets


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueTensors:
    """The arrays of `ValueTargets`; the fields mean the same."""

    row: Int64[Tensor, " V"]
    path: Int64[Tensor, "V P"]
    reward: Float32[Tensor, " V"]
    outcome: Float32[Tensor, " V"]
    through: Float32[Tensor, " V"]
    entered: Float32[Tensor, " V"]
    ending: Float32[Tensor, " V"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTensors:
    """The arrays of `SequenceTargets`; the fields mean the same."""

    row: Int64[Tensor, " Q"]
    advantage: Float32[Tensor, " Q"]
    length: Float32[Tensor, " Q"]
    choice: Int64[Tensor, " pairs"]
    candidate: Int64[Tensor, " pairs"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTensors:
    """The arrays of a `TrainBatch` on the model's device; the fields mean the same."""

    token: Int64[Tensor, "B S"]
    position: Int64[Tensor, "B S"]
    subtree_end: Int64[Tensor, "B S"]
    row: Int64[Tensor, " E"]
    query_slot: Int64[Tensor, " E"]
    state: Int64[Tensor, " E"]
    chosen: Int64[Tensor, " E"]
    behaviour_logprob: Float32[Tensor, " E"]
    advantage_pos: Float32[Tensor, " E"]
    advantage_neg: Float32[Tensor, " E"]
    kl_weight: Float32[Tensor, " E"]
    values: ValueTensors | None = None
    sequences: SequenceTensors | None = None


def to_tensors(batch: TrainBatch, device: torch.device | str = "cpu") -> BatchTensors:
    """Copies of the batch's arrays, integers widened to what indexing wants."""
    values, whole = batch.values, batch.sequences
    return BatchTensors(
        **_tensors(batch, BatchTensors, device),
        values=None if values is None else ValueTensors(**_tensors(values, ValueTensors, device)),
        sequences=None
        if whole is None
        else SequenceTensors(**_tensors(whole, SequenceTensors, device)),
    )


def _tensors(
    source: TrainBatch | ValueTargets | SequenceTargets,
    wanted: type[BatchTensors | ValueTensors | SequenceTensors],
    device: torch.device | str,
) -> dict[str, Any]:
    """The source's arrays that `wanted` names, by name."""
    nested = ("values", "sequences")
    arrays = {f.name: getattr(source, f.name) for f in fields(wanted) if f.name not in nested}
    tensors = {name: torch.tensor(array) for name, array in arrays.items()}
    return {
        name: (tensor if tensor.is_floating_point() else tensor.long()).to(device)
        for name, tensor in tensors.items()
    }


def tree_mask(subtree_end: Int64[Tensor, "B S"]) -> Bool[Tensor, "B S S"]:
    """Slot i sees slot j where `j <= i < subtree_end[j]`: its ancestors, itself and the prompt."""
    slot = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    return (slot <= slot[:, None]) & (slot[:, None] < subtree_end[:, None, :])


def choice_logprobs(
    model: PreTrainedModel,
    batch: BatchTensors,
    tokenizer: ItemTokenizer,
    distribution: Literal["trie", "full"] = "trie",
    *,
    temperature: float = 1.0,
) -> tuple[Float32[Tensor, " E"], Float32[Tensor, " E"]]:
    """Log-probability of each choice, and (without gradient) the entropy that it was drawn from.

    A code competes with its legal siblings under "trie", with the whole vocabulary under "full";
    free text always with the whole vocabulary, at the temperature that it was drawn with.
    """
    hidden = hidden_states(model, batch.token, batch.position, tree_mask(batch.subtree_end))
    head = head_weight(model)
    return score_choices(hidden, head, batch, tokenizer, distribution, temperature=temperature)


def score_choices(
    hidden: Float[Tensor, "B S D"],
    head: Float[Tensor, "tokens D"],
    batch: BatchTensors,
    tokenizer: ItemTokenizer,
    distribution: Literal["trie", "full"] = "trie",
    *,
    temperature: float = 1.0,
) -> tuple[Float32[Tensor, " E"], Float32[Tensor, " E"]]:
    """As `choice_logprobs`, from the last hidden state of every slot."""
    text = batch.state == SearchTrees.FREE_TEXT
    whole = text if distribution == "trie" else torch.ones_like(text)
    in_trie, in_vocabulary = (~whole).nonzero().squeeze(1), whole.nonzero().squeeze(1)
    at, state, query = _predictors(hidden, batch, in_trie)
    logprob, children = child_logprobs(at, state, head, tokenizer)
    # Children are consecutive nodes, so a child's place among them is a difference.
    first_child = tokenizer.trie.child_start
    chosen = children.start[query] + batch.chosen[in_trie] - first_child[batch.state[in_trie]]
    surprise = -(logprob.exp() * logprob).detach()
    entropy = surprise.new_zeros(len(state)).index_add(0, children.owner, surprise)[query]
    logprob = logprob[chosen]

    at, before, query = _predictors(hidden, batch, in_vocabulary)
    token = batch.chosen.clone()
    token[~text] = tokenizer.token_of(batch.chosen[~text])
    logit = (at @ head.T.to(at.dtype)).float()
    if temperature != 1:
        heat = torch.where(before == SearchTrees.FREE_TEXT, temperature, 1.0)
        logit = logit / heat[:, None]
    every = logit.log_softmax(-1)
    spread = -(every.exp() * every).detach().sum(-1)
    # Joined even where one is empty: a batch without choices still has a gradient, zero.
    logprob = torch.cat([logprob, every[query, token[in_vocabulary]]])
    order = torch.cat([in_trie, in_vocabulary]).argsort()
    return logprob[order], torch.cat([entropy, spread[query]])[order]


def _predictors(
    hidden: Float[Tensor, "B S D"], batch: BatchTensors, choice: Int64[Tensor, " E"]
) -> tuple[Float[Tensor, "F D"], Int64[Tensor, " F"], Int64[Tensor, " E"]]:
    """Distinct (position, trie node) pairs behind the choices, and the pair of each choice.

    Siblings share one, so that their distribution is evaluated once.
    """
    state = batch.state[choice]
    slot = batch.row[choice] * hidden.shape[1] + batch.query_slot[choice]
    span = state.max() + 2 if len(choice) else 1
    key, query = torch.unique(slot * span + state + 1, return_inverse=True)
    return hidden.flatten(0, 1)[key // span], key % span - 1, query

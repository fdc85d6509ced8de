"""Wrap a policy as a module whose forward pass scores a packed batch.

Shapes:  E choices   V states   Z codes of targets
"""

from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.logprobs import choice_logprobs, score_choices
from learner.tree_states import choose_attention, tree_states
from learner.value import state_values
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import head_weight
from orchard.policy.tree_check import check_trees
from orchard.policy.value_head import value_head_of
from orchard.targets import CodeTargets
from orchard.types import TrainBatch


class Scores(NamedTuple):
    """Scores of a batch under the policy."""

    logprob: Float[Tensor, " E"]
    """Log-probability of each choice."""
    entropy: Float[Tensor, " E"]
    """Entropy of the distribution of each choice, without gradient."""
    value: Float[Tensor, " V"] | None
    """Value of each state; None without a value head or where the batch has no value targets."""
    code_logprob: Float[Tensor, " Z"] | None
    """Log-probability of each code of a target; None where the batch has none."""


class LogprobModel(nn.Module):
    """Policy whose forward pass scores a batch's choices, in a form that DDP and FSDP can wrap."""

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: ItemTokenizer,
        distribution: Literal["trie", "full"],
        *,
        detach: bool = True,
        temperature: float = 1.0,
        attention: Literal["auto", "dense", "flex"] = "dense",
    ) -> None:
        """Wrap a policy and fix how its log-probabilities are computed.

        Args:
            policy: policy to wrap.
            tokenizer: catalog's trie and the tokens of its codes.
            distribution: default normalization of codes, "trie" or "full" (`choice_logprobs`).
            detach: keep the value head's gradient out of the rest of the policy.
            temperature: sampling temperature of free text.
            attention: attention over packed trees; see `learner.attention`.

        Raises:
            EngineError: packed trees do not reproduce the policy's own forward pass, or the
                policy's code cannot run FlexAttention.
        """
        super().__init__()
        check_trees(policy)
        choose_attention(policy, attention)
        self.policy = policy
        self._context: tuple[ItemTokenizer, Literal["trie", "full"]]
        self._context = (tokenizer, distribution)
        self._detach, self._temperature = detach, temperature

    def forward(
        self, batch: TrainBatch[Tensor], distribution: Literal["trie", "full"] | None = None
    ) -> Scores:
        """Score the choices, states and codes of a batch.

        `distribution` overrides the configured one.
        """
        head, temperature = value_head_of(self.policy), self._temperature
        tokenizer, default = self._context
        context = (tokenizer, distribution or default)
        num_choices, codes = len(batch.row), batch.codes
        if codes is not None:  # scored with the choices, whose distributions they share
            batch = _as_choices(batch, codes)
        value: Tensor | None = None
        if head is None or batch.values is None:
            scores = choice_logprobs(self.policy, batch, *context, temperature=temperature)
        else:
            hidden = tree_states(self.policy, batch)
            weight = head_weight(self.policy)
            scores = score_choices(hidden, weight, batch, *context, temperature=temperature)
            value_input = hidden.detach() if self._detach else hidden
            value = state_values(head, value_input, batch.values)
        if codes is None:
            return Scores(*scores, value, None)
        logprob, entropy = scores
        return Scores(logprob[:num_choices], entropy[:num_choices], value, logprob[num_choices:])


def _as_choices(batch: TrainBatch[Tensor], codes: CodeTargets[Tensor]) -> TrainBatch[Tensor]:
    """Append codes of targets to the choices of a batch, without an advantage."""
    predicted = ("row", "query_slot", "state", "chosen")
    joined = {name: torch.cat([getattr(batch, name), getattr(codes, name)]) for name in predicted}
    nothing = torch.zeros_like(codes.weight)
    for name in ("behaviour_logprob", "advantage_pos", "advantage_neg", "kl_weight"):
        joined[name] = torch.cat([getattr(batch, name), nothing])
    return replace(batch, **joined)

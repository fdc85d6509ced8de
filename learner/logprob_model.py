"""The policy as the module that the learner wraps.

Shapes:  E choices   V states
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.logprobs import BatchTensors, choice_logprobs, score_choices, tree_mask
from learner.value import state_values
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import head_weight, hidden_states
from orchard.policy.value_head import value_head_of


class LogprobModel(nn.Module):
    """A policy whose forward gives choices' log-probabilities, so that DDP and FSDP can wrap it."""

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: ItemTokenizer,
        distribution: Literal["trie", "full"],
        *,
        detach: bool = True,
        temperature: float = 1.0,
    ) -> None:
        """Hold the policy and what names its distribution (`trie` or `full`).

        `temperature` is that of free text; `detach` keeps the value head's gradient out of the rest
        of the policy.
        """
        super().__init__()
        self.policy = policy
        self._context: tuple[ItemTokenizer, Literal["trie", "full"]]
        self._context = (tokenizer, distribution)
        self._detach, self._temperature = detach, temperature

    def forward(
        self, batch: BatchTensors, distribution: Literal["trie", "full"] | None = None
    ) -> tuple[Float[Tensor, " E"], Float[Tensor, " E"], Float[Tensor, " V"] | None]:
        """Log-probability and entropy of every choice of the batch, and the value of its states.

        There is none without a value head, or where the batch has nothing for it to learn. Another
        `distribution` than the configured one may be asked for.
        """
        head, heat = value_head_of(self.policy), self._temperature
        tokenizer, own = self._context
        context = (tokenizer, distribution or own)
        if head is None or batch.values is None:
            scores = choice_logprobs(self.policy, batch, *context, temperature=heat)
            return *scores, None
        visible = tree_mask(batch.subtree_end)
        hidden = hidden_states(self.policy, batch.token, batch.position, visible)
        weight = head_weight(self.policy)
        scores = score_choices(hidden, weight, batch, *context, temperature=heat)
        read = hidden.detach() if self._detach else hidden
        return *scores, state_values(head, read, batch.values)

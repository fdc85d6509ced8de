"""Wrap a policy as a module whose forward pass scores a packed batch.

Shapes:  E choices   V states
"""

from typing import Literal

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from learner.logprobs import choice_logprobs, score_choices, tree_mask
from learner.value import state_values
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import head_weight, hidden_states
from orchard.policy.tree_check import check_trees
from orchard.policy.value_head import value_head_of
from orchard.types import TrainBatch


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
    ) -> None:
        """Wrap a policy and fix how its log-probabilities are computed.

        Args:
            policy: policy to wrap.
            tokenizer: catalog's trie and the tokens of its codes.
            distribution: default normalization of codes, "trie" or "full" (`choice_logprobs`).
            detach: keep the value head's gradient out of the rest of the policy.
            temperature: sampling temperature of free text.

        Raises:
            EngineError: packed trees do not reproduce the policy's own forward pass.
        """
        super().__init__()
        check_trees(policy)
        self.policy = policy
        self._context: tuple[ItemTokenizer, Literal["trie", "full"]]
        self._context = (tokenizer, distribution)
        self._detach, self._temperature = detach, temperature

    def forward(
        self, batch: TrainBatch[Tensor], distribution: Literal["trie", "full"] | None = None
    ) -> tuple[Float[Tensor, " E"], Float[Tensor, " E"], Float[Tensor, " V"] | None]:
        """Return each choice's log-probability and entropy, and the value of each state.

        The values are None without a value head or where the batch has no value targets.
        `distribution` overrides the configured one.
        """
        head, temperature = value_head_of(self.policy), self._temperature
        tokenizer, default = self._context
        context = (tokenizer, distribution or default)
        if head is None or batch.values is None:
            scores = choice_logprobs(self.policy, batch, *context, temperature=temperature)
            return *scores, None
        visible = tree_mask(batch.subtree_end)
        hidden = hidden_states(self.policy, batch.token, batch.position, visible)
        weight = head_weight(self.policy)
        scores = score_choices(hidden, weight, batch, *context, temperature=temperature)
        value_input = hidden.detach() if self._detach else hidden
        return *scores, state_values(head, value_input, batch.values)

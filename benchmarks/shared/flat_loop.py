"""RL baseline built from Hugging Face components, in the way of MiniOneRec's trainer.

As in arXiv 2510.24431 and its public code, each step is a constrained beam search by `generate`,
rule and ranking rewards, advantages standardized within the group, and one update on one full
sequence, prompt included, per candidate: a forward pass of the policy, one of a separate reference,
k3 divergence, mean over tokens and then over sequences. The candidates of a prompt share no
computation. Three things differ, so that it solves Orchard's problem: the policy is renormalized
over legal tokens, the ratio is clipped and may refer to a separate behavior policy, and codes
without an alternative are left out.

Shapes:  B prompts   P tokens of each   G candidates   L codes   R sequences of a micro-batch
"""

import copy

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.shared.hugging_face import Allowed, beams, legal_logits
from orchard.optim import make_optimizer
from orchard.settings import LearnerConfig


class FlatLoop:
    """Policy, reference and optimizer of the baseline."""

    def __init__(
        self,
        policy: PreTrainedModel,
        allowed: Allowed,
        config: LearnerConfig,
        *,
        group: int,
        levels: int,
        rows: int,
    ) -> None:
        """Set up in-place training of `policy`, with `rows` sequences per forward pass.

        A copy of the initial policy is the reference.
        """
        self.policy, self.reference = policy, copy.deepcopy(policy).requires_grad_(False)
        self._allowed, self._config = allowed, config
        self._group, self._levels, self._rows = group, levels, rows
        self._optimizer = make_optimizer(policy, lr=config.lr, weight_decay=config.weight_decay)

    def step(self, prompt: Int[Tensor, "B P"], target: Int[Tensor, "B L"]) -> float:
        """Search, score and update; return the loss."""
        codes = beams(self.policy, prompt, self._allowed, width=self._group, levels=self._levels)
        return self.update(prompt, codes, advantages(rewards(codes, target)))

    def update(
        self,
        prompt: Int[Tensor, "B P"],
        codes: Int[Tensor, "B G L"],
        advantage: Float[Tensor, "B G"],
        behaviour: Float[Tensor, "B G L"] | None = None,
    ) -> float:
        """Make one update and return the loss; without `behaviour` the ratio is 1."""
        flat_codes, flat_advantage = codes.flatten(0, 1), advantage.flatten()
        sequence = torch.cat([prompt.repeat_interleave(self._group, 0), flat_codes], 1)
        self._optimizer.zero_grad()
        total = 0.0
        for first in range(0, len(flat_codes), self._rows):
            micro_batch = slice(first, first + self._rows)
            with torch.no_grad():
                reference, _ = self._logprobs(self.reference, sequence[micro_batch])
            logprob, has_alternative = self._logprobs(self.policy, sequence[micro_batch])
            behaviour_logprob = (
                logprob.detach() if behaviour is None else behaviour.flatten(0, 1)[micro_batch]
            )
            loss = self._loss(
                logprob, behaviour_logprob, reference, flat_advantage[micro_batch][:, None]
            )
            loss = (loss * has_alternative).mean(1).sum() / len(flat_codes)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.policy.parameters(), self._config.grad_clip or float("inf"))
        self._optimizer.step()
        return total

    def _loss(
        self,
        logprob: Float[Tensor, "R L"],
        behaviour: Float[Tensor, "R L"],
        reference: Float[Tensor, "R L"],
        advantage: Float[Tensor, "R 1"],
    ) -> Float[Tensor, "R L"]:
        """Compute the clipped surrogate loss of each token plus its weighted divergence."""
        config = self._config
        ratio = (logprob - behaviour).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        bounded = ratio.clamp(max=config.dual_clip or float("inf"))
        surrogate = torch.minimum(bounded * advantage, clipped * advantage)
        log_ratio = reference - logprob
        return config.kl.weight * (log_ratio.exp() - log_ratio - 1) - surrogate

    def _logprobs(
        self, model: PreTrainedModel, sequence: Int[Tensor, "R tokens"]
    ) -> tuple[Float[Tensor, "R L"], Bool[Tensor, "R L"]]:
        """Compute the log-probability of each code, and whether it had an alternative."""
        codes = sequence[:, -self._levels :]
        logits = model(sequence, use_cache=False, logits_to_keep=self._levels + 1).logits[:, :-1]
        prefix = [tuple(row[:level]) for row in codes.tolist() for level in range(self._levels)]
        legal = legal_logits(logits.flatten(0, 1), prefix, self._allowed).view(logits.shape)
        has_alternative = legal.isfinite().sum(-1) > 1
        return legal.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1), has_alternative


def rewards(codes: Int[Tensor, "B G L"], target: Int[Tensor, "B L"]) -> Float[Tensor, "B G"]:
    """Compute rule and ranking rewards of candidates in rank order (arXiv 2510.12211).

    The target gets 1. In a group that has the target, each other candidate gets a penalty, which is
    larger for better ranks.
    """
    hit = (codes == target[:, None]).all(-1)
    discount = 1 / torch.arange(2, codes.shape[1] + 2).log2()
    is_penalized = ~hit & hit.any(1, keepdim=True)
    return hit.float() - is_penalized * discount / discount.sum()


def advantages(reward: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Standardize rewards within the group, by the unbiased standard deviation."""
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)

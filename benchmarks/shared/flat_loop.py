"""Reinforcement learning with Hugging Face's parts, as MiniOneRec's trainer goes about it.

arXiv 2510.24431, and its public code as read: each step is a constrained beam search by
`generate`, rule and ranking rewards, advantages standardised within the group, and one update with
a sequence per candidate, prompt and all: a forward pass of the policy, one of a separate reference,
k3 divergence, mean over tokens and then over sequences. Nothing is shared between the candidates of
a prompt. Three things are otherwise, so that it solves Orchard's problem: the policy is
renormalised over legal tokens, the ratio is clipped and may be to a behaviour policy other than the
policy itself, and codes without an alternative are left out.

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
    """A policy, its reference and its optimiser."""

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
        """Train `policy` in place, `rows` sequences to a forward pass; it is the reference, too."""
        self.policy, self.reference = policy, copy.deepcopy(policy).requires_grad_(False)
        self._allowed, self._config = allowed, config
        self._group, self._levels, self._rows = group, levels, rows
        self._optimizer = make_optimizer(policy, lr=config.lr, weight_decay=config.weight_decay)

    def step(self, prompt: Int[Tensor, "B P"], target: Int[Tensor, "B L"]) -> float:
        """Search, score and learn; returns the loss."""
        codes = beams(self.policy, prompt, self._allowed, width=self._group, levels=self._levels)
        return self.update(prompt, codes, advantages(rewards(codes, target)))

    def update(
        self,
        prompt: Int[Tensor, "B P"],
        codes: Int[Tensor, "B G L"],
        advantage: Float[Tensor, "B G"],
        behaviour: Float[Tensor, "B G L"] | None = None,
    ) -> float:
        """One update; the loss. Without `behaviour` the ratio is to the policy itself, hence 1."""
        flat, earned = codes.flatten(0, 1), advantage.flatten()
        sequence = torch.cat([prompt.repeat_interleave(self._group, 0), flat], 1)
        self._optimizer.zero_grad()
        total = 0.0
        for at in range(0, len(flat), self._rows):
            part = slice(at, at + self._rows)
            with torch.no_grad():
                reference, _ = self._logprobs(self.reference, sequence[part])
            logprob, free = self._logprobs(self.policy, sequence[part])
            before = logprob.detach() if behaviour is None else behaviour.flatten(0, 1)[part]
            loss = self._loss(logprob, before, reference, earned[part][:, None])
            loss = (loss * free).mean(1).sum() / len(flat)
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
        """The clipped surrogate of each token, and its divergence from the reference."""
        config = self._config
        ratio = (logprob - behaviour).exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        bounded = ratio.clamp(max=config.dual_clip or float("inf"))
        surrogate = torch.minimum(bounded * advantage, clipped * advantage)
        apart = reference - logprob
        return config.kl.weight * (apart.exp() - apart - 1) - surrogate

    def _logprobs(
        self, model: PreTrainedModel, sequence: Int[Tensor, "R tokens"]
    ) -> tuple[Float[Tensor, "R L"], Bool[Tensor, "R L"]]:
        """Log-probability of each code, and if it had an alternative."""
        codes = sequence[:, -self._levels :]
        logits = model(sequence, use_cache=False, logits_to_keep=self._levels + 1).logits[:, :-1]
        prefix = [tuple(row[:level]) for row in codes.tolist() for level in range(self._levels)]
        legal = legal_logits(logits.flatten(0, 1), prefix, self._allowed).view(logits.shape)
        free = legal.isfinite().sum(-1) > 1
        return legal.log_softmax(-1).gather(-1, codes[..., None]).squeeze(-1), free


def rewards(codes: Int[Tensor, "B G L"], target: Int[Tensor, "B L"]) -> Float[Tensor, "B G"]:
    """Rule and ranking rewards of candidates in the order of their ranks (arXiv 2510.12211).

    1 for the target; in a group that holds it, a penalty for each other candidate, the larger the
    better its rank.
    """
    hit = (codes == target[:, None]).all(-1)
    share = 1 / torch.arange(2, codes.shape[1] + 2).log2()
    missed = ~hit & hit.any(1, keepdim=True)
    return hit.float() - missed * share / share.sum()


def advantages(reward: Float[Tensor, "B G"]) -> Float[Tensor, "B G"]:
    """Standardised within the group, by the unbiased deviation."""
    return (reward - reward.mean(1, keepdim=True)) / (reward.std(1, keepdim=True) + 1e-4)

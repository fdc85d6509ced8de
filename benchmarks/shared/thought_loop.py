"""Batched loop for thoughts and codes in this process, as written by hand with Hugging Face.

Every prompt is computed once and its keys and values are repeated for the samples. All samples
advance together, a token at a time; keys and values stay from the prompt to the last code, forced
tags are forwarded with the token after them, and only the hidden states of last tokens reach the
head. Draws come from `torch.multinomial`, in the place of Orchard's, which depend on the prompt's
id and the sample alone. Log-probabilities of all tokens are kept, which RL needs.

Shapes:  R samples   S new slots   V tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from benchmarks.shared.hugging_face import Allowed, legal_logits
from orchard.policy.item_tokenizer import ThinkTokens


@dataclass(kw_only=True)
class Samples:
    """Tokens of samples, each with whether it belongs to its sample, and its log-probability."""

    token: list[Int[Tensor, " R"]] = field(default_factory=list[Tensor])
    used: list[Bool[Tensor, " R"]] = field(default_factory=list[Tensor])
    logprob: list[Float[Tensor, " R"]] = field(default_factory=list[Tensor])


class ThoughtLoop:
    """Loop over the tokens of all samples of equally long prompts."""

    def __init__(
        self, policy: PreTrainedModel, tags: ThinkTokens, allowed: Allowed, *, levels: int
    ) -> None:
        """Store the policy, its tags, the legal codes, and the number of blocks and codes."""
        self._policy, self._tags, self._allowed, self._levels = policy, tags, allowed, levels

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int]], *, samples: int, cap: int, temperature: float = 1.0
    ) -> Samples:
        """Generate `samples` thoughts and items per prompt, blocks of at most `cap` tokens."""
        widest = max(map(len, prompts))
        token = torch.tensor([[0] * (widest - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (widest - len(p)) + [1] * len(p) for p in prompts])
        self._cache, self._mask = DynamicCache(), mask[:, :0]
        if widest > 1:
            self._forward(token[:, :-1], mask[:, :-1])
        self._cache.batch_repeat_interleave(samples)
        self._mask = self._mask.repeat_interleave(samples, 0)
        last = token[:, -1:].repeat_interleave(samples, 0)
        ones, out = torch.ones_like(last), Samples()
        # Tokens that are forwarded together with the first of a block, and their mask.
        waiting, real = last, ones
        for _ in range(self._levels):
            waiting = torch.cat([waiting, ones * self._tags.open], 1)
            real = torch.cat([real, ones], 1)
            live = torch.ones(len(last), dtype=torch.bool)
            chosen = last[:, 0]
            for _ in range(cap):
                chosen = self._draw(self._forward(waiting, real), temperature, out, live)
                waiting, real = chosen[:, None], live[:, None].long()
                live = live & (chosen != self._tags.close)
                if not bool(live.any()):
                    break
            # The closing tag of all samples, forwarded with the next block; a drawn one is masked.
            real = real * (waiting != self._tags.close)
            waiting, real = (
                torch.cat([waiting, ones * self._tags.close], 1),
                torch.cat([real, ones], 1),
            )
        prefix: list[tuple[int, ...]] = [()] * len(last)
        for _ in range(self._levels):
            logits = legal_logits(self._forward(waiting, real), prefix, self._allowed)
            chosen = self._draw(logits, temperature, out, torch.ones(len(last), dtype=torch.bool))
            prefix = [(*p, t) for p, t in zip(prefix, chosen.tolist(), strict=True)]
            waiting, real = chosen[:, None], ones
        return out

    def _forward(self, token: Int[Tensor, "R S"], real: Int[Tensor, "R S"]) -> Float[Tensor, "R V"]:
        """Forward new tokens and return the logits after the last."""
        self._mask = torch.cat([self._mask, real], 1)
        position = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -token.shape[1] :]
        hidden = self._policy.base_model(
            input_ids=token, position_ids=position, attention_mask=self._mask,
            past_key_values=self._cache, use_cache=True,
        ).last_hidden_state[:, -1]  # fmt: skip
        head = cast(Tensor, self._policy.get_output_embeddings().weight)
        return hidden @ head.T

    def _draw(
        self, logits: Float[Tensor, "R V"], temperature: float, out: Samples, live: Tensor
    ) -> Int[Tensor, " R"]:
        """Draw a token of each sample and record it."""
        logprob = (logits.float() / temperature).log_softmax(-1)
        chosen = torch.multinomial(logprob.exp(), 1)
        out.token.append(chosen[:, 0])
        out.used.append(live)
        out.logprob.append(logprob.gather(1, chosen)[:, 0])
        return chosen[:, 0]

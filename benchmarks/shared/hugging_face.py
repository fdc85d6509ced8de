"""Beam search under a constraint as users of Hugging Face write it.

Shapes:  B prompts   P tokens of each   W beams   L codes   R rows of beams   V tokens
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from orchard.policy.item_tokenizer import ItemTokenizer

Allowed = Mapping[tuple[int, ...], Sequence[int]]
"""Legal next tokens after each run of codes, as token ids."""


def paths(tokenizer: ItemTokenizer) -> list[tuple[int, ...]]:
    """The token ids of every item's codes, all items having equally many."""
    items = tokenizer.catalog
    levels = [
        tokenizer.tokens_at(level).numpy()[items.codes[:, level]]
        for level in range(items.trie.depth)
    ]
    return [tuple(path) for path in np.stack(levels, 1).tolist()]


def allowed_tokens(tokenizer: ItemTokenizer) -> Allowed:
    """The legal sequences as the dictionary that public codes keep."""
    allowed: dict[tuple[int, ...], set[int]] = {}
    for path in paths(tokenizer):
        for level, token in enumerate(path):
            allowed.setdefault(path[:level], set()).add(token)
    return {prefix: sorted(after) for prefix, after in allowed.items()}


class AllowedTokens(LogitsProcessor):
    """The usual constraint of public codes: look each beam's codes up, mask all other tokens."""

    def __init__(self, allowed: Allowed, prompt: int) -> None:
        """`allowed` maps the codes after `prompt` tokens to the legal next ones."""
        self._allowed, self._prompt = allowed, prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """The scores, minus infinity where a token is not legal."""
        mask = torch.full_like(scores, float("-inf"))
        for row, tokens in enumerate(input_ids.tolist()):
            mask[row, self._allowed[tuple(tokens[self._prompt :])]] = 0
        return scores + mask


@torch.inference_mode()
def beams(
    model: PreTrainedModel,
    prompt: Int[Tensor, "B P"],
    allowed: Allowed,
    *,
    width: int,
    levels: int,
    processor: bool = False,
) -> Int[Tensor, "B W L"]:
    """The codes of the best beams, by `generate` and its own hook for constraints.

    With a `processor`, by that instead. The constrained distribution is renormalised, so that it
    is the policy that Orchard searches with; nothing is paid for an end of sequence.
    """
    batch, length = prompt.shape

    def after(_: int, tokens: Tensor) -> list[int]:
        return list(allowed[tuple(tokens[length:].tolist())])

    constraint: dict[str, Any] = {"prefix_allowed_tokens_fn": after}
    if processor:
        constraint = {"logits_processor": [AllowedTokens(allowed, length)]}
    found = cast(Any, model).generate(
        prompt, attention_mask=torch.ones_like(prompt), num_beams=width,
        num_return_sequences=width, max_new_tokens=levels, min_new_tokens=levels, do_sample=False,
        renormalize_logits=True, eos_token_id=None, pad_token_id=0, **constraint,
    )  # fmt: skip
    return found[:, length:].view(batch, width, levels)


def legal_logits(
    logits: Float[Tensor, "R V"], prefix: Sequence[tuple[int, ...]], allowed: Allowed
) -> Float[Tensor, "R V"]:
    """The logits after each prefix, minus infinity where a token is not legal."""
    mask = torch.full_like(logits, float("-inf"))
    for row, codes in enumerate(prefix):
        mask[row, list(allowed[codes])] = 0
    return logits + mask

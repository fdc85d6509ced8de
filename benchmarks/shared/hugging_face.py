"""Constrained beam search as commonly written with Hugging Face.

Shapes:  B prompts   P tokens of each   W beams   L codes   R rows of beams   V tokens
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel

from orchard.policy.item_tokenizer import ItemTokenizer

Allowed = Mapping[tuple[int, ...], Sequence[int]]
"""Legal next token ids after each prefix of token ids."""


def paths(tokenizer: ItemTokenizer) -> list[tuple[int, ...]]:
    """Return the token ids of every item's codes; all items must have equally many."""
    catalog = tokenizer.catalog
    token_of_level = [
        tokenizer.tokens_at(level).numpy()[catalog.codes[:, level]]
        for level in range(catalog.trie.depth)
    ]
    return [tuple(path) for path in np.stack(token_of_level, 1).tolist()]


def allowed_tokens(tokenizer: ItemTokenizer) -> Allowed:
    """Build the prefix dictionary of legal sequences that public implementations use."""
    allowed: dict[tuple[int, ...], set[int]] = {}
    for path in paths(tokenizer):
        for level, token in enumerate(path):
            allowed.setdefault(path[:level], set()).add(token)
    return {prefix: sorted(next_tokens) for prefix, next_tokens in allowed.items()}


class AllowedTokens(LogitsProcessor):
    """Logits processor of public implementations: look up each beam's prefix, mask the rest."""

    def __init__(self, allowed: Allowed, prompt: int) -> None:
        """Store `allowed`, which maps the tokens after `prompt` tokens to the legal next ones."""
        self._allowed, self._prompt = allowed, prompt

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> Any:
        """Return the scores, -inf for illegal tokens."""
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
    """Search the best beams by `generate` and its `prefix_allowed_tokens_fn`; return their codes.

    With `processor`, a logits processor constrains instead. The constrained distribution is
    renormalized, so that it equals the policy of Orchard's search; no end-of-sequence token is
    generated.
    """
    batch, length = prompt.shape

    def allowed_after(_: int, tokens: Tensor) -> list[int]:
        return list(allowed[tuple(tokens[length:].tolist())])

    constraint: dict[str, Any] = {"prefix_allowed_tokens_fn": allowed_after}
    if processor:
        constraint = {"logits_processor": [AllowedTokens(allowed, length)]}
    sequences = cast(Any, model).generate(
        prompt, attention_mask=torch.ones_like(prompt), num_beams=width,
        num_return_sequences=width, max_new_tokens=levels, min_new_tokens=levels, do_sample=False,
        renormalize_logits=True, eos_token_id=None, pad_token_id=0, **constraint,
    )  # fmt: skip
    return sequences[:, length:].view(batch, width, levels)


@torch.inference_mode()
def strong_beams(
    model: PreTrainedModel,
    prompt: Int[Tensor, "B P"],
    allowed: Allowed,
    *,
    width: int,
    levels: int,
) -> Int[Tensor, "B W L"]:
    """Search the best beams with one prefill per prompt, batched, with dense masks."""
    policy, batch, cache = cast(Any, model), len(prompt), DynamicCache()
    logits = policy(prompt, past_key_values=cache, logits_to_keep=1).logits[:, -1]
    score, codes = torch.zeros(batch, 1), prompt.new_zeros(batch, 1, 0)
    for level in range(levels):
        num_beams, num_tokens = codes.shape[1], logits.shape[1]
        prefix = [tuple(row) for row in codes.reshape(batch * num_beams, level).tolist()]
        legal = legal_logits(logits, prefix, allowed)
        step = legal.log_softmax(-1).view(batch, num_beams, num_tokens)
        score, flat = (score[:, :, None] + step).view(batch, -1).topk(width)
        parent_beam, code = flat // num_tokens, flat % num_tokens
        parent_codes = codes.gather(1, parent_beam[:, :, None].expand(-1, -1, level))
        codes = torch.cat([parent_codes, code[:, :, None]], -1)
        if level == levels - 1:
            break
        rows = (torch.arange(batch)[:, None] * num_beams + parent_beam).reshape(-1)
        cache.reorder_cache(rows)
        logits = policy(codes[:, :, -1].reshape(-1, 1), past_key_values=cache).logits[:, -1]
    return codes


def legal_logits(
    logits: Float[Tensor, "R V"], prefix: Sequence[tuple[int, ...]], allowed: Allowed
) -> Float[Tensor, "R V"]:
    """Return the logits after each prefix, -inf for illegal tokens."""
    mask = torch.full_like(logits, float("-inf"))
    for row, codes in enumerate(prefix):
        mask[row, list(allowed[codes])] = 0
    return logits + mask

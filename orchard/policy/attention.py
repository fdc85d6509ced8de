"""Attention masks of trees, for full attention and for layers with windows or chunks.

Transformers models accept a mask for all layers, or one for each kind of layer where a model mixes
kinds. A mask that a caller gives replaces the model's own, windows included, so that a tree needs
its windows in the mask. The distance between two tokens of a path is that of their positions, not
of their slots: slots of other branches lie between them.

Shapes:  R rows   S slots that attend   C slots that are attended to
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PretrainedConfig

from orchard.errors import EngineError

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"
_WINDOWS = (
    "sliding_window",
    "attention_chunk_size",
    "attention_window_size",
    "window_size",
    "local_window_size",
)
"""Settings of a model's configuration that limit how far back a layer reads."""


def position_limit(config: PretrainedConfig) -> int:
    """Return the maximum number of positions of a model.

    Raises:
        EngineError: the model has none, because it has no position table or rotary embedding.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        raise EngineError(
            f"a model of type {config.model_type} states no max_position_embeddings, and packed "
            "trees need explicit positions; take a model with rotary or learned positions, such as "
            "Qwen3, Llama, Mistral or Gemma 3"
        )
    return limit


def longest_window(config: PretrainedConfig) -> int:
    """Return the length of the longest window or chunk in a model's configuration, 0 for none."""
    text = config.get_text_config()
    sizes = [getattr(text, name, None) for name in _WINDOWS]
    return max((size for size in sizes if isinstance(size, int)), default=0)


def mask_kinds(config: PretrainedConfig) -> list[str]:
    """Return the kinds of layers of a model that differ in their masks, in alphabetical order."""
    text: Any = config.get_text_config()
    window = getattr(text, "sliding_window", None)
    kinds = set(getattr(text, "layer_types", None) or [SLIDING if window else FULL])
    return sorted(kinds & {FULL, SLIDING, CHUNKED}) or [FULL]


def make_masks(
    config: PretrainedConfig,
    visible: Bool[Tensor, "R S C"],
    position: Int[Tensor, "R S"],
    key_position: Int[Tensor, "R C"],
    dtype: torch.dtype,
) -> Float[Tensor, "R 1 S C"] | dict[str, Float[Tensor, "R 1 S C"]]:
    """Make the additive masks of a forward pass: one, or one per kind of layer.

    The last S of the C slots are the attending ones. A slot that sees nothing, which is padding,
    attends to itself: 0/0 in its softmax would turn all gradients into NaN.

    Args:
        config: configuration of the model.
        visible: whether slot c is an ancestor of slot s, or s itself, windows aside.
        position: position of each attending slot in its path.
        key_position: position of each slot that is attended to.
        dtype: precision of the model.
    """
    text: Any = config.get_text_config()
    window, chunk = (
        getattr(text, "sliding_window", None),
        getattr(text, "attention_chunk_size", None),
    )
    masks: dict[str, Tensor] = {}
    for kind in mask_kinds(config):
        seen = visible
        if kind == SLIDING and window:
            seen = visible & (position[:, :, None] - key_position[:, None] < window)
        elif kind == CHUNKED and chunk:
            same = position[:, :, None] // chunk == key_position[:, None] // chunk
            seen = visible & same
        masks[kind] = _additive(seen, dtype)
    return next(iter(masks.values())) if len(masks) == 1 else masks


def _additive(visible: Bool[Tensor, "R S C"], dtype: torch.dtype) -> Float[Tensor, "R 1 S C"]:
    """Return 0 where a slot is visible and the lowest number elsewhere."""
    num_slots, num_keys = visible.shape[1:]
    sees_nothing = ~visible.any(-1, keepdim=True)
    itself = torch.eye(num_slots, dtype=torch.bool, device=visible.device)
    itself = torch.nn.functional.pad(itself, (num_keys - num_slots, 0))
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    mask.masked_fill_(~(visible | (sees_nothing & itself)), torch.finfo(dtype).min)
    return mask[:, None]

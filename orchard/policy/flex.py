"""FlexAttention over packed trees, whose cost follows the visible slots alone.

All rows of a batch are joined into one sequence without padding. A slot sees slot j if and only if
`j <= i < end[j]`, where `end[j]` is the end of the subtree of slot j, so that a tree mask is one
array and needs no [slots, slots] table. Blocks of 128 x 128 slots are skipped where nothing is
visible, and computed without a mask where everything is.

Shapes:  N slots of all rows, a multiple of `BLOCK`   K blocks
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward

from orchard.policy.attention import CHUNKED, SLIDING, mask_kinds

BLOCK = 128
"""Number of slots of a block."""
_MAX_KERNELS = 64
"""Largest number of compiled kernels of a process."""
_NAME = "orchard_flex"
"""Name under which transformers knows this implementation of attention."""


def enable(model: PreTrainedModel) -> bool:
    """Let a model attend by FlexAttention; return whether its code takes another attention.

    Masks of such a model must be those of `block_masks`. A process compiles the kernel for each
    precision, with and without gradients, and for each kind of layer; above torch's usual limit of
    eight it would be replaced by one that holds all scores in memory.
    """
    dynamo = cast(Any, torch)._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, _MAX_KERNELS)
    model.set_attn_implementation(_NAME)
    return is_enabled(model)


def is_enabled(model: PreTrainedModel) -> bool:
    """Return whether `enable` was successful."""
    return getattr(model.config.get_text_config(), "_attn_implementation", None) == _NAME


def block_masks(
    config: PretrainedConfig, end: Int64[Tensor, " N"], position: Int64[Tensor, " N"]
) -> BlockMask | dict[str, BlockMask]:
    """Make the masks of one sequence of packed trees: one, or one per kind of layer.

    Args:
        config: configuration of the model.
        end: end of the subtree of each slot, in slots of the sequence.
        position: position of each slot in its path.
    """
    text: Any = config.get_text_config()
    masks: dict[str, BlockMask] = {}
    for kind in mask_kinds(config):
        reach = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}.get(kind, "")
        masks[kind] = _block_mask(end, position, kind, getattr(text, reach, None))
    return next(iter(masks.values())) if len(masks) == 1 else masks


def _block_mask(
    end: Int64[Tensor, " N"], position: Int64[Tensor, " N"], kind: str, reach: int | None
) -> BlockMask:
    """Make the mask of one kind of layer; `reach` is its window or chunk, None for full."""

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query < end[key])

    function: Callable[..., Tensor] = visible
    if reach is not None:
        limit = reach

        def within(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            if kind == SLIDING:
                near = position[query] - position[key] < limit
            else:
                near = position[query] // limit == position[key] // limit
            return visible(batch, head, query, key) & near

        function = within
    some, every = _blocks(end)
    if reach is not None:  # some of the visible slots may be too far away
        some, every = some | every, torch.zeros_like(every)
    return BlockMask.from_kv_blocks(
        *_listed(some), *_listed(every), BLOCK_SIZE=BLOCK, mask_mod=function
    )


def _blocks(end: Int64[Tensor, " N"]) -> tuple[Bool[Tensor, "K K"], Bool[Tensor, "K K"]]:
    """Return in which blocks of queries (rows) and keys some, and all, pairs are visible."""
    block_end = end.view(-1, BLOCK)
    first = torch.arange(len(block_end), device=end.device) * BLOCK  # slot of each block
    before = first < first[:, None]  # [K, K]: all keys come before all queries
    # The first query of a block is the first to be past a subtree, the last query the last.
    seen = before & (block_end.amax(1) > first[:, None])
    every = before & (block_end.amin(1) >= first[:, None] + BLOCK)
    diagonal = torch.eye(len(first), dtype=torch.bool, device=end.device)
    return (seen & ~every) | diagonal, every


def _listed(
    blocks: Bool[Tensor, "K K"],
) -> tuple[Int32[Tensor, "1 1 K"], Int32[Tensor, "1 1 K K"]]:
    """Return the number of chosen key blocks of each row, and their indices, chosen ones first."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return blocks.sum(1).int()[None, None], order.int()[None, None]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Run FlexAttention in the precision of the values.

    Under autocast, norms and rotations return queries and keys in float32. `scaled_dot_product`
    would convert them as well.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    attend = cast(Callable[..., Any], flex_attention_forward)
    return attend(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_NAME, _attend)

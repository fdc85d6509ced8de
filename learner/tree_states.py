"""Compute the hidden states of packed trees, by a dense mask or by FlexAttention.

Shapes:  B rows   S slots of the widest row   N slots of all rows   D hidden width
"""

from typing import Literal, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from transformers import PreTrainedModel

from orchard.errors import EngineError
from orchard.policy import flex
from orchard.policy.model import head_weight, hidden_states
from orchard.types import TrainBatch


def tree_mask(subtree_end: Int64[Tensor, "B S"]) -> Bool[Tensor, "B S S"]:
    """Return the attention mask: which slots (last axis) each slot sees.

    Slot i sees slot j where `j <= i < subtree_end[j]`: itself, its ancestors and the prompt.
    """
    slot = torch.arange(subtree_end.shape[1], device=subtree_end.device)
    return (slot <= slot[:, None]) & (slot[:, None] < subtree_end[:, None, :])


def choose_attention(model: PreTrainedModel, attention: Literal["auto", "dense", "flex"]) -> None:
    """Set a model's attention over packed trees; `auto` is "flex" on GPUs, else "dense".

    Raises:
        EngineError: "flex" was asked for on the CPU, where it has no gradients, or of a model whose
            code has an attention of its own.
    """
    device = device_of(model)
    if attention == "dense" or (attention == "auto" and device == "cpu"):
        return
    if device == "cpu":
        raise EngineError(
            'learner.attention = "flex" needs a GPU, since FlexAttention has no gradients on the '
            'CPU; set "auto"'
        )
    if not flex.enable(model) and attention == "flex":
        raise EngineError(
            f"the code of {type(model).__name__} does not take another attention; "
            'set learner.attention = "dense"'
        )


def device_of(model: PreTrainedModel) -> str:
    """Return the type of the device that a model is on."""
    return head_weight(model).device.type


def tree_states(model: PreTrainedModel, batch: TrainBatch[Tensor]) -> Float[Tensor, "B S D"]:
    """Compute the last hidden state of every slot; those of padding have no meaning."""
    if flex.is_enabled(model):
        return _flex_states(model, batch)
    return hidden_states(model, batch.token, batch.position, tree_mask(batch.subtree_end))


def _flex_states(model: PreTrainedModel, batch: TrainBatch[Tensor]) -> Float[Tensor, "B S D"]:
    """Compute the hidden states of all rows in one sequence without padding."""
    filled = batch.subtree_end > 0  # [B, S]
    slot = filled.flatten().nonzero().squeeze(1)  # [N] index of each slot in the table
    length = filled.sum(1)
    # [B, 1] first slot of each row in the sequence
    first = (length.cumsum(0) - length)[:, None]
    end = (batch.subtree_end + first).flatten()[slot]
    token, position = batch.token.flatten()[slot], batch.position.flatten()[slot]
    # Slots up to a whole block see themselves alone.
    num_slots, missing = len(slot), -len(slot) % flex.BLOCK or (0 if len(slot) else flex.BLOCK)
    surplus = torch.arange(num_slots, num_slots + missing, device=slot.device)
    end = torch.cat([end, surplus + 1])
    token, position = (torch.cat([x, torch.zeros_like(surplus)]) for x in (token, position))
    output = model.base_model(
        input_ids=token[None],
        position_ids=position[None],
        attention_mask=flex.block_masks(model.config, end, position),
        use_cache=False,
    )
    hidden = cast(Tensor, output.last_hidden_state)[0, :num_slots]
    table = hidden.new_zeros(filled.numel(), hidden.shape[1])
    return table.index_copy(0, slot, hidden).view(*filled.shape, -1)

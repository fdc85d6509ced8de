"""Shard the decoder blocks of a policy over workers, and bound the memory of their activations."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def checkpoint_blocks(policy: PreTrainedModel) -> None:
    """Compute the decoder blocks once more in the backward pass instead of keeping what they did.

    Transformers' own switch works in training mode alone, and RL updates without dropout are in
    evaluation mode.
    """
    for block in cast(nn.ModuleList, policy.base_model.layers):
        forward = block.forward

        def again(*args: Any, forward: Callable[..., Any] = forward, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return forward(*args, **kwargs)
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)

        block.forward = again


def shard_parameters(scorer: nn.Module, policy: PreTrainedModel) -> None:
    """Apply FSDP2: one unit per decoder block; the rest (embeddings, norm) is the root unit."""
    for block in cast(nn.ModuleList, policy.base_model.layers):
        fully_shard(block)
    fully_shard(scorer)

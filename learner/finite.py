"""Explain numbers of an update that are not finite, by what went into it."""

import math
from collections.abc import Sequence

import numpy as np
from torch import Tensor, nn

from orchard.settings import LearnerConfig
from orchard.types import TrainBatch

LARGEST_WEIGHT = 1e4
"""Magnitude that no weight of a trained policy reaches."""
_INPUTS = {
    "behaviour_logprob": "the log-probabilities of the searches",
    "advantage_pos": "the advantages",
    "advantage_neg": "the advantages",
    "kl_weight": "the weights of the divergence",
}
"""Fields of a batch and what they are."""


def cause(parts: Sequence[TrainBatch]) -> str:
    """Name the input of an update's micro-batches that is not finite; "" if all of them are."""
    for name, meaning in _INPUTS.items():
        if not all(np.isfinite(getattr(part, name)).all() for part in parts):
            return f"{meaning} of the batch are not finite; look at the rewards of this step"
    targets = [part.values for part in parts if part.values is not None]
    if not all(np.isfinite(target.reward).all() for target in targets):
        return "the targets of the value head are not finite; look at learner.value"
    return ""


def state_of_weights(
    policy: nn.Module, config: LearnerConfig, *, section: str, updates: int
) -> str:
    """Say how large the weights are, and which setting drove them there.

    Args:
        policy: the policy, before the update that is not finite.
        config: settings of the learner.
        section: section of the settings that the updates follow, `sft` or `learner`.
        updates: number of updates so far.
    """
    sizes = [number(parameter.detach().abs().max()) for parameter in policy.parameters()]
    finite, largest = all(map(math.isfinite, sizes)), max(filter(math.isfinite, sizes), default=0.0)
    if not finite and updates == 0:
        return "the policy that training starts from has such weights; start from another"
    if not finite or largest > LARGEST_WEIGHT:
        size = f"as large as {largest:.1e}" if finite else "that are not finite"
        return (
            f"{updates} updates at {section}.lr = {config.lr:g} have made weights {size}; "
            f"lower {section}.lr, and continue from the policy that validation selected"
        )
    return (
        f"the inputs are finite and the weights at most {largest:.1e}, so the arithmetic in "
        f"learner.dtype = {config.dtype} overflows; lower {section}.lr = {config.lr:g} if the "
        "gradient's norm was growing, or look at the prompts of this step"
    )


def number(value: Tensor) -> float:
    """Convert a scalar tensor to a float, gathered first where it is sharded."""
    full = getattr(value, "full_tensor", None)
    return float(full() if full is not None else value)

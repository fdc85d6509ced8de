"""Optimiser and schedule."""

import math
from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    own: Sequence[nn.Parameter] = (),
    own_lr: float = 0.0,
) -> AdamW:
    """AdamW that decays matrices only: norms and biases are scales, not weights to shrink.

    The parameters of `own` learn at a rate of their own and do not decay.
    """
    apart = {id(p) for p in own}
    shared = [p for p in model.parameters() if p.requires_grad and id(p) not in apart]
    groups = [
        {"params": [p for p in shared if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in shared if p.ndim < 2], "weight_decay": 0.0},
        {"params": list(own), "weight_decay": 0.0, "lr": own_lr},
    ]
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95))


def make_schedule(
    optimizer: AdamW, *, total_steps: int, warmup: float, final_lr: float
) -> LambdaLR:
    """Linear rise over a share of the steps, then a cosine down to a share of the peak rate."""
    rise = max(1, round(total_steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, total_steps - rise))
        return final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)

"""Optimiser and schedule."""

import math

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def optimiser(model: nn.Module, *, lr: float, weight_decay: float) -> AdamW:
    """AdamW that decays matrices only: norms and biases are scales, not weights to shrink."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95))


def schedule(optimizer: AdamW, *, total_steps: int, warmup: float, final_lr: float) -> LambdaLR:
    """Linear rise over a share of the steps, then a cosine down to a share of the peak rate."""
    rise = max(1, round(total_steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        progress = min(1.0, (step - rise) / max(1, total_steps - rise))
        return final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)

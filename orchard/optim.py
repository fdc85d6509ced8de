"""AdamW optimizer and learning-rate schedule."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    head_params: Sequence[nn.Parameter] = (),
    head_lr: float = 0.0,
) -> AdamW:
    """Create an AdamW optimizer that decays matrices only, not norms and biases.

    The parameters of a head, `head_params`, have the separate learning rate `head_lr` and no weight
    decay.
    """
    head_ids = {id(p) for p in head_params}
    shared = [p for p in model.parameters() if p.requires_grad and id(p) not in head_ids]
    groups = [
        {"params": [p for p in shared if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in shared if p.ndim < 2], "weight_decay": 0.0},
        {"params": list(head_params), "weight_decay": 0.0, "lr": head_lr},
    ]
    return AdamW([g for g in groups if g["params"]], lr=lr, betas=(0.9, 0.95))


def make_schedule(
    optimizer: AdamW, *, total_steps: int, warmup: float, final_lr: float
) -> LambdaLR:
    """Create a schedule with linear warmup and cosine decay.

    Args:
        optimizer: the optimizer, whose rates are the peak rates.
        total_steps: number of updates.
        warmup: share of the updates with a linearly rising rate.
        final_lr: final rate as a share of the peak rate.
    """
    warmup_steps = max(1, round(total_steps * warmup))

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_lr + (1 - final_lr) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def continue_schedule(schedule: LambdaLR, state: Mapping[str, Any]) -> None:
    """Continue a schedule in place at the step of a saved one, which may have another length.

    The rate of a step is that of the schedule in memory at this step, whatever the length of the
    saved one: a run that is extended continues as a run of the new length.
    """
    schedule.load_state_dict(dict(state))
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates  # pyright: ignore[reportPrivateUsage]  # what `get_last_lr` returns

"""Updates that are not finite."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from learner.trainer import Trainer
from orchard.errors import UpdateError
from orchard.policy.weights import digest, snapshot
from orchard.testing import tiny_prompts
from tests.fixtures.trainers import BRISK, ITEMS, batch, make_trainer, replace_settings, windows


def state_after(trainer: Trainer) -> str:
    """Digest of everything that an update changes."""
    tensors = [value for group in trainer.optimizer.state.values() for value in group.values()]
    moments = "".join(repr(torch.as_tensor(value).double().sum().item()) for value in tensors)
    return f"{digest(snapshot(trainer.policy))} {trainer.updates} {moments}"


def test_an_update_with_values_that_are_not_finite_is_not_applied() -> None:
    trainer = make_trainer()
    good = batch(trainer, tiny_prompts(ITEMS, [1, 4, 2]))
    trainer.rl_step(good)
    before = state_after(trainer)
    bad = replace(good, advantage_pos=np.full_like(good.advantage_pos, np.nan))
    with pytest.raises(UpdateError, match="update 2 was not applied.*advantages.*not finite"):
        trainer.rl_step(bad)
    assert state_after(trainer) == before
    trainer.rl_step(good)
    assert trainer.updates == 2


@pytest.mark.parametrize(("section", "value"), [("learner", 1e25), ("sft", 1e25)])
def test_a_rate_that_drove_the_weights_out_of_range_is_named(section: str, value: float) -> None:
    trainer = make_trainer(replace_settings(BRISK, lr=value))
    update = (
        (lambda: trainer.rl_step(good)) if section == "learner"
        else (lambda: trainer.sft_step(windows()))
    )  # fmt: skip
    good = batch(trainer, tiny_prompts(ITEMS, [1, 4, 2]))
    update()
    before = state_after(trainer)
    with pytest.raises(
        UpdateError, match=rf"1 updates at {section}.lr = 1e\+25 .* weights as large"
    ):
        update()
    assert state_after(trainer) == before
    with pytest.raises(UpdateError, match=f"after update 1 .* lower {section}.lr"):
        trainer.check_logprobs(np.array([0.5, np.nan], dtype=np.float32))


def test_a_policy_that_is_damaged_from_the_start_is_not_blamed_on_a_rate() -> None:
    trainer = make_trainer()
    with torch.no_grad():
        next(trainer.policy.parameters()).fill_(torch.nan)
    with pytest.raises(UpdateError, match="the policy that training starts from has such weights"):
        trainer.sft_step(windows())

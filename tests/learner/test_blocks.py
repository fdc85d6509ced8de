"""Decoder blocks that are computed again in the backward pass."""

import copy

import numpy as np
import pytest
import torch

from learner.batch.sft import pack_answers
from learner.trainer import Trainer
from orchard.settings import LearnerConfig
from orchard.testing import tiny_setup
from orchard.types import PolicyVersion


@pytest.mark.slow
def test_checkpointed_updates_equal_plain_ones_and_run_each_block_twice() -> None:
    world = tiny_setup()
    batch = pack_answers(world.prompts, world.tokenizer, PolicyVersion(step=0, digest=""))
    weights, calls = [], []
    for checkpointed in (False, True):
        policy = copy.deepcopy(world.model)
        config = LearnerConfig(gradient_checkpointing=checkpointed)
        trainer = Trainer(policy, world.tokenizer, config, total_steps=3)
        seen = list[int]()
        policy.base_model.layers[0].mlp.register_forward_pre_hook(
            lambda *_, seen=seen: seen.append(1)
        )
        for _ in range(2):
            trainer.sft_step(batch)
        trained = len(seen)
        score = trainer.score(batch)
        calls.append((trained, len(seen) - trained))
        weights.append([score, *(p.detach().numpy().copy() for p in policy.parameters())])
    assert calls == [(2, 1), (4, 1)]
    for plain, again in zip(*weights, strict=True):
        assert np.array_equal(plain, again)
    assert torch.is_grad_enabled()

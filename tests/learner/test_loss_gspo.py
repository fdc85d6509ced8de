"""Test the loss with sequence ratios: its definition, and packed rows against flat ones."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from learner.advantage.estimators import ESTIMATORS, candidate_lengths
from learner.batch.microbatch import micro_batches, shard
from learner.batch.pack import flatten, pack
from learner.logprobs import choice_logprobs, to_tensors
from learner.loss import LossStats, policy_loss
from learner.trainer import Trainer
from orchard.catalog.catalog import Catalog
from orchard.config import parse
from orchard.errors import ConfigError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.settings import LearnerConfig
from orchard.testing import tiny_policy
from orchard.types import ScoredTrees, TrainBatch

Grow = Callable[..., ScoredTrees]
Policy = tuple[PreTrainedModel, ItemTokenizer]
CLIPS = {"clip_low": 0.1, "clip_high": 0.15, "dual_clip": 1.4}


def rules(**settings: float) -> LearnerConfig:
    return LearnerConfig.model_validate(settings)


def both(
    scored: ScoredTrees, catalog: Catalog, policy: Policy, name: str = "group"
) -> tuple[TrainBatch, TrainBatch]:
    arguments = (scored, [ESTIMATORS[name](scored, 1e-4)], policy[1])
    return pack(*arguments, sequence_ratio=True), flatten(*arguments, sequence_ratio=True)


def learn(
    parts: list[TrainBatch], catalog: Catalog, policy: Policy
) -> tuple[float, list[Tensor], LossStats]:
    """Sum loss, gradients and statistics over batches."""
    model, tokenizer = policy
    model.zero_grad()
    total, log = 0.0, LossStats()
    for part in parts:
        batch = to_tensors(part)
        got = choice_logprobs(model, batch, tokenizer)
        value, logged = policy_loss(*got, None, batch, rules(**CLIPS))
        value.backward()
        total, log = total + value.item(), log + logged
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None], log


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6 * float(right.abs().max()))


@pytest.mark.parametrize("name", ["group", "dapo", "drgrpo", "leave_one_out", "blend"])
def test_packed_rows_give_the_loss_and_every_gradient_of_flat_rows(
    scored: ScoredTrees, catalog: Catalog, precise: Policy, name: str
) -> None:
    packed, flat = both(scored, catalog, precise, name)
    assert len(packed.row) < len(flat.row)
    loss, gradients, log = learn([packed], catalog, precise)
    flat_loss, flat_gradients, flat_log = learn([flat], catalog, precise)
    assert loss == pytest.approx(flat_loss, rel=1e-6)
    assert_same(gradients, flat_gradients)
    assert any(bool(gradient.any()) for gradient in gradients)
    assert (log.ratios, log.clipped) == (flat_log.ratios, flat_log.clipped) == (42, log.clipped)
    assert 0 < log.clipped < 42


def test_the_loss_is_its_definition_candidate_by_candidate(
    scored: ScoredTrees, catalog: Catalog, precise: Policy
) -> None:
    packed, _ = both(scored, catalog, precise)
    trees, credit = scored.trees, ESTIMATORS["group"](scored, 1e-4)
    with torch.no_grad():
        logprob, _ = choice_logprobs(precise[0], to_tensors(packed), precise[1])
    gap = dict(
        zip(zip(packed.row, packed.chosen, strict=True),
            logprob.numpy() - packed.behaviour_logprob, strict=True)
    )  # fmt: skip
    expected, kinds = 0.0, set[str]()
    lengths = candidate_lengths(trees)
    for index, (path, length) in enumerate(zip(trees.paths(), lengths, strict=True)):
        prompt = trees.prompt_of_candidate[index]
        nodes = trees.state[path[path >= 0]]
        ratio = np.exp(sum(gap.get((prompt, node), 0.0) for node in nodes) / length)
        advantage = float(credit.advantage[index, 0])
        clipped = min(max(ratio, 1 - 0.1), 1 + 0.15)
        term = min(ratio * advantage, clipped * advantage)
        if advantage < 0:
            kinds |= {"dual"} if term < 1.4 * advantage else set()
            term = max(term, 1.4 * advantage)
        kinds |= {"low"} if advantage < 0 and ratio < 0.9 else set()
        kinds |= {"high"} if advantage > 0 and ratio > 1.15 else set()
        expected -= term / len(lengths)
    loss, _, _ = learn([packed], catalog, precise)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert kinds == {"dual", "low", "high"}


@pytest.mark.parametrize("max_tokens", [1, 40])
def test_micro_batches_and_shards_add_up_to_the_batch(
    scored: ScoredTrees, catalog: Catalog, precise: Policy, max_tokens: int
) -> None:
    packed, _ = both(scored, catalog, precise)
    loss, gradients, _ = learn([packed], catalog, precise)
    for parts in (
        list(micro_batches(packed, max_tokens)),
        [shard(packed, rank, 3) for rank in range(3)],
    ):
        part_loss, part_gradients, _ = learn(parts, catalog, precise)
        assert len(parts) > 1
        assert part_loss == pytest.approx(loss, abs=1e-6)
        assert_same(part_gradients, gradients)


def test_where_the_policy_has_not_moved_the_gradient_is_that_of_token_ratios(
    scored: ScoredTrees, catalog: Catalog, policy: Policy
) -> None:
    model, tokenizer = policy
    credits = [ESTIMATORS["group"](scored, 1e-4)]
    gradients: list[Tensor] = []
    for sequence_ratio in (False, True):
        batch = to_tensors(pack(scored, credits, tokenizer, sequence_ratio=sequence_ratio))
        logprob, entropy = choice_logprobs(model, batch, tokenizer)
        on_policy = type(batch)(
            **{f: getattr(batch, f) for f in batch.__dataclass_fields__}
            | {"behaviour_logprob": logprob.detach()}
        )
        value, _ = policy_loss(logprob, entropy, None, on_policy, rules(**CLIPS))
        gradients.append(torch.autograd.grad(value, logprob)[0])
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-7, rtol=1e-4)


def test_a_learner_takes_several_updates_with_sequence_ratios(
    scored: ScoredTrees, catalog: Catalog
) -> None:
    model, tokenizer = tiny_policy(catalog, seed=3)
    config = LearnerConfig(
        ratio="sequence", clip_low=3e-4, clip_high=4e-4, updates_per_batch=3, lr=1e-3, warmup=0.0,
        max_tokens=200,
    )  # fmt: skip
    learner = Trainer(model, tokenizer, config, total_steps=3)
    batch, _ = both(scored, catalog, (model, tokenizer))
    metrics = learner.rl_step(batch)
    assert np.isfinite(list(metrics.values())).all()
    assert metrics["clipped_fraction"] > 0


def test_credit_by_step_has_no_sequence_ratio() -> None:
    learner = {"ratio": "sequence", "estimator": "sibling"}
    with pytest.raises(ConfigError) as refused:
        ESTIMATORS.check(parse({"name": "x", "data": {"path": "d"}, "learner": learner}))
    assert refused.value.code == "config.ratio_of_steps"

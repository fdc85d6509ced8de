"""Test the loss against its definition per candidate, and packed rows against flat ones."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from learner.advantage.estimators import ESTIMATORS
from learner.batch.microbatch import micro_batches, shard
from learner.batch.pack import flatten, pack
from learner.logprobs import choice_logprobs, to_tensors
from learner.loss import LossStats, policy_loss
from orchard.catalog.catalog import Catalog
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.settings import KlConfig, LearnerConfig
from orchard.testing import tiny_policy
from orchard.types import PolicyVersion, ScoredTrees, TrainBatch

Grow = Callable[..., ScoredTrees]
Policy = tuple[PreTrainedModel, ItemTokenizer]
CLIPS = {"clip_low": 0.2, "clip_high": 0.3, "dual_clip": 1.5}


def rules(kl_weight: float = 0.0, **settings: float) -> LearnerConfig:
    return LearnerConfig.model_validate({"kl": KlConfig(weight=kl_weight), **settings})


def choices(gain: list[float], loss: list[float]) -> TrainBatch[Tensor]:
    """Build choices with behavior log-probability 0 and KL weight 1, without rows."""
    nothing = torch.zeros(len(gain), dtype=torch.long)
    return TrainBatch(
        token=nothing[:, None], position=nothing[:, None], subtree_end=nothing[:, None],
        row=nothing, query_slot=nothing, state=nothing, chosen=nothing,
        behaviour_logprob=torch.zeros(len(gain)), advantage_pos=torch.tensor(gain).float(),
        advantage_neg=torch.tensor(loss).float(), kl_weight=torch.ones(len(gain)),
        forward_tokens=0, flat_tokens=0, policy=PolicyVersion(step=0, digest=""), catalog="",
    )  # fmt: skip


@pytest.mark.slow
@given(
    log_ratio=st.floats(-3, 3),
    weighted=st.lists(st.floats(-2, 2), min_size=1, max_size=5),
    low=st.floats(0, 1),
    high=st.floats(0, 2),
    dual=st.sampled_from([0.0, 1.5, 3.0]),
)
def test_two_sums_say_as_much_as_all_candidates_of_a_choice(
    log_ratio: float, weighted: list[float], low: float, high: float, dual: float
) -> None:
    ratio, expected = float(np.exp(log_ratio)), 0.0
    for advantage in weighted:
        clipped = min(max(ratio, 1 - low), 1 + high)
        term = min(ratio * advantage, clipped * advantage)
        expected += max(term, dual * advantage) if dual and advantage < 0 else term
    gain, loss = sum(max(a, 0.0) for a in weighted), sum(min(a, 0.0) for a in weighted)
    value, _ = policy_loss(
        torch.tensor([log_ratio]), torch.zeros(1), None, choices([gain], [loss]),
        rules(clip_low=low, clip_high=high, dual_clip=dual),
    )  # fmt: skip
    assert value.item() == pytest.approx(-expected, rel=1e-5, abs=1e-5)


def test_the_gradient_stops_where_a_clip_is_active_against_the_advantage() -> None:
    ratio = torch.tensor([1.4, 0.7, 1.4, 1.6, 0.7, 1.1])
    logprob = ratio.log().requires_grad_()
    batch = choices([1, 1, 0, 0, 0, 1], [0, 0, -1, -1, -1, -1])
    value, parts = policy_loss(logprob, torch.zeros(6), None, batch, rules(**CLIPS))
    (gradient,) = torch.autograd.grad(value, logprob)
    torch.testing.assert_close(gradient, torch.tensor([0, -0.7, 1.4, 0, 0, 0]))
    assert parts.metrics()["clipped_fraction"] == pytest.approx(3 / 6)


def test_the_log_says_what_became_of_each_choice() -> None:
    logprob = torch.tensor([2.0, 0.5, 1.0]).log()
    entropy, batch = torch.tensor([0.1, 0.3, 0.2]), choices([1, 0, 1], [0, -1, 0])
    _, parts = policy_loss(logprob, entropy, logprob + 1, batch, rules(0.1, **CLIPS))
    divergence = 3 * (np.e - 2)
    assert parts.metrics() == pytest.approx(
        {
            "surrogate": -(1.3 - 0.8 + 1), "kl": divergence, "entropy": 0.2,
            "clipped_fraction": 2 / 3, "ratio_mean": 3.5 / 3, "ratio_max": 2.0,
            "logprob_gap": np.log(2),
        }
    )  # fmt: skip
    assert LossStats() + parts == parts
    batch = choices([0, 1], [-1, 0])
    _, other = policy_loss(logprob[1:], entropy[1:], None, batch, rules(0.1, **CLIPS))
    both = (parts + other).metrics()
    assert both == pytest.approx(
        {
            "surrogate": -1.7, "kl": divergence, "entropy": 1.1 / 5, "clipped_fraction": 3 / 5,
            "ratio_mean": 5 / 5, "ratio_max": 2.0, "logprob_gap": np.log(2),
        }
    )  # fmt: skip
    assert not any(LossStats().metrics().values())


def test_the_divergence_is_k3_and_pulls_towards_the_reference() -> None:
    logprob = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -0.5])
    batch = replace(choices([0.0] * 3, [0.0] * 3), kl_weight=torch.tensor([1.0, 2.0, 3.0]))
    value, parts = policy_loss(logprob, torch.zeros(3), reference, batch, rules(0.1, **CLIPS))
    k3 = [np.exp(-0.5) + 0.5 - 1, np.exp(1.0) - 1.0 - 1, 0.0]
    assert parts.kl == pytest.approx(k3[0] + 2 * k3[1], rel=1e-6)
    assert value.item() == pytest.approx(0.1 * parts.kl, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, logprob)
    assert gradient[0] > 0 > gradient[1]
    assert gradient[2] == 0


def learn(
    parts: Iterable[TrainBatch], catalog: Catalog, policy: Policy
) -> tuple[float, list[Tensor], LossStats]:
    """Sum loss, gradients and statistics over batches; the reference is another policy."""
    model, tokenizer = policy
    reference, _ = tiny_policy(catalog, seed=1)
    reference.double()
    model.zero_grad()
    total, log = 0.0, LossStats()
    for part in parts:
        batch = to_tensors(part)
        with torch.no_grad():
            anchor, _ = choice_logprobs(reference, batch, tokenizer)
        got = choice_logprobs(model, batch, tokenizer)
        value, logged = policy_loss(*got, anchor, batch, rules(0.1, **CLIPS))
        value.backward()
        total, log = total + value.item(), log + logged
    return total, [p.grad.clone() for p in model.parameters() if p.grad is not None], log


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    """Check that gradients agree up to the rounding of another summation order."""
    for left, right in zip(a, b, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6 * float(right.abs().max()))


def both(scored: ScoredTrees, catalog: Catalog, policy: Policy) -> tuple[TrainBatch, TrainBatch]:
    credits = [ESTIMATORS["group"](scored, 1e-4), ESTIMATORS["drgrpo"](scored, 1e-4)]
    arguments = (scored, credits, policy[1])
    return pack(*arguments), flatten(*arguments)


def test_packed_rows_give_the_loss_and_every_gradient_of_flat_rows(
    scored: ScoredTrees, catalog: Catalog, precise: Policy
) -> None:
    packed, flat = both(scored, catalog, precise)
    loss, gradients, log = learn([packed], catalog, precise)
    flat_loss, flat_gradients, flat_log = learn([flat], catalog, precise)
    assert loss == pytest.approx(flat_loss, rel=1e-6)
    assert log.kl == pytest.approx(flat_log.kl, rel=1e-6)
    assert_same(gradients, flat_gradients)
    assert len(gradients) == len(list(precise[0].parameters()))
    assert any(bool(gradient.any()) for gradient in gradients)


def test_every_kind_of_clip_is_active_where_packed_and_flat_are_compared(
    scored: ScoredTrees, catalog: Catalog, precise: Policy
) -> None:
    packed, _ = both(scored, catalog, precise)
    with torch.no_grad():
        logprob, _ = choice_logprobs(precise[0], to_tensors(packed), precise[1])
    ratio = np.exp(logprob.numpy() - packed.behaviour_logprob)
    assert ((ratio > 1.3) & (packed.advantage_pos > 0) & (packed.advantage_neg < 0)).any()
    assert ((ratio < 0.8) & (packed.advantage_neg < 0)).any()
    assert ((ratio > 1.5) & (packed.advantage_neg < 0)).any()
    assert (packed.kl_weight > 0).all()


@pytest.mark.parametrize("max_tokens", [1, 40, 10_000])
def test_micro_batches_add_up_to_the_batch(
    scored: ScoredTrees, catalog: Catalog, precise: Policy, max_tokens: int
) -> None:
    packed, _ = both(scored, catalog, precise)
    loss, gradients, log = learn([packed], catalog, precise)
    parts = list(micro_batches(packed, max_tokens))
    part_loss, part_gradients, part_log = learn(parts, catalog, precise)
    assert part_loss == pytest.approx(loss, rel=1e-6)
    assert part_log.metrics() == pytest.approx(log.metrics(), rel=1e-5)
    assert_same(part_gradients, gradients)


@pytest.mark.parametrize("world", [1, 2, 4, 9])
def test_shards_add_up_to_the_batch(
    scored: ScoredTrees, catalog: Catalog, precise: Policy, world: int
) -> None:
    packed, _ = both(scored, catalog, precise)
    loss, gradients, _ = learn([packed], catalog, precise)
    parts = [shard(packed, rank, world) for rank in range(world)]
    part_loss, part_gradients, _ = learn(parts, catalog, precise)
    assert part_loss == pytest.approx(loss, rel=1e-6)
    assert_same(part_gradients, gradients)


def test_a_batch_without_choices_has_a_zero_gradient_for_every_parameter(
    scored: ScoredTrees, catalog: Catalog, precise: Policy
) -> None:
    packed, _ = both(scored, catalog, precise)
    empty = shard(packed, 8, 9)
    assert len(empty.row) == 0
    loss, gradients, log = learn([empty], catalog, precise)
    assert loss == 0
    assert log == LossStats()
    assert len(gradients) == len(list(precise[0].parameters()))
    assert not any(bool(gradient.any()) for gradient in gradients)


def test_prompts_that_share_codes_give_the_loss_that_they_give_alone(
    score_leaves: Grow, catalog: Catalog, precise: Policy
) -> None:
    groups, rewards = [[0, 1, 2, 9], [0, 1, 2, 9]], [[1.0, 0.0, 0.0, 0.2], [0.0, 0.0, 1.0, 0.0]]
    scored = score_leaves(groups, rewards, histories=[5, 2])
    together, _, _ = learn([both(scored, catalog, precise)[0]], catalog, precise)
    alone = 0.0
    for row in range(2):
        bounds = scored.trees.candidate_start[[row, row + 1]]
        part = ScoredTrees(
            trees=scored.trees.select(np.array([row])),
            reward=scored.reward[slice(*bounds)],
            parts={},
        )
        alone += learn([both(part, catalog, precise)[0]], catalog, precise)[0]
    assert together == pytest.approx(alone / 2, rel=1e-6)


def test_the_full_distribution_is_the_softmax_over_the_vocabulary(
    scored: ScoredTrees, catalog: Catalog, policy: Policy
) -> None:
    model, tokenizer = policy
    _, flat = both(scored, catalog, policy)
    batch = to_tensors(flat)
    with torch.no_grad():
        got = choice_logprobs(model, batch, tokenizer, "full")
        logits = model(input_ids=batch.token).logits[batch.row, batch.query_slot]
    expected = logits.log_softmax(-1)
    token = tokenizer.token_of(batch.chosen)
    torch.testing.assert_close(got[0], expected.gather(1, token[:, None])[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1], -(expected.exp() * expected).sum(1), atol=1e-5, rtol=0)

"""Test the losses against their formulas, candidate by candidate, and their gradients."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

from learner.advantage.estimators import ESTIMATORS
from learner.batch.pack import flatten, pack
from learner.logprobs import choice_logprobs, to_tensors
from learner.loss import policy_loss
from learner.surrogates import LOSSES, RatioTerms
from orchard.config import parse
from orchard.errors import ConfigError
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.settings import LearnerConfig
from orchard.types import ScoredTrees

Grow = Callable[..., ScoredTrees]
LOW, HIGH, DELTA = 0.2, 0.3, 0.1


def rules(loss: str, *, low: float = LOW, high: float = HIGH, **more: object) -> LearnerConfig:
    return LearnerConfig.model_validate(
        {"loss": loss, "clip_low": low, "clip_high": high, "ecpo_delta": DELTA, "kl": {"weight": 0}}
        | more
    )


def cispo(log_ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """Value and derivative by log pi of the term of one candidate."""
    weight = min(max(np.exp(log_ratio), 1 - low), 1 + high)
    return weight * advantage * log_ratio, weight * advantage


def ecpo(log_ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """The same by the paper: PPO's minimum with another behavior probability.

    With pi = e^log_ratio and a behavior probability of 1, the denominator is a constant.
    """
    pi = np.exp(log_ratio)
    behavior = max(1.0, pi / (1 + high + DELTA)) if advantage < 0 else 1.0
    ratio = pi / behavior
    clipped = min(max(ratio, 1 - low), 1 + high)
    value = min(ratio * advantage, clipped * advantage)
    is_open = ratio * advantage <= clipped * advantage
    return value, ratio * advantage if is_open else 0.0


@given(
    log_ratio=st.floats(-3, 3),
    weighted=st.lists(st.floats(-2, 2), min_size=1, max_size=5),
    low=st.floats(0, 1),
    high=st.floats(0, 2),
)
@pytest.mark.parametrize(("name", "formula"), [("cispo", cispo), ("ecpo", ecpo)])
def test_a_loss_is_the_sum_of_its_formula_over_candidates(
    name: str,
    formula: Callable[..., tuple[float, float]],
    log_ratio: float,
    weighted: list[float],
    low: float,
    high: float,
) -> None:
    single = float(np.float32(log_ratio))
    for edge in (1 - low, 1 + high, 1 + high + DELTA):  # at a kink the derivative has two values
        if abs(np.exp(single) - edge) < 1e-4:
            return
    expected = np.sum([formula(single, advantage, low, high) for advantage in weighted], axis=0)
    logprob = torch.tensor([single], requires_grad=True)
    gain, loss = sum(max(a, 0.0) for a in weighted), sum(min(a, 0.0) for a in weighted)
    ratios = RatioTerms(logprob, torch.tensor([gain]), torch.tensor([loss]))
    term, _ = LOSSES[name](ratios, rules(name, low=low, high=high, dual_clip=0.0))
    (gradient,) = torch.autograd.grad(term.sum(), logprob)
    assert term.item() == pytest.approx(expected[0], rel=1e-4, abs=1e-4)
    assert gradient.item() == pytest.approx(expected[1], rel=1e-4, abs=1e-4)


def test_the_clipped_share_counts_what_each_loss_changes() -> None:
    log_ratio = torch.tensor([0.5, 0.9, 1.35, 1.5, 1.5, 0.5]).log()
    gain = torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0, 1.0])
    loss = torch.tensor([-1.0, -1.0, 0.0, -1.0, 0.0, 0.0])
    expected = {
        "clip": [True, False, True, False, False, False],
        "cispo": [True, False, True, True, False, True],
        "ecpo": [True, False, True, True, False, False],
    }
    for name, clipped in expected.items():
        found = LOSSES[name](RatioTerms(log_ratio, gain, loss), rules(name))
        assert found.clipped.tolist() == clipped, name


@pytest.mark.parametrize("sequence_ratio", [False, True])
@pytest.mark.parametrize("name", ["cispo", "ecpo"])
def test_packed_rows_give_the_loss_and_gradient_of_flat_rows(
    score_random: Grow,
    precise: tuple[PreTrainedModel, ItemTokenizer],
    name: str,
    sequence_ratio: bool,
) -> None:
    model, tokenizer = precise
    scored = score_random([5, 6])
    credits = [ESTIMATORS["group"](scored, 1e-4)]
    config = rules(name, ratio="sequence" if sequence_ratio else "token")
    found = list[tuple[float, list[torch.Tensor], float]]()
    for lay_out in (pack, flatten):
        batch = to_tensors(lay_out(scored, credits, tokenizer, sequence_ratio=sequence_ratio))
        model.zero_grad()
        value, stats = policy_loss(*choice_logprobs(model, batch, tokenizer), None, batch, config)
        value.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((value.item(), gradients, stats.clipped))
    (packed, gradients, clipped), (flat, flat_gradients, _) = found
    assert clipped > 0
    assert packed == pytest.approx(flat, rel=1e-6)
    for left, right in zip(gradients, flat_gradients, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6 * float(right.abs().max()))


@pytest.mark.parametrize("name", ["cispo", "ecpo"])
def test_on_policy_all_losses_have_the_gradient_of_the_policy(
    score_random: Grow, precise: tuple[PreTrainedModel, ItemTokenizer], name: str
) -> None:
    model, tokenizer = precise
    scored = score_random([5])
    packed = to_tensors(pack(scored, [ESTIMATORS["group"](scored, 1e-4)], tokenizer))
    gradients = list[torch.Tensor]()
    for loss in ("clip", name):
        logprob, entropy = choice_logprobs(model, packed, tokenizer)
        batch = replace(packed, behaviour_logprob=logprob.detach())
        value, _ = policy_loss(logprob, entropy, None, batch, rules(loss))
        gradients.append(torch.autograd.grad(value, logprob)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("learner", "message"),
    [
        ({"loss": "sispo"}, "did you mean cispo"),
        ({"loss": "cispo", "clip_high": 4.0}, "bounds the ratio at 5 .* learner.dual_clip = 0"),
        ({"loss": "ecpo", "dual_clip": 1.25}, "bounds the ratio at 1.3 .* learner.dual_clip = 0"),
        ({"loss": "ecpo", "ecpo_delta": 0.0}, "ecpo_delta"),
    ],
)
def test_losses_that_do_not_fit_are_refused(learner: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LOSSES.check(parse({"name": "x", "data": {"path": "d"}, "learner": learner}))


@pytest.mark.parametrize(
    "learner",
    [{}, {"loss": "cispo"}, {"loss": "ecpo"}, {"loss": "ecpo", "dual_clip": 0.0},
     {"loss": "cispo", "ratio": "sequence", "tis_clip": 0.0}],
)  # fmt: skip
def test_losses_fit_the_other_defaults(learner: dict[str, object]) -> None:
    LOSSES.check(parse({"name": "x", "data": {"path": "d"}, "learner": learner}))

r"""Compute the policy-gradient loss of packed choices and its statistics.

`learner.surrogates` has the losses that `learner.loss` names. What follows is the default, `clip`.

One choice is shared by every candidate i through it, each with a weighted advantage a_i. They all
see the same ratio r = pi_current / pi_behaviour, so their surrogates collapse. For a_i >= 0,
min(r a_i, clip(r) a_i) = a_i min(r, 1 + high); for a_i < 0 it is a_i max(r, 1 - low), and with a
dual clip c > 1 (arXiv 1912.09729, eq. 5) max(c a_i, .) = a_i min(max(r, 1 - low), c). Hence

    sum_i min(r a_i, clip(r) a_i) = A+ min(r, 1 + high) + A- min(max(r, 1 - low), c)

with A+ and A- the sums of the positive and of the negative a_i. This is exact, not an
approximation, and A+ and A- are all that a choice needs to carry. The other losses are linear in
A+ and A- as well.

GSPO (arXiv 2507.18071, eq. 5-7) has one ratio per candidate, the geometric mean of the ratios of
its tokens, s_i = exp(1 / |y_i| sum_t log r_t), clipped as above. Candidates do not share it, so
nothing collapses. A batch for GSPO lists the choices on each candidate's path; the sums over them
are an `index_add`, whose gradient reaches each choice from every candidate through it. This is
exact, too. |y_i| counts forced codes, as the estimators do; their log-ratio is 0.

Shapes:  E choices   R ratios, of choices or of candidates
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from learner.surrogates import LOSSES, RatioTerms
from orchard.settings import LearnerConfig
from orchard.types import TrainBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStats:
    """Sums and maxima over choices; `+` combines those of micro-batches and workers."""

    surrogate: float = 0.0
    kl: float = 0.0
    """Weighted k3 divergence from the reference, before the coefficient `learner.kl.weight`."""
    value: float = 0.0
    """Squared error of the value head, before the coefficient `learner.value.weight`."""
    target_nll: float = 0.0
    """Negative log-probability of target codes, weighted as in the loss."""
    choices: float = 0.0
    """Number of choices, over which `entropy` is summed."""
    entropy: float = 0.0
    clipped: float = 0.0
    """Number of ratios for which the clip of their advantage's sign is active."""
    ratios: float = 0.0
    """Number of ratios (one per choice, or one per candidate), over which `ratio` is summed."""
    ratio: float = 0.0
    ratio_max: float = 0.0
    logprob_gap: float = 0.0
    """Largest absolute difference between current and behavior log-probabilities."""

    def __add__(self, other: "LossStats") -> "LossStats":
        """Return the statistics of both together."""
        largest = ("ratio_max", "logprob_gap")
        return LossStats(
            **{
                f.name: max(a, b) if f.name in largest else a + b
                for f in fields(self)
                for a, b in [(getattr(self, f.name), getattr(other, f.name))]
            }
        )

    def metrics(self) -> dict[str, float]:
        """Return the metrics to log: weighted sums unchanged, the rest per choice or per ratio."""
        num_choices, num_ratios = max(1.0, self.choices), max(1.0, self.ratios)
        return {
            "surrogate": self.surrogate,
            "kl": self.kl,
            "entropy": self.entropy / num_choices,
            "clipped_fraction": self.clipped / num_ratios,
            "ratio_mean": self.ratio / num_ratios,
            "ratio_max": self.ratio_max,
            "logprob_gap": self.logprob_gap,
        }


def policy_loss(
    logprob: Float32[Tensor, " E"],
    entropy: Float32[Tensor, " E"],
    reference_logprob: Float32[Tensor, " E"] | None,
    batch: TrainBatch[Tensor],
    config: LearnerConfig,
) -> tuple[Float32[Tensor, ""], LossStats]:
    """Return the negative surrogate plus the weighted k3 divergence from the reference.

    Args:
        logprob: log-probabilities of the choices under the current policy, with gradient.
        entropy: entropies of the distributions that they were drawn from; logged only.
        reference_logprob: log-probabilities under the frozen reference; None leaves the
            divergence out.
        batch: choices with their behavior log-probabilities, advantages and weights; where it
            lists candidates (`sequences`), there is one ratio per candidate.
        config: the loss, its clips, and `kl.weight`, the coefficient of sum kl_weight_e k3_e,
            k3 = e^d - d - 1 with d = reference - current (Schulman 2020, "Approximating KL
            divergence").
    """
    ratios = _ratio_terms(logprob, batch)
    term, clipped = LOSSES[config.loss](ratios, config)
    surrogate = -term.sum()
    divergence = surrogate.new_zeros(())
    if reference_logprob is not None:
        reference_log_ratio = reference_logprob - logprob
        k3 = reference_log_ratio.exp() - reference_log_ratio - 1
        divergence = (batch.kl_weight * k3).sum()
    choice_log_ratio = logprob - batch.behaviour_logprob
    ratio = ratios.log_ratio.exp()
    stats = _loss_stats(surrogate, divergence, choice_log_ratio, entropy, ratio, clipped)
    return surrogate + config.kl.weight * divergence, stats


def _ratio_terms(logprob: Float32[Tensor, " E"], batch: TrainBatch[Tensor]) -> RatioTerms:
    """Return the terms of each choice, or of each candidate where the batch lists candidates."""
    log_ratio, sequences = logprob - batch.behaviour_logprob, batch.sequences
    if sequences is None:
        return RatioTerms(log_ratio, batch.advantage_pos, batch.advantage_neg)
    # [R] sum of the log-ratios along each candidate's path
    total = log_ratio.new_zeros(len(sequences.row))
    total = total.index_add(0, sequences.candidate, log_ratio.index_select(0, sequences.choice))
    return RatioTerms(
        total / sequences.length,
        sequences.advantage.clamp(min=0),
        sequences.advantage.clamp(max=0),
    )


@torch.no_grad()
def _loss_stats(
    surrogate: Float32[Tensor, ""],
    divergence: Float32[Tensor, ""],
    log_ratio: Float32[Tensor, " E"],
    entropy: Float32[Tensor, " E"],
    ratio: Float32[Tensor, " R"],
    clipped: Bool[Tensor, " R"],
) -> LossStats:
    """Reduce the choices and ratios of a micro-batch to its statistics."""
    zero = log_ratio.new_zeros(1)  # keeps the maxima defined where there are no choices
    values: list[Float[Tensor, ""]] = [
        surrogate,
        divergence,
        entropy.sum(),
        clipped.sum().float(),
        ratio.sum(),
        torch.cat([ratio, zero]).max(),
        torch.cat([log_ratio.abs(), zero]).max(),
    ]
    # One transfer for all sums: on a GPU each read waits for all the work before it.
    surrogate_sum, kl_sum, entropy_sum, num_clipped, ratio_sum, ratio_max, logprob_gap = (
        torch.stack(values).tolist()
    )
    return LossStats(
        surrogate=surrogate_sum,
        kl=kl_sum,
        choices=float(len(log_ratio)),
        ratios=float(len(ratio)),
        entropy=entropy_sum,
        clipped=num_clipped,
        ratio=ratio_sum,
        ratio_max=ratio_max,
        logprob_gap=logprob_gap,
    )

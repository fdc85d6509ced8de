r"""The clipped policy-gradient loss of packed choices, and what to log about it.

One choice is shared by every candidate i through it, each with a weighted advantage a_i. They all
see the same ratio r = pi_current / pi_behaviour, so their surrogates collapse. For a_i >= 0,
min(r a_i, clip(r) a_i) = a_i min(r, 1 + high); for a_i < 0 it is a_i max(r, 1 - low), and with a
dual clip c > 1 (arXiv 1912.09729, eq. 5) max(c a_i, .) = a_i min(max(r, 1 - low), c). Hence

    sum_i min(r a_i, clip(r) a_i) = A+ min(r, 1 + high) + A- min(max(r, 1 - low), c)

with A+ and A- the sums of the positive and of the negative a_i: exact, not an approximation, and
all that a choice needs to carry.

GSPO (arXiv 2507.18071, eq. 5-7) has one ratio per candidate, the geometric mean of those of its
tokens, s_i = exp(1 / |y_i| sum_t log r_t), clipped as above. No two candidates share it, so that
nothing collapses; a batch for it lists the choices on each candidate's path, and the sums over them
are an `index_add` whose gradient comes back to each choice from every candidate through it: again
exact. |y_i| counts forced codes, as the estimators do; their log-ratio is 0.

Shapes:  E choices   R ratios, of choices or of candidates
"""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from learner.logprobs import BatchTensors


@dataclass(frozen=True, slots=True, kw_only=True)
class LossStats:
    """Sums and extremes over choices; `+` joins micro-batches and workers."""

    surrogate: float = 0.0
    kl: float = 0.0
    """Weighted k3 divergence from the reference, before its coefficient."""
    value: float = 0.0
    """Squared error of the value head, before its coefficient."""
    choices: float = 0.0
    """Number of choices that the following are summed over."""
    entropy: float = 0.0
    clipped: float = 0.0
    """Ratios whose clip is active against their advantage."""
    ratios: float = 0.0
    """Number of ratios: one per choice, or one per candidate."""
    ratio: float = 0.0
    ratio_max: float = 0.0
    logprob_gap: float = 0.0
    """Largest |current - behaviour| log-probability."""

    def __add__(self, other: "LossStats") -> "LossStats":
        """Of both together."""
        largest = ("ratio_max", "logprob_gap")
        return LossStats(
            **{
                f.name: max(a, b) if f.name in largest else a + b
                for f in fields(self)
                for a, b in [(getattr(self, f.name), getattr(other, f.name))]
            }
        )

    def metrics(self) -> dict[str, float]:
        """For the log: sums that are weighted already as they are, the others per choice."""
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
    batch: BatchTensors,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_weight: float,
) -> tuple[Float32[Tensor, ""], LossStats]:
    """Negative clipped surrogate plus `kl_weight` times the k3 divergence from the reference.

    Args:
        logprob: of the choices under the current policy, with gradient.
        entropy: of the distributions that they were drawn from; logged only.
        reference_logprob: under the frozen reference; None leaves the divergence out.
        batch: choices with their behaviour log-probabilities, advantages and weights; where it
            lists candidates (`sequences`), the ratio is theirs.
        clip_low: the ratio is cut below at 1 - clip_low where the advantage is negative.
        clip_high: and above at 1 + clip_high where it is positive.
        dual_clip: bound on the ratio where the advantage is negative; 0 for none.
        kl_weight: coefficient of sum kl_weight_e k3_e, k3 = e^d - d - 1 with d = reference -
            current (Schulman 2020, "Approximating KL divergence").
    """
    log_ratio, gain, loss = _ratio_terms(logprob, batch)
    ratio = log_ratio.exp()
    ceiling = dual_clip if dual_clip > 0 else float("inf")
    gained = gain * ratio.clamp(max=1 + clip_high)
    lost = loss * ratio.clamp(min=1 - clip_low, max=ceiling)
    surrogate = -(gained + lost).sum()
    divergence = surrogate.new_zeros(())
    if reference_logprob is not None:
        apart = reference_logprob - logprob
        divergence = (batch.kl_weight * (apart.exp() - apart - 1)).sum()
    clipped = (gain > 0) & (ratio > 1 + clip_high)
    clipped |= (loss < 0) & ((ratio < 1 - clip_low) | (ratio > ceiling))
    apart = logprob - batch.behaviour_logprob
    parts = _parts(surrogate, divergence, apart, entropy, ratio, clipped)
    return surrogate + kl_weight * divergence, parts


def _ratio_terms(
    logprob: Float32[Tensor, " E"], batch: BatchTensors
) -> tuple[Float32[Tensor, " R"], Float32[Tensor, " R"], Float32[Tensor, " R"]]:
    """Log-ratio, A+ and A- of each choice, or of each candidate where the batch lists them."""
    log_ratio, whole = logprob - batch.behaviour_logprob, batch.sequences
    if whole is None:
        return log_ratio, batch.advantage_pos, batch.advantage_neg
    total = log_ratio.new_zeros(len(whole.row))
    total = total.index_add(0, whole.candidate, log_ratio.index_select(0, whole.choice))
    return total / whole.length, whole.advantage.clamp(min=0), whole.advantage.clamp(max=0)


@torch.no_grad()
def _parts(
    surrogate: Float32[Tensor, ""],
    divergence: Float32[Tensor, ""],
    log_ratio: Float32[Tensor, " E"],
    entropy: Float32[Tensor, " E"],
    ratio: Float32[Tensor, " R"],
    clipped: Bool[Tensor, " R"],
) -> LossStats:
    nothing = log_ratio.new_zeros(1)
    values: list[Float[Tensor, ""]] = [
        surrogate,
        divergence,
        entropy.sum(),
        clipped.sum().float(),
        ratio.sum(),
        torch.cat([ratio, nothing]).max(),
        torch.cat([log_ratio.abs(), nothing]).max(),
    ]
    # One transfer for all: on a GPU each read waits for everything before it.
    a, b, c, d, e, f, g = torch.stack(values).tolist()
    return LossStats(
        surrogate=a,
        kl=b,
        choices=float(len(log_ratio)),
        ratios=float(len(ratio)),
        entropy=c,
        clipped=d,
        ratio=e,
        ratio_max=f,
        logprob_gap=g,
    )

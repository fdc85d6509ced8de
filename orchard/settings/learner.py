"""Settings of the learner, which turns scored trees into the next policy version."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from orchard.settings.section import Fraction, Section, refusal


class KlConfig(Section):
    """KL penalty towards a reference policy."""

    weight: NonNegativeFloat = 1e-3
    """Weight of the k3 KL estimator in the loss; with 0 no reference model is loaded."""
    reference: Literal["fixed", "ema"] = "fixed"
    """Reference policy: the initial policy, or an exponential moving average of the policy."""
    ema_every: PositiveInt = 512
    """Updates between two steps of an `ema` reference."""
    ema_share: Fraction = 0.6
    """Share of the current policy in each step of an `ema` reference."""


class ValueConfig(Section):
    """Training of the value head of `model.value_head` (V-STAR, arXiv 2602.10699)."""

    weight: NonNegativeFloat = 1.0
    """Weight of the value loss (squared error) relative to the policy loss."""
    lr: NonNegativeFloat = 1e-3
    """Learning rate of the value head, on the schedule of `learner.lr`."""
    target: Literal["td", "monte_carlo"] = "td"
    """Value target: the step reward plus the discounted value of the next state, or the discounted
    sum of the rewards to the end."""
    discount: Fraction = 0.99
    """Discount factor per code."""
    level_weight: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (0.3, 0.5, 1.0)
    """Step reward of codes 1, 2, ... that match the target; the last entry applies to all later
    codes."""
    outcome: dict[str, NonNegativeFloat] = Field(default_factory=dict[str, float])
    """Reward parts and their weights, paid at a candidate's last code instead of the step rewards,
    so that the value head predicts the reward of the run. Empty as in the paper."""
    detach: bool = True
    """Whether to stop the gradient of the value loss at the hidden states of the policy."""


class SapoConfig(Section):
    """Step-level credit (SAPO, arXiv 2605.17648), for `learner.estimator = "sapo"`."""

    match: Literal["step_match", "prefix_match"] = "step_match"
    """Condition for the reward of code k: it equals the target's code k, or all codes up to k
    do."""
    think_only: bool = False
    """Whether the advantage of a step applies to its thinking block alone and not to its code."""
    sid_token_weight: NonNegativeFloat = 1.0
    """Factor on the loss weight of codes, each of which is one token next to a whole block."""
    format_weight: NonNegativeFloat = 0.0
    """Weight of an additional, separately standardized loss that rewards the right number of
    blocks."""


class LearnerConfig(Section):
    """Policy optimization on scored trees."""

    section: ClassVar[str] = "learner"
    renamed: ClassVar[Mapping[str, str]] = {
        "step": "sapo", "truncate": "tis_clip", "average": "ema_decay",
    }  # fmt: skip
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {"estimator": {"step": "sapo"}}

    workers: PositiveInt = 1
    """Number of Ray Train workers."""
    gpus: NonNegativeFloat = 0.0
    """GPUs per worker."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """Parallelism over the workers."""
    steps: PositiveInt = 300
    """Number of training steps, each of which consumes one batch of rollouts. A run that is
    continued with another number follows the learning rates of a run of that length, from the step
    where it is."""
    rows: Literal["auto", "fresh", "train", "feedback"] = "auto"
    """Rows that prompts are drawn from: the requests of `data.feedback`, the fresh rows of
    `data.fresh` or `data.hold_back`, or those of the warm start; `auto` takes the first of these
    that exists."""
    prompts_per_step: PositiveInt = 64
    """Number of prompts per training step."""
    max_draws: PositiveInt = 1
    """Maximum number of times that `prompts_per_step` prompts are drawn for one step, until as many
    groups teach, that is, have an advantage (dynamic sampling, DAPO, arXiv 2503.14476). Groups that
    teach are trained on first; with 1, the first draw is used without selection."""
    updates_per_batch: PositiveInt = 1
    """Gradient steps on one batch; the ratio clip takes effect above 1."""
    estimator: str = "group"
    """Advantage estimator. `group`, `dapo`, `drgrpo` and `leave_one_out` compare a candidate with
    its group; `sibling` compares it, at each code, with the sibling codes of the same search tree;
    `group_sibling` adds both losses and `blend` averages both advantages; `sapo` compares each step
    of a candidate with the same step of its group; `credit_to_go` compares the sum of the rewards
    of a step and the later steps (HRPO); `boundary` compares the strongest positive of a group with
    its hardest negative alone (ReCast); `window` compares the positives with a window of the
    negatives; `snips` weighs logged draws by their probability under the policy, with
    `rollout.search = "logged"`."""
    weight_clip: Annotated[float, Field(ge=1.0)] = 10.0
    """Largest importance weight of a logged draw, in `snips`."""
    lists: Literal["single", "independent"] = "single"
    """Logged draws that `snips` learns from: only answers of one draw, or also lists drawn without
    replacement, under the assumption that users judge each item regardless of its neighbors and
    position."""
    sibling_weight: NonNegativeFloat = 1.0
    """Weight of the sibling loss relative to the group loss, in `group_sibling`."""
    window: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Window of the estimator `window`: the negatives that count, as shares of a group's negatives
    from the most to the least likely. (0, .1) aims at the first place of the list, a window further
    down aims at more places, and (0, 1) is `group`."""
    sapo: SapoConfig = SapoConfig()
    std_epsilon: Annotated[float, Field(gt=0.0)] = 1e-4
    """Constant added to a standard deviation before advantages are divided by it."""
    lr: NonNegativeFloat = 2e-4
    """Peak learning rate."""
    warmup: Fraction = 0.03
    """Share of the updates with a linearly rising learning rate; a cosine decay to `final_lr`
    follows."""
    final_lr: Fraction = 0.1
    """Final learning rate as a share of `lr`."""
    weight_decay: NonNegativeFloat = 0.0
    """AdamW weight decay of matrices; norms and biases have none."""
    grad_clip: NonNegativeFloat = 0.3
    """Maximum gradient norm; 0 disables clipping."""
    loss: str = "clip"
    """Policy loss. `clip`: the clipped ratio (PPO), with a dual clip; `cispo`: the log-probability,
    weighted by the clipped ratio, so that no choice loses its gradient (MiniMax-M1, arXiv
    2506.13585; the paper has `clip_low` = 1); `ecpo`: as `clip`, with a bounded gradient where the
    advantage is negative and the ratio high (OneRec, arXiv 2506.13695)."""
    ecpo_delta: Annotated[float, Field(gt=0.0)] = 0.1
    """Distance, in `ecpo`, from the upper clip to the ratio above which the gradient of a negative
    advantage is bounded."""
    ratio: Literal["token", "sequence"] = "token"
    """Level of the clipped importance ratio: each token, or the geometric mean over a candidate's
    tokens (GSPO, arXiv 2507.18071). The latter needs far narrower clips: 3e-4 and 4e-4 for texts of
    thousands of tokens."""
    clip_low: Fraction = 0.2
    """Lower clip: the ratio is clipped at 1 - clip_low."""
    clip_high: NonNegativeFloat = 0.2
    """Upper clip: the ratio is clipped at 1 + clip_high."""
    dual_clip: NonNegativeFloat = 3.0
    """Dual clip of the loss `clip`: upper bound, above 1, on the ratio where the advantage is
    negative; 0 disables it. The other losses have bounds of their own."""
    tis_clip: NonNegativeFloat = 0.0
    """Upper bound of the truncated importance sampling (TIS) weight relative to the policy version
    that ran the search; 0 disables it."""
    logprob: Literal["trie", "full"] = "trie"
    """Distribution of a code: over its legal siblings, or over the full vocabulary."""
    dropout: Fraction = 0.0
    """Dropout rate of the embeddings and of each block's output during an update. It requires one
    update per batch and no lag, because the ratio is then 1 within the same pass."""
    ema_decay: Fraction = 0.0
    """Decay per update of the moving average of the weights, which is evaluated and saved; 0
    disables it. Rollouts always use the newest weights."""
    anchor: NonNegativeFloat = 0.0
    """Weight of a supervised term beside the policy loss: the mean negative log-probability of the
    codes of each prompt's target (GRPO-SR, arXiv 2604.14878); 0 disables it."""
    hint_weight: NonNegativeFloat = 0.0
    """Weight of the same supervised term on the codes that `rollout.hints` has given to a search;
    .005 to .01 in HCGRec (arXiv 2608.11980)."""
    kl: KlConfig = KlConfig()
    value: ValueConfig = ValueConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass; weights and optimizer state stay in float32."""
    attention: Literal["auto", "dense", "flex"] = "auto"
    """Attention over packed trees: with a dense mask, or FlexAttention, which skips blocks of slots
    that do not see each other and has no padding. `auto` takes FlexAttention on GPUs, where the
    code of the model supports it."""
    gradient_checkpointing: bool = False
    """Whether to keep only the inputs of each decoder block and compute the block once more in the
    backward pass: about a third more time, for far less memory."""
    max_tokens: PositiveInt = 65536
    """Maximum number of padded token slots per forward pass; larger batches are split into
    micro-batches."""
    threads: PositiveInt = 2
    """CPU threads per worker."""
    max_failures: NonNegativeInt = 3
    """Number of times a failed worker group is restarted."""
    timeout_s: PositiveFloat = 600.0
    """Seconds to wait for one update, which may be one of many in an epoch."""
    start_timeout_s: PositiveFloat = 300.0
    """Seconds to wait for the workers to start."""

    @model_validator(mode="after")
    def _window_has_a_width(self) -> "LearnerConfig":
        if self.window[0] >= self.window[1]:
            raise refusal(
                "empty_window",
                f"learner.window = {list(self.window)} has no width; its first share must be below "
                "its second",
            )
        return self

    @model_validator(mode="after")
    def _dual_clip_above_one(self) -> "LearnerConfig":
        if 0 < self.dual_clip <= 1:
            raise refusal(
                "dual_clip_too_low",
                f"learner.dual_clip = {self.dual_clip} would bind at ratio 1; take a value above "
                "1, or 0 to switch it off",
            )
        return self

    @model_validator(mode="after")
    def _tis_clip_fits(self) -> "LearnerConfig":
        full_or_sequence = self.logprob == "full" or self.ratio == "sequence"
        if self.tis_clip and (self.dropout or full_or_sequence):
            raise refusal(
                "tis_of_other_ratios",
                'learner.tis_clip > 0 needs learner.dropout = 0, logprob = "trie" and ratio = '
                '"token"',
            )
        if 0 < self.tis_clip < 1:
            raise refusal(
                "tis_clip_too_low",
                f"learner.tis_clip = {self.tis_clip} would shrink every advantage; take 1 or "
                "more, or 0 to switch it off",
            )
        return self

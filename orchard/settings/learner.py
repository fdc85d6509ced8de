"""Scored trees to the next policy."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from orchard.settings.section import Fraction, Section


class KlConfig(Section):
    """How far the policy may move from its reference."""

    weight: NonNegativeFloat = 1e-3
    """Of the k3 estimator; 0 leaves the reference model out altogether."""
    reference: Literal["fixed", "ema"] = "fixed"
    ema_every: PositiveInt = 512
    """Updates between two moves of an `ema` reference."""
    ema_share: Fraction = 0.6
    """Share of the current policy in each move."""


class ValueConfig(Section):
    """How the value head of `model.value_head` learns (V-STAR, arXiv 2602.10699)."""

    weight: NonNegativeFloat = 1.0
    """Of its squared error beside the policy's loss."""
    lr: NonNegativeFloat = 1e-3
    """Its own rate, on the schedule of `learner.lr`."""
    target: Literal["td", "monte_carlo"] = "td"
    """Step reward plus the next state's discounted value, or the discounted rewards to the end."""
    discount: Fraction = 0.99
    level_weight: Annotated[tuple[NonNegativeFloat, ...], Field(min_length=1)] = (0.3, 0.5, 1.0)
    """Step reward of codes 1, 2, ... that agree with the target; the last one of all later ones."""
    outcome: dict[str, NonNegativeFloat] = Field(default_factory=dict[str, float])
    """Parts of the reward, with their weights, that a candidate earns at its last code in place of
    these step rewards: V then foretells what the run pays. Empty as in the paper."""
    detach: bool = True
    """Keep its gradient out of the rest of the policy."""


class SapoConfig(Section):
    """Credit by steps (SAPO, arXiv 2605.17648), for `learner.estimator = "sapo"`."""

    match: Literal["step_match", "prefix_match"] = "step_match"
    """Code k earns its reward by being the target's, or only where all codes before it are, too."""
    think_only: bool = False
    """Give a step's advantage to its thinking block alone, not to its code."""
    sid_token_weight: NonNegativeFloat = 1.0
    """Factor on the weight of codes, each of which is one token beside a whole block."""
    format_weight: NonNegativeFloat = 0.0
    """Of a further loss, standardised on its own, that rewards the right number of blocks."""


class LearnerConfig(Section):
    """Scored trees to the next policy."""

    section: ClassVar[str] = "learner"
    renamed: ClassVar[Mapping[str, str]] = {
        "step": "sapo", "truncate": "tis_clip", "average": "ema_decay",
    }  # fmt: skip
    renamed_values: ClassVar[Mapping[str, Mapping[str, str]]] = {"estimator": {"step": "sapo"}}

    workers: PositiveInt = 1
    """Ray Train workers."""
    gpus: NonNegativeFloat = 0.0
    """GPUs per worker."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    steps: PositiveInt = 300
    prompts_per_step: PositiveInt = 64
    updates_per_batch: PositiveInt = 1
    """Gradient steps on one batch; above 1 the clip comes into force."""
    estimator: Literal[
        "group", "dapo", "drgrpo", "leave_one_out", "sibling", "blend", "group_sibling", "sapo"
    ] = "group"
    """Who a candidate is compared with: its group, or at each code the alternatives that were also
    found; `group_sibling` adds both losses, `blend` averages both advantages; `step` compares each
    step of a candidate with the same step of its group."""
    sibling_weight: NonNegativeFloat = 1.0
    """Of the sibling loss beside the group's, in `group_sibling`."""
    sapo: SapoConfig = SapoConfig()
    std_epsilon: Annotated[float, Field(gt=0.0)] = 1e-4
    lr: NonNegativeFloat = 2e-4
    warmup: Fraction = 0.03
    final_lr: Fraction = 0.1
    weight_decay: NonNegativeFloat = 0.0
    grad_clip: NonNegativeFloat = 0.3
    ratio: Literal["token", "sequence"] = "token"
    """What is compared with the behaviour policy and clipped: each choice, or the geometric mean
    over a candidate's tokens (GSPO, arXiv 2507.18071), which wants far narrower clips: 3e-4 and
    4e-4 for texts of thousands of tokens."""
    clip_low: Fraction = 0.2
    clip_high: NonNegativeFloat = 0.2
    dual_clip: NonNegativeFloat = 3.0
    """Bound above 1 on the ratio of choices with negative advantage; 0 switches it off."""
    tis_clip: NonNegativeFloat = 0.0
    """Bound of truncated importance weights to the version that searched (TIS); 0: none."""
    logprob: Literal["trie", "full"] = "trie"
    """Distribution of a code: over its legal siblings, or over the whole vocabulary."""
    dropout: Fraction = 0.0
    """Of embeddings and of each block's output while a batch is learned from, with one update per
    batch and no lag: the ratio is then one, to the same pass."""
    ema_decay: Fraction = 0.0
    """Decay per update of the moving average of the weights that is evaluated and kept; 0: none.
    Rollouts always follow the newest weights."""
    kl: KlConfig = KlConfig()
    value: ValueConfig = ValueConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass; weights and optimiser stay in float32."""
    max_tokens: PositiveInt = 65536
    """Padded slots per forward pass; larger batches are cut into micro-batches."""
    threads: PositiveInt = 2
    max_failures: NonNegativeInt = 3
    timeout_s: PositiveFloat = 600.0
    """Longest wait for one update or one epoch."""
    start_timeout_s: PositiveFloat = 300.0

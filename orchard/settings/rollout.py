"""Settings of the rollout: the search that turns prompts into search trees."""

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

from orchard.settings.section import Fraction, Section
from orchard.settings.widths import Width, Widths, last, shown


class VedConfig(Section):
    """Value-guided efficient decoding (V-STAR, arXiv 2602.10699), for `rollout.search = "ved"`."""

    guide: Literal["head", "critic", "expert"] = "head"
    """Source of the values that guide the search: the value head of the policy, trained together
    with it; a critic trained beforehand (`orchard fit critic`), available from the first update on;
    or the experts of the policy's guide (`orchard fit guide`)."""
    likelihood: bool = False
    """Whether the priority of a node, and the order of the leaves, contain its log-probability
    besides its value; the paper's priority has none."""
    budget: PositiveInt = 33
    """Maximum number of tokens forwarded per prompt. As in the paper, the distribution at the root
    counts as one token and leaves count as none; a beam of width W over three codes costs 1 + 2
    W."""
    width: PositiveInt = 8
    """Width of the initial likelihood beam."""
    exploration: NonNegativeFloat = 1.0
    """Weight of the exploration bonus for rarely visited nodes; beta in the paper."""
    entropy_weight: NonNegativeFloat = 0.1
    """Weight of a node's entropy in its priority; lambda in the paper."""
    value_weight: NonNegativeFloat = 1.0
    """Weight of a node's value in its priority; with 0 the entropy alone guides the search."""
    expand_root: bool = True
    """Whether every traversal may expand the root, which is the only node at its depth and so never
    has a priority below the mean of its depth."""
    warm_visits: bool = False
    """Whether the paths of the initial beam count as visits."""
    to_leaf: bool = False
    """Whether each new child is extended down to a leaf, one sampled code after another."""
    count_leaves: bool = False
    """Whether the evaluation of leaves counts against the budget."""
    traversals: PositiveInt = 1
    """Number of traversals per prompt between two forward passes. Visits are counted immediately,
    values after the pass."""
    warmup: NonNegativeInt = 0
    """Number of initial updates that use beam search while the value head is trained."""


class ThinkConfig(Section):
    """Thinking blocks before each code (SAPO, arXiv 2605.17648), for `rollout.search = "think"`."""

    block_tokens: PositiveInt = 64
    """Maximum number of tokens in a thinking block, after which its closing tag is forced."""
    codes: Literal["sample", "beam"] = "sample"
    """Decoding of the codes after a thought."""
    width: PositiveInt = 1
    """Number of candidates per thought; the number of thoughts is `rollout.group_size`."""


class RolloutConfig(Section):
    """Search for candidates by the rollout actors."""

    section: ClassVar[str] = "rollout"
    renamed: ClassVar[Mapping[str, str]] = {"candidates": "group_size"}

    actors: PositiveInt = 1
    """Number of rollout actors."""
    engine: str = "vllm"
    """Decoding engine."""
    decode: Literal["worker", "requests"] = "worker"
    """Execution of a search with vLLM: inside the vLLM worker, or as one public request per
    prefix."""
    search: str = "beam"
    """Search algorithm. `beam`: the most likely candidates; `beam_sample`: distinct candidates,
    sampled without replacement; `sample`: independent samples; `dynamic`: 1.5 times as many
    samples, of which the target and as few duplicates as possible are kept (ReRe); `ved`:
    value-guided search; `think`: independent thoughts, one block for each code, followed by the
    codes."""
    guide: Literal["none", "expert", "critic", "head", "expert+head"] = "none"
    """Values that guide `beam`, whose prefixes are then ranked by log p + V: `expert` takes the
    guide of the policy that training starts from (`orchard fit guide`), `critic` the critic
    (`orchard fit critic`), `head` the value head of the policy, which only values forwarded
    prefixes and therefore gives the children of a prefix the same value; `expert+head` adds both.
    Rewards and losses use log p alone."""
    group_size: PositiveInt = 16
    """Number of candidates per prompt."""
    width: Widths | None = None
    """Beam width of the search `beam`: one number, or a list with a number for each level of the
    codes, such as [32, 64, 64]; by default `group_size`. The last number must be at least
    `group_size`."""
    add_target: bool = False
    """Whether a training search that missed the target replaces its worst candidate with the
    target."""
    hints: NonNegativeInt = 0
    """Maximum number of leading codes of the target that a training search may get as a hint. A
    prompt whose group teaches nothing is searched again below one code of its target, then below
    two, until the rewards of its group differ (HCGRec, arXiv 2608.11980). Hinted codes are not part
    of the policy loss; 0 gives no hints."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Sampling temperature of the random searches; the reported log-probabilities are those of the
    unscaled policy."""
    ved: VedConfig = VedConfig()
    think: ThinkConfig = ThinkConfig()
    batch_size: PositiveInt = 64
    """Number of prompts per request to an actor."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the engine."""
    threads: PositiveInt = 2
    """CPU threads per actor."""
    gpus: NonNegativeFloat = 0.0
    """GPUs per actor; vLLM splits the policy over them (tensor parallelism)."""
    kv_cache_gib: Annotated[float, Field(gt=0.0)] = 1.0
    """Size in GiB of vLLM's paged KV cache per actor in system memory on a CPU; on a GPU
    `gpu_memory` applies instead."""
    gpu_memory: Fraction = 0.4
    """Share of the GPU memory that vLLM may use."""
    max_restarts: NonNegativeInt = 3
    """Number of actors that may be replaced over the whole run."""
    timeout_s: PositiveFloat = 300.0
    """Seconds to wait for one batch of search trees."""
    start_timeout_s: PositiveFloat = 300.0
    """Seconds to wait for an actor to start."""

    @model_validator(mode="after")
    def _wide_enough(self) -> "RolloutConfig":
        if self.width is not None and last(self.width) < self.group_size:
            raise ValueError(
                f"rollout.width = {shown(self.width)} ends below rollout.group_size = "
                f"{self.group_size}; a beam finds no more candidates than its last level keeps"
            )
        if self.width is not None and self.search != "beam":
            raise ValueError(
                f"rollout.width = {shown(self.width)} is of rollout.search = beam, not of "
                f"{self.search}; leave it out"
            )
        return self

    @property
    def beam_width(self) -> Width:
        """Width of the beam: `width`, by default `group_size`."""
        return self.group_size if self.width is None else self.width

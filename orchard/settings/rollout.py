"""Prompts to search trees."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from orchard.settings.section import Fraction, Section


class VedConfig(Section):
    """Value-guided efficient decoding (V-STAR, arXiv 2602.10699), for `rollout.search = "ved"`."""

    guide: Literal["head", "critic"] = "head"
    """Whose values guide: those of the policy's own head, which learns beside it, or those of a
    critic fitted beforehand (`orchard fit critic`), which has them from the first update on."""
    budget: PositiveInt = 33
    """Most tokens forwarded per prompt, the root's own distribution counted as one and leaves left
    out, as the paper counts; a beam of width W over three codes costs 1 + 2 W."""
    width: PositiveInt = 8
    """Of the likelihood beam that the tree begins with."""
    exploration: NonNegativeFloat = 1.0
    """Of rarely visited nodes in the selection; the paper's beta."""
    entropy_weight: NonNegativeFloat = 0.1
    """Of a node's entropy in its priority; the paper's lambda."""
    value_weight: NonNegativeFloat = 1.0
    """Of a node's value in its priority; 0 leaves the guidance to the entropy."""
    expand_root: bool = True
    """Let the root, alone at its depth and so never below its mean, grow in every traversal."""
    warm_visits: bool = False
    """Count the paths of the beam as visits."""
    to_leaf: bool = False
    """Follow each new child down to a leaf, one sampled code after another."""
    count_leaves: bool = False
    """Count the evaluation of leaves against the budget."""
    traversals: PositiveInt = 1
    """Per prompt between two forward passes; visits count at once, values with the pass."""
    warmup: NonNegativeInt = 0
    """First updates that search by beam, while the value head learns to guide."""


class ThinkConfig(Section):
    """Thinking before naming an item (SAPO, arXiv 2605.17648), for `rollout.search = "think"`."""

    block_tokens: PositiveInt = 64
    """Most tokens of a block's own; after so many its closing tag is forced."""
    codes: Literal["sample", "beam"] = "sample"
    """How codes are found after a thought."""
    width: PositiveInt = 1
    """Candidates after each thought, of which there are `rollout.group_size`."""


class RolloutConfig(Section):
    """Prompts to search trees."""

    section: ClassVar[str] = "rollout"
    renamed: ClassVar[Mapping[str, str]] = {"candidates": "group_size"}

    actors: PositiveInt = 1
    engine: Literal["vllm", "torch"] = "vllm"
    decode: Literal["worker", "requests"] = "worker"
    """Where vLLM's searches run: inside its worker, or as one public request per prefix."""
    search: Literal["beam", "beam_sample", "sample", "dynamic", "ved", "think"] = "beam"
    """`beam`: the best candidates; `beam_sample`: distinct ones, drawn without replacement;
    `sample`: independent draws; `dynamic`: the target and little twice, of half as many draws
    again; `ved`: what a value head guides to; `think`: independent thoughts, a block for each code,
    and what codes follow them."""
    group_size: PositiveInt = 16
    """Candidates per prompt; the width of the beam."""
    add_target: bool = False
    """Put the target in the place of the worst candidate where a search for training missed it."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Of the random searches; reported log-probabilities are those of the policy itself."""
    ved: VedConfig = VedConfig()
    think: ThinkConfig = ThinkConfig()
    batch_size: PositiveInt = 64
    """Prompts per request to an actor."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: PositiveInt = 2
    gpus: NonNegativeFloat = 0.0
    """GPUs per actor; vLLM splits the policy over them (tensor parallelism)."""
    kv_cache_gib: Annotated[float, Field(gt=0.0)] = 1.0
    """vLLM's paged cache per actor: system memory on a CPU; a GPU takes `gpu_memory` instead."""
    gpu_memory: Fraction = 0.4
    """Share of a GPU that vLLM may take."""
    max_restarts: NonNegativeInt = 3
    timeout_s: PositiveFloat = 300.0
    """Longest wait for one batch of trees."""
    start_timeout_s: PositiveFloat = 300.0

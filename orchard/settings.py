"""The settings of a run: one frozen section per room, bounds in the types, meaning below each.

Importable without torch and without Ray.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(ge=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Duration = Annotated[float, Field(gt=0.0)]


class Section(BaseModel):
    """A frozen part of the configuration; every field documents itself below its line."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DataConfig(Section):
    """Where the interactions are, in the Parquet schema of `docs/data.md`."""

    path: Path
    """Folder of the files below."""
    items: str = "items.parquet"
    """Columns item_id, sid, and title if known."""
    train: tuple[str, ...] = ("train.parquet",)
    """Columns user_id, history, target; several files are one split."""
    valid: str = "valid.parquet"
    test: str = "test.parquet"
    embeddings: str | None = None
    """Columns item_id and embedding (a list of numbers): what the value head's step rewards compare
    items by; by default they compare codes."""
    max_history: Positive = 10
    """Most recent items that the policy sees."""
    level_size: tuple[Positive, ...] | None = None
    """Nominal codebook sizes; by default the largest code in use plus one."""
    varying_depth: bool = False
    """Allow semantic IDs of different lengths."""
    titles: bool = False
    """Items are their titles, in the text tokens of the policy in `model.path`, instead of semantic
    IDs."""


class ModelConfig(Section):
    """The policy: a Hugging Face causal language model."""

    path: Path | None = None
    """Folder of a saved policy; by default a small Qwen3 is made from the sizes below."""
    hidden_size: Positive = 128
    intermediate_size: Positive = 384
    layers: Positive = 4
    heads: Positive = 4
    kv_heads: Positive = 2
    dropout: Share = 0.2
    """Of embeddings and of each block's output, in the supervised warm start only."""
    value_head: bool = False
    """Teach the policy, in reinforcement learning, what a prefix is worth (see `learner.value`);
    `rollout.search = "ved"` is guided by it."""


class SftConfig(Section):
    """The supervised warm start: next code over whole user sequences."""

    epochs: Positive = 20
    batch_size: Positive = 64
    """User sequences per update, over all workers."""
    lr: Rate = 2e-3
    warmup: Share = 0.05
    """Share of the updates during which the rate rises; a cosine falls to `final_lr` after it."""
    final_lr: Share = 0.05
    """Last rate as a share of `lr`."""
    weight_decay: Rate = 0.05
    grad_clip: Rate = 1.0
    logprob: Literal["trie", "full"] = "trie"
    """Distribution whose likelihood is raised: over the legal siblings, or over the whole
    vocabulary, forced codes included, which generalised better on real data."""
    average: Share = 0.998
    """Decay per update of the moving average of the weights that is evaluated and kept; 0: none."""
    minutes: Rate = 0.0
    """Stop after the epoch in which so many minutes have passed; 0 sets no limit."""
    valid_rows: NonNegative = 1000
    """Rows of the validation split that choose the epoch; 0 keeps the last."""
    valid_beams: Positive = 20
    patience: Positive = 5
    """Stop after so many epochs without a better NDCG@10 on the validation rows."""


class VedConfig(Section):
    """Value-guided efficient decoding (V-STAR, arXiv 2602.10699), for `rollout.search = "ved"`."""

    budget: Positive = 33
    """Most tokens forwarded per prompt, the root's own distribution counted as one and leaves left
    out, as the paper counts; a beam of width W over three codes costs 1 + 2 W."""
    width: Positive = 8
    """Of the likelihood beam that the tree begins with."""
    exploration: Rate = 1.0
    """Of rarely visited nodes in the selection; the paper's beta."""
    entropy_weight: Rate = 0.1
    """Of a node's entropy in its priority; the paper's lambda."""
    value_weight: Rate = 1.0
    """Of a node's value in its priority; 0 leaves the guidance to the entropy."""
    expand_root: bool = True
    """Let the root, alone at its depth and so never below its mean, grow in every traversal."""
    warm_visits: bool = False
    """Count the paths of the beam as visits."""
    to_leaf: bool = False
    """Follow each new child down to a leaf, one sampled code after another."""
    count_leaves: bool = False
    """Count the evaluation of leaves against the budget."""
    traversals: Positive = 1
    """Per prompt between two forward passes; visits count at once, values with the pass."""
    warmup: NonNegative = 0
    """First updates that search by beam, while the value head learns to guide."""


class RolloutConfig(Section):
    """Prompts to search trees."""

    actors: Positive = 1
    engine: Literal["vllm", "torch"] = "vllm"
    decode: Literal["worker", "requests"] = "worker"
    """Where vLLM's searches run: inside its worker, or as one public request per prefix."""
    search: Literal["beam", "beam_sample", "sample", "dynamic", "ved"] = "beam"
    """`beam`: the best candidates; `beam_sample`: distinct ones, drawn without replacement;
    `sample`: independent draws; `dynamic`: the target and little twice, of half as many draws
    again; `ved`: what a value head guides to."""
    candidates: Positive = 16
    """Candidates per prompt; the width of the beam."""
    temperature: Annotated[float, Field(gt=0.0)] = 1.0
    """Of the random searches; reported log-probabilities are those of the policy itself."""
    ved: VedConfig = VedConfig()
    batch_size: Positive = 64
    """Prompts per request to an actor."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: Positive = 2
    gpus: Rate = 0.0
    """GPUs per actor."""
    kv_cache_gib: Annotated[float, Field(gt=0.0)] = 1.0
    """vLLM's paged cache per actor: system memory on a CPU; a GPU takes `gpu_memory` instead."""
    gpu_memory: Share = 0.4
    """Share of a GPU that vLLM may take."""
    max_restarts: NonNegative = 3
    timeout_s: Duration = 300.0
    """Longest wait for one batch of trees."""
    start_timeout_s: Duration = 300.0


class RewardsConfig(Section):
    """Search trees to scored trees."""

    weights: dict[str, float] = Field(default_factory=lambda: {"rule": 1.0, "ranking": 1.0})
    """Weight of each part, by name; the names are those of `rewards.REWARDS`."""
    actors: Positive = 1
    queue: Positive = 8
    """Batches that may wait at each actor."""
    timeout_s: Duration = 30.0
    retries: NonNegative = 2
    max_restarts: NonNegative = 3


class KlConfig(Section):
    """How far the policy may move from its reference."""

    weight: Rate = 1e-3
    """Of the k3 estimator; 0 leaves the reference model out altogether."""
    reference: Literal["fixed", "ema"] = "fixed"
    ema_every: Positive = 512
    """Updates between two moves of an `ema` reference."""
    ema_share: Share = 0.6
    """Share of the current policy in each move."""


class ValueConfig(Section):
    """How the value head of `model.value_head` learns (V-STAR, arXiv 2602.10699)."""

    weight: Rate = 1.0
    """Of its squared error beside the policy's loss."""
    lr: Rate = 1e-3
    """Its own rate, on the schedule of `learner.lr`."""
    target: Literal["td", "monte_carlo"] = "td"
    """Step reward plus the next state's discounted value, or the discounted rewards to the end."""
    discount: Share = 0.99
    level_weight: Annotated[tuple[Rate, ...], Field(min_length=1)] = (0.3, 0.5, 1.0)
    """Step reward of codes 1, 2, ... that agree with the target; the last one of all later ones."""
    detach: bool = True
    """Keep its gradient out of the rest of the policy."""


class LearnerConfig(Section):
    """Scored trees to the next policy."""

    workers: Positive = 1
    """Ray Train workers."""
    gpus: Rate = 0.0
    """GPUs per worker."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    steps: Positive = 300
    prompts_per_step: Positive = 64
    updates_per_batch: Positive = 1
    """Gradient steps on one batch; above 1 the clip comes into force."""
    estimator: Literal[
        "group", "dapo", "drgrpo", "leave_one_out", "sibling", "blend", "group_sibling"
    ] = "group"
    """Who a candidate is compared with: its group, or at each code the alternatives that were also
    found; `group_sibling` adds both losses, `blend` averages both advantages."""
    sibling_weight: Rate = 1.0
    """Of the sibling loss beside the group's, in `group_sibling`."""
    std_epsilon: Annotated[float, Field(gt=0.0)] = 1e-4
    lr: Rate = 2e-4
    warmup: Share = 0.03
    final_lr: Share = 0.1
    weight_decay: Rate = 0.0
    grad_clip: Rate = 0.3
    clip_low: Share = 0.2
    clip_high: Rate = 0.2
    dual_clip: Rate = 3.0
    """Bound above 1 on the ratio of choices with negative advantage; 0 switches it off."""
    logprob: Literal["trie", "full"] = "trie"
    """Distribution of a code: over its legal siblings, or over the whole vocabulary."""
    dropout: Share = 0.0
    """Of embeddings and of each block's output while a batch is learned from, with one update per
    batch and no lag: the ratio is then one, to the same pass."""
    average: Share = 0.0
    """Decay per update of the moving average of the weights that is evaluated and kept; 0: none.
    Rollouts always follow the newest weights."""
    kl: KlConfig = KlConfig()
    value: ValueConfig = ValueConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward pass; weights and optimiser stay in float32."""
    max_tokens: Positive = 65536
    """Padded slots per forward pass; larger batches are cut into micro-batches."""
    threads: Positive = 2
    max_failures: NonNegative = 3
    timeout_s: Duration = 600.0
    """Longest wait for one update or one epoch."""
    start_timeout_s: Duration = 300.0


class EvaluateConfig(Section):
    """Held-out evaluation by constrained beam search."""

    beams: Positive = 50
    engine: Literal["vllm", "torch"] = "torch"
    every: NonNegative = 50
    """Updates between two looks at the validation rows; 0 never looks."""
    valid_rows: Positive = 1000
    valid_beams: Positive = 20
    test_rows: NonNegative = 0
    """Rows of the test split before and after; 0 takes all."""
    batch_size: Positive = 256
    resamples: Positive = 2000
    """Bootstrap resamples behind each 95 % interval."""


class CheckpointConfig(Section):
    """What survives."""

    every: Positive = 50
    """Updates between two checkpoints."""
    keep: Positive = 2


class ClusterConfig(Section):
    """Where things run and how far ahead rollouts may run."""

    address: str | None = None
    """Ray cluster to join; by default RAY_ADDRESS, or a local cluster of this run's own."""
    cpus: Positive | None = None
    """CPUs of the local cluster; by default what the plan needs."""
    max_lag: NonNegative = 0
    """Updates that a rollout's policy may be behind the learner's; 0 is synchronous."""
    publish_timeout_s: Duration = 60.0


class Config(Section):
    """A whole run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Of the folder below `output`."""
    seed: NonNegative = 0
    output: Path = Path("runs")
    data: DataConfig
    model: ModelConfig = ModelConfig()
    sft: SftConfig = SftConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    learner: LearnerConfig = LearnerConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()

    @property
    def run_dir(self) -> Path:
        """Folder of everything that the run writes."""
        return self.output / self.name

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.model.hidden_size % self.model.heads:
            raise ValueError(
                f"model.hidden_size = {self.model.hidden_size} is not a multiple of "
                f"model.heads = {self.model.heads}; choose one that is"
            )
        if self.model.heads % self.model.kv_heads:
            raise ValueError(
                f"model.heads = {self.model.heads} is not a multiple of "
                f"model.kv_heads = {self.model.kv_heads}; choose one that is"
            )
        if self.learner.estimator == "leave_one_out" and self.rollout.candidates < 2:
            raise ValueError(
                "learner.estimator = leave_one_out needs rollout.candidates >= 2, "
                f"not {self.rollout.candidates}"
            )
        if self.model.value_head and "vllm" in (self.rollout.engine, self.evaluate.engine):
            raise ValueError(
                "model.value_head = true needs an engine that runs the head; set rollout.engine "
                'and evaluate.engine to "torch"'
            )
        if self.rollout.search == "ved" and not self.model.value_head:
            raise ValueError(
                'rollout.search = "ved" is guided by values; set model.value_head = true, '
                "or choose another search"
            )
        if 0 < self.learner.dual_clip <= 1:
            raise ValueError(
                f"learner.dual_clip = {self.learner.dual_clip} would bind at ratio 1; "
                "take a value above 1, or 0 to switch it off"
            )
        updates, lag = self.learner.updates_per_batch, self.cluster.max_lag
        if self.learner.dropout and (updates > 1 or lag):
            raise ValueError(
                f"learner.dropout = {self.learner.dropout} needs learner.updates_per_batch = 1 and "
                f"cluster.max_lag = 0, not {updates} and {lag}: the ratio of two passes under "
                "different dropout is noise"
            )
        if not any(self.rewards.weights.values()):
            raise ValueError("rewards.weights has no part with a weight; give one, e.g. rule = 1.0")
        return self

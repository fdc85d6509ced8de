"""Typed settings of a run: one frozen pydantic section per component, bounds in the types.

The string below each field is its description in docs/configuration.md.

Importable without torch and without Ray.
"""

from pathlib import Path

from pydantic import Field, NonNegativeInt, model_validator

from orchard.settings.critic import CriticConfig
from orchard.settings.data import DataConfig
from orchard.settings.learner import KlConfig, LearnerConfig, SapoConfig, ValueConfig
from orchard.settings.model import LoraConfig, ModelConfig, PromptConfig, SftConfig, TasksConfig
from orchard.settings.rewards import (
    CollaborativeConfig,
    ListwiseConfig,
    RewardsConfig,
    ScorerConfig,
    TransitionConfig,
)
from orchard.settings.rollout import RolloutConfig, ThinkConfig, VedConfig
from orchard.settings.run import CheckpointConfig, ClusterConfig, EvaluateConfig
from orchard.settings.section import Section
from orchard.settings.serve import FilterConfig, ServeConfig, VariantConfig

__all__ = [
    "CheckpointConfig",
    "ClusterConfig",
    "CollaborativeConfig",
    "Config",
    "CriticConfig",
    "DataConfig",
    "EvaluateConfig",
    "FilterConfig",
    "KlConfig",
    "LearnerConfig",
    "ListwiseConfig",
    "LoraConfig",
    "ModelConfig",
    "PromptConfig",
    "RewardsConfig",
    "RolloutConfig",
    "SapoConfig",
    "ScorerConfig",
    "ServeConfig",
    "SftConfig",
    "TasksConfig",
    "ThinkConfig",
    "TransitionConfig",
    "ValueConfig",
    "VariantConfig",
    "VedConfig",
]


class Config(Section):
    """All settings of one run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Run name, which is also the name of its folder below `output`."""
    seed: NonNegativeInt = 0
    """Seed of every random draw of the run."""
    output: Path = Path("runs")
    """Folder that holds the run folders."""
    plugins: tuple[str, ...] = ()
    """Modules that register searches, estimators, rewards or engines of your own; the driver and
    every actor import them, also from the working directory."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    sft: SftConfig = SftConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    learner: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    serve: ServeConfig = ServeConfig()

    @property
    def thinks(self) -> bool:
        """True if the policy generates thinking blocks or is trained to generate them."""
        return self.teaches_thinking or self.rollout.search == "think" or self.evaluate.think

    @property
    def teaches_thinking(self) -> bool:
        """True if SFT trains on rationales."""
        return self.data.rationales is not None or self.data.rationale_template is not None

    @property
    def run_dir(self) -> Path:
        """Folder that receives every file of the run."""
        return self.output / self.name

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        sizes = self.model.model_dump()
        for multiple, divisor in (("hidden_size", "heads"), ("heads", "kv_heads")):
            if sizes[multiple] % sizes[divisor]:
                raise ValueError(
                    f"model.{multiple} = {sizes[multiple]} is not a multiple of "
                    f"model.{divisor} = {sizes[divisor]}; choose one that is"
                )
        decodes_by_requests = self.rollout.decode == "requests"
        if (
            self.model.value_head
            and decodes_by_requests
            and "vllm" in (self.rollout.engine, self.evaluate.engine)
        ):
            raise ValueError(
                'rollout.decode = "requests" cannot run the head of model.value_head = true, for '
                'which vLLM gives no hidden states; set rollout.decode = "worker", or '
                'rollout.engine and evaluate.engine to "torch"'
            )
        if self.data.rationales is not None and self.data.rationale_template is not None:
            raise ValueError(
                "data.rationales and data.rationale_template both say where rationales come from; "
                "set one of them"
            )
        searches_thoughts = self.rollout.search == "think"
        if self.prompt.history is not None and self.data.titles:
            raise ValueError(
                "prompt.history writes items as semantic IDs, data.titles = true as titles; "
                "leave one of them out"
            )
        has_tasks = any(self.sft.tasks.model_dump().values())
        if has_tasks and (self.prompt.history is None or self.teaches_thinking):
            raise ValueError(
                "sft.tasks are tasks of a text model that is not taught to think; set "
                "prompt.history and no rationales, or leave them at 0"
            )
        if self.thinks and (self.data.titles or self.data.varying_depth):
            raise ValueError(
                "a policy that thinks has a block for each code, and so needs semantic IDs of one "
                "length; set data.titles = data.varying_depth = false"
            )
        if self.learner.sapo.think_only and not searches_thoughts:
            raise ValueError(
                "learner.sapo.think_only = true leaves nothing to learn without thoughts; set "
                'rollout.search = "think"'
            )
        if 0 < self.learner.dual_clip <= 1:
            raise ValueError(
                f"learner.dual_clip = {self.learner.dual_clip} would bind at ratio 1; "
                "take a value above 1, or 0 to switch it off"
            )
        updates, max_lag = self.learner.updates_per_batch, self.cluster.max_off_policy_steps
        if self.learner.dropout and (updates > 1 or max_lag):
            raise ValueError(
                f"learner.dropout = {self.learner.dropout} needs learner.updates_per_batch = 1 and "
                f"cluster.max_off_policy_steps = 0, not {updates} and {max_lag}: the ratio of two "
                "passes under different dropout is noise"
            )
        learner = self.learner
        if learner.tis_clip and (
            learner.dropout or learner.logprob == "full" or learner.ratio == "sequence"
        ):
            raise ValueError(
                'learner.tis_clip > 0 needs learner.dropout = 0, logprob = "trie" and ratio = '
                '"token"'
            )
        if 0 < learner.tis_clip < 1:
            raise ValueError(
                f"learner.tis_clip = {learner.tis_clip} would shrink every advantage; take 1 or "
                "more, or 0 to switch it off"
            )
        if not any(self.rewards.weights.values()):
            raise ValueError("rewards.weights has no part with a weight; give one, e.g. rule = 1.0")
        return self

"""Typed settings of a run: one frozen pydantic section per component, bounds in the types.

The string below each field is its description in docs/configuration.md.

Importable without torch and without Ray.
"""

from pathlib import Path

from pydantic import Field, NonNegativeInt, model_validator

from orchard.settings.critic import CriticConfig
from orchard.settings.data import DataConfig
from orchard.settings.guide import GuideConfig
from orchard.settings.learner import KlConfig, LearnerConfig, SapoConfig, ValueConfig
from orchard.settings.loop import LoopConfig
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
from orchard.settings.section import Section, refusal
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
    "GuideConfig",
    "KlConfig",
    "LearnerConfig",
    "ListwiseConfig",
    "LoopConfig",
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
    """Modules that register your own searches, estimators, rewards or engines; the driver and every
    actor import them, also from the working directory."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    prompt: PromptConfig = PromptConfig()
    sft: SftConfig = SftConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    learner: LearnerConfig = LearnerConfig()
    critic: CriticConfig = CriticConfig()
    guide: GuideConfig = GuideConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    serve: ServeConfig = ServeConfig()
    loop: LoopConfig = LoopConfig()

    @property
    def run_dir(self) -> Path:
        """Folder that receives every file of the run."""
        return self.output / self.name

    @property
    def rollouts_evaluate(self) -> bool:
        """Whether the rollout actors evaluate in training, which needs no further actor then.

        They cannot evaluate averaged weights while they search with the newest.
        """
        return self.evaluate.engine == self.rollout.engine and not self.learner.ema_decay

    @model_validator(mode="after")
    def _fresh_rows_exist(self) -> "Config":
        for key, rows in (("sft.rows", self.sft.rows), ("learner.rows", self.learner.rows)):
            if rows == "fresh" and not self.data.has_fresh:
                raise refusal(
                    "no_fresh_rows",
                    f'{key} = "fresh" needs fresh rows; set data.fresh or data.hold_back, or '
                    f'{key} = "train"',
                )
        wanting = {"learner.rows": self.learner.rows, "guide.counts": self.guide.counts}
        for key, rows in wanting.items():
            if rows == "feedback" and not self.data.feedback:
                raise refusal(
                    "no_feedback",
                    f'{key} = "feedback" needs feedback; set data.feedback to folders that '
                    "`orchard data feedback` has made, or choose other rows",
                )
        return self

    @model_validator(mode="after")
    def _items_in_one_notation(self) -> "Config":
        if self.prompt.history is not None and self.data.titles:
            raise refusal(
                "two_notations",
                "prompt.history writes items as semantic IDs, data.titles = true as titles; "
                "leave one of them out",
            )
        return self

    @model_validator(mode="after")
    def _tasks_of_text_model(self) -> "Config":
        has_tasks = any(self.sft.tasks.model_dump().values())
        if has_tasks and (self.prompt.history is None or self.data.has_rationales):
            raise refusal(
                "tasks_without_text",
                "sft.tasks are tasks of a text model that is not taught to think; set "
                "prompt.history and no rationales, or leave them at 0",
            )
        return self

    @model_validator(mode="after")
    def _dropout_of_one_pass(self) -> "Config":
        updates, max_lag = self.learner.updates_per_batch, self.cluster.max_off_policy_steps
        if self.learner.dropout and (updates > 1 or max_lag):
            raise refusal(
                "dropout_of_two_passes",
                f"learner.dropout = {self.learner.dropout} needs learner.updates_per_batch = 1 and "
                f"cluster.max_off_policy_steps = 0, not {updates} and {max_lag}: the ratio of two "
                "passes under different dropout is noise",
            )
        return self

    @model_validator(mode="after")
    def _one_worker_in_process(self) -> "Config":
        if self.cluster.in_process and self.learner.workers > 1:
            raise refusal(
                "workers_in_process",
                f"learner.workers = {self.learner.workers} needs processes of Ray; set "
                "cluster.in_process = false, or learner.workers = 1",
            )
        return self

    @model_validator(mode="after")
    def _adapters_to_publish(self) -> "Config":
        if self.cluster.publish_format == "adapter" and not self.model.lora.rank:
            raise refusal(
                "no_adapters_to_publish",
                'cluster.publish_format = "adapter" needs adapters; set model.lora.rank, or '
                "publish in float32 or bfloat16",
            )
        return self

    @model_validator(mode="after")
    def _hint_weight_of_hints(self) -> "Config":
        if self.learner.hint_weight and not self.rollout.hints:
            raise refusal(
                "hint_weight_without_hints",
                f"learner.hint_weight = {self.learner.hint_weight} has no hints to learn; set "
                "rollout.hints to the largest number of codes to give",
            )
        return self

"""What is evaluated, what survives, and where things run."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from orchard.settings.section import Section


class EvaluateConfig(Section):
    """Held-out evaluation by constrained beam search."""

    beams: PositiveInt = 50
    engine: Literal["vllm", "torch"] = "torch"
    think: bool = False
    """Let the policy think, greedily and with `rollout.think.block_tokens`, before the beam."""
    every: NonNegativeInt = 50
    """Updates between two looks at the validation rows; 0 never looks."""
    valid_rows: PositiveInt = 1000
    valid_beams: PositiveInt = 20
    test_rows: NonNegativeInt = 0
    """Rows of the test split before and after; 0 takes all."""
    batch_size: PositiveInt = 256
    resamples: PositiveInt = 2000
    """Bootstrap resamples behind the 95 % intervals of an evaluation; differences between two take
    2,000."""


class CheckpointConfig(Section):
    """What survives."""

    every: PositiveInt = 50
    """Updates between two checkpoints."""
    keep: PositiveInt = 2


class ClusterConfig(Section):
    """Where things run and how far ahead rollouts may run."""

    section: ClassVar[str] = "cluster"
    renamed: ClassVar[Mapping[str, str]] = {"max_lag": "max_off_policy_steps"}

    address: str | None = None
    """Ray cluster to join; by default RAY_ADDRESS, or a local cluster of this run's own."""
    cpus: PositiveInt | None = None
    """CPUs of the local cluster; by default what the plan needs."""
    max_off_policy_steps: NonNegativeInt = 0
    """Updates that a rollout's policy may be behind the learner's; 0 is synchronous."""
    publish_timeout_s: PositiveFloat = 60.0
    probe_prompts: NonNegativeInt = 2
    """Prompts whose targets each rollout actor scores anew when it is given weights, to compare
    with the learner; 0 trusts the digest alone."""
    probe_tolerance: PositiveFloat | None = None
    """Largest difference of one of them, in nats; by default 0.001, or 0.5 where rollout or learner
    computes in bfloat16."""
    tracker: Literal["wandb", "mlflow"] | None = None
    """Log to Weights & Biases (offline unless WANDB_MODE says otherwise) or MLflow as well; needs
    the extra `tracking`."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Of the driver's `/metrics` for Prometheus; 0 is any free one, by default there is none."""
    metrics_host: str = "127.0.0.1"
    """Where that listens; 0.0.0.0 shows the metrics to all who can reach the machine."""

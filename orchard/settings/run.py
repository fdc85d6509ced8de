"""Settings of evaluation, checkpoints and the Ray cluster."""

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from orchard.settings.section import Section
from orchard.settings.widths import Widths


class EvaluateConfig(Section):
    """Held-out evaluation by constrained beam search."""

    beams: Widths = 50
    """Beam width of the evaluation on the test split: one number, or a list with a number for each
    level of the codes, the last of which is the number of candidates."""
    engine: str = "torch"
    """Decoding engine of the evaluation."""
    think: bool = False
    """Whether the policy generates thinking blocks before the beam, greedily and with
    `rollout.think.block_tokens`."""
    guide: bool | Literal["auto"] = "auto"
    """Whether an evaluation also searches with the guide of the policy; `auto` does so if there is
    one."""
    wide: NonNegativeInt = 0
    """Beam width of a second guided search for the rows whose first ten candidates are not proved
    to be the best of the catalog; 0 searches once."""
    exclude_seen: bool | Literal["auto"] = "auto"
    """Whether an evaluation also reports lists without the items of the row's own history, and
    leaves these items out of guided lists; `auto` does so if fewer than 1 % of the training targets
    are in their own history."""
    every: NonNegativeInt = 50
    """Number of updates between two evaluations on the validation rows; 0 disables them."""
    valid_rows: PositiveInt = 1000
    """Number of validation rows."""
    valid_beams: Annotated[int, Field(ge=10)] = 20
    """Beam width of the evaluation on the validation rows; at least 10, since NDCG@10 selects the
    best version."""
    test_rows: NonNegativeInt = 0
    """Number of test rows that are evaluated before and after training; 0 uses all."""
    batch_size: PositiveInt = 256
    """Number of prompts per batch of the evaluation."""
    resamples: PositiveInt = 2000
    """Number of bootstrap resamples for the 95 % intervals of an evaluation; a comparison of two
    evaluations uses 2,000."""


class CheckpointConfig(Section):
    """Checkpoints of a run."""

    every: PositiveInt = 50
    """Number of updates between two checkpoints."""
    keep: PositiveInt = 2
    """Number of most recent checkpoints to keep."""


class ClusterConfig(Section):
    """Ray cluster, weight synchronization and metrics of a run."""

    section: ClassVar[str] = "cluster"
    renamed: ClassVar[Mapping[str, str]] = {"max_lag": "max_off_policy_steps"}

    in_process: bool = False
    """Whether actors and learner all run in the driver's process, one after the other and without
    Ray: for debuggers, and for policies so small that separate processes cost more than they
    save."""
    address: str | None = None
    """Address of the Ray cluster to join; by default RAY_ADDRESS, or a new local cluster."""
    cpus: PositiveInt | None = None
    """Number of CPUs of the local cluster; by default as many as the plan needs."""
    max_off_policy_steps: NonNegativeInt = 0
    """Maximum number of updates by which the rollout policy may lag behind the learner; 0 is
    synchronous."""
    publish_timeout_s: PositiveFloat = 60.0
    """Seconds to wait for the actors to load published weights."""
    publish_format: Literal["float32", "bfloat16", "adapter"] = "float32"
    """Format of published weights: all in float32; all in bfloat16, which halves their size; or,
    with `model.lora.rank`, the adapters and all other trained weights, which each actor adds to the
    initial policy. Policies are saved in float32 in any case."""
    probe_prompts: NonNegativeInt = 2
    """Number of probe prompts whose targets each rollout actor scores after it loads weights, for
    comparison with the learner; with 0 only the digest is verified."""
    probe_tolerance: PositiveFloat | None = None
    """Maximum difference in nats between the rollout and learner log-probabilities of a probe
    target; by default 0.001, or 0.5 if rollout or learner computes in bfloat16 or weights are
    published in it."""
    tracker: str | None = None
    """Additional experiment tracker: Weights & Biases (offline unless WANDB_MODE overrides it) or
    MLflow; needs the extra `tracking`."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Port of the driver's `/metrics` endpoint for Prometheus; 0 selects a free port, and by
    default there is no endpoint."""
    metrics_host: str = "127.0.0.1"
    """Address that the `/metrics` endpoint binds to; 0.0.0.0 exposes the metrics to every host that
    can reach the machine."""

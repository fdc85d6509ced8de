"""Definitions of all Prometheus metrics of a run, with unit and meaning.

A metric with `logged` takes its values from the run's metrics logger, under that name; `{label}`
matches one part of the name and becomes the value of the label. Other metrics are read from the
pools and the controller at each scrape. Every sample also has the label `run`.

To add a metric, log the value and add an entry to `METRICS`, which dashboards, rules and tests use.
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import Literal

Kind = Literal["counter", "gauge", "histogram"]

STEP_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
PUSH_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
LAG = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Prometheus metric. Names of counters end in `_total`; names include seconds and bytes."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    logged: str | None = None
    """Name in the metrics logger: a counter adds the logged value, a gauge is set to it."""
    buckets: tuple[float, ...] = ()


def _counter(name: str, help: str, logged: str | None = None, *labels: str) -> Metric:
    return Metric(name=name, kind="counter", help=help, labels=labels, logged=logged)


def _gauge(name: str, help: str, logged: str | None = None, *labels: str) -> Metric:
    return Metric(name=name, kind="gauge", help=help, labels=labels, logged=logged)


def _histogram(name: str, help: str, logged: str, buckets: tuple[float, ...]) -> Metric:
    return Metric(name=name, kind="histogram", help=help, logged=logged, buckets=buckets)


METRICS = (
    # Lifecycle of the run.
    _gauge("orchard_start_timestamp_seconds", "Time at which this process started on the run."),
    _gauge(
        "orchard_end_timestamp_seconds",
        "Time at which this process ended its work on the run in an orderly way, also after an "
        "error; 0 until then.",
    ),
    _counter("orchard_steps_total", "Updates or epochs done by this process.", None, "phase"),
    _gauge("orchard_step", "Updates or epochs done by the run.", None, "phase"),
    _gauge(
        "orchard_last_step_timestamp_seconds", "Time at which the last step ended.", None, "phase"
    ),
    _counter("orchard_non_finite_total", "Logged values that were not finite.", None, "logged"),
    _gauge("orchard_checkpoint_step", "Step of the newest checkpoint."),
    _gauge(
        "orchard_checkpoint_timestamp_seconds",
        "Time of the newest checkpoint; initially the start of this process.",
    ),
    _histogram(
        "orchard_step_seconds", "Duration of a step without evaluation.", "cluster/step_s", STEP_S
    ),
    _counter(
        "orchard_step_phase_seconds_total",
        "Seconds of steps by phase: wait, pack, learn, publish, save.",
        "cluster/{phase}_s",
        "phase",
    ),
    # Rollout.
    _counter("orchard_prompts_total", "Prompts searched and learned from.", "rollout/prompts"),
    _counter("orchard_candidates_total", "Candidates learned from.", "rollout/candidates"),
    _counter(
        "orchard_rollout_forward_tokens_total",
        "Tokens of forward passes in searches.",
        "rollout/forward_tokens",
    ),
    _counter(
        "orchard_rollout_prefill_tokens_total",
        "Prompt tokens among the forward tokens.",
        "rollout/prefill_tokens",
    ),
    _counter("orchard_rollout_passes_total", "Forward passes of searches.", "rollout/passes"),
    _counter("orchard_rollout_search_seconds_total", "Time inside searches.", "rollout/search_s"),
    _gauge("orchard_rollout_diversity", "Mean distance of candidates.", "rollout/diversity"),
    _histogram(
        "orchard_policy_lag_versions",
        "Versions between the policy of a batch and the policy that it updated.",
        "rollout/lag_versions",
        LAG,
    ),
    _gauge("orchard_policy_lag_last_versions", "Lag of the newest batch.", "rollout/lag_versions"),
    _gauge("orchard_policy_lag_bound_versions", "The configured cluster.max_off_policy_steps."),
    # Rewards and groups.
    _gauge("orchard_reward_mean", "Mean reward of candidates.", "rewards/mean"),
    _gauge("orchard_reward_best", "Mean of the best reward per group.", "rewards/best"),
    _gauge("orchard_hit_ratio", "Share of groups that contain their target.", "rewards/hit_rate"),
    _gauge(
        "orchard_zero_spread_ratio",
        "Share of groups with equal rewards, which have no gradient.",
        "rewards/zero_spread_share",
    ),
    _gauge("orchard_distinct_ratio", "Distinct leaves per candidate.", "rewards/distinct_share"),
    _gauge(
        "orchard_probability_mass_ratio",
        "Probability of a group's distinct leaves under the policy that searched.",
        "rewards/probability_mass",
    ),
    _gauge("orchard_reward_part_mean", "Mean of one reward component.", "rewards/{part}", "part"),
    # Learner.
    _gauge("orchard_value_loss", "Squared error of the value head.", "learner/value_loss"),
    _gauge("orchard_surrogate", "Negative clipped surrogate.", "learner/surrogate"),
    _gauge("orchard_kl_nats", "Divergence from the reference (k3).", "learner/kl"),
    _gauge("orchard_entropy_nats", "Mean entropy of a choice.", "learner/entropy"),
    _gauge("orchard_clipped_ratio", "Share of clipped choices.", "learner/clipped_fraction"),
    _gauge("orchard_importance_weight_max", "Largest importance weight.", "learner/ratio_max"),
    _gauge("orchard_gradient_norm", "Gradient norm before clipping.", "learner/grad_norm"),
    _gauge("orchard_learning_rate", "Learning rate of the last update.", "learner/lr"),
    _gauge(
        "orchard_logprob_gap_nats",
        "Largest difference between the search's and the learner's log-probability of a choice.",
        "learner/logprob_gap",
    ),
    _gauge("orchard_logprob_gap_bound_nats", "Tolerance of the log-probability probe."),
    _counter(
        "orchard_learner_forward_tokens_total",
        "Token slots of forward passes in updates.",
        "learner/forward_tokens",
    ),
    _gauge("orchard_warm_start_loss", "Mean SFT loss of the last epoch.", "sft/loss"),
    # Evaluation.
    _gauge(
        "orchard_evaluation_ratio",
        "HR@k or NDCG@k on held-out rows, on semantic IDs or items.",
        "evaluate/{metric}@{k}/{level}",
        "metric",
        "k",
        "level",
    ),
    # The closed loop (`orchard loop`), by round.
    _gauge("orchard_loop_reward", "Mean reward per request of the last window.", "loop/reward"),
    _gauge(
        "orchard_loop_realized_reward",
        "Reward per draw of the policy that was watched in the last window.",
        "loop/realized",
    ),
    _gauge(
        "orchard_loop_realized_reward_low", "Lower end of its 95 % interval.", "loop/realized_low"
    ),
    _gauge("orchard_loop_realized_reward_high", "Upper end of its interval.", "loop/realized_high"),
    _gauge(
        "orchard_loop_predicted_reward",
        "Off-policy estimate of the reward per draw of the policy trained last.",
        "loop/predicted",
    ),
    _gauge(
        "orchard_loop_predicted_reward_low", "Lower end of its 95 % interval.", "loop/predicted_low"
    ),
    _gauge(
        "orchard_loop_predicted_reward_high", "Upper end of its interval.", "loop/predicted_high"
    ),
    _gauge(
        "orchard_loop_serving_reward",
        "Off-policy estimate of the reward per draw of the policy that answers.",
        "loop/serving",
    ),
    _gauge(
        "orchard_loop_drift",
        "Change of the reward per draw of one policy between the last two windows.",
        "loop/drift",
    ),
    _gauge("orchard_loop_window_requests", "Requests of the last window.", "loop/window_requests"),
    _gauge("orchard_loop_window_events", "Events of the last window.", "loop/window_events"),
    _gauge(
        "orchard_loop_event_delay_seconds",
        "Median time from an exposure to its event in the last window.",
        "loop/event_delay_seconds",
    ),
    _counter(
        "orchard_loop_late_events_total",
        "Events that came after their window was closed.",
        "loop/late_events",
    ),
    _counter("orchard_loop_published_total", "Policies that were published.", "loop/published"),
    _counter("orchard_loop_refused_total", "Policies that the gate refused.", "loop/refused"),
    _counter(
        "orchard_loop_rolled_back_total", "Policies that were rolled back.", "loop/rolled_back"
    ),
    _counter("orchard_loop_skipped_total", "Windows without exposures.", "loop/skipped"),
    _counter(
        "orchard_loop_outside_total",
        "Windows whose reward was outside the predicted interval.",
        "loop/outside",
    ),
    # Weights and recovery.
    _histogram(
        "orchard_publish_seconds", "Duration of a weight push.", "cluster/publish_s", PUSH_S
    ),
    _gauge("orchard_policy_version", "Policy step that a process has loaded.", None, "holder"),
    _counter("orchard_restarts_total", "Actors or worker groups replaced.", None, "pool"),
    _counter(
        "orchard_pool_failures_total",
        "Calls that failed, by reason: died, deadline, raised, unfit.",
        None,
        "pool",
        "method",
        "reason",
    ),
    # Pools, by actor.
    _gauge("orchard_pool_actors", "Number of actors of a pool.", None, "pool"),
    _counter("orchard_pool_calls_total", "Completed calls.", None, "pool", "actor", "method"),
    _counter(
        "orchard_pool_busy_seconds_total",
        "Seconds with at least one call in progress at an actor.",
        None,
        "pool",
        "actor",
    ),
    _gauge("orchard_pool_in_hand", "Calls in progress at an actor.", None, "pool", "actor"),
    _gauge("orchard_pool_waiting", "Calls that wait for an actor with queue space.", None, "pool"),
)

PHASES = {f"cluster/{phase}_s" for phase in ("wait", "pack", "learn", "publish", "save")}
"""Logged names of the phases of a step."""
NOT_SHOWN = {
    "rewards/restarts", "rollout/restarts", "learner/restarts", "rewards/step_signal_share",
}  # fmt: skip
"""Logged names that the pools export themselves, or that match a pattern by accident."""

BY_NAME = {metric.name: metric for metric in METRICS}
"""Metrics by name."""

OTHERS = {
    "ray_serve_num_http_requests_total": "Requests at the Ray Serve proxies.",
    "ray_serve_num_http_error_requests_total": "Requests answered with an error.",
    "ray_serve_http_request_latency_ms": "Histogram of the latency at the proxy.",
    "ray_serve_deployment_request_counter_total": "Requests by deployment.",
    "ray_serve_deployment_error_counter_total": "Exceptions by deployment.",
    "ray_serve_deployment_processing_latency_ms": "Histogram of the time in a replica.",
    "ray_serve_replica_processing_queries": "Requests in progress in replicas.",
    "ray_serve_deployment_queued_queries": "Requests that wait for a replica.",
    "ray_serve_deployment_replica_healthy": "1 for each healthy replica.",
    "ray_serve_health_check_failures_total": "Failed health checks.",
    "ray_node_cpu_utilization": "CPU utilization of a node in percent.",
    "ray_node_mem_used": "Bytes used on a node.",
    "ray_node_disk_free": "Bytes free on a node's disk.",
    "ray_object_store_memory": "Bytes in the object store, by location.",
    "ray_node_gpus_utilization": "GPU utilization of a node in percent.",
    "ray_node_gram_used": "Megabytes of GPU memory used.",
}
"""Metrics of Ray and Ray Serve that dashboards and rules use, exported by Ray's node agents."""


@cache
def _patterns() -> tuple[tuple[re.Pattern[str], Metric], ...]:
    """Compile the logged names, those without labels first: `rewards/mean` is no component."""
    ordered = sorted((m for m in METRICS if m.logged), key=lambda m: len(m.labels))
    return tuple(
        (re.compile(re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>[^/@]+)", re.escape(m.logged or ""))), m)
        for m in ordered
    )


@cache
def find(logged: str) -> tuple[tuple[Metric, tuple[str, ...]], ...]:
    """Return the metrics that a logged name feeds, with their label values; often none.

    `cluster/publish_s` is both a histogram and one of the phases of a step.
    """
    if logged in NOT_SHOWN or logged.startswith("rewards/match_"):
        return ()
    matches = [
        (metric, tuple(match[label] for label in metric.labels))
        for pattern, metric in _patterns()
        if (match := pattern.fullmatch(logged)) is not None
    ]
    plain = tuple(pair for pair in matches if not pair[1])
    return plain if plain and logged not in PHASES else tuple(matches)

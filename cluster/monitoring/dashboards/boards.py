"""Contents of the dashboards."""

from cluster.monitoring.dashboards.graphs import QUANTILES, Board
from cluster.monitoring.dashboards.graphs import by_node as _by_node
from cluster.monitoring.dashboards.graphs import graph as _graph
from cluster.monitoring.dashboards.graphs import one as _one
from cluster.monitoring.dashboards.graphs import quantiles as _quantiles
from cluster.monitoring.dashboards.graphs import rate as _rate
from cluster.monitoring.dashboards.graphs import value as _value
from cluster.monitoring.dashboards.loop_board import LOOP

SEARCHES = ', pool=~"rollout|rewards"'

ROLLOUT = Board(
    uid="orchard-rollout",
    title="Orchard / Rollout throughput",
    rows=(
        (
            _graph("Prompts", "reqps", "Prompts searched per second.",
                   (_rate("orchard_prompts_total"), "{{run}}")),
            _graph("Candidates", "cps", "Leaves of search trees per second.",
                   (_rate("orchard_candidates_total"), "{{run}}")),
            _graph(
                "Forward tokens", "cps", "Forward passes of searches.",
                (_rate("orchard_rollout_forward_tokens_total"), "{{run}} all"),
                (_rate("orchard_rollout_prefill_tokens_total"), "{{run}} prompts"),
            ),
        ),
        (
            _graph(
                "Forward passes", "cps", "Few large passes are better than many small ones.",
                (_rate("orchard_rollout_passes_total"), "{{run}}"),
            ),
            _graph(
                "Tokens per second of search", "cps", "Engine speed without queueing.",
                (
                    f"{_rate('orchard_rollout_forward_tokens_total')} / "
                    f"{_rate('orchard_rollout_search_seconds_total')}",
                    "{{run}}",
                ),
            ),
            _one("Diversity", "none", "Mean distance of candidates.", "orchard_rollout_diversity"),
        ),
        (
            _graph(
                "Calls by actor", "cps", "Batches searched and scored.",
                (_rate("orchard_pool_calls_total", "pool", "actor", only=SEARCHES),
                 "{{run}} {{pool}} {{actor}}"),
            ),
            _graph(
                "Idle actors", "percentunit", "Share of time without a call in progress.",
                (f"1 - {_rate('orchard_pool_busy_seconds_total', 'pool', 'actor')}",
                 "{{run}} {{pool}} {{actor}}"),
            ),
            _graph(
                "Queue", "none",
                "Calls in progress, and calls that wait for an actor with queue space.",
                (f"sum by (run, pool) ({_value('orchard_pool_in_hand')})",
                 "{{run}} {{pool}} in hand"),
                (_value("orchard_pool_waiting"), "{{run}} {{pool}} waiting"),
            ),
        ),
        (
            _graph(
                "Lag", "none", "Versions behind, and the bound cluster.max_off_policy_steps.",
                (_value("orchard_policy_lag_last_versions"), "{{run}} last batch"),
                (_value("orchard_policy_lag_bound_versions"), "{{run}} bound"),
                (
                    "sum by (run) (rate(orchard_policy_lag_versions_sum"
                    '{run=~"$run"}[$__rate_interval])) / sum by (run) '
                    '(rate(orchard_policy_lag_versions_count{run=~"$run"}[$__rate_interval]))',
                    "{{run}} mean",
                ),
            ),
            _graph(
                "Where a step's time goes", "percentunit", "Seconds of each phase per second.",
                (_rate("orchard_step_phase_seconds_total", "phase"), "{{run}} {{phase}}"),
            ),
            _graph("Step", "s", "Without evaluation.", *_quantiles("orchard_step_seconds")),
        ),
    ),
)  # fmt: skip

LEARNING = Board(
    uid="orchard-learning",
    title="Orchard / Learning",
    rows=(
        (
            _graph(
                "Reward", "none", "Mean over candidates, by component, and the best of a group.",
                (_value("orchard_reward_mean"), "{{run}} mean"),
                (_value("orchard_reward_best"), "{{run}} best of group"),
                (_value("orchard_reward_part_mean"), "{{run}} {{part}}"),
            ),
            _one("Groups that hold the target", "percentunit", "Hit rate.", "orchard_hit_ratio"),
            _one("Groups without spread", "percentunit", "They give no gradient.",
                 "orchard_zero_spread_ratio"),
        ),
        (
            _one("KL to the reference", "none", "k3 estimator, nats.", "orchard_kl_nats"),
            _one("Choices at the clip", "percentunit", "Clip active.", "orchard_clipped_ratio"),
            _one("Entropy of a choice", "none", "Nats.", "orchard_entropy_nats"),
        ),
        (
            _graph(
                "Rollout against learner", "none",
                "Largest difference on one choice. Synchronous runs in float32 stay below 1e-4.",
                (_value("orchard_logprob_gap_nats"), "{{run}}"),
                (_value("orchard_logprob_gap_bound_nats"), "{{run}} bound"),
            ),
            _one("Probability mass found", "percentunit",
                 "Probability of a group's distinct leaves; near 1 the search is exhaustive.",
                 "orchard_probability_mass_ratio"),
            _one("Distinct leaves", "percentunit", "Per candidate.", "orchard_distinct_ratio"),
        ),
        (
            _graph(
                "NDCG on held-out rows", "none", "Validation rows.",
                (_value("orchard_evaluation_ratio", ', metric="ndcg"'), "{{run}} @{{k}} {{level}}"),
            ),
            _graph(
                "Hit rate on held-out rows", "none", "Validation rows.",
                (_value("orchard_evaluation_ratio", ', metric="hr"'), "{{run}} @{{k}} {{level}}"),
            ),
            _graph(
                "Loss", "none", "Loss of updates and of SFT epochs.",
                (_value("orchard_value_loss"), "{{run}} value head"),
                (_value("orchard_surrogate"), "{{run}} surrogate"),
                (_value("orchard_warm_start_loss"), "{{run}} warm start"),
            ),
        ),
        (
            _one("Norm of the gradient", "none", "Before clipping.", "orchard_gradient_norm"),
            _one("Largest importance weight", "none", "1 at first in a synchronous step.",
                 "orchard_importance_weight_max"),
            _one("Learning rate", "none", "Value of the last update.", "orchard_learning_rate"),
        ),
        (
            _graph(
                "Updates", "cps", "Steps done.",
                (_rate("orchard_steps_total", "phase"), "{{run}} {{phase}}"),
            ),
            _graph(
                "Learner's tokens", "cps", "Token slots of forward passes in updates.",
                (_rate("orchard_learner_forward_tokens_total"), "{{run}}"),
            ),
            _one("Step of the run", "none", "Continues after a resume.", "orchard_step",
                 "{{run}} {{phase}}"),
        ),
    ),
)  # fmt: skip

WEIGHTS = Board(
    uid="orchard-weights",
    title="Orchard / Weights and recovery",
    rows=(
        (
            _one("Version by holder", "none", "Last version that the process confirmed.",
                 "orchard_policy_version", "{{run}} {{holder}}"),
            _graph("Push", "s", "Weight push to all processes.",
                   *_quantiles("orchard_publish_seconds")),
            _graph(
                "Share of a step", "percentunit", "Seconds of pushing per second.",
                (_rate("orchard_step_phase_seconds_total", only=', phase="publish"'), "{{run}}"),
            ),
        ),
        (
            _graph(
                "Failed calls", "none", "Failures in the last ten minutes, by reason.",
                ('sum by (run, pool, method, reason) '
                 '(increase(orchard_pool_failures_total{run=~"$run"}[10m])) > 0',
                 "{{run}} {{pool}} {{method}} {{reason}}"),
            ),
            _one("Restarts", "none", "Actors and worker groups replaced by this process.",
                 "orchard_restarts_total", "{{run}} {{pool}}"),
            _one("Actors", "none", "By pool.", "orchard_pool_actors", "{{run}} {{pool}}"),
        ),
        (
            _graph(
                "Age of the newest checkpoint", "s", "Work that a crash would lose.",
                ('time() - orchard_checkpoint_timestamp_seconds{run=~"$run"}', "{{run}}"),
            ),
            _one("Step of the newest checkpoint", "none", "A resume begins here.",
                 "orchard_checkpoint_step"),
            _graph(
                "Since the last step", "s", "A stalled run shows a growing age.",
                ('time() - orchard_last_step_timestamp_seconds{run=~"$run"}', "{{run}} {{phase}}"),
            ),
        ),
        (
            _graph(
                "Non-finite values", "none", "NaN or infinity in the logged metrics.",
                (_value("orchard_non_finite_total"), "{{run}} {{logged}}"),
            ),
            _by_node("Free disk", "bytes", "min by (instance) (ray_node_disk_free)"),
            _graph("Object store", "bytes", "From Ray's node agents.",
                   ("sum by (Location) (ray_object_store_memory)", "{{Location}}")),
        ),
        (
            _by_node("CPU", "percent", "max by (instance) (ray_node_cpu_utilization)"),
            _by_node("Memory", "bytes", "max by (instance) (ray_node_mem_used)"),
            _by_node("GPUs", "percent", "avg by (instance) (ray_node_gpus_utilization)"),
        ),
    ),
)  # fmt: skip


def _serve(metric: str, *by: str) -> str:
    return f"sum by ({', '.join(by)}) (rate({metric}[$__rate_interval]))"


def _by(*labels: str) -> str:
    return " ".join(f"{{{{{label}}}}}" for label in labels)


def _served(metric: str, *by: str) -> tuple[str, str]:
    return _serve(metric, *by), _by(*by)


def _latency(metric: str, *by: str) -> tuple[tuple[str, str], ...]:
    rate = _serve(f"{metric}_bucket", "le", *by)
    return tuple((f"histogram_quantile({q}, {rate})", f"{_by(*by)} p{q[2:]}") for q in QUANTILES)


SERVING = Board(
    uid="orchard-serving",
    title="Orchard / Serving",
    by_run=False,
    rows=(
        (
            _graph("Requests", "reqps", "At the Ray Serve proxies.",
                   _served("ray_serve_num_http_requests_total", "route")),
            _graph("Errors", "reqps", "Answered with an error, by code.",
                   _served("ray_serve_num_http_error_requests_total", "error_code")),
            _graph("Latency", "ms", "At the proxy.",
                   *_latency("ray_serve_http_request_latency_ms", "route")),
        ),
        (
            _graph("Time in a replica", "ms", "By deployment.",
                   *_latency("ray_serve_deployment_processing_latency_ms", "deployment")),
            _graph(
                "Requests by deployment", "reqps", "Requests and exceptions.",
                _served("ray_serve_deployment_request_counter_total", "deployment"),
                (_serve("ray_serve_deployment_error_counter_total", "deployment"),
                 "{{deployment}} failed"),
            ),
            _graph("Fill of a batch", "percentunit", "Beam rows relative to `serve.budget`.",
                   *_latency("ray_orchard_serve_beam_fill", "variant")),
        ),
        (
            _graph(
                "Answers", "reqps", "By variant and source; `popularity` is the fallback.",
                _served("ray_orchard_serve_requests_total", "variant", "source"),
                (_serve("ray_orchard_serve_cache_hits_total", "variant"), "{{variant}} cached"),
            ),
            _graph("Answers by policy", "reqps", "Two during a policy switch.",
                   _served("ray_orchard_serve_requests_total", "policy")),
            _graph(
                "Refusals and fallbacks", "reqps", "Includes illegal items, which must not occur.",
                _served("ray_orchard_serve_refused_total", "kind"),
                (_serve("ray_orchard_serve_fallbacks_total", "reason"), "fallback: {{reason}}"),
                (_serve("ray_orchard_serve_illegal_total", "variant"), "illegal: {{variant}}"),
            ),
        ),
        (
            _graph("Time by phase", "s", "Of a request: queue, prefill, levels, post, total.",
                   *_latency("ray_orchard_serve_phase_seconds", "phase")),
            _graph("Beam rows waiting", "none", "Bounded by `serve.queue`; beyond it: 429.",
                   ("max by (replica) (ray_orchard_serve_queue_rows)", "{{replica}}")),
            _graph(
                "Versions", "none", "Oldest policy and catalog version of all replicas.",
                ("min by (variant) (ray_orchard_serve_policy_step)", "{{variant}} step"),
                ("min(ray_orchard_serve_catalogue_version)", "catalogue"),
            ),
        ),
        (
            _graph(
                "Refused", "none",
                "1 while a policy or a delta is refused and the older one served.",
                ("max by (variant) (ray_orchard_serve_policy_refused)", "{{variant}} policy"),
                ("max(ray_orchard_serve_catalogue_refused)", "delta"),
            ),
            _graph("Continued histories", "cps", "Requests that continued a cached history.",
                   _served("ray_orchard_serve_prefix_hits_total", "variant")),
            _graph(
                "Cached histories", "bytes", "Size of the cached keys and values.",
                ("max by (variant) (ray_orchard_serve_prefix_bytes)", "{{variant}}"),
            ),
            _graph("Tokens saved", "cps", "Prompt tokens that were not forwarded again.",
                   _served("ray_orchard_serve_prefix_tokens_total", "variant")),
        ),
        (
            _graph(
                "Queue", "none", "Requests waiting for a replica, and in a replica.",
                ("sum(ray_serve_deployment_queued_queries)", "waiting"),
                ("sum(ray_serve_replica_processing_queries)", "in a replica"),
            ),
            _graph("Healthy replicas", "none", "All deployments.",
                   ("sum(ray_serve_deployment_replica_healthy)", "replicas")),
            _graph("Failed health checks", "cps", "By deployment.",
                   _served("ray_serve_health_check_failures_total", "deployment")),
        ),
    ),
)  # fmt: skip

BOARDS = (ROLLOUT, LEARNING, WEIGHTS, LOOP, SERVING)

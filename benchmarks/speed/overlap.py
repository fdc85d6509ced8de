"""Benchmark the throughput of a second rollout actor and of one version of lag.

The job is that of the quickstart (synthetic world, vLLM rollouts) with one or two rollout actors,
and with `cluster.max_off_policy_steps` 0 or 1, with one thread for the learner and each actor. Each
configuration is one complete run from the same SFT policy, without evaluation or checkpoints in
between; the first updates, in which vLLM warms up, are left out. Throughput is end to end: updates
between two times of the log. `busy_cores` is measured over the whole machine, so it includes other
processes.
"""

import shutil
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from benchmarks.shared.measure import Figure, Report, Row, figure, report
from benchmarks.shared.recipe import ONE_THREAD, branch
from cluster.cli.commands import QUICKSTART, warm_start
from orchard import config
from orchard.data.synthetic import WorldParams, write_world
from orchard.settings import Config
from orchard.tracking.metrics_log import FILE, read_metrics

WAYS = {(actors, lag): f"{actors} actors, lag {lag}" for lag in (0, 1) for actors in (1, 2)}
FIRST = 5
"""Number of warm-up updates that are left out."""
ALONE = ("evaluate.every=0", "evaluate.test_rows=64", "evaluate.valid_rows=64",
         "checkpoint.every=10000", "learner.tis_clip=2.0")  # fmt: skip
"""Overrides of all runs: no evaluation, and truncated importance sampling even without lag."""


def run(quick: bool) -> Report:
    """Measure updates and tokens per second of each configuration; `quick` is a smoke test."""
    steps, epochs = (FIRST + 2, 1) if quick else (FIRST + 40, 3)
    folder = Path(tempfile.mkdtemp(prefix="orchard-overlap-"))
    try:
        write_world(folder / "world", WorldParams())
        changes = (
            *ONE_THREAD, *ALONE, f"output={folder}", f"data.path={folder / 'world'}",
            f"learner.steps={steps}", f"sft.epochs={epochs}",
        )  # fmt: skip
        sft_config = config.load(QUICKSTART, [*changes, "name=start"])
        warm_start(sft_config, dry_run=False)
        metrics: dict[tuple[int, int], dict[str, float]] = {}
        for actors, lag in WAYS:
            config_of_way = config.load(QUICKSTART, [
                *changes, f"name=ways-{actors}-{lag}", f"rollout.actors={actors}",
                f"cluster.max_off_policy_steps={lag}",
            ])  # fmt: skip
            metrics[actors, lag] = _one(sft_config, config_of_way)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows: list[Row] = [{"way": name} | metrics[way] for way, name in WAYS.items()]
    return report("overlap", _figures(metrics), rows)


def _figures(metrics: dict[tuple[int, int], dict[str, float]]) -> list[Figure]:
    def over(name: str, way_a: tuple[int, int], way_b: tuple[int, int]) -> Figure:
        ratio = metrics[way_a]["updates_per_s"] / metrics[way_b]["updates_per_s"]
        busy = [f"{metrics[way]['busy_cores']:.2f}" for way in (way_b, way_a)]
        note = f"updates per second, {WAYS[way_a]} over {WAYS[way_b]}; busy cores {busy[1]}, "
        return figure(name, ratio, "x", asked=">= 1", note=f"{note}{busy[0]}")

    extra_lag = max(values["most_lag"] - lag for (_, lag), values in metrics.items())
    return [
        over("second_actor_synchronous", (2, 0), (1, 0)),
        over("lag_with_one_actor", (1, 1), (1, 0)),
        over("second_actor_with_lag", (2, 1), (1, 1)),
        figure("staleness_above_bound", extra_lag, "versions", asked="<= 0"),
    ]


def _one(sft_config: Config, run_config: Config) -> dict[str, float]:
    """Run RL once and return the throughput of the updates after the warm-up."""
    with _CpuWatch() as watch:
        branch(sft_config, run_config)
    log = read_metrics(run_config.run_dir / FILE)["train"]
    step_time = log["cluster/step_s"].time[FIRST - 1 :]
    duration_s, measured = step_time[-1] - step_time[0], slice(FIRST, None)

    def total(name: str) -> float:
        return float(np.sum(log[name].value[measured]))

    tokens = sum(total(f"rollout/{kind}_tokens") for kind in ("forward", "prefill", "leaf"))
    return {
        "updates_per_s": (len(step_time) - 1) / duration_s,
        "prompts_per_s": total("rollout/prompts") / duration_s,
        "rollout_tokens_per_s": tokens / duration_s,
        "learn_share": total("cluster/learn_s") / duration_s,
        "wait_share": total("cluster/wait_s") / duration_s,
        "search_s_per_update": total("rollout/search_s") / (len(step_time) - 1),
        "busy_cores": watch.busy_cores(step_time[0], step_time[-1]),
        "most_lag": float(np.max(log["rollout/lag_versions"].value)),
        "ratio_max": float(np.max(log["learner/ratio_max"].value[measured])),
    }


class _CpuWatch:
    """Sampler of the processor time of the whole machine."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="cpu", daemon=True)

    def __enter__(self) -> "_CpuWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            spent = psutil.cpu_times()
            self._seen.append((time.time(), spent.user + spent.nice + spent.system))
            if self._done.wait(0.2):
                return

    def busy_cores(self, begin: float, end: float) -> float:
        """Return the mean number of busy cores between two times in seconds since 1970."""
        moment, spent = np.array(self._seen).T
        return float(np.diff(np.interp([begin, end], moment, spent))[0] / (end - begin))

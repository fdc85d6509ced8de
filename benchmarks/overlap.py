"""What a second rollout actor and one version of lag bring on this machine.

The job of the quickstart (synthetic world, vLLM rollouts) with one or two rollout actors, and with
`cluster.max_off_policy_steps` 0 or 1, one thread to the learner and to each actor. Each way is one
whole run from the same warm start, without evaluation or checkpoints in between; the first updates
of a run, in which vLLM warms up, are left out. Throughput is what a user waits for: updates between
two moments of the log, not the time of each phase. `busy_cores` counts the whole machine, other
processes included.
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
"""Updates that are left out."""
ALONE = ("evaluate.every=0", "evaluate.test_rows=64", "evaluate.valid_rows=64",
         "checkpoint.every=10000", "learner.tis_clip=2.0")  # fmt: skip
"""Truncated importance sampling in all ways, so that lag is the only difference."""


def run(quick: bool) -> Report:
    """Updates and tokens per second in each way; `quick` shows only that it works."""
    steps, epochs = (FIRST + 2, 1) if quick else (FIRST + 40, 3)
    folder = Path(tempfile.mkdtemp(prefix="orchard-overlap-"))
    try:
        write_world(folder / "world", WorldParams())
        changes = (
            *ONE_THREAD, *ALONE, f"output={folder}", f"data.path={folder / 'world'}",
            f"learner.steps={steps}", f"sft.epochs={epochs}",
        )  # fmt: skip
        begin = config.load(QUICKSTART, [*changes, "name=start"])
        warm_start(begin, dry_run=False)
        found: dict[tuple[int, int], dict[str, float]] = {}
        for actors, lag in WAYS:
            own = config.load(QUICKSTART, [
                *changes, f"name=ways-{actors}-{lag}", f"rollout.actors={actors}",
                f"cluster.max_off_policy_steps={lag}",
            ])  # fmt: skip
            found[actors, lag] = _one(begin, own)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    rows: list[Row] = [{"way": name} | found[way] for way, name in WAYS.items()]
    return report("overlap", _figures(found), rows)


def _figures(found: dict[tuple[int, int], dict[str, float]]) -> list[Figure]:
    def over(name: str, ours: tuple[int, int], theirs: tuple[int, int]) -> Figure:
        ratio = found[ours]["updates_per_s"] / found[theirs]["updates_per_s"]
        busy = [f"{found[way]['busy_cores']:.2f}" for way in (theirs, ours)]
        note = f"updates per second, {WAYS[ours]} over {WAYS[theirs]}; busy cores {busy[1]}, "
        return figure(name, ratio, "x", asked=">= 1", note=f"{note}{busy[0]}")

    stale = max(one["most_lag"] - lag for (_, lag), one in found.items())
    return [
        over("second_actor_synchronous", (2, 0), (1, 0)),
        over("lag_with_one_actor", (1, 1), (1, 0)),
        over("second_actor_with_lag", (2, 1), (1, 1)),
        figure("staleness_above_bound", stale, "versions", asked="<= 0"),
    ]


def _one(begin: Config, own: Config) -> dict[str, float]:
    """One run of RL, and what its log says of the updates after the first ones."""
    with _CpuWatch() as watch:
        branch(begin, own)
    log = read_metrics(own.run_dir / FILE)["train"]
    at = log["cluster/step_s"].time[FIRST - 1 :]
    span, rest = at[-1] - at[0], slice(FIRST, None)

    def total(name: str) -> float:
        return float(np.sum(log[name].value[rest]))

    tokens = sum(total(f"rollout/{kind}_tokens") for kind in ("forward", "prefill", "leaf"))
    return {
        "updates_per_s": (len(at) - 1) / span,
        "prompts_per_s": total("rollout/prompts") / span,
        "rollout_tokens_per_s": tokens / span,
        "learn_share": total("cluster/learn_s") / span,
        "wait_share": total("cluster/wait_s") / span,
        "search_s_per_update": total("rollout/search_s") / (len(at) - 1),
        "busy_cores": watch.busy_cores(at[0], at[-1]),
        "most_lag": float(np.max(log["rollout/lag_versions"].value)),
        "ratio_max": float(np.max(log["learner/ratio_max"].value[rest])),
    }


class _CpuWatch:
    """Samples how much processor time the whole machine has spent."""

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
        """Mean number of busy cores between two moments, seconds since 1970."""
        moment, spent = np.array(self._seen).T
        return float(np.diff(np.interp([begin, end], moment, spent))[0] / (end - begin))

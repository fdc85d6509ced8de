"""A run file over several seeds: warm start, RL, and a control that goes on with the warm start.

The control trains on the same rows for as long as RL took, to the nearest epoch, from the same
warm start, at a quarter of its learning rate. All are judged on the whole test split; differences
are paired by row and averaged over the seeds before rows are resampled.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.shared.measure import Figure, Report, Row, figure, report
from cluster.cli.commands import TRAINED, WARM_START, improve, warm_start
from orchard import config
from orchard.evaluation import ranking
from orchard.evaluation.bootstrap import Estimate
from orchard.evaluation.ranking import Evaluation
from orchard.settings import Config
from orchard.tracking.metrics_log import FILE, read_metrics

ONE_THREAD = ("learner.threads=1", "rollout.threads=1")
"""For policies this small a second thread costs more than it gains, most of all beside others."""
METRICS = ("ndcg@10/sid", "hr@1/sid", "hr@3/sid", "hr@10/sid", "hr@50/sid", "ndcg@10/item")


@dataclass(frozen=True, kw_only=True)
class Seed:
    """The three evaluations of one seed."""

    warm_start: Evaluation
    trained: Evaluation
    control: Evaluation
    seconds: dict[str, float]


def measure(
    name: str, *, seeds: int, bars: dict[str, float], beside: str, changes: tuple[str, ...] = ()
) -> Report:
    """Run (or read, where it is done) every seed of `cluster/runs/<name>.toml`, and compare.

    `bars` are asked of the warm start's metrics; `beside` names what others reach.
    """
    found = [_one(name, seed, changes) for seed in range(seeds)]
    figures = [
        figure(f"warm_start_{metric}", _mean(metric, [s.warm_start for s in found]), "",
               asked=f">= {bar}", note=f"mean of {seeds} seeds; {beside}")
        for metric, bar in bars.items()
    ]  # fmt: skip
    rows: list[Row] = []
    for side in ("warm_start", "trained", "control"):
        evaluations = [getattr(seed, side) for seed in found]
        rows.append({"policy": side} | {metric: _mean(metric, evaluations) for metric in METRICS})
    for other in ("warm_start", "control"):
        gain = over_seeds(
            [seed.trained for seed in found], [getattr(seed, other) for seed in found]
        )
        rows.append({"difference": f"trained - {other}"} | spelt(gain))
        figures.append(_above_zero(other, gain["ndcg@10/sid"], seeds))
    for index, seed in enumerate(found):
        scores = {side: getattr(seed, side).metrics["ndcg@10/sid"].mean
                  for side in ("warm_start", "trained", "control")}  # fmt: skip
        rows.append({"seed": index} | scores | seed.seconds)
    return report(name, figures, rows)


def _one(name: str, seed: int, changes: tuple[str, ...]) -> Seed:
    """What one seed came to; a command that has run already only reads its results."""
    settings = _settings(name, f"{name}-{seed}", seed, changes)
    warm_start(settings, dry_run=False)
    improve(settings, dry_run=False)
    log = read_metrics(settings.run_dir / FILE)
    train_s = float(np.sum(log["train"]["cluster/step_s"].value))
    control = control_of(
        settings, Path("cluster/runs") / f"{name}.toml", train_s, (
            *changes, f"name={name}-{seed}-control", f"seed={seed}",
        ),
    )  # fmt: skip
    return Seed(
        warm_start=read(settings, WARM_START),
        trained=read(settings, TRAINED),
        control=read(control, WARM_START),
        seconds={
            "warm_start_s": float(log["sft"]["sft/elapsed_s"].value[-1]),
            "train_s": train_s,
            "control_s": _seconds(control),
        },
    )


def control_of(begin: Config, path: Path, seconds: float, changes: Sequence[str]) -> Config:
    """A run that goes on with the warm start of another for so long, to the nearest epoch.

    It has the run file at `path` with the changes, which name it, at a quarter of the rate.
    """
    epoch_s = float(np.median(read_metrics(begin.run_dir / FILE)["sft"]["sft/epoch_s"].value))
    control = config.load(path, [
        *changes,
        f"model.path={begin.run_dir / WARM_START}",
        f"sft.epochs={max(1, round(seconds / epoch_s))}",
        f"sft.lr={begin.sft.lr / 4}",
    ])  # fmt: skip
    warm_start(control, dry_run=False)
    return control


def _settings(name: str, run: str, seed: int, changes: tuple[str, ...]) -> Config:
    path = Path("cluster/runs") / f"{name}.toml"
    return config.load(path, [f"name={run}", f"seed={seed}", *changes])


def branch(begin: Config, own: Config) -> None:
    """RL of one run from the warm start of another, which is made where there is none.

    What the warm start is worth on the test rows is taken along: it is the same for every branch.
    """
    if not (begin.run_dir / "evaluation" / f"{WARM_START}.json").is_file():
        warm_start(begin, dry_run=False)
    for folder in (WARM_START, "evaluation"):
        if not (own.run_dir / folder).is_dir():
            shutil.copytree(begin.run_dir / folder, own.run_dir / folder)
    improve(own, dry_run=False)


def means(found: Evaluation, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """The means of some metrics."""
    return {metric: found.metrics[metric].mean for metric in metrics}


def read(settings: Config, name: str = TRAINED) -> Evaluation:
    """An evaluation that a run has kept."""
    return ranking.read(settings.run_dir / "evaluation" / f"{name}.json")


def _seconds(settings: Config) -> float:
    return float(read_metrics(settings.run_dir / FILE)["sft"]["sft/elapsed_s"].value[-1])


def _mean(metric: str, found: list[Evaluation]) -> float:
    return float(np.mean([one.metrics[metric].mean for one in found]))


def over_seeds(ours: Sequence[Evaluation], theirs: Sequence[Evaluation]) -> dict[str, Estimate]:
    """The first evaluations minus the second, paired by row and averaged over the seeds."""
    return ranking.paired_over_seeds(
        [one.ranks for one in ours], [one.ranks for one in theirs], width=ours[0].width
    )


def spelt(gain: dict[str, Estimate], metrics: Sequence[str] = METRICS) -> dict[str, str]:
    """Differences with their intervals, by metric."""
    return {m: f"{gain[m].mean:+.4f} [{gain[m].low:+.4f}, {gain[m].high:+.4f}]" for m in metrics}


def _above_zero(other: str, gain: Estimate, seeds: int) -> Figure:
    note = f"NDCG@10, lower end of the paired 95 % interval; mean {gain.mean:+.4f}, {seeds} seeds"
    return figure(f"gain_over_{other}", gain.low, "", asked="> 0", note=note)

"""Run a run file over several seeds: SFT, RL, and a control that continues SFT.

The control trains on the same rows for as long as RL took, to the nearest epoch, from the same SFT
policy, at a quarter of its learning rate. All are evaluated on the whole test split; differences
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
"""Overrides for one thread: for policies this small a second thread costs more than it gains."""
METRICS = ("ndcg@10/sid", "hr@1/sid", "hr@3/sid", "hr@10/sid", "hr@50/sid", "ndcg@10/item")


@dataclass(frozen=True, kw_only=True)
class Seed:
    """Evaluations of one seed: SFT policy, RL policy and control."""

    warm_start: Evaluation
    trained: Evaluation
    control: Evaluation
    seconds: dict[str, float]


def measure(
    name: str,
    *,
    seeds: int,
    bars: dict[str, float],
    published: str,
    changes: tuple[str, ...] = (),
) -> Report:
    """Run every seed of `cluster/runs/<name>.toml`, or read its results, and compare.

    `bars` are targets of the SFT policy's metrics; `published` is a note on published results.
    """
    results = [_one(name, seed, changes) for seed in range(seeds)]
    figures = [
        figure(f"warm_start_{metric}", _mean(metric, [s.warm_start for s in results]), "",
               asked=f">= {bar}", note=f"mean of {seeds} seeds; {published}")
        for metric, bar in bars.items()
    ]  # fmt: skip
    rows: list[Row] = []
    for side in ("warm_start", "trained", "control"):
        evaluations = [getattr(seed, side) for seed in results]
        rows.append({"policy": side} | {metric: _mean(metric, evaluations) for metric in METRICS})
    for other in ("warm_start", "control"):
        gain = over_seeds(
            [seed.trained for seed in results], [getattr(seed, other) for seed in results]
        )
        rows.append({"difference": f"trained - {other}"} | spelt(gain))
        figures.append(_above_zero(other, gain["ndcg@10/sid"], seeds))
    for index, seed in enumerate(results):
        ndcg = {side: getattr(seed, side).metrics["ndcg@10/sid"].mean
                  for side in ("warm_start", "trained", "control")}  # fmt: skip
        rows.append({"seed": index} | ndcg | seed.seconds)
    return report(name, figures, rows)


def _one(name: str, seed: int, changes: tuple[str, ...]) -> Seed:
    """Run one seed and return its results; a command that has run already only reads them."""
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


def control_of(sft_config: Config, path: Path, seconds: float, changes: Sequence[str]) -> Config:
    """Continue the SFT of another run for `seconds`, to the nearest epoch; return the new run.

    The new run has the run file at `path` with the changes, which include its name, and a quarter
    of the learning rate.
    """
    epoch_s = float(np.median(read_metrics(sft_config.run_dir / FILE)["sft"]["sft/epoch_s"].value))
    control = config.load(path, [
        *changes,
        f"model.path={sft_config.run_dir / WARM_START}",
        f"sft.epochs={max(1, round(seconds / epoch_s))}",
        f"sft.lr={sft_config.sft.lr / 4}",
    ])  # fmt: skip
    warm_start(control, dry_run=False)
    return control


def _settings(name: str, run: str, seed: int, changes: tuple[str, ...]) -> Config:
    path = Path("cluster/runs") / f"{name}.toml"
    return config.load(path, [f"name={run}", f"seed={seed}", *changes])


def branch(sft_config: Config, run_config: Config) -> None:
    """Run RL from the SFT policy of another run, which is trained if it does not exist.

    The SFT policy's evaluation is copied, since it is the same for every branch.
    """
    if not (sft_config.run_dir / "evaluation" / f"{WARM_START}.json").is_file():
        warm_start(sft_config, dry_run=False)
    for folder in (WARM_START, "evaluation"):
        if not (run_config.run_dir / folder).is_dir():
            shutil.copytree(sft_config.run_dir / folder, run_config.run_dir / folder)
    improve(run_config, dry_run=False)


def means(evaluation: Evaluation, metrics: Sequence[str] = METRICS) -> dict[str, float]:
    """Return the means of some metrics."""
    return {metric: evaluation.metrics[metric].mean for metric in metrics}


def read(settings: Config, name: str = TRAINED) -> Evaluation:
    """Read an evaluation of a run."""
    return ranking.read(settings.run_dir / "evaluation" / f"{name}.json")


def _seconds(settings: Config) -> float:
    return float(read_metrics(settings.run_dir / FILE)["sft"]["sft/elapsed_s"].value[-1])


def _mean(metric: str, evaluations: list[Evaluation]) -> float:
    return float(np.mean([evaluation.metrics[metric].mean for evaluation in evaluations]))


def over_seeds(ours: Sequence[Evaluation], theirs: Sequence[Evaluation]) -> dict[str, Estimate]:
    """Estimate the first evaluations minus the second, paired by row and seed."""
    return ranking.paired_over_seeds(
        [evaluation.ranks for evaluation in ours],
        [evaluation.ranks for evaluation in theirs],
        width=ours[0].width,
    )


def spelt(gain: dict[str, Estimate], metrics: Sequence[str] = METRICS) -> dict[str, str]:
    """Format differences with their intervals, by metric."""
    return {m: f"{gain[m].mean:+.4f} [{gain[m].low:+.4f}, {gain[m].high:+.4f}]" for m in metrics}


def _above_zero(other: str, gain: Estimate, seeds: int) -> Figure:
    note = (
        f"NDCG@10, lower end of the 95 % interval over rows and seeds; mean {gain.mean:+.4f}, "
        f"{seeds} seeds"
    )
    return figure(f"gain_over_{other}", gain.low, "", asked="> 0", note=note)

"""Prepare the parts of a report and render them: templates in `templates/` hold the markup."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from cluster.console import duration, interval, metrics_of
from cluster.report.plots import Curve, curves, forest, tree
from orchard.evaluation.bootstrap import Estimate
from orchard.evaluation.ranking import Evaluation
from orchard.tracking.metrics_log import Series

HEADLINES = ("ndcg@10/sid", "hr@10/sid")
"""Metrics of the tiles at the top."""

Metrics = Mapping[str, Series]
Changes = Mapping[str, Mapping[str, Estimate]]
"""Paired differences by comparison, then by metric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Figure of one phase, with the metrics that it shows if the run has them."""

    title: str
    names: tuple[str, ...]
    log: bool = False
    is_share: bool = False
    """Whether the values are shares, drawn from 0 to 100 %."""
    note: str = ""
    """Sentence below the figure."""


def _evaluated(metric: str, *ks: int) -> tuple[str, ...]:
    return tuple(f"evaluate/{metric}@{k}/sid" for k in ks)


PANELS: dict[str, tuple[Panel, ...]] = {
    "train": (
        Panel(title="Reward", names=("rewards/mean", "rewards/rule")),
        Panel(
            title="Groups that hold the target",
            names=("rewards/hit_rate", "rollout/hit_share_valid"),
            is_share=True,
            note="If training rows are hit far more often than held-out rows, they are memorized.",
        ),
        Panel(title="NDCG on held-out rows", names=_evaluated("ndcg", 3, 5, 10)),
        Panel(title="Hit rate on held-out rows", names=_evaluated("hr", 1, 3, 5, 10, 20)),
        Panel(title="KL to the reference", names=("learner/kl",)),
        Panel(title="Entropy of a choice", names=("learner/entropy",)),
        Panel(
            title="Groups without spread in reward",
            names=("rewards/zero_spread_share",),
            is_share=True,
            note="All candidates of these groups have the same reward, so there is no gradient.",
        ),
        Panel(title="Choices at the clip", names=("learner/clipped_fraction",)),
        Panel(title="Norm of the gradient", names=("learner/grad_norm",)),
        Panel(title="Loss", names=("learner/loss", "learner/surrogate")),
        Panel(title="Rollout against learner", names=("learner/logprob_gap",), log=True),
        Panel(title="Learning rate", names=("learner/lr",)),
        Panel(title="Prompts per second of search", names=("rollout/prompts_per_s",)),
        Panel(title="Forward tokens per step", names=("rollout/forward_tokens",)),
    ),
    "sft": (
        Panel(title="Loss of the warm start", names=("sft/loss", "sft/nll")),
        Panel(title="NDCG on held-out rows", names=_evaluated("ndcg", 3, 5, 10)),
        Panel(title="Learning rate", names=("sft/lr",)),
        Panel(title="Hit rate on held-out rows", names=_evaluated("hr", 1, 3, 5, 10, 20)),
    ),
    "loop": (
        Panel(title="Reward per request", names=("loop/reward",)),
        Panel(
            title="Reward per draw, predicted and realized",
            names=("loop/predicted", "loop/realized", "loop/serving"),
        ),
        Panel(
            title="Requests and events of a window",
            names=("loop/window_requests", "loop/window_events", "loop/late_events"),
        ),
        Panel(title="Decisions", names=("loop/published", "loop/refused", "loop/rolled_back")),
    ),
}
"""Figures of each phase; metrics in no figure are shown in the appendix."""

TIME_NAMES = {
    "cluster/wait_s": "waiting for searches and rewards",
    "cluster/pack_s": "advantages and packing",
    "cluster/learn_s": "waiting for the update",
    "cluster/publish_s": "weights to the rollout actors",
    "cluster/save_s": "copying the state for a checkpoint",
    "cluster/step_s": "a whole step",
    "rollout/search_s": "searches in rollout actors",
    "learner/update_s": "updates in the learner",
    "sft/epoch_s": "an epoch",
    "loop/seconds_s": "a round",
}
"""Plain names of the times of a phase."""
STEPS = {"train": "update", "sft": "epoch", "loop": "round"}
"""Unit of the steps of each phase."""
TITLES = {"train": "Reinforcement learning", "sft": "Warm start", "loop": "Closed loop"}
"""Heading of each phase."""


class Figure(NamedTuple):
    """Figure with its title."""

    title: str
    svg: Markup
    note: str = ""


class Time(NamedTuple):
    """Row of a table of times."""

    name: str
    metric: str
    """Name in the log; empty if the row is computed."""
    spent: float
    """Seconds in total."""
    share: float
    """Share of the phase."""
    median: str
    slow: str
    """95th percentile of the seconds of one step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationTable:
    """Evaluations and their paired differences, one metric per row."""

    evaluations: Mapping[str, Evaluation]
    changes: Changes
    metrics: Sequence[str]
    facts: Mapping[str, Sequence[str]]
    """Facts besides the metrics: a text per evaluation."""
    figures: Sequence[Figure]


def render(template: str, **values: object) -> str:
    """Return an HTML page; every value is escaped, except for figures."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(interval=interval, tree=tree)
    return environment.get_template(template).render(values)


def tiles(
    evaluations: Mapping[str, Evaluation], changes: Changes, train: Metrics, num_updates: int
) -> list[tuple[str, str]]:
    """Return the headline numbers; `num_updates` is the configured number, 0 if unknown."""
    entries: list[tuple[str, str]] = []
    change = next(iter(changes.values()), {})
    for metric in HEADLINES:
        means = [e.metrics[metric].mean for e in evaluations.values() if metric in e.metrics]
        if means:
            note = f"paired {interval(change[metric], signed=True)}" if metric in change else ""
            value = " \N{RIGHTWARDS ARROW} ".join(f"{mean:.4f}" for mean in means[:2])
            entries.append((value, f"{metric} {note}"))
    if train:
        of_total = f" of {num_updates}" if num_updates else ""
        entries.append((f"{last_step(train)}{of_total}", "updates"))
    if "cluster/step_s" in train:
        entries.append((duration(float(np.nansum(train["cluster/step_s"].value))), "in updates"))
    if "rollout/prompts_per_s" in train:
        rate = train["rollout/prompts_per_s"].value
        rate = rate[np.isfinite(rate)]
        if len(rate):
            entries.append((f"{np.median(rate):.1f}", "prompts searched per second"))
    return entries


def evaluation(evaluations: Mapping[str, Evaluation], changes: Changes) -> EvaluationTable:
    """Return all evaluations and paired differences."""
    names = metrics_of(evaluations.values())
    facts = [_facts(result) for result in evaluations.values()]
    figures: list[Figure] = []
    for level in ("sid", "item") if changes else ():
        level_metrics = [name for name in names if name.endswith(f"/{level}")]
        svg = forest(changes, level_metrics)
        figures.append(Figure(f"Paired differences, {level} level", svg))
    return EvaluationTable(
        evaluations=evaluations,
        changes=changes,
        metrics=names,
        facts={name: [f.get(name, "") for f in facts] for each in facts for name in each},
        figures=figures,
    )


def phase(name: str, metrics: Metrics, reward_note: str = "") -> dict[str, Any]:
    """Return the figures of a phase, the titles of those without data, and the times.

    `reward_note` goes below the figure of the rewards.
    """
    figures, absent = list[Figure](), list[str]()
    for panel in PANELS[name]:
        present = with_numbers(metrics, panel.names)
        if present:
            svg = curves(
                present, title=panel.title, steps=STEPS[name], log=panel.log,
                is_share=panel.is_share,
            )  # fmt: skip
            note = reward_note if panel.title == "Reward" else panel.note
            figures.append(Figure(panel.title, svg, note))
        else:
            absent.append(panel.title.lower())
    return {
        "title": TITLES[name], "figures": figures, "absent": absent, "times": times(metrics),
    }  # fmt: skip


def times(metrics: Metrics) -> list[tuple[str, list[Time]]]:
    """Return the times of a phase: parts of the loop, and work in actors and workers."""
    timed = {
        name: series.value[np.isfinite(series.value)]
        for name, series in metrics.items()
        if name.endswith("_s") and not name.endswith(("_per_s", "elapsed_s"))
    }
    timed = {name: value for name, value in timed.items() if len(value)}
    steps = timed.pop("cluster/step_s", None)
    if not timed:
        return []
    total = float((steps if steps is not None else np.concatenate([*timed.values()])).sum())

    def row(name: str, value: np.ndarray) -> Time:
        spent, (median, slow) = float(value.sum()), np.quantile(value, [0.5, 0.95])
        share = spent / total if total else 0.0
        plain = TIME_NAMES.get(name, "")
        return Time(
            plain or name, name if plain else "", spent, share, f"{median:.3f}", f"{slow:.3f}"
        )

    names = sorted(timed, key=lambda name: -float(timed[name].sum()))
    laps = [row(name, timed[name]) for name in names if name.startswith("cluster/")]
    work = [row(name, timed[name]) for name in names if not name.startswith("cluster/")]
    if steps is not None:
        rest = max(total - sum(time.spent for time in laps), 0.0)
        laps.append(Time("everything else", "", rest, rest / total if total else 0.0, "", ""))
        laps.append(row("cluster/step_s", steps))
    return [
        ("", laps),
        *([("work in actors and workers, which may overlap", work)] if work else []),
    ]


def others(log: Mapping[str, Metrics]) -> list[Figure]:
    """Return the figures of all metrics that no other section shows."""
    figures: list[Figure] = []
    for name, metrics in log.items():
        shown = {metric for panel in PANELS.get(name, ()) for metric in panel.names}
        for metric in sorted(metrics.keys() - shown):
            title, present = f"{name}: {metric}", with_numbers(metrics, [metric])
            if present:
                svg = curves(present, title=title, steps=STEPS.get(name, "step"))
                figures.append(Figure(title, svg))
    return figures


def last_step(metrics: Metrics) -> int:
    """Return the last logged step of a phase, 0 if there is none."""
    return max((int(series.step.max()) for series in metrics.values()), default=0)


def with_numbers(metrics: Metrics, names: Sequence[str]) -> list[Curve]:
    """Return curves of the metrics that have at least one finite value."""
    present = [name for name in names if name in metrics and np.isfinite(metrics[name].value).any()]
    return [
        Curve(label=name.split("/")[-2 if "@" in name else -1], series=metrics[name])
        for name in present
    ]


def _facts(result: Evaluation) -> dict[str, str]:
    """Return the facts of an evaluation besides its metrics."""
    facts = {"policy": result.policy, "rows": str(result.num_rows), "candidates": str(result.width)}
    facts["seconds"] = f"{result.seconds:.1f}"
    extra = {name: f"{value:.6g}" for name, value in result.extra.items() if name != "seconds"}
    return facts | {name.replace("_", " "): text for name, text in extra.items()}

"""Build the HTML sections of the report; a section without data is empty."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

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


def _evaluated(metric: str, *ks: int) -> tuple[str, ...]:
    return tuple(f"evaluate/{metric}@{k}/sid" for k in ks)


PANELS: dict[str, tuple[Panel, ...]] = {
    "train": (
        Panel(title="Reward", names=("rewards/mean", "rewards/rule")),
        Panel(title="Groups that hold the target", names=("rewards/hit_rate",)),
        Panel(title="NDCG on held-out rows", names=_evaluated("ndcg", 3, 5, 10)),
        Panel(title="Hit rate on held-out rows", names=_evaluated("hr", 1, 3, 5, 10, 20)),
        Panel(title="KL to the reference", names=("learner/kl",)),
        Panel(title="Entropy of a choice", names=("learner/entropy",)),
        Panel(title="Groups without spread in reward", names=("rewards/zero_spread_share",)),
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
}
"""Figures of each phase; metrics in no figure are shown in the appendix."""

STEPS = {"train": "update", "sft": "epoch"}
"""Unit of the steps of each phase."""
TITLES = {"train": "Reinforcement learning", "sft": "Warm start"}
"""Heading of each phase."""


def notices(missing: Sequence[str]) -> str:
    """Return the list of missing parts."""
    if not missing:
        return ""
    lines = "".join(f"<li>{escape(sentence)}</li>" for sentence in missing)
    return f"<div class='notice'><b>Missing from this report</b><ul>{lines}</ul></div>"


def tiles(
    evaluations: Mapping[str, Evaluation], changes: Changes, train: Metrics, num_updates: int
) -> str:
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
    cells = "".join(
        f"<div class='tile'><b>{escape(value)}</b><span>{escape(label)}</span></div>"
        for value, label in entries
    )
    return f"<div class='tiles'>{cells}</div>" if cells else ""


def evaluation(evaluations: Mapping[str, Evaluation], changes: Changes) -> str:
    """Return all evaluations and paired differences, as a table and as figures."""
    if not evaluations:
        return ""
    names = metrics_of(evaluations.values())
    heads = "".join(f"<th>{escape(name)}</th>" for name in (*evaluations, *changes))
    rows = [_evaluation_row(name, evaluations, changes) for name in names]
    rows.append("<tr class='gap'><td>of the search</td></tr>")
    facts = {name: _facts(result) for name, result in evaluations.items()}
    for fact in dict.fromkeys(fact for facts_of in facts.values() for fact in facts_of):
        cells = "".join(f"<td>{escape(facts_of.get(fact, ''))}</td>" for facts_of in facts.values())
        rows.append(f"<tr><td>{escape(fact)}</td>{cells}{'<td></td>' * len(changes)}</tr>")
    table = (
        "<p class='faint'>Mean over rows and 95 % bootstrap interval. Differences are paired: both "
        "sides on the same resampled rows. /sid counts a hit on the semantic ID, /item on the item "
        "itself. Colored if the interval excludes zero.</p>"
        f"<div class='scroll'><table><thead><tr><th>metric</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    figures = ""
    for level in ("sid", "item") if changes else ():
        level_metrics = [name for name in names if name.endswith(f"/{level}")]
        figures += figure(f"Paired differences, {level} level", forest(changes, level_metrics))
    grid = f"<div class='grid' style='margin-top:20px'>{figures}</div>" if figures else ""
    return f"<h2>Evaluation</h2>{table}{grid}"


def training(phase: str, metrics: Metrics) -> str:
    """Return the figures of a phase."""
    figures, absent = "", list[str]()
    for panel in PANELS[phase]:
        present = with_numbers(metrics, panel.names)
        if present:
            svg = curves(present, title=panel.title, steps=STEPS[phase], log=panel.log)
            figures += figure(panel.title, svg)
        else:
            absent.append(panel.title.lower())
    note = f"<p class='faint'>Not in the log: {escape(', '.join(absent))}.</p>" if absent else ""
    return f"<h2>{TITLES[phase]}</h2><div class='grid'>{figures}</div>{note}" if figures else ""


def seconds(phase: str, metrics: Metrics) -> str:
    """Return the time of a phase: parts of the loop, and work in actors and workers."""
    timed = {
        name: series.value[np.isfinite(series.value)]
        for name, series in metrics.items()
        if name.endswith("_s") and not name.endswith(("_per_s", "elapsed_s"))
    }
    timed = {name: value for name, value in timed.items() if len(value)}
    steps = timed.pop("cluster/step_s", None)
    laps = {name: value for name, value in timed.items() if name.startswith("cluster/")}
    work = {name: value for name, value in timed.items() if name not in laps}
    if not timed:
        return ""
    total = float((steps if steps is not None else np.concatenate([*timed.values()])).sum())
    rows = [_time_row(name, float(v.sum()), total, v) for name, v in _longest_first(laps)]
    if steps is not None:
        rest = total - sum(float(value.sum()) for value in laps.values())
        rows.append(_time_row("in no lap", max(rest, 0.0), total, None))
        rows.append(_time_row("cluster/step_s", total, total, steps))
    rows.append(
        "<tr class='gap'><td>work in actors and workers, which may overlap</td></tr>"
        if work
        else ""
    )
    rows += [_time_row(name, float(v.sum()), total, v) for name, v in _longest_first(work)]
    head = "<th>phase</th><th>seconds</th><th>share</th><th>median</th><th>95th</th><th></th>"
    return (
        f"<h2>Seconds by phase, {TITLES[phase].lower()}</h2><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def examples(search_examples: Sequence[Mapping[str, Any]]) -> str:
    """Return a few prompts with their search trees."""
    figures = ""
    for example in search_examples:
        history = " \N{RIGHTWARDS ARROW} ".join(escape(name) for name in example["history"])
        figures += (
            f"<figure><h3>Row {example['row']}: {escape(example['target'])}</h3>"
            f"<p class='faint'>after {history}</p>{tree(example)}</figure>"
        )
    if not figures:
        return ""
    note = (
        "Validation rows under the last policy, as the training searches them. The heading names "
        "what was chosen next; bold where it was found. Thick edges are likely choices, light "
        "nodes of high value (of high log-probability where the search knows no values). Hollow "
        "nodes on dotted edges are prefixes that a beam of as many candidates does not hold. At "
        "the end of each path: place by likelihood, reward, log-probability, item."
    )
    return f"<h2>Search trees</h2><p class='faint'>{note}</p><div class='stack'>{figures}</div>"


def configuration(text: str) -> str:
    """Return the resolved run file."""
    if not text:
        return ""
    return f"<details><summary>Configuration</summary><pre>{escape(text)}</pre></details>"


def appendix(log: Mapping[str, Metrics]) -> str:
    """Return the figures of all metrics that no other section shows."""
    figures = ""
    for phase, metrics in log.items():
        shown = {name for panel in PANELS.get(phase, ()) for name in panel.names}
        for name in sorted(metrics.keys() - shown):
            title, present = f"{phase}: {name}", with_numbers(metrics, [name])
            if present:
                svg = curves(present, title=title, steps=STEPS.get(phase, "step"))
                figures += figure(title, svg)
    if not figures:
        return ""
    return (
        "<details><summary>All other metrics</summary>"
        f"<div class='grid small'>{figures}</div></details>"
    )


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


def figure(title: str, svg: str) -> str:
    """Return a figure with its title."""
    return f"<figure><h3>{escape(title)}</h3>{svg}</figure>"


def _evaluation_row(metric: str, evaluations: Mapping[str, Evaluation], changes: Changes) -> str:
    cells = ""
    for result in evaluations.values():
        estimate = result.metrics.get(metric)
        cells += f"<td>{_small_interval(interval(estimate)) if estimate else ''}</td>"
    for change in changes.values():
        estimate = change.get(metric)
        if estimate is None:
            cells += "<td></td>"
            continue
        tone = ("up" if estimate.mean > 0 else "down") if estimate.significant else ""
        text = _small_interval(interval(estimate, signed=True))
        cells += f"<td class='{tone}'>{text}</td>"
    return f"<tr><td>{escape(metric)}</td>{cells}</tr>"


def _small_interval(text: str) -> str:
    mean, bounds = text.split(" ", 1)
    return f"{escape(mean)} <small>{escape(bounds)}</small>"


def _facts(result: Evaluation) -> dict[str, str]:
    """Return the facts of an evaluation besides its metrics."""
    facts = {"policy": result.policy, "rows": str(result.num_rows), "candidates": str(result.width)}
    facts["seconds"] = f"{result.seconds:.1f}"
    extra = {name: f"{value:.6g}" for name, value in result.extra.items() if name != "seconds"}
    return facts | {name.replace("_", " "): text for name, text in extra.items()}


def _longest_first(timed: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    return sorted(timed.items(), key=lambda item: -float(item[1].sum()))


def _time_row(name: str, spent: float, total: float, value: np.ndarray | None) -> str:
    share = spent / total if total else 0.0
    middle, slow = np.quantile(value, [0.5, 0.95]) if value is not None else ("", "")
    times = [f"{t:.3f}" if not isinstance(t, str) else t for t in (middle, slow)]
    bar = f"<span class='bar' style='width:{100 * min(share, 1):.1f}%'></span>"
    return (
        f"<tr><td>{escape(name)}</td><td>{spent:.1f}</td><td>{share:.1%}</td>"
        f"<td>{times[0]}</td><td>{times[1]}</td><td class='wide'>{bar}</td></tr>"
    )

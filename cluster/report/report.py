"""Write the HTML report of a run: configuration, metrics, evaluations and search trees.

The page is a single file without network requests. It uses the files that the run folder contains,
so that a failed run has a report, too; missing parts are listed at the top.

    config.toml   metrics.jsonl   examples.json   evaluation/<name>.json with its Parquet file
    loop.jsonl
"""

import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.console import comparisons, duration, in_order
from cluster.report import sections, verdict
from cluster.report.examples import read_examples
from cluster.report.loop_rounds import LOG, LoopSection, loop_section, read_log
from orchard.errors import DataError
from orchard.evaluation.bootstrap import Estimate
from orchard.evaluation.ranking import Evaluation, difference, read
from orchard.folders import atomic_write
from orchard.tracking.metrics_log import FILE, Series, read_metrics

REPORT = "report.html"
"""Name of the report in the run folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFindings:
    """Contents of a run folder."""

    folder: Path
    config_text: str
    config: Mapping[str, Any]
    log: Mapping[str, Mapping[str, Series]]
    """Logged series by phase, then by metric."""
    evaluations: Mapping[str, Evaluation]
    changes: Mapping[str, Mapping[str, Estimate]]
    """Paired differences by comparison, then by metric."""
    examples: Sequence[Mapping[str, Any]]
    loop: LoopSection | None
    """Rounds of a closed loop; None without any."""
    missing: Sequence[str]
    """Sentences about missing parts."""


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder and return its path.

    Raises:
        DataError: the folder does not exist.
    """
    if not run_dir.is_dir():
        raise DataError(f"run folder {run_dir} does not exist; give the folder of a run")
    path = run_dir / REPORT
    atomic_write(path, page(gather(run_dir)))
    return path


def gather(run_dir: Path) -> RunFindings:
    """Load the contents of a run folder; list unreadable parts as missing, with the reason."""
    missing: list[str] = []
    config_text, config, log = "", dict[str, Any](), dict[str, Mapping[str, Series]]()
    try:
        config_text = (run_dir / "config.toml").read_text(encoding="utf-8")
        config = tomllib.loads(config_text)
    except (OSError, ValueError) as error:
        missing.append(f"The configuration, config.toml: {_reason(error)}.")
    try:
        log = read_metrics(run_dir / FILE)
    except DataError as error:
        missing.append(f"The metrics: {error}.")
    evaluations: dict[str, Evaluation] = {}
    for path in sorted((run_dir / "evaluation").glob("*.json")):
        try:
            evaluations[path.stem] = read(path)
        except DataError as error:
            missing.append(f"The evaluation {path.stem}: {error}.")
    examples: list[dict[str, Any]] = []
    try:
        examples = read_examples(run_dir)
    except ValueError as error:
        missing.append(f"The search trees: {error}.")
    loop: LoopSection | None = None
    try:
        loop = loop_section(read_log(run_dir / LOG))
    except DataError as error:
        missing.append(f"The rounds of the loop: {error}.")
    changes: dict[str, Mapping[str, Estimate]] = {}
    for a, b in comparisons(evaluations):
        try:
            changes[f"{a} \N{MINUS SIGN} {b}"] = difference(evaluations[a], evaluations[b])
        except DataError as error:
            missing.append(f"The comparison of {a} with {b}: {error}.")
    return RunFindings(
        folder=run_dir,
        config_text=config_text,
        config=config,
        log=log,
        evaluations={name: evaluations[name] for name in in_order(evaluations)},
        changes=changes,
        examples=examples,
        loop=loop,
        missing=[*missing, *_unfinished(config, log, evaluations)],
    )


def page(findings: RunFindings) -> str:
    """Return the whole HTML document."""
    name = str(findings.config.get("name", findings.folder.resolve().name))
    train = findings.log.get("train", {})
    num_steps = _configured_steps(findings.config)
    reward_note = verdict.paid(findings.config.get("rewards", {}).get("weights", {}))
    return sections.render(
        "report.html",
        title=name,
        when=_when(findings),
        missing=findings.missing,
        verdict=verdict.verdict(findings.changes),
        advice=verdict.advice(train),
        tiles=sections.tiles(findings.evaluations, findings.changes, train, num_steps),
        evaluation=sections.evaluation(findings.evaluations, findings.changes),
        phases=[
            sections.phase(phase, findings.log[phase], reward_note)
            for phase in sections.PANELS
            if phase in findings.log
        ],
        examples=findings.examples,
        loop=findings.loop,
        config_text=findings.config_text,
        others=sections.others(findings.log),
    )


def _reason(error: Exception) -> str:
    return "it does not exist" if isinstance(error, FileNotFoundError) else str(error)


def _unfinished(
    config: Mapping[str, Any],
    log: Mapping[str, Mapping[str, Series]],
    evaluations: Mapping[str, Evaluation],
) -> list[str]:
    """Return sentences about steps and evaluations that an unfinished run lacks."""
    sentences: list[str] = []
    if log and not {"train", "loop"} & log.keys():
        sentences.append("Reinforcement learning: the log has no step of it.")
    num_steps, last_step = _configured_steps(config), sections.last_step(log.get("train", {}))
    if num_steps and 0 < last_step < num_steps:
        sentences.append(
            f"Updates {last_step + 1} to {num_steps}: the run was stopped or is going on."
        )
    if not evaluations:
        sentences.append("Evaluations: the folder evaluation/ has none that can be read.")
    return sentences


def _configured_steps(config: Mapping[str, Any]) -> int:
    """Return the configured number of updates, 0 if unknown."""
    return int(config.get("learner", {}).get("steps", 0))


def _when(findings: RunFindings) -> str:
    """Describe the time span of the log."""
    times = [s.time for metrics in findings.log.values() for s in metrics.values()]
    if not times:
        return f"run folder {findings.folder.name}"
    first, last = min(float(t.min()) for t in times), max(float(t.max()) for t in times)
    date_format = "%d %B %Y %H:%M"
    begin, end = (time.strftime(date_format, time.gmtime(t)) for t in (first, last))
    return f"{begin} to {end} UTC, {duration(last - first)} from the first line of the log"

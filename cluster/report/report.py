"""One page about one run: what it set out to do, what it did, and what came of it.

The page is a single file that asks the network for nothing. It is made from whatever the run folder
holds, so that a run that died has a report too; what is missing is said at the top.

    config.toml   metrics.jsonl   examples.json   evaluation/<name>.json with its Parquet file
"""

import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from cluster.console import comparisons, duration, in_order
from cluster.report import sections
from cluster.training.search_examples import read_examples
from orchard.errors import DataError
from orchard.evaluation.bootstrap import Estimate
from orchard.evaluation.ranking import Evaluation, difference, read
from orchard.folders import atomic_write
from orchard.tracking.metrics_log import FILE, Series, read_metrics

REPORT = "report.html"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFindings:
    """What a run folder holds."""

    folder: Path
    config_text: str
    config: Mapping[str, Any]
    log: Mapping[str, Mapping[str, Series]]
    """Phase to metric to series."""
    evaluations: Mapping[str, Evaluation]
    changes: Mapping[str, Mapping[str, Estimate]]
    """Paired differences by comparison, then by metric."""
    examples: Sequence[Mapping[str, Any]]
    missing: Sequence[str]
    """Sentences about what is not there."""


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
    """Read what is there; whatever cannot be read is missing, with the reason."""
    missing: list[str] = []
    text, config, log = "", dict[str, Any](), dict[str, Mapping[str, Series]]()
    try:
        text = (run_dir / "config.toml").read_text(encoding="utf-8")
        config = tomllib.loads(text)
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
    changes: dict[str, Mapping[str, Estimate]] = {}
    for a, b in comparisons(evaluations):
        try:
            changes[f"{a} \N{MINUS SIGN} {b}"] = difference(evaluations[a], evaluations[b])
        except DataError as error:
            missing.append(f"The comparison of {a} with {b}: {error}.")
    return RunFindings(
        folder=run_dir,
        config_text=text,
        config=config,
        log=log,
        evaluations={name: evaluations[name] for name in in_order(evaluations)},
        changes=changes,
        examples=examples,
        missing=[*missing, *_unfinished(config, log, evaluations)],
    )


def page(found: RunFindings) -> str:
    """The whole document."""
    name = str(found.config.get("name", found.folder.resolve().name))
    phases = [phase for phase in sections.PANELS if phase in found.log]
    body = [
        f"<header><h1>{escape(name)}</h1><p class='faint'>{escape(_when(found))}</p></header>",
        sections.notices(found.missing),
        sections.tiles(
            found.evaluations, found.changes, found.log.get("train", {}), _wanted(found.config)
        ),
        sections.evaluation(found.evaluations, found.changes),
        *(sections.training(phase, found.log[phase]) for phase in phases),
        *(sections.seconds(phase, found.log[phase]) for phase in phases),
        sections.examples(found.examples),
        sections.configuration(found.config_text),
        sections.appendix(found.log),
    ]
    return document(name, body)


def document(title: str, body: Sequence[str]) -> str:
    """A page of some parts that stands alone."""
    css = (Path(__file__).parent / "report.css").read_text(encoding="utf-8")
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)} - Orchard</title><style>{css}</style></head>\n"
        f"<body>{''.join(part for part in body if part)}</body></html>\n"
    )


def _reason(error: Exception) -> str:
    return "it does not exist" if isinstance(error, FileNotFoundError) else str(error)


def _unfinished(
    config: Mapping[str, Any],
    log: Mapping[str, Mapping[str, Series]],
    evaluations: Mapping[str, Evaluation],
) -> list[str]:
    """What a whole run would have, beyond its files."""
    sentences: list[str] = []
    if log and "train" not in log:
        sentences.append("Reinforcement learning: the log has no step of it.")
    wanted, done = _wanted(config), sections.last_step(log.get("train", {}))
    if wanted and 0 < done < wanted:
        sentences.append(f"Updates {done + 1} to {wanted}: the run was stopped or is going on.")
    if not evaluations:
        sentences.append("Evaluations: the folder evaluation/ has none that can be read.")
    return sentences


def _wanted(config: Mapping[str, Any]) -> int:
    """Updates that the run was to make, 0 if unknown."""
    return int(config.get("learner", {}).get("steps", 0))


def _when(found: RunFindings) -> str:
    times = [s.time for metrics in found.log.values() for s in metrics.values()]
    if not times:
        return f"run folder {found.folder.name}"
    first, last = min(float(t.min()) for t in times), max(float(t.max()) for t in times)
    form = "%d %B %Y %H:%M"
    begin, end = (time.strftime(form, time.gmtime(t)) for t in (first, last))
    return f"{begin} to {end} UTC, {duration(last - first)} from the first line of the log"

"""Write an HTML comparison of several runs: settings that differ, metrics and evaluations.

The other runs are compared with the first. Like the report of a single run, the page uses the files
that the folders contain, and missing parts are listed at the top.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.report import sections
from cluster.report.plots import Curve, curves
from cluster.report.report import RunFindings, gather
from orchard.config import flatten
from orchard.errors import DataError
from orchard.evaluation.bootstrap import Estimate
from orchard.evaluation.ranking import Evaluation, difference
from orchard.folders import atomic_write

UNCHANGED = {"name", "output", "seed"}
"""Settings that are expected to differ between runs; only the seed of these is shown."""


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write the page and return its path.

    Raises:
        DataError: a folder does not exist or is given twice.
    """
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"run folder {folder} does not exist; give folders of runs")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise DataError("a run folder is given twice; give each run once")
    atomic_write(path, comparison([gather(folder) for folder in folders]))
    return path


def comparison(runs: Sequence[RunFindings]) -> str:
    """Return the whole HTML document."""
    names = _distinct([run.folder for run in runs])
    missing = [
        f"{name}: {sentence}" for name, run in zip(names, runs, strict=True)
        for sentence in run.missing
    ]  # fmt: skip
    last = {
        name: run.evaluations.get("trained", next(iter(run.evaluations.values())))
        for name, run in zip(names, runs, strict=True)
        if run.evaluations
    }
    changes, refused = _changes(last)
    phases = [phase for phase in sections.PANELS if any(phase in run.log for run in runs)]
    return sections.render(
        "comparison.html",
        title=" / ".join(names),
        names=names,
        missing=[*missing, *refused],
        settings=settings([run.config for run in runs]),
        evaluation=sections.evaluation(last, changes),
        phases=[(sections.TITLES[phase], courses(phase, names, runs)) for phase in phases],
    )


def settings(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of the settings in which the runs differ."""
    flat = [flatten(config) for config in configs]
    keys = sorted({key for run in flat for key in run} - UNCHANGED | {"seed"})
    values = {key: [run.get(key) for run in flat] for key in keys}
    return {key: row for key, row in values.items() if any(value != row[0] for value in row)}


def courses(phase: str, names: Sequence[str], runs: Sequence[RunFindings]) -> list[sections.Figure]:
    """Return the figures of a phase, with one curve per run."""
    figures: list[sections.Figure] = []
    for panel in sections.PANELS[phase]:
        for metric in panel.names:
            run_curves = [
                Curve(label=name, series=curve.series)
                for name, run in zip(names, runs, strict=True)
                for curve in sections.with_numbers(run.log.get(phase, {}), [metric])
            ]
            if run_curves:
                title = panel.title if len(panel.names) == 1 else f"{panel.title}: {metric}"
                svg = curves(run_curves, title=title, steps=sections.STEPS[phase], log=panel.log)
                figures.append(sections.Figure(title, svg))
    return figures


def _changes(
    last: Mapping[str, Evaluation],
) -> tuple[dict[str, Mapping[str, Estimate]], list[str]]:
    """Return the paired differences to the first run, and the reasons for missing ones."""
    changes, reasons = dict[str, Mapping[str, Estimate]](), list[str]()
    first, *others = last or [""]
    for name in others:
        try:
            changes[f"{name} \N{MINUS SIGN} {first}"] = difference(last[name], last[first])
        except DataError as error:
            reasons.append(f"The comparison of {name} with {first}: {error}.")
    return changes, reasons


def _distinct(folders: Sequence[Path]) -> list[str]:
    """Return distinct names of the folders, with as many parent folders as needed."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(len(path) for path in parts) + 1):
        names = ["/".join(path[-depth:]) for path in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]

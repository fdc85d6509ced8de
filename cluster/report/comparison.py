"""Write an HTML comparison of several runs: settings that differ, metrics and evaluations.

The other runs are compared with the first. Like the report of a single run, the page uses the files
that the folders contain, and missing parts are listed at the top.
"""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from cluster.report import sections
from cluster.report.plots import Curve, curves
from cluster.report.report import RunFindings, document, gather
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
    body = [
        f"<header><h1>{escape(' against '.join(names))}</h1></header>",
        sections.notices([*missing, *refused]),
        settings(dict(zip(names, (run.config for run in runs), strict=True))),
        sections.evaluation(last, changes),
        *(courses(phase, names, runs) for phase in phases),
    ]
    return document(" / ".join(names), body)


def settings(configs: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table of the settings in which the runs differ."""
    flat = {name: flatten(config) for name, config in configs.items()}
    keys = sorted({key for run in flat.values() for key in run} - UNCHANGED | {"seed"})
    rows = ""
    for key in keys:
        values = [run.get(key) for run in flat.values()]
        if any(value != values[0] for value in values):
            cells = "".join(f"<td>{escape(str(value))}</td>" for value in values)
            rows += f"<tr><td>{escape(key)}</td>{cells}</tr>"
    heads = "".join(f"<th>{escape(name)}</th>" for name in configs)
    table = (
        "<div class='scroll'><table><thead><tr><th>setting</th>"
        f"{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    return f"<h2>Settings that differ</h2>{table if rows else '<p>None.</p>'}"


def courses(phase: str, names: Sequence[str], runs: Sequence[RunFindings]) -> str:
    """Return the figures of a phase, with one curve per run."""
    figures = ""
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
                figures += sections.figure(title, svg)
    return f"<h2>{sections.TITLES[phase]}</h2><div class='grid'>{figures}</div>" if figures else ""


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

"""One page about several runs: what differs between them, how they went, and what came of each.

The first run is the one that the others are set against. Like the report of a single run it is made
of whatever the folders hold, and what is missing is said at the top.
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
"""Settings that differ between runs as a matter of course; of these only the seed is shown."""


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
    """The whole document."""
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
    """The settings in which the runs differ, as a table."""
    flat = {name: flatten(config) for name, config in configs.items()}
    keys = sorted({key for one in flat.values() for key in one} - UNCHANGED | {"seed"})
    rows = ""
    for key in keys:
        values = [one.get(key) for one in flat.values()]
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
    """The figures of a phase, one curve a run."""
    drawn = ""
    for panel in sections.PANELS[phase]:
        for metric in panel.names:
            found = [
                Curve(label=name, series=curve.series)
                for name, run in zip(names, runs, strict=True)
                for curve in sections.with_numbers(run.log.get(phase, {}), [metric])
            ]
            if found:
                title = panel.title if len(panel.names) == 1 else f"{panel.title}: {metric}"
                svg = curves(found, title=title, steps=sections.STEPS[phase], log=panel.log)
                drawn += sections.figure(title, svg)
    return f"<h2>{sections.TITLES[phase]}</h2><div class='grid'>{drawn}</div>" if drawn else ""


def _changes(
    last: Mapping[str, Evaluation],
) -> tuple[dict[str, Mapping[str, Estimate]], list[str]]:
    """Paired differences to the first run, and why there are none where there are none."""
    found, refused = dict[str, Mapping[str, Estimate]](), list[str]()
    first, *others = last or [""]
    for name in others:
        try:
            found[f"{name} \N{MINUS SIGN} {first}"] = difference(last[name], last[first])
        except DataError as error:
            refused.append(f"The comparison of {name} with {first}: {error}.")
    return found, refused


def _distinct(folders: Sequence[Path]) -> list[str]:
    """Names of the folders, with as much of what is above them as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(len(one) for one in parts) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]

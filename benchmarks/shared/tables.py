"""Generate `docs/figures.md` and marked tables of other pages from the results of the benchmarks.

`orchard bench NAME --json benchmarks/results/NAME.json` measures, and `make figures` writes every
figure and every row of every benchmark into `docs/figures.md`, the comparisons into
`docs/results.md` and the ratios of three of them into `README.md`.
"""

import json
import math
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import cast

from benchmarks.shared.measure import Figure, Report, Row
from benchmarks.shared.plots import ablation
from benchmarks.shared.readme import TABLES, highlights, within

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "figures.md"
RESULTS_PAGE = ROOT / "docs" / "results.md"
README = ROOT / "README.md"


def read(folder: Path = RESULTS) -> list[Report]:
    """Read all results, sorted by name of the benchmark."""
    return [cast(Report, json.loads(p.read_text())) for p in sorted(folder.glob("*.json"))]


def page(reports: Sequence[Report]) -> str:
    """Format all figures and rows, a section for each benchmark."""
    head = (
        "# Figures\n\nAll that each `orchard bench NAME` measured, with commit and machine.\n"
        "`make figures` writes this page from `benchmarks/results`; [results](results.md)\n"
        "explains the comparisons.\n"
    )
    return "\n".join([head, *(_section(report) for report in reports)])


def filled(text: str, reports: Sequence[Report]) -> str:
    """Fill in the tables of `docs/results.md`; raise ValueError if marks are missing."""
    for report in reports:
        if report["bench"] in TABLES:
            text = within(text, report["bench"], TABLES[report["bench"]](report))
    return text


def filled_readme(text: str, reports: Sequence[Report]) -> str:
    """Fill in the table of the README; raise ValueError if marks are missing."""
    return within(text, "highlights", highlights(reports))


def main() -> None:
    """Rewrite `docs/figures.md`, the marked tables of other pages, and the plot."""
    reports = read()
    PAGE.write_text(page(reports))
    RESULTS_PAGE.write_text(filled(RESULTS_PAGE.read_text(), reports))
    README.write_text(filled_readme(README.read_text(), reports))
    for report in reports:
        if report["bench"] == "vstar":
            ablation(report)


def _section(report: Report) -> str:
    machine = report["machine"]
    where = (
        f"Commit {report['commit']}; {machine['processor']}, {machine['cores']} cores, "
        f"{machine['memory_gib']} GiB, torch {machine['torch']}."
    )
    figures = [
        f"| {figure['name']} | {_measured(figure)} | {_spelt(figure['note'])} |"
        for figure in report["figures"]
    ]
    table = ["| figure | measured | setting |", "|---|---|---|", *figures] if figures else []
    parts = [f"## {report['bench']}", where, "\n".join(table), *_tables(report["rows"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _tables(rows: Iterable[Row]) -> list[str]:
    """Format one table for each group of consecutive rows with the same columns."""
    return [
        "\n".join(
            [
                f"| {' | '.join(columns)} |",
                f"|{'---|' * len(columns)}",
                *(f"| {' | '.join(_spelt(row[name]) for name in columns)} |" for row in alike),
            ]
        )
        for columns, alike in groupby(rows, key=tuple)
    ]


def _measured(figure: Figure) -> str:
    return " ".join([_spelt(figure["value"]), figure["unit"]]).strip()


def _spelt(value: str | float | bool) -> str:
    """Format a value to four significant digits, integers in full."""
    if isinstance(value, str | bool):
        return str(value).replace("|", "\\|")
    if not math.isfinite(value) or float(value).is_integer():
        return f"{value:,.0f}" if math.isfinite(value) else str(value)
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    main()

"""The published tables are those that the benches' results make."""

from pathlib import Path

import pytest

from benchmarks.shared import plots, readme, tables
from benchmarks.shared.measure import Report, figure


def a_report() -> Report:
    return Report(
        bench="toy",
        commit="abc",
        machine={"processor": "P", "cores": 2, "memory_gib": 1.5, "torch": "2"},
        figures=[
            figure("fast", 3.14159, "x", asked=">= 3", note="side by side"),
            figure("small", 12345.6, "B", asked="<= 10"),
        ],
        rows=[{"way": "a", "s": 1.0}, {"way": "b|c", "s": 0.00012345}, {"seed": 1}],
    )


def test_a_page_shows_all_figures_and_keeps_rows_of_one_shape_together() -> None:
    made = tables.page([a_report()])
    assert "| fast | 3.142 x | side by side |" in made
    assert "| small | 12,346 B |  |" in made
    assert (
        "| way | s |\n|---|---|\n| a | 1 |\n| b\\|c | 0.0001234 |\n\n| seed |\n|---|\n| 1 |" in made
    )


def test_a_factor_of_the_highlights_is_the_ratio_of_its_seconds() -> None:
    table = readme.highlights(tables.read()).splitlines()[2:]
    for line in table:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        ours, theirs = (float(cell.split()[-2]) for cell in cells[1:3])
        assert float(cells[3].strip("*x")) == pytest.approx(theirs / ours, rel=0.07)
    assert len(table) == 3


def test_only_what_lies_between_the_marks_is_replaced() -> None:
    begin, end = readme.marks("toy")
    text = f"before {begin} old {end} after"
    assert readme.within(text, "toy", "new") == f"before {begin}\n\nnew\n\n{end} after"
    with pytest.raises(ValueError, match="put the two marks"):
        readme.within("no marks", "toy", "new")


def test_what_is_published_is_what_was_measured() -> None:
    reports = tables.read()
    assert tables.PAGE.read_text() == tables.page(reports)
    text = tables.RESULTS_PAGE.read_text()
    assert tables.filled(text, reports) == text
    text = tables.README.read_text()
    assert tables.filled_readme(text, reports) == text
    assert readme.TABLES.keys() <= {one["bench"] for one in reports}


@pytest.mark.slow
def test_the_ablation_shows_every_way_and_is_the_same_twice(tmp_path: Path) -> None:
    score, made = plots.METRIC, a_report()
    made["rows"] = [
        {"way": "beam+grpo", "seed": 0, score: 0.105, "forward_tokens": 4e5},
        {"way": "ved+both", "seed": 0, score: 0.100, "forward_tokens": 6e5},
        {"way": "ved+both", "seed": 1, score: 0.101, "forward_tokens": 6e5},
        {"policy": "warm_start", "seed": 0, score: 0.1017},
        {"engine": "torch", "seconds": 1.0},
    ]
    path, drawn = tmp_path / "ablation.svg", list[str]()
    for _ in range(2):
        plots.ablation(made, path)
        drawn.append(path.read_text())
    assert drawn[0] == drawn[1]
    assert ">beam+grpo<" in drawn[0]
    assert drawn[0].count(">ved+both<") == 1  # named at its first seed

"""The comparison page of several runs."""

import re
from pathlib import Path

import pytest

from cluster.cli import app as cli
from cluster.report.comparison import write_comparison
from orchard.errors import DataError
from orchard.evaluation import ranking
from orchard.testing import make_evaluation
from orchard.tracking.metrics_log import MetricsLogger


def a_run(folder: Path, *, rate: float, hit: float, num_rows: int = 500) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(
        f'name = "{folder.name}"\n[learner]\nlr = {rate}\nsteps = 2\n'
    )
    with MetricsLogger(folder) as metrics_logger:
        for step in (1, 2):
            metrics_logger.log("train", step, {"rewards/mean": hit * step, "learner/kl": 0.1})
    evaluation = make_evaluation(hit, num_rows=num_rows)
    ranking.write(evaluation, folder / "evaluation" / "trained.json")
    return folder


@pytest.mark.slow
def test_runs_are_set_side_by_side_and_against_the_first(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path / name, rate=r, hit=h) for name, r, h in (("a", 0.1, 0.2), ("b", 0.2, 0.6))
    ]
    page = write_comparison(runs, tmp_path / "page.html").read_text()
    assert re.search(r"<td>learner.lr</td><td>0.1</td><td>0.2</td>", page)
    assert "learner.steps</td>" not in page
    assert "<th>b \N{MINUS SIGN} a</th>" in page
    assert "<td class='up'>+" in page
    assert page.count("<svg") >= 4  # reward, divergence, and the differences at both levels
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_runs_of_one_name_are_told_apart_and_what_cannot_be_compared_is_said(
    tmp_path: Path,
) -> None:
    first = a_run(tmp_path / "x" / "run", rate=0.1, hit=0.2)
    second = a_run(tmp_path / "y" / "run", rate=0.1, hit=0.2, num_rows=400)
    page = write_comparison([first, second], tmp_path / "page.html").read_text()
    assert "The comparison of y/run with x/run" in page
    assert "None." in page


def test_a_missing_or_repeated_folder_is_refused(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", rate=0.1, hit=0.2)
    with pytest.raises(DataError, match="does not exist"):
        write_comparison([run, tmp_path / "none"], tmp_path / "page.html")
    with pytest.raises(DataError, match="given twice"):
        write_comparison([run, run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_the_command_writes_beside_the_first_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [a_run(tmp_path / name, rate=0.1, hit=0.3) for name in "ab"]
    cli.main(["report", *map(str, runs)])
    assert str(tmp_path / "comparison.html") in capsys.readouterr().out
    assert (tmp_path / "comparison.html").is_file()

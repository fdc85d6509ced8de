"""Rounds of a loop in a report: one row each, with what was decided and why."""

from pathlib import Path

import pytest

from cluster.loop.metrics import drift, round_metrics
from cluster.loop.state import RoundState, write_log
from cluster.report.loop_rounds import HEADINGS, LOG, loop_section, read_log
from cluster.report.report import write_report
from orchard.errors import DataError
from orchard.evaluation.bootstrap import Estimate


def estimate(mean: float) -> Estimate:
    return Estimate(mean=mean, low=mean - 0.1, high=mean + 0.1, n=9)


STATES = [
    RoundState(
        number=0, phase="done", counts={"requests": 12.0}, reward=estimate(0.5),
        predicted=estimate(0.75), serving=estimate(0.5), outcome="published", canary="00001",
    ),
    RoundState(number=1, phase="done", outcome="skipped", reasons=("no <exposures>",)),
    RoundState(
        number=2, phase="done", watch="below", rolled_back=True, realized=estimate(0.25),
        expected=estimate(0.75), serving=estimate(0.625), outcome="refused",
    ),
]  # fmt: skip


def test_the_report_has_a_row_for_each_round(tmp_path: Path) -> None:
    write_log(tmp_path / LOG, STATES)
    section = loop_section(read_log(tmp_path / LOG))
    assert section is not None
    assert {len(row) for row in section.rows} == {len(HEADINGS)}
    first, second, third = section.rows
    assert first[:3] == ["0", "12", "0.5000 [0.4000, 0.6000]"]
    assert (first[8], second[8], third[5]) == ("published", "skipped", "below")
    page = write_report(tmp_path).read_text()
    assert "0.7500 [0.6500, 0.8500]" in page
    assert "no &lt;exposures&gt;" in page
    assert loop_section(read_log(tmp_path / "none")) is None


def test_a_damaged_log_is_named_in_the_report(tmp_path: Path) -> None:
    (tmp_path / LOG).write_text("{")
    with pytest.raises(DataError, match="which writes it again"):
        read_log(tmp_path / LOG)
    assert "The rounds of the loop" in write_report(tmp_path).read_text()


def test_metrics_of_a_round_are_its_decisions_and_estimates() -> None:
    first, second, third = (round_metrics(state) for state in STATES)
    assert (first["loop/published"], second["loop/skipped"], third["loop/rolled_back"]) == (1, 1, 1)
    assert first["loop/predicted_low"] == pytest.approx(0.65)
    assert "loop/realized" not in first
    assert third["loop/outside"] == 1
    # The same policy answered in both windows; the skipped one between says nothing.
    assert drift(STATES) == pytest.approx(0.125)
    assert drift(STATES[:2]) is None

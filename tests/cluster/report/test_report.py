"""The report of a complete or partial run: one file without network requests."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cluster.report.plots import Curve, curves, running_mean
from cluster.report.report import gather, page, write_report
from orchard.errors import DataError
from orchard.evaluation import ranking
from orchard.testing import make_evaluation
from orchard.tracking.metrics_log import FILE, MetricsLogger, Series

VOID = {"meta", "br", "hr", "img", "link", "input"}
PARTS = ("config.toml", FILE, "evaluation")


class Outline(HTMLParser):
    """Parser that checks nesting, and collects text and the URLs that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.said, self.fetched = list[str](), list[str](), list[str]()
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            local = value is not None and value.startswith(("#", "data:"))
            if name in ("src", "href", "xlink:href", "srcset", "data", "action") and not local:
                self.fetched.append(f"{tag} {name}={value}")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.said)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text('name = "a <b>"\n[learner]\nsteps = 3\n')
    with MetricsLogger(tmp_path) as metrics_logger:
        metrics_logger.log("sft", 1, {"sft/loss": 2.0, "sft/epoch_s": 4.0})
        for step in (1, 2, 3):
            values = {
                "rewards/mean": 0.1 * step,
                "learner/kl": math.nan,
                "cluster/publish_s": 0.5,
                "cluster/step_s": 2.0,
                "rollout/search_s": 1.25,
                "made_up/<thing>": 1.0,
            }
            metrics_logger.log("train", step, values)
    ranking.write(make_evaluation(0.3), tmp_path / "evaluation" / "warm_start.json")
    ranking.write(make_evaluation(0.6), tmp_path / "evaluation" / "trained.json")
    return tmp_path


def remove(path: Path) -> None:
    for child in path.iterdir() if path.is_dir() else ():
        remove(child)
    path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.slow
def test_a_whole_run_has_all_parts_and_misses_none(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    text = path.read_text(encoding="utf-8")
    outline = Outline(text)
    assert outline.fetched == []
    for address in ("http://", "https://", "@import", "url(h", "<script"):
        assert address not in text
    for part in ("Evaluation", "Reinforcement learning", "Warm start", "Seconds by phase"):
        assert part in outline.text
    assert "Missing from this report" not in outline.text
    assert text.count("<svg") >= 4


@pytest.mark.slow
def test_names_are_text_and_never_markup(run_dir: Path) -> None:
    text = page(gather(run_dir))
    assert "a &lt;b&gt;" in text
    assert "<thing>" not in text
    assert "made_up/&lt;thing&gt;" in text


@pytest.mark.slow
def test_the_table_sets_after_against_before_row_by_row(run_dir: Path) -> None:
    findings = gather(run_dir)
    assert list(findings.evaluations) == ["warm_start", "trained"]
    (change,) = findings.changes.values()
    gain = (
        make_evaluation(0.6).metrics["hr@10/sid"].mean
        - make_evaluation(0.3).metrics["hr@10/sid"].mean
    )
    assert change["hr@10/sid"].mean == pytest.approx(gain)
    assert re.search(rf"class='up'>\+{f'{gain:.4f}'[1:]} <small>", page(findings))


@pytest.mark.slow
def test_the_seconds_of_a_phase_add_up_to_its_steps(run_dir: Path) -> None:
    cells = re.sub(r"<[^>]+>", " ", page(gather(run_dir)))
    assert re.search(r"cluster/publish_s\s+1\.5\s+25\.0%\s+0\.500\s+0\.500", cells)
    assert re.search(r"everything else\s+4\.5\s+75\.0%", cells)
    assert re.search(r"cluster/step_s\s+6\.0\s+100\.0%", cells)
    assert re.search(r"rollout/search_s\s+3\.8\s+62\.5%", cells)
    assert re.search(r"sft/epoch_s\s+4\.0\s+100\.0%", cells)


@pytest.mark.slow
@pytest.mark.parametrize("kept", [(), *((part,) for part in PARTS)])
def test_a_report_is_made_of_whatever_is_there_and_says_what_is_not(
    run_dir: Path, kept: tuple[str, ...]
) -> None:
    for part in set(PARTS) - set(kept):
        remove(run_dir / part)
    said = Outline(write_report(run_dir).read_text(encoding="utf-8")).text
    signs = {
        "config.toml": "The configuration, config.toml: it does not exist",
        FILE: f"{FILE} does not exist",
        "evaluation": "the folder evaluation/ has none that can be read",
    }
    assert {part for part, sign in signs.items() if sign not in said} == set(kept)


def test_a_run_that_stopped_early_says_which_updates_it_lacks(run_dir: Path) -> None:
    with MetricsLogger(run_dir) as metrics_logger:
        metrics_logger.rewind("train", 2)
    assert "Updates 3 to 3: the run was stopped or is going on." in gather(run_dir).missing


def test_broken_files_cost_their_part_and_no_more(run_dir: Path) -> None:
    (run_dir / "config.toml").write_text("name = ")
    (run_dir / FILE).write_text("nonsense\n" + (run_dir / FILE).read_text())
    (run_dir / "evaluation" / "trained.parquet").unlink()
    findings = gather(run_dir)
    assert list(findings.evaluations) == ["warm_start"]
    assert [sentence.split(":")[0] for sentence in findings.missing] == [
        "The configuration, config.toml",
        "The metrics",
        "The evaluation trained",
    ]
    assert "nonsense" in Outline(page(findings)).text


def test_evaluations_of_other_rows_are_shown_but_not_compared(run_dir: Path) -> None:
    ranking.write(make_evaluation(0.5, num_rows=300), run_dir / "evaluation" / "quick.json")
    findings = gather(run_dir)
    assert list(findings.evaluations) == ["warm_start", "trained", "quick"]
    assert len(findings.changes) == 1
    assert any(
        line.startswith("The comparison of quick with warm_start") for line in findings.missing
    )


def test_there_is_no_report_without_a_run_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist; give the folder of a run"):
        write_report(tmp_path / "nowhere")


@pytest.mark.slow
def test_any_series_can_be_drawn() -> None:
    def series(values: list[float]) -> Series:
        count = len(values)
        return Series(step=np.arange(count), time=np.arange(count) * 1.0, value=np.asarray(values))

    for values in ([1.0], [0.0, 0.0], [math.nan, -3.0], [1e-9, 1e9], [0.5] * 60):
        for log in (False, True):
            found = [
                Curve(label="$x", series=series(values)),
                Curve(label="y", series=series([2.0])),
            ]
            svg = curves(found, title="a & b", log=log)
            assert Outline(svg).fetched == []
            assert 'aria-label="a &amp; b"' in svg


def test_a_running_mean_leaves_a_straight_line_straight_and_steps_over_gaps() -> None:
    line = np.arange(30.0)
    smooth = running_mean(line, width=7)
    np.testing.assert_allclose(smooth[1:-1], line[1:-1])
    assert np.isnan(smooth[[0, -1]]).all()
    gap = np.where(line == 10, np.nan, 1.0)
    np.testing.assert_allclose(running_mean(gap, width=7)[1:-1], 1.0)


@pytest.mark.slow
def test_a_table_that_is_wider_than_a_phone_scrolls_by_itself(run_dir: Path) -> None:
    text = page(gather(run_dir))
    tables = re.findall(r"(<div class='scroll'>)?<table", text)
    assert len(tables) > 1
    assert all(tables)
    tracks = re.findall(r"grid-template-columns: ([^;}]*)", text)
    assert tracks
    for track in tracks:  # a bare 1fr is at least as wide as its widest word
        assert not re.search(r"\b1fr\b", re.sub(r"minmax\([^)]*\)", "", track)), track

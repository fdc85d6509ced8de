"""Progress of a run on the console, and its closing table."""

import io

import numpy as np
import pytest
from rich.console import Console

from cluster.console import Progress, closing_table, comparisons, duration, in_order
from orchard.evaluation import ranking
from orchard.evaluation.ranking import Evaluation, TargetRanks


class Clock:
    """Clock that advances on request."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def an_evaluation(hit: float, num_rows: int = 200) -> Evaluation:
    rank = np.where(np.random.default_rng(0).random(num_rows) < hit, 0, TargetRanks.MISS)
    ranks = TargetRanks(sid=rank, item=rank)
    found = ranking.metrics(ranks, width=10, resamples=50)
    return Evaluation(
        metrics=found, ranks=ranks, row=np.arange(num_rows), split="a", width=10, seconds=1.0,
        policy="0-a", catalog="c",
    )  # fmt: skip


def plain() -> Console:
    return Console(file=io.StringIO(), width=60, force_terminal=False)


def said(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_away_from_a_terminal_progress_is_a_line_now_and_then() -> None:
    console, clock = plain(), Clock()
    with Progress("training", total=100, done=10, console=console, clock=clock) as progress:
        for step in range(1, 21):
            clock.now += 4.0
            progress.advance({"unknown/thing": 1, "rewards/mean": step / 10})
    lines = said(console).splitlines()
    assert (
        len(lines) == 80 // 12 + 1
    )  # at the first step ten seconds after the last line, and at the end
    # 3 steps in 12 seconds; 87 are left.
    assert lines[0] == "training 13/100  12.0 s  4.0 s each  5:48 left  mean 0.3"
    assert lines[-1].startswith("training 30/100")
    assert lines[-1].endswith("done")


def test_a_work_that_fails_is_not_called_done() -> None:
    console, clock = plain(), Clock()

    def fail() -> None:
        with Progress("training", total=5, console=console, clock=clock) as progress:
            progress.advance()
            raise RuntimeError("out of apples")

    with pytest.raises(RuntimeError, match="out of apples"):
        fail()
    assert said(console).splitlines()[-1].endswith("stopped")


def test_on_a_terminal_progress_is_a_bar_with_rate_and_time_left() -> None:
    console, clock = Console(file=io.StringIO(), width=120, force_terminal=True), Clock()
    with Progress("training", total=10, console=console, clock=clock) as progress:
        clock.now += 0.5
        progress.advance({"learner/kl": 0.25})
    assert "2.00/s  4.5 s left  kl 0.25" in said(console)
    assert "1/10" in said(console)


def test_the_closing_table_shows_levels_differences_and_seconds() -> None:
    console = plain()
    shown = {"trained": an_evaluation(0.6), "warm_start": an_evaluation(0.3)}
    closing_table(shown, seconds={"training": 12.25}, console=console)
    text = said(console)
    assert text.index("warm_start") < text.index("trained")
    assert "trained - warm_start" in text
    for part in ("hr@10/sid", "ndcg@10/item", "[+.", "training", "12.2"):
        assert part in text
    assert "hr@50" not in text


def test_a_comparison_that_is_refused_is_explained() -> None:
    console = plain()
    shown = {"trained": an_evaluation(0.6), "warm_start": an_evaluation(0.3, num_rows=100)}
    closing_table(shown, seconds={}, console=console)
    assert "evaluations of 200 and 100 rows are not of the same rows" in said(console)


def test_the_warm_start_comes_first_and_the_control_is_what_training_must_beat() -> None:
    names = ["extra", "control", "trained", "warm_start"]
    assert in_order(names) == ["warm_start", "trained", "control", "extra"]
    assert comparisons(names) == [
        ("trained", "warm_start"),
        ("control", "warm_start"),
        ("extra", "warm_start"),
        ("trained", "control"),
    ]
    assert comparisons(["trained", "control"]) == [("control", "trained")]
    assert comparisons(["warm_start"]) == comparisons([]) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(8.44, "8.4 s"), (59.99, "60.0 s"), (727.0, "12:07"), (11527.4, "3:12:07")],
)
def test_a_duration_reads_as_a_clock_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text

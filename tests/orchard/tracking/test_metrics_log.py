"""The metrics logger across crashes, resumed runs and numbers that are none."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from orchard.errors import DataError
from orchard.tracking.metrics_log import FILE, TENSORBOARD, MetricsLogger, read_metrics


def log_steps(run_dir: Path, phase: str, steps: range) -> None:
    with MetricsLogger(run_dir) as metrics_logger:
        for step in steps:
            metrics_logger.log(phase, step, {"learner/kl": step / 10})


def steps_of(run_dir: Path, phase: str) -> list[int]:
    return read_metrics(run_dir / FILE)[phase]["learner/kl"].step.tolist()


def test_what_is_logged_is_read_back_by_phase_and_metric(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as metrics_logger:
        metrics_logger.log("sft", 1, {"sft/loss": 3.5})
        metrics_logger.log("train", 1, {"rewards/mean": np.float32(0.25), "learner/kl": 0.1})
        metrics_logger.log("train", 2, {"learner/tokens": 7, "learner/kl": 0.2})
    found = read_metrics(tmp_path / FILE)
    assert {phase: sorted(metrics) for phase, metrics in found.items()} == {
        "sft": ["sft/loss"],
        "train": ["learner/kl", "learner/tokens", "rewards/mean"],
    }
    series = found["train"]["learner/kl"]
    assert series.step.tolist() == [1, 2]
    assert series.value.tolist() == [0.1, 0.2]
    assert series.time[0] <= series.time[1]
    assert found["train"]["rewards/mean"].value.tolist() == [0.25]


def test_a_line_is_on_disk_before_the_next_step_begins(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as metrics_logger:
        for step in range(3):
            metrics_logger.log("train", step, {"learner/kl": 0.0})
            assert steps_of(tmp_path, "train") == list(range(step + 1))


def test_a_line_is_plain_json_whatever_was_measured(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as metrics_logger:
        metrics_logger.log("train", 1, {"learner/kl": math.nan, "learner/loss": math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    entry = json.loads((tmp_path / FILE).read_text(), parse_constant=refuse)
    assert entry["values"] == {"learner/kl": None, "learner/loss": None}
    assert entry.keys() == {"step", "time", "phase", "values"}
    assert math.isnan(read_metrics(tmp_path / FILE)["train"]["learner/kl"].value[0])


def test_a_reopened_metrics_logger_goes_on_where_it_stopped(tmp_path: Path) -> None:
    log_steps(tmp_path, "train", range(3))
    log_steps(tmp_path, "train", range(3, 5))
    assert steps_of(tmp_path, "train") == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("torn", ['{"step": 3, "ti', '{"step": 3}', "\x00\x00", "7"])
def test_a_torn_last_line_harms_neither_reader_nor_writer(tmp_path: Path, torn: str) -> None:
    log_steps(tmp_path, "train", range(3))
    with (tmp_path / FILE).open("a") as file:
        file.write(torn)
    assert steps_of(tmp_path, "train") == [0, 1, 2]
    log_steps(tmp_path, "train", range(3, 4))
    assert steps_of(tmp_path, "train") == [0, 1, 2, 3]


def test_a_whole_last_line_without_its_end_is_kept(tmp_path: Path) -> None:
    log_steps(tmp_path, "train", range(3))
    path = tmp_path / FILE
    path.write_text(path.read_text().rstrip("\n"))
    log_steps(tmp_path, "train", range(3, 4))
    assert steps_of(tmp_path, "train") == [0, 1, 2, 3]


def test_a_broken_line_amid_others_is_named(tmp_path: Path) -> None:
    log_steps(tmp_path, "train", range(2))
    path = tmp_path / FILE
    path.write_text("not an entry\n" + path.read_text())
    with pytest.raises(DataError, match=r"line 1 of .*metrics\.jsonl.*'not an entry"):
        read_metrics(path)
    with pytest.raises(DataError, match="does not exist"):
        read_metrics(tmp_path / "elsewhere.jsonl")


def test_k_steps_a_crash_and_the_rest_log_as_if_nothing_had_happened(tmp_path: Path) -> None:
    whole, crashed = tmp_path / "whole", tmp_path / "crashed"
    for folder, last in ((whole, 6), (crashed, 5)):
        log_steps(folder, "sft", range(1, 4))
        log_steps(folder, "train", range(1, last))
    with MetricsLogger(crashed) as metrics_logger:  # the last checkpoint is of step 2
        assert metrics_logger.rewind("train", 2) == 2
        for step in range(3, 6):
            metrics_logger.log("train", step, {"learner/kl": step / 10})
    for phase in ("sft", "train"):
        assert steps_of(crashed, phase) == steps_of(whole, phase)


def test_rewinding_to_the_last_step_changes_nothing(tmp_path: Path) -> None:
    log_steps(tmp_path, "train", range(3))
    before = (tmp_path / FILE).read_bytes()
    with MetricsLogger(tmp_path) as metrics_logger:
        assert metrics_logger.rewind("train", 2) == 0
        assert metrics_logger.rewind("sft", 0) == 0
    assert (tmp_path / FILE).read_bytes() == before


def test_tensorboard_shows_each_step_once_even_after_a_rewind(tmp_path: Path) -> None:
    log_steps(tmp_path, "train", range(1, 5))
    with MetricsLogger(tmp_path) as metrics_logger:
        metrics_logger.rewind("train", 2)
        metrics_logger.log("train", 3, {"learner/kl": 9.0})
    events = EventAccumulator(str(tmp_path / TENSORBOARD / "train"))
    events.Reload()
    seen = [(event.step, round(event.value, 3)) for event in events.Scalars("learner/kl")]
    assert seen == [(1, 0.1), (2, 0.2), (3, 9.0)]

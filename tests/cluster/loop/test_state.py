"""State of rounds: one file each, read back as written; the log has each round once."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.loop.state import PHASES, RoundState, read_states, write_log, write_state
from cluster.report.loop_rounds import read_log
from orchard.errors import CheckpointError
from orchard.evaluation.bootstrap import Estimate

ESTIMATE = Estimate(mean=0.5, low=0.25, high=0.75, n=8)
FULL = RoundState(
    number=0, phase="done", canary="00001", expected=ESTIMATE, window_end=5.5, event_files=2,
    counts={"requests": 3.0}, realized=ESTIMATE, reward=ESTIMATE, watch="inside", trained="00001",
    predicted=ESTIMATE, serving=ESTIMATE, outcome="published", reasons=("a", "b"), seconds=1.5,
)  # fmt: skip


def test_states_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_states(tmp_path) == []
    begun = RoundState(number=1)
    for each in (FULL, begun):
        write_state(tmp_path, each)
    assert read_states(tmp_path) == [FULL, begun]
    write_state(tmp_path, replace(begun, phase="collected", window_end=7.0))
    assert read_states(tmp_path)[1].window_end == 7.0
    assert [file.name for file in sorted((tmp_path / "rounds").iterdir())] == [
        "00000.json",
        "00001.json",
    ]


def test_a_round_goes_on_after_its_last_phase() -> None:
    state = RoundState(number=0, phase="trained")
    assert [state.has_done(phase) for phase in PHASES] == [True] * 4 + [False] * 2


def test_damage_is_named(tmp_path: Path) -> None:
    write_state(tmp_path, FULL)
    path = tmp_path / "rounds" / "00000.json"
    for text in ("{", "[]", json.dumps({"number": 0, "shoes": 1}), json.dumps({})):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="remove it and all later ones"):
            read_states(tmp_path)
    path.unlink()
    write_state(tmp_path, RoundState(number=1))
    with pytest.raises(CheckpointError, match="are not 0 to 0"):
        read_states(tmp_path)


def test_the_log_has_one_row_per_ended_round(tmp_path: Path) -> None:
    states = [FULL, RoundState(number=1, phase="trained")]
    for _ in range(2):
        write_log(tmp_path / "loop.jsonl", states)
    (row,) = read_log(tmp_path / "loop.jsonl")
    assert row["outcome"] == "published"
    assert row["predicted"] == {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 8}

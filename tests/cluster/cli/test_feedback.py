"""From an exposure log and events to a feedback folder by the command."""

import json
from pathlib import Path

import polars as pl
import pytest
from typer.testing import CliRunner

from cluster.cli.app import app
from cluster.cli.feedback import behavior_values
from orchard.errors import ConfigError
from orchard.feedback.read import read_feedback
from orchard.feedback.schema import SUMMARY
from serve.exposure_log import ExposureLog
from serve.schema import Cost, Item, Level, RecommendResponse


def logged(folder: Path, request: str, items: list[int]) -> None:
    """Write the answer to a request as the endpoint does."""
    answer = RecommendResponse.model_construct(
        items=[
            Item.model_construct(
                rank=rank, item_id=item, score=-1.0, sid=[0, item],
                title="", guide=None,
                levels=[Level(code=0, logprob=-0.5), Level(code=item, logprob=-0.5)],
            )
            for rank, item in enumerate(items, 1)
        ],
        variant="main", policy="3-abc", catalog="0-00000000", source="policy",
        decoder="beam_sample", width=len(items), seed=1,
        cost=Cost(prefill_tokens=0, forward_tokens=0, passes=0, batch=1, seconds=0.0),
    )  # fmt: skip
    log = ExposureLog(folder, rows=1)
    log.add(
        answer, request_id=request, user="u", history=[1, 2], temperature=1.0, restricted=False,
        shadow=False,
    )  # fmt: skip
    log.flush()


def test_a_log_and_events_become_feedback(tmp_path: Path) -> None:
    log = tmp_path / "log"
    logged(log, "a", [3, 4])
    logged(log, "b", [4])
    shown = pl.read_parquet(log)["time"].max()
    assert isinstance(shown, float)
    events = tmp_path / "events.csv"
    events.write_text(
        "time,request_id,item_id,behavior\n"
        f"{shown + 1},a,4,click\n{shown + 2},a,4,buy\n{shown + 3},z,4,buy\n"
    )
    out = tmp_path / "out"
    arguments = ["data", "feedback", str(log), str(events), str(out), "--value", "buy=1"]
    result = CliRunner().invoke(app, [*arguments, "--value", "click=.1"])
    assert result.exit_code == 0, result.output
    rows = read_feedback([out])
    assert sorted(zip(rows["request_id"], rows["item_id"], rows["reward"], strict=True)) == [
        ("a", 3, 0.0), ("a", 4, 1.1), ("b", 4, 0.0),
    ]  # fmt: skip
    summary = json.loads((out / SUMMARY).read_text())
    assert summary["counts"]["unknown_request"] == 1
    assert summary["options"]["values"] == {"buy": 1.0, "click": 0.1}
    assert "unknown_request  1" in result.output


def test_values_and_choices_are_checked(tmp_path: Path) -> None:
    assert behavior_values(["buy=1", "a=b=.5"]) == {"buy": 1.0, "a=b": 0.5}
    with pytest.raises(ConfigError, match="'buy' is not a behavior with a number"):
        behavior_values(["buy"])
    result = CliRunner().invoke(
        app, ["data", "feedback", "log", "events", str(tmp_path), "--combine", "mean"]
    )
    assert isinstance(result.exception, ConfigError)
    assert "choose sum or max or last" in str(result.exception)

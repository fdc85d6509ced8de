"""Columns of events and of feedback, the Parquet files between an endpoint and a run.

An *event* is something that a user did: a view, a click, a purchase. An *exposure* is an item that
an endpoint showed, a row of `serve.exposure_log`. *Feedback* has one row for every exposure, with
the reward of the events that are attributed to it; an exposure without any has reward 0.
"""

from pathlib import Path

import polars as pl

ROWS, SUMMARY = "rows.parquet", "summary.json"
"""Files of a feedback folder: its rows, and the counts of everything that was joined or not."""

EVENTS = pl.Schema(
    {
        "event_id": pl.String, "time": pl.Float64, "request_id": pl.String, "user": pl.String,
        "item_id": pl.Int64, "behavior": pl.String, "value": pl.Float64,
    }
)  # fmt: skip
"""Columns of events: `time` in seconds; a request, a user or both; `event_id` tells duplicates
apart, and without it all columns do; `value` is 1 by default."""

EVENTS_NEEDED = ("time", "item_id", "behavior")
"""Columns that events must have, besides at least one of `request_id` and `user`."""

EXPOSURES = pl.Schema(
    {
        "request_id": pl.String, "time": pl.Float64, "user": pl.String, "shadow": pl.Boolean,
        "policy": pl.String, "catalogue": pl.String, "source": pl.String, "decoder": pl.String,
        "width": pl.Int32, "temperature": pl.Float64, "restricted": pl.Boolean,
        "history": pl.List(pl.Int64), "rank": pl.Int32, "item_id": pl.Int64,
        "sid": pl.List(pl.Int32), "logprob": pl.List(pl.Float64),
    }
)  # fmt: skip
"""Columns that are read of an exposure log; rows with `shadow` were not shown."""

FEEDBACK = pl.Schema(
    {
        "request_id": pl.String, "time": pl.Float64, "user": pl.String,
        "history": pl.List(pl.Int64), "item_id": pl.Int64, "rank": pl.Int32,
        "sid": pl.List(pl.Int32), "logprob": pl.List(pl.Float64), "decoder": pl.String,
        "width": pl.Int32, "temperature": pl.Float64, "restricted": pl.Boolean,
        "policy": pl.String, "catalogue": pl.String, "source": pl.String, "reward": pl.Float64,
        "weight": pl.Float64, "behaviors": pl.List(pl.String),
    }
)  # fmt: skip
"""Columns of feedback: the exposure with its history, oldest item first, and the log-probability of
each code (null where the decoder drew nothing), its reward and weight, and the behaviors seen."""


def is_feedback(folder: Path) -> bool:
    """Return whether a folder holds the rows of feedback."""
    return (folder / ROWS).is_file()

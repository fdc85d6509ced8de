"""Rounds of a closed loop in the report of a run, from the log that `orchard loop` writes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchard.errors import DataError

LOG = "loop.jsonl"
"""Name of the log of rounds in the run folder."""
HEADINGS = (
    "round", "requests", "reward per request", "realized per draw", "expected", "place",
    "predicted for the next", "served policy, off-policy", "outcome", "reasons",
)  # fmt: skip
"""Headings of the table of rounds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopSection:
    """Table of the rounds."""

    headings: tuple[str, ...]
    rows: list[list[str]]


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a log of rounds; none if there is no log.

    Raises:
        DataError: a row is damaged.
    """
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise DataError(
            f"{path} is damaged: {error}; run `orchard loop` again, which writes it again"
        ) from error


def loop_section(log: list[dict[str, Any]]) -> LoopSection | None:
    """Return the section of the rounds; None without any."""
    if not log:
        return None
    return LoopSection(headings=HEADINGS, rows=[table_row(row) for row in log])


def table_row(row: Mapping[str, Any]) -> list[str]:
    """Return a row of the report's table from a row of the log; see `HEADINGS`."""
    counts: Mapping[str, Any] = row.get("counts") or {}
    return [
        str(row["number"]), f"{counts.get('requests', 0):g}", _interval(row.get("reward")),
        _interval(row.get("realized")), _interval(row.get("expected")), str(row.get("watch") or ""),
        _interval(row.get("predicted")), _interval(row.get("serving")),
        str(row.get("outcome") or ""), "; ".join(row.get("reasons") or ()),
    ]  # fmt: skip


def _interval(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return ""
    return f"{estimate['mean']:.4f} [{estimate['low']:.4f}, {estimate['high']:.4f}]"

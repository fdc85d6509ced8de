"""Exposures and events of a few requests."""

from collections.abc import Callable, Mapping, Sequence

import polars as pl
import pytest

from orchard.feedback.schema import EVENTS, EXPOSURES

Table = Callable[[Sequence[Mapping[str, object]]], pl.DataFrame]


@pytest.fixture
def exposures() -> Table:
    """Rows of an exposure log, of which each row names what matters."""

    def make(rows: Sequence[Mapping[str, object]]) -> pl.DataFrame:
        default = {
            "request_id": "r", "time": 1000.0, "user": None, "shadow": False, "policy": "7-abc",
            "catalogue": "0-00000000", "source": "policy", "decoder": "beam_sample", "width": 1,
            "temperature": 1.0, "restricted": False, "history": [1, 2], "rank": 1, "item_id": 5,
            "sid": [0, 1, 2], "logprob": [-0.5, -0.25, 0.0],
        }  # fmt: skip
        return pl.DataFrame([default | row for row in rows], EXPOSURES)

    return make


@pytest.fixture
def events() -> Table:
    """Events of which each row names what matters."""

    def make(rows: Sequence[Mapping[str, object]]) -> pl.DataFrame:
        default = {
            "event_id": None, "time": 1010.0, "request_id": "r", "user": None, "item_id": 5,
            "behavior": "click", "value": 1.0,
        }  # fmt: skip
        return pl.DataFrame([default | row for row in rows], EVENTS)

    return make

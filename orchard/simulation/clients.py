"""Clients of simulated users: they ask an endpoint over HTTP and write what the users then do.

Request ids are functions of window and visit, so that a window that is repeated after a crash gives
the same ids, and the events of both attempts are duplicates of each other.

Shapes:  R visits
"""

import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from jaxtyping import Bool

from orchard.errors import DataError
from orchard.folders import atomic_file
from orchard.simulation.simulator import ShownLists, Simulator, Visits, shown_lists

_log = logging.getLogger("orchard")
_TRIES, _PAUSE_S = 3, 0.5
"""Tries of a request that failed without an answer or by the server, and the pause between two."""
_EXPLORE, _SEED = 101, 102
"""Streams of random numbers."""


@dataclass(frozen=True, kw_only=True)
class Asking:
    """Way in which clients ask."""

    url: str
    """Address of the endpoint."""
    k: int = 10
    """Number of items of a list."""
    explore: float = 0.5
    """Share of the visits that are shown a single draw of the policy, whose probability is known,
    instead of a list of `k` items."""
    seed: int = 0
    """Seed of the draws."""
    threads: int = 4
    """Number of requests at a time."""
    timeout_s: float = 30.0
    """Timeout of a request."""


@dataclass(frozen=True, kw_only=True)
class AnsweredVisits:
    """Visits of one window with their answers and events."""

    visits: Visits
    shown: ShownLists
    explored: Bool[np.ndarray, " R"]
    """Whether each visit was shown a single draw."""
    events: pl.DataFrame
    failed: int
    """Number of requests without an answer."""


def visit(simulator: Simulator, window: int, asking: Asking) -> AnsweredVisits:
    """Let the users of a window visit the endpoint, respond, and remember what they did.

    They visit now, whatever the times of the simulator are.

    Raises:
        DataError: the endpoint refuses requests, or answers none of them.
    """
    visits = simulator.visits(window)
    rng = np.random.default_rng([asking.seed, window, _EXPLORE])
    explored = rng.random(len(visits)) < asking.explore
    seeds = np.random.default_rng([asking.seed, window, _SEED]).integers(0, 2**62, len(visits))
    ids = [f"w{window}-{number}" for number in range(len(visits))]
    bodies = [
        {"history": visits.history_of(number), "user": str(visits.user[number])}
        | (
            {"k": 1, "width": 1, "decoder": "beam_sample", "seed": int(seeds[number])}
            if explored[number]
            else {"k": asking.k}
        )
        for number in range(len(visits))
    ]
    answers, answered_at = ask(asking, ids, bodies)
    visits = replace(visits, time=np.array(answered_at, dtype=np.float64))
    failed = sum(answer is None for answer in answers)
    if answers and failed == len(answers):
        raise DataError(
            f"the endpoint {asking.url} answered none of {failed} requests; see its log"
        )
    lists = [[item["item_id"] for item in answer["items"]] if answer else [] for answer in answers]
    shown = shown_lists(ids, lists)
    events = simulator.respond(visits, shown)
    simulator.remember(events)
    return AnsweredVisits(
        visits=visits, shown=shown, explored=explored, events=events, failed=failed
    )


def ask(
    asking: Asking, ids: Sequence[str], bodies: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any] | None], list[float]]:
    """Send requests, several at a time; return their answers in order, and when each came.

    A request that failed has the answer None.

    Raises:
        DataError: the endpoint refuses a request as invalid.
    """
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    address = f"{asking.url.rstrip('/')}/v1/recommend"

    def send(number: int) -> dict[str, Any] | None:
        headers = {"content-type": "application/json", "x-request-id": ids[number]}
        data = json.dumps(bodies[number]).encode()
        for attempt in range(_TRIES):
            time.sleep(_PAUSE_S * min(attempt, 1))
            try:
                request = urllib.request.Request(address, data, headers)
                with opener.open(request, timeout=asking.timeout_s) as reply:
                    answer: dict[str, Any] = json.load(reply)
                    return answer
            except urllib.error.HTTPError as error:
                if error.code < 500 and error.code not in (408, 429):
                    raise DataError(
                        f"{address} refused request {ids[number]} with {error.code}: "
                        f"{error.read().decode(errors='replace')[:300]}"
                    ) from error
                _log.info("request %s failed with %d", ids[number], error.code)
            except (OSError, ValueError) as error:
                _log.info("request %s failed: %s", ids[number], error)
        return None

    def answered(number: int) -> tuple[dict[str, Any] | None, float]:
        return send(number), time.time()

    with ThreadPoolExecutor(asking.threads) as pool:
        pairs = list(pool.map(answered, range(len(bodies))))
    return [answer for answer, _ in pairs], [moment for _, moment in pairs]


def write_events(folder: Path, name: str, events: pl.DataFrame) -> Path:
    """Write events as `name.parquet` to a folder, atomically; return the path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.parquet"
    with atomic_file(path) as partial:
        events.write_parquet(partial)
    return path

"""Off-policy evaluation on an exposure log, for `orchard evaluate --logged`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import typer
from jaxtyping import Float64, Int64

from cluster.loop.judge import judge
from orchard.catalog.catalog import Catalog
from orchard.errors import DataError
from orchard.evaluation import off_policy
from orchard.folders import atomic_write
from orchard.parquet import read_table
from orchard.policy.store import Policy
from rollout.engine.torch import TorchEngine

_NEEDED = (
    "request_id", "item_id", "decoder", "width", "temperature", "restricted", "source", "shadow",
    "history", "logprob",
)  # fmt: skip
_OPTIONAL = ("time", "rank", "catalogue")
"""Columns that tell the items of one answer from those of the next, and their catalog."""


@dataclass(frozen=True, kw_only=True)
class LoggedRows:
    """Usable decisions of an exposure log: single draws with a known probability."""

    row: Int64[np.ndarray, " B"]
    """Catalog row of the drawn item, -1 where the judged policy cannot show it."""
    history: list[list[int]]
    """Item ids before each decision, oldest first."""
    logprob: list[list[float]]
    """Log-probabilities of the codes of the drawn item, under the logging policy."""
    reward: Float64[np.ndarray, " B"]
    """Reward of each decision: the sum over the items that it showed."""
    passed_over: int
    """Number of log rows that are left out."""
    elsewhere: int
    """Number of decisions that were drawn from another catalog than the judged one."""


def read_log(log: Path, rewards: Path, catalog: Catalog) -> LoggedRows:
    """Load the single draws of an exposure log with their rewards; a missing reward counts as 0.

    A slate of several draws, a beam, a restricted draw, or a draw at a temperature other than 1 has
    no known probability and is left out. One draw may show several items, which share a semantic
    ID: they are one decision. A draw that the judged policy cannot make, because its catalog lacks
    the item or would show another one of the same semantic ID first, is kept: its probability is 0,
    and to leave it out would bias every estimate.

    Raises:
        DataError: a file or a column is missing, or no row is left.
    """
    files = sorted(log.glob("*.parquet")) if log.is_dir() else [log]
    if not files:
        raise DataError(f"exposure log {log} holds no Parquet file; set serve.exposure to make one")
    rows: list[dict[str, Any]] = []
    for file in files:
        table = read_table(file, role="exposure", columns=_NEEDED, remedy="--logged")
        known = [name for name in (*_NEEDED, *_OPTIONAL) if name in table.column_names]
        rows += table.select(known).to_pylist()
    usable = [
        row
        for row in rows
        if row["decoder"] == "beam_sample" and row["width"] == 1 and row["temperature"] == 1.0
        and row["source"] == "policy" and not row["restricted"] and not row["shadow"]
        and row["logprob"]
    ]  # fmt: skip
    if not usable:
        raise DataError(
            f"of {len(rows)} rows of {log} none is a single unrestricted draw; let the endpoint "
            'explore with decoder = "beam_sample", width = 1, k = 1 and temperature = 1'
        )
    earned = read_rewards(rewards)
    # Rows of each draw; a draw shows its first item first.
    draws: list[list[dict[str, Any]]] = []
    for row in usable:
        if draws and _continues(draws[-1][-1], row):
            draws[-1].append(row)
        else:
            draws.append([row])
    first = [draw[0] for draw in draws]
    found, listed = catalog.lookup(np.array([row["item_id"] for row in first], np.int64))
    # The judged policy shows the first item of a leaf first: it draws no other one.
    shows = listed & (catalog.place_in_leaf[found] == 0)
    short = catalog.digest[:8]
    return LoggedRows(
        row=np.where(shows, found, -1),
        history=[row["history"] for row in first],
        logprob=[row["logprob"] for row in first],
        reward=np.array(
            [
                sum(earned.get((row["request_id"], row["item_id"]), 0.0) for row in draw)
                for draw in draws
            ],
            dtype=np.float64,
        ),
        passed_over=len(rows) - len(usable),
        elsewhere=sum((row.get("catalogue") or short).rpartition("-")[2] != short for row in first),
    )


def read_rewards(path: Path) -> dict[tuple[str, int], float]:
    """Read the reward of each shown item, by request and item; several of one item are summed.

    Raises:
        DataError: the file or a column is missing, or a reward is missing or not finite.
    """
    table = read_table(
        path, role="rewards", columns=("request_id", "item_id", "reward"), remedy="--rewards"
    )
    earned: dict[tuple[str, int], float] = {}
    for number, row in enumerate(table.to_pylist()):
        try:
            reward = float(row["reward"])
        except (TypeError, ValueError) as error:
            raise DataError(
                f"row {number} of {path} has reward {row['reward']!r}; give a number or drop it"
            ) from error
        key = (row["request_id"], row["item_id"])
        earned[key] = earned.get(key, 0.0) + reward
    return earned


def _continues(before: dict[str, Any], row: dict[str, Any]) -> bool:
    """Return whether a row of the log shows a further item of the draw of the row before it."""
    same = all(before[name] == row[name] for name in ("request_id", "logprob", "history"))
    return same and before.get("time") == row.get("time") and row.get("rank") != 1


def evaluate_log(
    folder: Path, log: Path, rewards: Path, json_file: Path | None
) -> off_policy.OffPolicyEstimate:
    """Evaluate the policy in `folder` on an exposure log, and print the estimates.

    Raises:
        DataError: the policy or the log cannot be used.
    """
    policy = Policy.open(folder)
    tokenizer, catalog = policy.tokenizer, policy.tokenizer.catalog
    engine = TorchEngine(policy.model, tokenizer, policy.version)
    logged = read_log(log, rewards, catalog)
    estimates, _ = judge(
        engine, tokenizer, row=logged.row, history=logged.history, logprob=logged.logprob,
        reward=logged.reward, max_history=policy.facts.max_history,
    )  # fmt: skip
    for name in ("logged", "is", "snips", "pdis", "dr"):
        each = estimates.value[name]
        typer.echo(f"{name:>7}  {each.mean:.4f}  [{each.low:.4f}, {each.high:.4f}]  n = {each.n}")
    typer.echo(
        f"the weights leave {estimates.effective:.1f} effective decisions of {len(logged.row)}; "
        f"the largest weight is {estimates.largest:.3g}; {logged.passed_over} rows of the log "
        "were skipped"
    )
    impossible = int((logged.row < 0).sum())
    if impossible or logged.elsewhere:
        typer.echo(
            f"{logged.elsewhere} decisions were drawn from another catalog than "
            f"{catalog.digest[:8]}; {impossible} cannot be drawn from it and have weight 0; no "
            "decision judges items that the catalog of the log lacked"
        )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        metrics = {name: asdict(each) for name, each in estimates.value.items()}
        atomic_write(json_file, json.dumps(metrics, indent=2) + "\n")
    return estimates

"""Off-policy evaluation on an exposure log, for `orchard evaluate --logged`."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import typer
from jaxtyping import Float64, Int64

from orchard import ragged
from orchard.catalog.catalog import Catalog
from orchard.errors import DataError
from orchard.evaluation import off_policy
from orchard.folders import atomic_write
from orchard.parquet import read_table
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.store import Policy
from orchard.types import Prompts
from rollout.engine.torch import TorchEngine
from rollout.search.score_items import score_items

_NEEDED = (
    "request_id", "item_id", "decoder", "width", "temperature", "restricted", "source", "shadow",
    "history", "logprob",
)  # fmt: skip
_BATCH, _FOLDS = 128, 5


@dataclass(frozen=True, kw_only=True)
class LoggedRows:
    """Usable decisions of an exposure log: single draws with a known probability."""

    row: Int64[np.ndarray, " B"]
    """Catalog row of the drawn item."""
    history: list[list[int]]
    """Item ids before each decision, oldest first."""
    logprob: list[list[float]]
    """Log-probabilities of the codes of the drawn item, under the logging policy."""
    reward: Float64[np.ndarray, " B"]
    passed_over: int
    """Number of log rows that are left out."""


def read_log(log: Path, rewards: Path, catalog: Catalog) -> LoggedRows:
    """Load the single draws of an exposure log with their rewards; a missing reward counts as 0.

    A slate of several items, a beam, a restricted draw, or a draw at a temperature other than 1 has
    no known probability and is left out, as are items that the catalog lacks.

    Raises:
        DataError: a file or a column is missing, or no row is left.
    """
    files = sorted(log.glob("*.parquet")) if log.is_dir() else [log]
    if not files:
        raise DataError(f"exposure log {log} holds no Parquet file; set serve.exposure to make one")
    parts = [
        read_table(file, role="exposure", columns=_NEEDED, remedy="--logged") for file in files
    ]
    table = pa.concat_tables([part.select(_NEEDED) for part in parts])
    rows: list[dict[str, Any]] = table.to_pylist()
    drawn = [
        row
        for row in rows
        if row["decoder"] == "beam_sample" and row["width"] == 1 and row["temperature"] == 1.0
        and row["source"] == "policy" and not row["restricted"] and not row["shadow"]
        and row["logprob"]
    ]  # fmt: skip
    if not drawn:
        raise DataError(
            f"of {len(rows)} rows of {log} none is a single unrestricted draw; let the endpoint "
            'explore with decoder = "beam_sample", width = 1, k = 1 and temperature = 1'
        )
    reward_table = read_table(
        rewards, role="rewards", columns=("request_id", "item_id", "reward"), remedy="--rewards"
    )
    earned = {
        (row["request_id"], row["item_id"]): float(row["reward"])
        for row in reward_table.to_pylist()
    }
    catalog_row, in_catalog = catalog.find(np.array([row["item_id"] for row in drawn], np.int64))
    kept = [row for row, listed in zip(drawn, in_catalog, strict=True) if listed]
    return LoggedRows(
        row=catalog_row[in_catalog],
        history=[row["history"] for row in kept],
        logprob=[row["logprob"] for row in kept],
        reward=np.array([earned.get((row["request_id"], row["item_id"]), 0.0) for row in kept]),
        passed_over=len(rows) - len(kept),
    )


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
    target = np.zeros((len(logged.row), catalog.trie.depth))
    behaviour, reward = np.zeros_like(target), np.zeros_like(target)
    # target, behaviour: log-probability of each code of the drawn item under the evaluated and the
    # logging policy, (B, depth); root: probability of each first code under the evaluated policy.
    root: list[np.ndarray] = []
    for batch_start in range(0, len(logged.row), _BATCH):
        rows = slice(batch_start, min(batch_start + _BATCH, len(logged.row)))
        prompts = prompts_of(logged.history[rows], tokenizer)
        target[rows], first = score_items(engine, prompts, catalog.leaf_of_item[logged.row[rows]])
        root.append(np.exp(first.astype(np.float64)))
    for row, logprob in enumerate(logged.logprob):
        behaviour[row, : len(logprob)] = logprob
        reward[row, len(logprob) - 1] = logged.reward[row]  # earned with the last code
    codes = catalog.trie.code[catalog.trie.children(catalog.trie.level_start[:1]).node].numpy()
    # Index of the first code of each drawn item among the children of the root.
    first_code = np.searchsorted(codes, catalog.codes[logged.row, 0])
    fold = np.arange(len(first_code)) % _FOLDS
    q, v = off_policy.first_code_model(first_code, reward, fold, np.concatenate(root))
    estimates = off_policy.estimate(
        off_policy.LoggedDecisions(behaviour=behaviour, target=target, reward=reward, q=q, v=v)
    )
    for name in ("logged", "is", "snips", "pdis", "dr"):
        each = estimates.value[name]
        typer.echo(f"{name:>7}  {each.mean:.4f}  [{each.low:.4f}, {each.high:.4f}]  n = {each.n}")
    typer.echo(
        f"weights leave {estimates.effective:.1f} effective decisions of {len(first_code)}, the "
        f"largest is {estimates.largest:.3g}; {logged.passed_over} rows of the log were passed over"
    )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        metrics = {name: asdict(each) for name, each in estimates.value.items()}
        atomic_write(json_file, json.dumps(metrics, indent=2) + "\n")
    return estimates


def prompts_of(history: list[list[int]], tokenizer: ItemTokenizer) -> Prompts:
    """Build the prompts of logged histories; items that the catalog lacks are skipped."""
    rows: list[np.ndarray] = []
    for item_ids in history:
        row, in_catalog = tokenizer.catalog.find(np.array(item_ids, dtype=np.int64))
        rows.append(row[in_catalog])
    # Catalog rows of all histories, concatenated; history b is flat[start[b] : start[b + 1]].
    start = ragged.starts(np.array([len(row) for row in rows]))
    flat = np.concatenate([np.zeros(0, np.int64), *rows])
    token, token_start = tokenizer.encode_history(flat, start)
    return Prompts(
        id=np.arange(len(rows)), target=np.zeros(len(rows), np.int64), history=flat,
        history_start=start, token=token, token_start=token_start,
    )  # fmt: skip

"""`orchard evaluate --logged`: a policy judged by what another one showed."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import typer
from jaxtyping import Float64, Int64

from orchard import ragged
from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.errors import DataError
from orchard.evaluation import off_policy
from orchard.folders import atomic_write
from orchard.parquet import read_table
from orchard.policy import item_tokenizer, model, weights
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.types import PolicyVersion, Prompts
from rollout.engine.torch import TorchEngine
from rollout.search.score_items import score_items

_NEEDED = (
    "request_id", "item_id", "decoder", "width", "temperature", "restricted", "source", "shadow",
    "history", "logprob",
)  # fmt: skip
_BATCH, _FOLDS = 128, 5


@dataclass(frozen=True, kw_only=True)
class LoggedRows:
    """The decisions of an exposure log that can be judged by."""

    row: Int64[np.ndarray, " B"]
    """Catalog row of the drawn item."""
    history: list[list[int]]
    logprob: list[list[float]]
    reward: Float64[np.ndarray, " B"]
    passed_over: int
    """Rows of the log that were no single unrestricted draw."""


def read_log(log: Path, rewards: Path, items: Catalog) -> LoggedRows:
    """Single draws of the exposure log, joined with their rewards; no reward is a reward of 0.

    A slate of several items, a beam, a draw among fewer items than all or at another temperature
    has no known probability, and is passed over.

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
        one
        for one in rows
        if one["decoder"] == "beam_sample" and one["width"] == 1 and one["temperature"] == 1.0
        and one["source"] == "policy" and not one["restricted"] and not one["shadow"]
        and one["logprob"]
    ]  # fmt: skip
    if not drawn:
        raise DataError(
            f"of {len(rows)} rows of {log} none is a single unrestricted draw; let the endpoint "
            'explore with decoder = "beam_sample", width = 1, k = 1 and temperature = 1'
        )
    given = read_table(
        rewards, role="rewards", columns=("request_id", "item_id", "reward"), remedy="--rewards"
    )
    earned = {
        (one["request_id"], one["item_id"]): float(one["reward"]) for one in given.to_pylist()
    }
    found, known = items.find(np.array([one["item_id"] for one in drawn], dtype=np.int64))
    kept = [one for one, there in zip(drawn, known, strict=True) if there]
    return LoggedRows(
        row=found[known],
        history=[one["history"] for one in kept],
        logprob=[one["logprob"] for one in kept],
        reward=np.array([earned.get((one["request_id"], one["item_id"]), 0.0) for one in kept]),
        passed_over=len(rows) - len(kept),
    )


def evaluate_log(
    folder: Path, log: Path, rewards: Path, json_file: Path | None
) -> off_policy.OffPolicyEstimate:
    """Judge the policy in `folder`; prints what was found.

    Raises:
        DataError: the policy or the log cannot be used.
    """
    model.check_folder(folder)
    items = catalogs.load(folder / "catalogue")
    words = item_tokenizer.make_item_tokenizer(item_tokenizer.read_tokenizer(folder), items)
    policy = model.load(folder, words)
    version = PolicyVersion(step=0, digest=weights.digest(weights.snapshot(policy)))
    engine = TorchEngine(policy, words, version)
    read = read_log(log, rewards, items)
    target = np.zeros((len(read.row), items.trie.depth))
    behaviour, reward = np.zeros_like(target), np.zeros_like(target)
    root: list[np.ndarray] = []
    for at in range(0, len(read.row), _BATCH):
        rows = slice(at, min(at + _BATCH, len(read.row)))
        prompts = prompts_of(read.history[rows], words)
        target[rows], first = score_items(engine, prompts, items.leaf_of_item[read.row[rows]])
        root.append(np.exp(first.astype(np.float64)))
    for row, logprob in enumerate(read.logprob):
        behaviour[row, : len(logprob)] = logprob
        reward[row, len(logprob) - 1] = read.reward[row]
    codes = items.trie.code[items.trie.children(items.trie.level_start[:1]).node].numpy()
    place = np.searchsorted(codes, items.codes[read.row, 0])
    fold = np.arange(len(place)) % _FOLDS
    q, v = off_policy.first_code_model(place, reward, fold, np.concatenate(root))
    found = off_policy.estimate(
        off_policy.LoggedDecisions(behaviour=behaviour, target=target, reward=reward, q=q, v=v)
    )
    for name in ("logged", "is", "snips", "pdis", "dr"):
        one = found.value[name]
        typer.echo(f"{name:>7}  {one.mean:.4f}  [{one.low:.4f}, {one.high:.4f}]  n = {one.n}")
    typer.echo(
        f"weights leave {found.effective:.1f} effective decisions of {len(place)}, the largest is "
        f"{found.largest:.3g}; {read.passed_over} rows of the log were passed over"
    )
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        metrics = {name: asdict(one) for name, one in found.value.items()}
        atomic_write(json_file, json.dumps(metrics, indent=2) + "\n")
    return found


def prompts_of(history: list[list[int]], tokenizer: ItemTokenizer) -> Prompts:
    """What the policy reads of logged histories; items that are gone are passed over."""
    rows: list[np.ndarray] = []
    for one in history:
        row, known = tokenizer.catalog.find(np.array(one, dtype=np.int64))
        rows.append(row[known])
    start = ragged.starts(np.array([len(one) for one in rows]))
    flat = np.concatenate([np.zeros(0, np.int64), *rows])
    token, token_start = tokenizer.encode_history(flat, start)
    return Prompts(
        id=np.arange(len(rows)), target=np.zeros(len(rows), np.int64), history=flat,
        history_start=start, token=token, token_start=token_start,
    )  # fmt: skip

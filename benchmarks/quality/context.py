"""Benchmark context in prompts: a world where behavior decides, and gaps between real reviews.

In the world, users view and buy; the next item follows from the last item that was bought, and what
was viewed says nothing. Items and histories are the same for every way, and so are the sizes:

    without     prompts of items alone
    with        the behavior of every event is a token after its item
    missing     the policy of `with`, where the test rows do not tell the behavior

On Amazon Industrial (the exact training rows, a third of all) the context is the time until the
next event, in buckets. Differences are paired by row and averaged over seeds.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.shared.measure import Figure, Report, Row, figure, report
from benchmarks.shared.recipe import over_seeds, spelt
from cluster.training.controller import start_controller
from cluster.training.evaluate import evaluate
from cluster.training.run import prepare
from cluster.training.sft import sft
from orchard import config
from orchard.data.importers.examples import PARTS, SHARES
from orchard.evaluation.ranking import Evaluation
from orchard.settings import Config

METRICS = ("ndcg@10/sid", "hr@1/sid", "hr@10/sid")
SEEDS, USERS, EPOCHS = 2, 1000, 12
INDUSTRIAL_SEEDS, INDUSTRIAL_EPOCHS = 2, 8
ITEMS, EVENTS, MAX_HISTORY = 60, 12, 6
BOUGHT, FOLLOWS = 0.3, 0.8
"""Share of events that are purchases, and of those that follow from the last purchase."""
NEXT = (0.6, 0.25, 0.15)
"""Probabilities of the items that follow a purchase."""
SIZE = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 2, "intermediate_size": 64}


def run(quick: bool) -> Report:
    """Train all ways with all seeds; `quick` has one seed, few users and one epoch."""
    torch.set_num_threads(1)
    seeds, users, epochs = (1, 200, 1) if quick else (SEEDS, USERS, EPOCHS)
    folder = Path(tempfile.mkdtemp(prefix="orchard-context-"))
    try:
        write_world(folder / "world", users)
        base: dict[str, Any] = {
            "data": {"path": str(folder / "world"), "max_history": MAX_HISTORY},
            "model": SIZE,
            "sft": {"epochs": epochs, "lr": 2e-3, "valid_rows": 200, "valid_beams": 10},
        }
        found = results(folder / "runs", base, ("behavior",), seeds)
        rows, gain = table("world", found)
        figures = [gain]
        industrial = Path(os.environ.get("ORCHARD_DATA", "data")) / "amazon_industrial"
        if industrial.is_dir():
            write_gaps(industrial, folder / "industrial")
            base["data"] = {"path": str(folder / "industrial"), "max_history": 10}
            base["model"] = {}
            base["sft"] = {
                "epochs": 1 if quick else INDUSTRIAL_EPOCHS, "ema_decay": 0.99, "logprob": "full",
            }  # fmt: skip
            seeds = 1 if quick else INDUSTRIAL_SEEDS
            rows += table("industrial", results(folder / "gaps", base, ("gap",), seeds))[0]
        return report("context", figures, rows)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def results(
    output: Path, base: dict[str, Any], context: Sequence[str], seeds: int
) -> dict[str, list[Evaluation]]:
    """Train without and with context, a run for each seed; return the test evaluations by way."""
    found: dict[str, list[Evaluation]] = {"without": [], "with": [], "missing": []}
    for seed in range(seeds):
        for way in ("without", "with"):
            tree = {
                **base, "name": f"{way}-{seed}", "output": str(output), "seed": seed,
                "data": {**base["data"], "context": list(context) if way == "with" else []},
                "rollout": {"engine": "torch", "threads": 1},
                "learner": {"threads": 1, "max_tokens": 4096},
                "evaluate": {"beams": 10, "exclude_seen": False},
                "cluster": {"in_process": True},
            }  # fmt: skip
            for name, evaluation in trained(config.parse(tree), way).items():
                found[name].append(evaluation)
    return found


def trained(settings: Config, way: str) -> dict[str, Evaluation]:
    """Run SFT and evaluate its policy on the test rows, with and without their context."""
    run = prepare(settings, "sft")

    async def work() -> dict[str, Evaluation]:
        async with start_controller(run) as controller:
            await sft(controller)
            begun = run.with_phase("evaluate", run.result)
            tests = {way: begun}
            if way == "with":
                tests["missing"] = replace(begun, test=replace(run.test, context=None))
            found: dict[str, Evaluation] = {}
            for name, each in tests.items():
                await controller.start_phase(each)
                found |= await evaluate(controller, run.result, split="test", beams=10, name=name)
            return found

    return asyncio.run(work())


def table(data: str, found: dict[str, list[Evaluation]]) -> tuple[list[Row], Figure]:
    """Return the means of all ways and their differences, and the figure of the gain."""
    rows: list[Row] = [
        {"data": data, "prompts": way}
        | {m: float(np.mean([each.metrics[m].mean for each in evaluations])) for m in METRICS}
        for way, evaluations in found.items()
    ]
    for way in ("with", "missing"):
        gain = over_seeds(found[way], found["without"])
        rows.append({"data": data, "prompts": f"{way} - without"} | spelt(gain, METRICS))
    gain = over_seeds(found["with"], found["without"])["ndcg@10/sid"]
    seeds = len(found["with"])
    note = f"lower end of 95 %, {seeds} seeds; mean {gain.mean:+.4f}"
    return rows, figure(f"{data}_context_above_none", gain.low, "", asked="> 0", note=note)


def write_world(folder: Path, users: int) -> None:
    """Write items and the rows of users, sorted by users' places: 8 of 10 of them train."""
    draw = np.random.default_rng(0)
    sizes = (5, 5, 5)
    number = draw.choice(int(np.prod(sizes)), size=ITEMS, replace=False)
    codes = np.stack(np.unravel_index(number, sizes), axis=1)
    following = np.stack([draw.choice(ITEMS, size=len(NEXT), replace=False) for _ in range(ITEMS)])
    item = np.zeros((users, EVENTS), np.int64)
    bought = draw.random((users, EVENTS)) < BOUGHT
    last = np.full(users, -1)
    for at in range(EVENTS):
        item[:, at] = draw.integers(ITEMS, size=users)
        follows = (draw.random(users) < FOLLOWS) & (last >= 0)
        choice = draw.choice(len(NEXT), size=users, p=NEXT)
        item[follows, at] = following[last[follows], choice[follows]]
        last = np.where(bought[:, at], item[:, at], last)
    folder.mkdir(parents=True)
    items = pa.table({"item_id": np.arange(ITEMS), "sid": codes.tolist()})
    pq.write_table(items, folder / "items.parquet")
    behavior = np.where(bought, "buy", "view")
    bounds = [0, *(int(share * users) for share in SHARES), users]
    for part, (low, high) in zip(PARTS, pairwise(bounds), strict=True):
        columns: dict[str, list[Any]] = {
            "user_id": [], "history": [], "history_behavior": [], "target": [],
        }  # fmt: skip
        for user in range(low, high):
            for at in range(1, EVENTS):
                first = max(0, at - MAX_HISTORY)
                columns["user_id"].append(user)
                columns["history"].append(item[user, first:at].tolist())
                columns["history_behavior"].append(behavior[user, first:at].tolist())
                columns["target"].append(int(item[user, at]))
        pq.write_table(pa.table(columns), folder / f"{part}.parquet")


def write_gaps(source: Path, folder: Path) -> None:
    """Copy Amazon Industrial with the time of each event of the histories.

    An event's time is that of the row of the same user whose target it was; a user's first event
    was no target, and its time is missing.
    """
    folder.mkdir(parents=True)
    shutil.copyfile(source / "items.parquet", folder / "items.parquet")
    tables = {part: pq.read_table(source / f"{part}.parquet") for part in PARTS}
    rows = [
        (user, time, at, part, history, target)
        for part, each in tables.items()
        for at, (user, time, history, target) in enumerate(
            zip(*(each[n].to_pylist() for n in ("user_id", "timestamp", "history", "target")),
                strict=True)
        )
    ]  # fmt: skip
    # Of equal times the shorter history comes first, and of equally long ones the earlier row.
    rows.sort(key=lambda row: (row[0], row[1], len(row[4]), row[2]))
    times: dict[str, dict[int, list[int | None]]] = {part: {} for part in PARTS}
    past: list[tuple[int, int]] = []  # targets of the user's earlier rows, with their times
    owner = None
    for user, time, at, part, history, target in rows:
        past, owner = ([] if user != owner else past), user
        known: list[int | None] = [None] * len(history)
        recent = past[-len(history) :]
        for place, (item, then) in enumerate(recent, start=len(history) - len(recent)):
            known[place] = then if history[place] == item else None
        times[part][at] = known
        past.append((target, time))
    for part, each in tables.items():
        lists = pa.array([times[part][at] for at in range(len(each))], pa.list_(pa.int64()))
        pq.write_table(each.append_column("history_timestamp", lists), folder / f"{part}.parquet")

"""Benchmark the way of new weights from the learner to a holder, through real Ray actors.

A learner's process changes its policy and publishes it through the job queue; the driver sends the
version to a rollout actor with the torch engine, which verifies and loads it and then searches for
two prompts. Every transfer format takes this way by the code of a training run. The way by value,
as it was before weights were stored where they are made, is kept here: a snapshot with its SHA-256
through the queue and the driver into the object store, and a second SHA-256 at the holder.

`push_s` is the time from the end of the learner's update to the driver's knowledge that the holder
has loaded the version: `store_s` (pack, digest and copy into the object store, or snapshot and
digest), `pass_s` (queue and driver), `verify_s` and `load_s` at the holder. `search_s` follows.

`copies` counts the copies of the policy in all processes at the peak: the learner's and the
holder's own, and what the proportional set size (PSS) of the driver and all Ray processes grows by
over two pushes, divided by the bytes of the policy in float32. PSS counts a shared page once.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import torch

from benchmarks.shared.measure import Report, Row, figure, report
from cluster.actors.memory import MemoryMonitor, resident_bytes
from learner.publisher import ObjectStore, Publisher
from learner.workers.job_queue import Job, Result
from learner.workers.trainer_handle import JobQueueActor
from orchard.catalog import catalog as catalogs
from orchard.policy import lora, model, weights
from orchard.policy.item_tokenizer import ItemTokenizer, compact_tokenizer, make_item_tokenizer
from orchard.settings import LoraConfig, ModelConfig, RolloutConfig
from orchard.testing import save_model_folder, tiny_prompts
from orchard.types import PolicyVersion, StoredTransfer, Update
from rollout import actor as rollout_actor
from rollout.actor import RolloutWorker

SIZES = {
    "1M": ModelConfig(hidden_size=128, intermediate_size=384, layers=4, heads=4, kv_heads=2),
    "20M": ModelConfig(hidden_size=384, intermediate_size=1152, layers=10, heads=6, kv_heads=3),
    "165M": ModelConfig(hidden_size=768, intermediate_size=2304, layers=24, heads=12, kv_heads=4),
}
"""Sizes of the policies by their number of parameters."""
WAYS = ("by_value", "float32", "bfloat16", "adapter")
RANK, THREADS = 16, 2
"""Rank of the adapters, and threads of each process."""
SAMPLE_S = 0.05
"""Seconds between two samples of the memory."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """Policy of one size, in a folder."""

    folder: Path
    tokenizer: ItemTokenizer
    parameters: int
    prompts: Any
    """Prompts of the first search."""


class Learner:
    """Process that changes a policy and publishes it."""

    def __init__(self, task: Task, way: str, queue: Any) -> None:
        """Load the policy, with adapters where they are to travel."""
        torch.set_num_threads(THREADS)
        self._policy, self._queue, self._way = model.load(task.folder), queue, way
        self._number = 0
        if way == "adapter":
            lora.attach(self._policy, LoraConfig(rank=RANK), seed=0)
        store = ObjectStore(put=ray.put, get=ray.get)
        self._publisher = None
        if way != "by_value":
            self._publisher = Publisher(self._policy, cast(Any, way), store, writes=True)

    def update(self) -> tuple[float, float]:
        """Change all trained weights and publish them; return the seconds and when it began."""
        with torch.no_grad():
            for parameter in self._policy.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.0 + 1e-6).add_(1e-6)
        began = time.monotonic()
        self._number += 1
        if self._publisher is not None:
            stored: Any = self._publisher.publish(self._policy)
            digest = stored.digest
        else:
            stored = weights.snapshot(self._policy)
            digest = weights.digest(stored)
        elapsed = time.monotonic() - began
        version = PolicyVersion(step=self._number, digest=digest)
        update = Update(policy=version, metrics={"loss": 0.0}, weights=stored)
        ray.get(self._queue.put_result.remote(Result(number=self._number, update=update)))
        return elapsed, began


class Holder(RolloutWorker):
    """Rollout worker that times what it does."""

    def __init__(self, *arguments: Any) -> None:
        """Start like a rollout worker."""
        super().__init__(*arguments)
        self.laps: dict[str, float] = {}
        self._check = rollout_actor.check_digest
        rollout_actor.check_digest = self._timed_check

    def _timed_check(self, *arguments: Any, **options: Any) -> None:
        began = time.monotonic()
        self._check(*arguments, **options)
        self.laps["verify_s"] = time.monotonic() - began

    def load_weights(self, *arguments: Any) -> PolicyVersion:
        """Load a transfer as a rollout actor does."""
        began = time.monotonic()
        version = super().load_weights(*arguments)
        self.laps["load_s"] = time.monotonic() - began - self.laps["verify_s"]
        return version

    def load_by_value(self, version: PolicyVersion, values: weights.Weights) -> PolicyVersion:
        """Verify and load weights that arrived as values, tensor by tensor through a copy."""
        began = time.monotonic()
        if weights.digest(values) != version.digest:
            raise ValueError("another digest")
        self.laps["verify_s"] = time.monotonic() - began
        policy = cast(Any, self._engine)._model
        with torch.no_grad():
            for name, parameter in policy.named_parameters():
                parameter.copy_(torch.from_numpy(np.array(values[name])))
        self._engine.version = version  # type: ignore[misc]
        self.laps["load_s"] = time.monotonic() - began - self.laps["verify_s"]
        return version

    def times(self) -> dict[str, float]:
        """Return the seconds of the last load."""
        return self.laps


def run(quick: bool) -> Report:
    """Push policies of 1, 20 and 165 million parameters each way; `quick` the smallest alone."""
    names, repeats = (["1M"], 1) if quick else (list(SIZES), 5)
    rows: list[Row] = []
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="orchard-push-") as folder:
        for name in names:
            task = _task(SIZES[name], Path(folder) / name)
            # The store keeps the pages that it has touched, so a session measures one growth.
            sessions = [WAYS] if name != "165M" else [WAYS[:1], WAYS[1:]]
            for ways in sessions:
                rows += [{"policy": name, **row} for row in _session(task, ways, repeats)]
    largest = {str(row["way"]): row for row in rows if row["policy"] == names[-1]}
    rows.append({"load_before": load, "load_after": os.getloadavg()[0]})
    return report("push", _figures(largest, names[-1]), rows)


def _figures(largest: dict[str, Row], name: str) -> list[Any]:
    """Return the figures of the largest policy."""
    before = float(largest["by_value"]["push_s"])
    note = f"{name} parameters, learner's update to loaded holder, {THREADS} threads a process"
    return [
        figure(f"speedup_{way}", before / float(largest[way]["push_s"]), "x", asked=">= 1",
               note=f"over the way by value, {note}")
        for way in WAYS[1:]
    ] + [
        figure("gb_per_s", float(largest["float32"]["gb_per_s"]), "GB/s", asked=">= 1.5",
               note=f"bytes of the policy in float32 over push_s, {note}"),
        figure("copies", float(largest["float32"].get("copies", 0.0)), "copies", asked="<= 4",
               note="of the policy in all processes at the peak of a push, by PSS"),
    ]  # fmt: skip


def _task(config: ModelConfig, folder: Path) -> Task:
    """Save a random policy of some size."""
    rng = np.random.default_rng(0)
    codes = rng.integers(64, size=(2_000, 3)).tolist()
    catalog = catalogs.from_codes(codes, level_size=(64, 64, 64), varying_depth=False)
    text_tokenizer = compact_tokenizer(catalog)
    tokenizer = make_item_tokenizer(text_tokenizer, catalog)
    policy = model.create(config, tokenizer, seed=0)
    save_model_folder(policy, text_tokenizer, folder)
    prompts = tiny_prompts(catalog, (10, 20))
    parameters = sum(parameter.numel() for parameter in policy.parameters())
    return Task(folder=folder, tokenizer=tokenizer, parameters=parameters, prompts=prompts)


def _session(task: Task, ways: Sequence[str], repeats: int) -> list[Row]:
    """Push a policy each way in one Ray session; return the median seconds and the memory."""
    size = 4 * task.parameters
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        object_store_memory=max(200 << 20, 6 * size),
    )  # fmt: skip
    try:
        return [_measure(task, way, repeats, first=way == ways[0]) for way in ways]
    finally:
        ray.shutdown()


def _measure(task: Task, way: str, repeats: int, *, first: bool) -> Row:
    """Push a policy one way; the first of a session also measures the memory."""
    size = 4 * task.parameters
    queue = JobQueueActor.options(num_cpus=0, max_concurrency=100).remote()
    learner = ray.remote(num_cpus=1)(Learner).remote(task, way, queue)
    config = RolloutConfig(engine="torch", search="beam", group_size=8, threads=THREADS)
    holder = ray.remote(num_cpus=1)(Holder).remote(config, task.folder, task.tokenizer, 0)
    ray.get([learner.__ray_ready__.remote(), holder.__ray_ready__.remote()])
    held: list[Any] = [None]  # what a controller holds: the last published version
    pss = partial(resident_bytes, proportional=True)
    before = pss()
    with MemoryMonitor(every_s=SAMPLE_S, measure=pss) as memory:
        early = [_push(learner, holder, queue, number, held) for number in (1, 2)]
    laps = [_push(learner, holder, queue, number, held) for number in range(3, 3 + repeats)]
    began = time.monotonic()
    ray.get(holder.search.remote(task.prompts, 0))
    search_s = time.monotonic() - began
    for actor in (learner, holder, queue):
        ray.kill(actor)
    median = {key: statistics.median(lap[key] for lap in laps) for key in laps[0]}
    copies = {"copies": 2 + (memory.peak_bytes - before) / size} if first else {}
    return {
        "way": way, "parameters": task.parameters, **median,
        "gb_per_s": size / median["push_s"] / 1e9, "first_push_s": early[0]["push_s"],
        "search_s": search_s, **copies,
    }  # fmt: skip


def _push(learner: Any, holder: Any, queue: Any, number: int, held: list[Any]) -> dict[str, float]:
    """Run one update and push its weights; return the seconds of the phases."""
    updating = learner.update.remote()
    ray.get(queue.put_job.remote(number, Job(kind="update")))
    result: Any = ray.get(queue.get_result.remote(number))
    update: Update = result.update
    version = update.policy
    if isinstance(update.weights, StoredTransfer):
        held[0] = update.weights
        loaded: PolicyVersion = ray.get(holder.load_weights.remote(version, update.weights))
    else:
        held[0] = ray.put(dict(update.weights))
        loaded = ray.get(holder.load_by_value.remote(version, held[0]))
    ended = time.monotonic()
    if loaded.digest != version.digest:
        raise ValueError(f"the holder has {loaded}, not {version}")
    store_s, began = ray.get(updating)
    ray.get(queue.checkpoint_listed.remote(number))  # lets the queue forget earlier jobs
    laps: dict[str, float] = ray.get(holder.times.remote())
    push_s = ended - began
    pass_s = push_s - store_s - laps["verify_s"] - laps["load_s"]
    return {"push_s": push_s, "store_s": store_s, "pass_s": pass_s, **laps}

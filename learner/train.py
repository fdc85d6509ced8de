"""The Ray Train shell: a group of workers that does numbered jobs, and the handle that gives them.

The driver posts jobs 1, 2, 3, ... at a `Desk`; every worker asks for the job after its last one,
does it, and the first worker hands in the result. After a failure Ray Train restarts the group from
the newest checkpoint, and the group asks again for the jobs that it lost: the desk keeps them until
a later checkpoint covers them.
"""

import asyncio
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import ray
import ray.train
import torch
from ray.train import CheckpointConfig as RayCheckpointConfig
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from learner import checkpoint, sft
from learner.step import Learner
from orchard import model, value, weights
from orchard.catalogue import Catalogue
from orchard.config import Config, LearnerConfig
from orchard.errors import ActorError
from orchard.prompts import PromptFormat, Sequences
from orchard.types import PolicyVersion, TrainBatch, Update
from orchard.vocabulary import Vocabulary
from orchard.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Job:
    """Something for the whole worker group to do."""

    kind: Literal["epoch", "update", "stop"]
    batch: tuple[Any, ...] = ()
    """The object reference of an update's batch, in a tuple: a bare one would be fetched here."""
    save: bool = False
    """Write a checkpoint once the job is done."""
    judged: bool = True
    """Also hand back the weights that are evaluated and kept."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a job left behind; job 0 is the start itself."""

    number: int
    update: Update
    weights: Weights
    """To search with from now on."""
    kept: Weights | None
    """To evaluate and keep, where those are others and were asked for."""
    saved: bool


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """All that a worker needs; identical on every rank."""

    config: Config
    phase: Literal["sft", "train"]
    policy: Path
    """Hugging Face folder of the policy to start from."""
    catalogue: Catalogue
    vocabulary: Vocabulary
    sequences: Sequences | None
    """Of the warm start."""
    total_steps: int


class Desk:
    """Where jobs wait for the workers and results for the driver."""

    def __init__(self) -> None:
        """An empty desk."""
        self._jobs: dict[int, Job] = {}
        self._results: dict[int, Result] = {}
        self._changed = asyncio.Condition()

    async def post(self, number: int, job: Job) -> None:
        """Offer a job."""
        async with self._changed:
            self._jobs[number] = job
            self._changed.notify_all()

    async def fetch(self, number: int) -> Job:
        """The job of that number, as soon as there is one; lives no longer than the driver."""
        async with self._changed:
            await self._changed.wait_for(lambda: number in self._jobs)
            return self._jobs[number]

    async def deliver(self, result: Result) -> None:
        """Hand in a result; repeats after a restart change nothing."""
        async with self._changed:
            self._results.setdefault(result.number, result)
            if result.saved:
                self._jobs = {n: job for n, job in self._jobs.items() if n > result.number}
            self._changed.notify_all()

    async def collect(self, number: int) -> Result:
        """The result of that number, once; `-1` asks for the oldest there is (the start)."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: number in self._results or (number < 0 and bool(self._results))
            )
            return self._results.pop(number if number >= 0 else min(self._results))


DeskActor: Any = ray.remote(Desk)


def work(task: dict[str, Any]) -> None:
    """What each Ray Train worker runs, given its `assignment` and the `desk`."""
    assignment, desk = cast(Assignment, task["assignment"]), task["desk"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = assignment.config
    torch.set_num_threads(config.learner.threads)
    policy = model.load(assignment.policy, assignment.vocabulary)
    supervised = assignment.phase == "sft"
    if config.model.value_head and not supervised:
        value.attach(policy, seed=config.seed)
    else:
        value.detach(policy)
    model.add_dropout(policy, config.model.dropout if supervised else config.learner.dropout)
    learner = Learner(
        policy,
        assignment.catalogue.trie,
        assignment.vocabulary,
        _learner_config(config, assignment.phase),
        total_steps=assignment.total_steps,
        average=config.sft.average if supervised else config.learner.average,
        device=get_device(),
        rank=rank,
        world=world,
    )
    digest, number = assignment.catalogue.digest, 0
    if (saved := ray.train.get_checkpoint()) is not None:
        with saved.as_directory() as folder:
            number = checkpoint.load(learner, Path(folder), catalogue=digest)

    def deliver(metrics: Mapping[str, float], *, saved: bool = False, judged: bool = True) -> None:
        searching = learner.result if supervised else learner.policy
        values = weights.snapshot(searching)
        others = judged and searching is not learner.result
        kept = weights.snapshot(learner.result) if others else None
        if rank == 0:
            version = PolicyVersion(step=number, digest=weights.digest(values))
            update = Update(policy=version, metrics=metrics)
            result = Result(number=number, update=update, weights=values, kept=kept, saved=saved)
            ray.get(desk.deliver.remote(result))

    deliver({})
    while (job := cast(Job, ray.get(desk.fetch.remote(number + 1)))).kind != "stop":
        number += 1
        torch.manual_seed(hash((config.seed, number, rank)) % 2**63)
        if job.kind == "epoch":
            metrics = _epoch(learner, assignment, number)
        else:
            metrics = learner.improve(cast(TrainBatch, ray.get(job.batch[0])))
        if job.save:
            _save(learner, number, digest, rank)
        deliver(metrics, saved=job.save, judged=job.judged)


def _learner_config(config: Config, phase: str) -> LearnerConfig:
    """The learner's section, with the warm start's own rates where it is the warm start."""
    if phase == "train":
        return config.learner
    own = config.sft
    return config.learner.model_copy(
        update={
            "logprob": own.logprob,
            "lr": own.lr,
            "warmup": own.warmup,
            "final_lr": own.final_lr,
            "weight_decay": own.weight_decay,
            "grad_clip": own.grad_clip,
            "kl": config.learner.kl.model_copy(update={"weight": 0.0}),
        }
    )


def _epoch(learner: Learner, assignment: Assignment, number: int) -> dict[str, float]:
    """One pass over the sequences in an order drawn from (seed, epoch)."""
    begin, config = time.perf_counter(), assignment.config
    sequences = cast(Sequences, assignment.sequences)
    form = PromptFormat(catalogue=assignment.catalogue, vocabulary=assignment.vocabulary)
    order = np.random.Generator(np.random.Philox(key=[config.seed, number])).permutation(
        len(sequences)
    )
    version, size = PolicyVersion(step=number, digest=""), config.sft.batch_size
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    forced = config.sft.logprob == "full"
    measured = [
        learner.supervise(sft.pack_sequences(sequences, rows, form, version, forced=forced))
        for rows in batches
    ]
    return {
        "loss": float(np.mean([m["nll"] for m in measured])),
        "grad_norm": float(np.mean([m["grad_norm"] for m in measured])),
        "lr": measured[-1]["lr"],
        "epoch_s": time.perf_counter() - begin,
    }


def _save(learner: Learner, number: int, catalogue: str, rank: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(learner, Path(folder), number=number, catalogue=catalogue, write=rank == 0)
        mine = ray.train.Checkpoint.from_directory(folder) if rank == 0 else None
        ray.train.report(
            {"number": number}, checkpoint=mine, checkpoint_dir_name=f"job_{number:06d}"
        )


class RemoteLearner:
    """The driver's handle: `await update(batch)` as if the learner were here."""

    def __init__(self, assignment: Assignment, *, storage: Path) -> None:
        """Prepare; nothing runs before `start`."""
        self._config, self._storage = assignment.config, storage
        self._assignment = assignment
        self._desk: Any = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._number = 0
        self.weights: Weights = {}
        """Of the newest version, to search with."""
        self.kept: Weights = {}
        """To evaluate and keep, of the newest job that was to hand them back."""

    async def start(self) -> PolicyVersion:
        """Start the workers; the version they begin with, from a checkpoint if there is one."""
        self._desk = DeskActor.options(num_cpus=0, max_concurrency=1000).remote()
        learner, checkpoints = self._config.learner, self._config.checkpoint
        trainer = TorchTrainer(
            work,
            train_loop_config={"assignment": self._assignment, "desk": self._desk},
            torch_config=TorchConfig(backend="nccl" if learner.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=learner.workers,
                use_gpu=learner.gpus > 0,
                resources_per_worker={"CPU": 1, **({"GPU": learner.gpus} if learner.gpus else {})},
            ),
            run_config=RunConfig(
                name=f"learner-{self._assignment.phase}",
                storage_path=str(self._storage.resolve()),
                failure_config=FailureConfig(max_failures=learner.max_failures),
                checkpoint_config=RayCheckpointConfig(num_to_keep=checkpoints.keep),
            ),
        )

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as error:  # handed to whoever waits for the next result
                self._failure = error

        self._thread = threading.Thread(target=fit, name="learner", daemon=True)
        self._thread.start()
        result = await self._collect(-1, learner.start_timeout_s)
        self._number = result.number
        return result.update.policy

    async def update(self, batch: TrainBatch, *, save: bool = False, judged: bool = True) -> Update:
        """One RL step on a batch; `kept` is up to date afterwards if it is to be `judged`."""
        job = Job(kind="update", batch=(ray.put(batch),), save=save, judged=judged)
        return await self._do(job)

    async def epoch(self, *, save: bool = False) -> Update:
        """One supervised pass over the training sequences."""
        return await self._do(Job(kind="epoch", save=save))

    async def close(self) -> None:
        """Let the workers finish; gives up waiting after ten seconds."""
        if self._thread is None or not self._thread.is_alive():
            return
        await self._desk.post.remote(self._number + 1, Job(kind="stop"))
        await asyncio.to_thread(self._thread.join, 10.0)

    async def _do(self, job: Job) -> Update:
        self._number += 1
        await self._desk.post.remote(self._number, job)
        return (await self._collect(self._number, self._config.learner.timeout_s)).update

    async def _collect(self, number: int, timeout_s: float) -> Result:
        """Wait for a result, for the end of the worker group, or for the deadline."""
        pending = asyncio.ensure_future(
            asyncio.wrap_future(self._desk.collect.remote(number).future())
        )
        deadline = time.monotonic() + timeout_s
        while True:
            done, _ = await asyncio.wait({pending}, timeout=1.0)
            if done:
                result = cast(Result, pending.result())
                self.weights = result.weights
                self.kept = result.weights if result.kept is None else result.kept
                return result
            if self._thread is not None and not self._thread.is_alive():
                raise ActorError(
                    f"the learner stopped at job {number} after {self._config.learner.max_failures}"
                    f" restarts: {self._failure}; see what it printed below logs in the run folder"
                ) from self._failure
            if time.monotonic() > deadline:
                raise ActorError(
                    f"the learner did not finish job {number} within {timeout_s:.0f} s; "
                    "raise learner.timeout_s, or see what it printed below logs in the run folder"
                )

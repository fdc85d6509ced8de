"""The Ray Train shell: a group of workers that does numbered jobs, and the handle that gives them.

The driver posts jobs 1, 2, 3, ... at a `Desk`; every worker asks for the job after its last one,
does it, and the first worker hands in the result. After a failure Ray Train restarts the group from
the newest checkpoint, and the group asks again for the jobs that it lost: the desk keeps them until
the second checkpoint after them.
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
from learner.desk import Desk, Job, Result
from learner.step import Learner
from orchard import lora, model, value, weights
from orchard.catalogue import Catalogue
from orchard.config import Config, LearnerConfig
from orchard.errors import ActorError
from orchard.prompts import PromptFormat, Sequences, Split
from orchard.rationales import Traces
from orchard.tasks import Tasks
from orchard.types import PolicyVersion, TrainBatch, Update
from orchard.vocabulary import Vocabulary
from orchard.weights import Weights


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
    traces: tuple[Split, Traces] | None
    """What it has instead where it teaches to think: rows and their rationales."""
    tasks: Tasks | None
    """What it has instead where it teaches a text model."""
    total_steps: int


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
    lora.attach(policy, config.model.lora, seed=config.seed)
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
        temperature=1.0 if supervised else config.rollout.temperature,
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
        values = lora.snapshot(searching)
        others = judged and searching is not learner.result
        average = lora.snapshot(learner.result) if others else None
        if rank == 0:
            version = PolicyVersion(step=number, digest=weights.digest(values))
            update = Update(policy=version, metrics=metrics)
            kept = None
            if average is not None:
                kept = PolicyVersion(step=number, digest=weights.digest(average)), average
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
    if job.save:
        _save(learner, number, digest, rank)


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
    traces, tasks, windows = assignment.traces, assignment.tasks, assignment.sequences
    form = PromptFormat(catalogue=assignment.catalogue, vocabulary=assignment.vocabulary)
    version, forced = PolicyVersion(step=number, digest=""), config.sft.logprob == "full"

    def batch(rows: np.ndarray) -> TrainBatch:
        if tasks is not None:
            return sft.pack_examples(tasks.examples(rows, form), form, version, forced=forced)
        if traces is not None:
            return sft.pack_traces(*traces, rows, form, version, forced=forced)
        return sft.pack_sequences(cast(Sequences, windows), rows, form, version, forced=forced)

    if tasks is not None:
        order = tasks.epoch(number, seed=config.seed)
    else:
        order = np.random.Generator(np.random.Philox(key=[config.seed, number])).permutation(
            len(cast(Sequences, windows) if traces is None else traces[1])
        )
    size = config.sft.batch_size
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    measured = [learner.supervise(batch(rows)) for rows in batches]
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
        self._number = self._saved = 0
        self.restarts = 0
        """Times that the worker group was started again."""
        self.weights: Weights = {}
        """Of the newest version, to search with."""
        self.kept: tuple[PolicyVersion, Weights] = (PolicyVersion(step=-1, digest=""), {})
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
        self._number = self._saved = result.number
        return result.update.policy

    async def update(self, batch: TrainBatch, *, save: bool = False, judged: bool = True) -> Update:
        """One RL step on a batch; `kept` is up to date afterwards if it is to be `judged`."""
        job = Job(kind="update", batch=(ray.put(batch),), save=save, judged=judged)
        return await self._do(job)

    async def epoch(self, *, save: bool = False) -> Update:
        """One supervised pass over the training sequences."""
        return await self._do(Job(kind="epoch", save=save))

    async def close(self, *, save: bool = False) -> None:
        """Let the workers finish; gives up waiting after ten seconds.

        With `save` they first write what no checkpoint holds yet, for which they have
        `learner.timeout_s`; raises ActorError where they did not.
        """
        if self._thread is None or not self._thread.is_alive():
            return
        save = save and self._saved < self._number
        await self._desk.post.remote(self._number + 1, Job(kind="stop", save=save))
        await asyncio.to_thread(self._thread.join, self._config.learner.timeout_s if save else 10.0)
        if save and (self._failure or self._thread.is_alive()):
            raise ActorError(
                f"the learner did not save job {self._number} before it stopped: "
                f"{self._failure or 'out of time'}; the run resumes from job {self._saved}"
            )

    async def _do(self, job: Job) -> Update:
        self._number += 1
        await self._desk.post.remote(self._number, job)
        result = await self._collect(self._number, self._config.learner.timeout_s)
        self._saved = self._number if result.saved else self._saved
        return result.update

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
                self.weights, self.restarts = result.weights, result.restarts
                self.kept = result.kept or (result.update.policy, result.weights)
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

"""The Ray Train shell: a group of workers that does numbered jobs, and the handle that gives them.

The driver posts jobs 1, 2, 3, ... at a `Desk`; every worker asks for the job after its last one,
does it, and the first worker hands in the result. After a failure Ray Train restarts the group from
the newest checkpoint, and the group asks again for the jobs that it lost: the queue keeps them
until the second checkpoint after them.
"""

import asyncio
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import ray
import ray.train
import torch
from jaxtyping import Float32
from ray.train import CheckpointConfig as RayCheckpointConfig
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from learner import checkpoint
from learner.job_queue import Job, JobQueue, Result
from learner.spec import LearnerSpec, learner_config, probe_of, sft_epoch
from learner.trainer import Trainer
from orchard.errors import ActorError, CheckpointError
from orchard.policy import lora, model, value_head, weights
from orchard.policy.weights import Weights
from orchard.types import PolicyVersion, TrainBatch, Update

JobQueueActor: Any = ray.remote(JobQueue)


def worker_loop(task: dict[str, Any]) -> None:
    """What each Ray Train worker runs, given its `assignment` and the `queue`.

    `unlisted` is the checkpoint to begin with where Ray Train knows of none.
    """
    assignment, queue = cast(LearnerSpec, task["assignment"]), task["queue"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = assignment.config
    torch.set_num_threads(config.learner.threads)
    policy = model.load(assignment.policy, assignment.tokenizer)
    supervised = assignment.phase == "sft"
    lora.attach(policy, config.model.lora, seed=config.seed)
    if config.model.value_head and not supervised:
        value_head.attach(policy, seed=config.seed)
    else:
        value_head.detach(policy)
    model.add_dropout(policy, config.model.dropout if supervised else config.learner.dropout)
    learner = Trainer(
        policy,
        assignment.tokenizer,
        learner_config(config, assignment.phase),
        total_steps=assignment.total_steps,
        average=config.sft.ema_decay if supervised else config.learner.ema_decay,
        temperature=1.0 if supervised else config.rollout.temperature,
        device=get_device(),
        rank=rank,
        world=world,
    )
    digest, number = assignment.tokenizer.catalog.digest, 0
    if (saved := ray.train.get_checkpoint()) is not None:
        with saved.as_directory() as folder:
            number = checkpoint.load(learner, Path(folder), catalog=digest)
    elif (unlisted := cast(Path | None, task["unlisted"])) is not None:
        number = checkpoint.load(learner, unlisted, catalog=digest)

    def deliver(metrics: Mapping[str, float], *, judged: bool = True) -> None:
        searching = learner.result if supervised else learner.policy
        values = lora.snapshot(searching)
        others = judged and searching is not learner.result
        average = lora.snapshot(learner.result) if others else None
        probed = None if probe is None else learner.score(probe)
        if rank == 0:
            version = PolicyVersion(step=number, digest=weights.digest(values))
            update = Update(policy=version, metrics=metrics)
            kept = None
            if average is not None:
                kept = PolicyVersion(step=number, digest=weights.digest(average)), average
            result = Result(
                number=number,
                update=update,
                weights=values,
                eval_weights=kept,
                probe_logprobs=probed,
            )
            ray.get(queue.put_result.remote(result))

    probe = None if assignment.probe is None else probe_of(assignment, assignment.probe)
    saved_job = number
    deliver({})
    while (job := _next(queue, number, saved_job)).kind != "stop":
        if job.kind == "save":
            if (reason := _save(learner, number, digest, rank)) is not None:
                ray.get(queue.checkpoint_failed.remote(reason))
                return
            saved_job = number
            ray.get(queue.checkpoint_done.remote(number))
            continue
        number += 1
        torch.manual_seed(hash((config.seed, number, rank)) % 2**63)
        if job.kind == "epoch":
            metrics = sft_epoch(learner, assignment, number)
        else:
            metrics = learner.rl_step(cast(TrainBatch, ray.get(job.batch[0])))
        deliver(metrics, judged=job.needs_eval)


def _next(queue: Any, number: int, saved: int) -> Job:
    """What to do after job `number`, when the newest checkpoint is that of job `saved`."""
    return ray.get(queue.get_job.remote(number + 1, saved=saved))


def _save(learner: Trainer, number: int, catalog: str, rank: int) -> str | None:
    """Write a checkpoint; what the storage has against it, in which case there is none."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            write = rank == 0
            checkpoint.save(learner, Path(folder), number=number, catalog=catalog, write=write)
            mine = ray.train.Checkpoint.from_directory(folder) if write else None
            ray.train.report(
                {"number": number},
                checkpoint=mine,
                checkpoint_dir_name=checkpoint.folder_of(number),
            )
    except OSError as error:
        if error.errno not in checkpoint.REFUSALS:
            raise  # another try, in a group started again, may go better
        return os.strerror(error.errno)
    return None


class TrainerHandle:
    """The driver's handle: `await update(batch)` as if the learner were here."""

    def __init__(self, assignment: LearnerSpec, *, storage: Path) -> None:
        """Prepare; nothing runs before `start`."""
        self._config, self._storage = assignment.config, storage.resolve()
        self._assignment = assignment
        self._folder = self._storage / f"learner-{assignment.phase}"
        self._queue: Any = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._number = self._saved = 0
        self.restarts = 0
        """Times that the worker group was started again."""
        self.weights: Weights = {}
        """Of the newest version, to search with."""
        self.probe_logprobs: Float32[np.ndarray, " B"] | None = None
        """Log-probabilities of the probe's answers under `weights`."""
        self.eval_weights: tuple[PolicyVersion, Weights] = (PolicyVersion(step=-1, digest=""), {})
        """To evaluate and keep, of the newest job that was to hand them back."""

    async def start(self) -> PolicyVersion:
        """Start the workers; the version they begin with, from a checkpoint if there is one."""
        # Beside the driver: the loss of any other node must not take the jobs along.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._queue = JobQueueActor.options(
            num_cpus=0, max_concurrency=1000, scheduling_strategy=here
        ).remote()
        learner, checkpoints = self._config.learner, self._config.checkpoint
        unlisted: Path | None = None
        if checkpoint.torn(self._folder):
            unlisted = checkpoint.newest_whole(self._folder)
            (self._folder / checkpoint.RECORD).unlink()
        task = {"assignment": self._assignment, "queue": self._queue, "unlisted": unlisted}
        trainer = TorchTrainer(
            worker_loop,
            train_loop_config=task,
            torch_config=TorchConfig(backend="nccl" if learner.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=learner.workers,
                use_gpu=learner.gpus > 0,
                resources_per_worker={"CPU": 1, **({"GPU": learner.gpus} if learner.gpus else {})},
            ),
            run_config=RunConfig(
                name=self._folder.name,
                storage_path=str(self._storage),
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

    async def update(self, batch: TrainBatch, *, judged: bool = True) -> Update:
        """One RL step on a batch; `kept` is up to date afterwards if it is to be `judged`."""
        return await self._do(Job(kind="update", batch=(ray.put(batch),), needs_eval=judged))

    async def epoch(self) -> Update:
        """One supervised pass over the training sequences."""
        return await self._do(Job(kind="epoch"))

    async def save(self) -> None:
        """Write a checkpoint of the newest job, unless there is one.

        Raises:
            CheckpointError: the storage does not take it; older checkpoints stay as they are.
        """
        number, begun = self._number, self._saved
        if begun == number:
            return
        refused = cast(str, await self._wait(self._queue.request_checkpoint.remote(number), number))
        if refused:
            # Half a checkpoint, which no record names, would only keep the disk full.
            shutil.rmtree(self._folder / checkpoint.folder_of(number), ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of job {number} cannot be written below {self._storage}: "
                f"{refused}; the one of job {begun} is whole, make room (docs/runbooks/"
                "disk-full.md) and the same command resumes from there"
            )
        self._saved = number

    async def close(self, *, save: bool = False) -> None:
        """Let the workers finish; gives up waiting after ten seconds.

        With `save` they first write what no checkpoint holds yet; raises as `save` does.
        """
        if self._thread is None or not self._thread.is_alive():
            return
        if save:
            await self.save()
        await self._wait(
            self._queue.put_job.remote(self._number + 1, Job(kind="stop")), self._number
        )
        await asyncio.to_thread(self._thread.join, 10.0)

    async def _do(self, job: Job) -> Update:
        self._number += 1
        await self._wait(self._queue.put_job.remote(self._number, job), self._number)
        result = await self._collect(self._number, self._config.learner.timeout_s)
        return result.update

    async def _collect(self, number: int, timeout_s: float) -> Result:
        """The result of a job, of which it takes note."""
        answer = await self._wait(self._queue.get_result.remote(number), number, timeout_s)
        result = cast(Result, answer)
        self.weights, self.restarts = result.weights, result.restarts
        self.probe_logprobs = result.probe_logprobs
        self.eval_weights = result.eval_weights or (result.update.policy, result.weights)
        return result

    async def _wait(self, answer: Any, number: int, timeout_s: float | None = None) -> object:
        """Wait for an answer about a job, for the end of the worker group, or for the deadline."""
        pending = asyncio.ensure_future(asyncio.wrap_future(answer.future()))
        timeout_s = timeout_s or self._config.learner.timeout_s
        deadline = time.monotonic() + timeout_s
        starting = number < 0
        at = "while starting" if starting else f"at job {number}"
        bound = "learner.start_timeout_s" if starting else "learner.timeout_s"
        while True:
            done, _ = await asyncio.wait({pending}, timeout=1.0)
            if done:
                return pending.result()
            if self._thread is not None and not self._thread.is_alive():
                raise ActorError(
                    f"the learner stopped {at} after {self._config.learner.max_failures}"
                    f" restarts: {self._failure}; see what it printed below logs in the run folder"
                ) from self._failure
            if time.monotonic() > deadline:
                # A group that was started again repeats jobs first: each has as long as a new one.
                left = timeout_s - await self._idle_s()
                if left <= 0:
                    raise ActorError(
                        f"the learner did not answer {at} within {timeout_s:.0f} s; raise {bound}, "
                        "or see what it printed below logs in the run folder"
                    )
                deadline = time.monotonic() + left

    async def _idle_s(self) -> float:
        """Seconds since the workers handed in anything."""
        answer = asyncio.wrap_future(self._queue.idle_s.remote().future())
        return cast(float, await asyncio.wait_for(answer, self._config.learner.timeout_s))

"""Run the trainer on Ray Train: the worker loop and the driver's handle.

The driver puts jobs 1, 2, 3, ... into a `JobQueue`. Every worker takes the job after its last one
and runs it, and the worker of rank 0 puts the result. After a failure Ray Train restarts the group
from the newest checkpoint, and the group requests the lost jobs again: the queue keeps them until
the second checkpoint after them.
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

import ray
import ray.train
import torch
from ray.train import CheckpointConfig as RayCheckpointConfig
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from learner import checkpoint
from learner.job_queue import Job, JobQueue, Result
from learner.publisher import ObjectStore, Publisher
from learner.spec import LearnerSpec, learner_config, pack_probe, sft_epoch
from learner.trainer import Trainer
from orchard.errors import ActorError, CheckpointError, OrchardError
from orchard.policy import lora, model, value_head
from orchard.policy.store import Policy
from orchard.registry import import_plugins
from orchard.types import PolicyVersion, TrainBatch, Update

JobQueueActor: Any = ray.remote(JobQueue)
PROGRESS_S = 1.0
"""Shortest time in seconds between two reports of progress in an epoch."""


def worker_loop(task: dict[str, Any]) -> None:
    """Run jobs on a Ray Train worker until one of kind "stop".

    The task holds the `spec`, the `queue`, and `unlisted`, the checkpoint folder to start from
    where Ray Train lists none. An error that a restart would only repeat goes to the driver.
    """
    try:
        _work(task)
    except OrchardError as error:
        if ray.train.get_context().get_world_rank() == 0:
            ray.get(task["queue"].put_error.remote(error))


def _work(task: dict[str, Any]) -> None:
    """Run the jobs of `worker_loop`."""
    spec, queue = cast(LearnerSpec, task["spec"]), task["queue"]
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = spec.config
    import_plugins(config.plugins)
    torch.set_num_threads(config.learner.threads)
    policy = Policy.open(spec.policy, spec.tokenizer).model
    supervised = spec.phase == "sft"
    lora.attach(policy, config.model.lora, seed=config.seed)
    if config.model.value_head and not supervised:
        value_head.attach(policy, seed=config.seed)
    else:
        value_head.detach(policy)
    model.add_dropout(policy, config.model.dropout if supervised else config.learner.dropout)
    publisher = Publisher(
        policy,
        config.cluster.publish_format,
        ObjectStore(put=ray.put, get=ray.get),
        writes=rank == 0,
    )
    trainer = Trainer(
        policy,
        spec.tokenizer,
        learner_config(config, spec.phase),
        total_steps=spec.total_steps,
        ema_decay=config.sft.ema_decay if supervised else config.learner.ema_decay,
        temperature=1.0 if supervised else config.rollout.temperature,
        device=get_device(),
        rank=rank,
        world=world,
    )
    digest, number = spec.tokenizer.catalog.digest, 0
    if (saved := ray.train.get_checkpoint()) is not None:
        with saved.as_directory() as folder:
            number = checkpoint.load(trainer, Path(folder), catalog=digest, data=spec.data)
    elif (unlisted := cast(Path | None, task["unlisted"])) is not None:
        number = checkpoint.load(trainer, unlisted, catalog=digest, data=spec.data)

    def deliver(metrics: Mapping[str, float], *, needs_eval: bool = True) -> None:
        searched = trainer.eval_policy if supervised else trainer.policy
        published = publisher.publish(searched)
        is_distinct = needs_eval and searched is not trainer.eval_policy
        average = publisher.publish(trainer.eval_policy, exact=True) if is_distinct else None
        rounds = needs_eval and publisher.rounds and not is_distinct
        exact = publisher.publish(searched, exact=True) if rounds else None
        adapter = lora.factors(trainer.eval_policy) if needs_eval else None
        probe_logprobs = None if probe is None else trainer.score(probe)
        if probe_logprobs is not None:
            trainer.check_logprobs(probe_logprobs)
        if published is not None:  # on rank 0
            eval_weights = None
            if average is not None:
                eval_weights = PolicyVersion(step=number, digest=average.digest), average
            update = Update(
                policy=PolicyVersion(step=number, digest=published.digest),
                metrics=metrics,
                weights=published,
                adapter=publisher.store(adapter) if adapter else None,
                probe_logprobs=probe_logprobs,
                eval_weights=eval_weights,
                exact_weights=exact,
            )
            ray.get(queue.put_result.remote(Result(number=number, update=update)))

    reported = time.monotonic()

    def advance() -> None:
        nonlocal reported
        if rank == 0 and time.monotonic() - reported >= PROGRESS_S:
            reported = time.monotonic()
            queue.report_progress.remote()

    probe = None if spec.probe is None else pack_probe(spec, spec.probe)
    saved_job = number
    deliver({})
    while (job := _next(queue, number, saved_job)).kind != "stop":
        if job.kind == "save":
            if (reason := _save(trainer, number, spec, rank)) is not None:
                ray.get(queue.checkpoint_failed.remote(reason))
                return
            saved_job = number
            ray.get(queue.checkpoint_done.remote(number))
            continue
        number += 1
        torch.manual_seed(hash((config.seed, number, rank)) % 2**63)
        if job.kind == "epoch":
            metrics = sft_epoch(trainer, spec, number, advance)
        else:
            metrics = trainer.rl_step(cast(TrainBatch, ray.get(job.batch[0])))
        deliver(metrics, needs_eval=job.needs_eval)


def _next(queue: Any, number: int, saved: int) -> Job:
    """Wait for the job after job `number`, where the newest checkpoint is that of job `saved`."""
    return ray.get(queue.get_job.remote(number + 1, saved=saved))


def _save(trainer: Trainer, number: int, spec: LearnerSpec, rank: int) -> str | None:
    """Write a checkpoint; return None, or the reason why the storage does not take it."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            write = rank == 0
            checkpoint.save(
                trainer,
                Path(folder),
                number=number,
                catalog=spec.tokenizer.catalog.digest,
                data=spec.data,
                write=write,
            )
            reported = ray.train.Checkpoint.from_directory(folder) if write else None
            ray.train.report(
                {"number": number},
                checkpoint=reported,
                checkpoint_dir_name=checkpoint.folder_of(number),
            )
    except OSError as error:
        if error.errno not in checkpoint.REFUSALS:
            raise  # a retry in a restarted group may succeed
        return os.strerror(error.errno)
    return None


class TrainerHandle:
    """Driver's handle of the worker group, with awaitable jobs such as `update(batch)`."""

    def __init__(self, spec: LearnerSpec, *, storage: Path) -> None:
        """Store the work to do; nothing runs before `start`."""
        self._config, self._storage = spec.config, storage.resolve()
        self._spec = spec
        self._folder = self._storage / f"learner-{spec.phase}"
        self._queue: Any = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._number = self._saved = 0
        self.restarts = 0
        """Number of restarts of the worker group."""

    async def start(self) -> Update:
        """Start the workers, from a checkpoint if there is one; return their first version."""
        # On the driver's node: the loss of any other node must not lose the jobs.
        driver_node = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        )
        self._queue = JobQueueActor.options(
            num_cpus=0, max_concurrency=1000, scheduling_strategy=driver_node
        ).remote()
        learner, checkpoints = self._config.learner, self._config.checkpoint
        unlisted = checkpoint.recover(self._folder)
        task = {"spec": self._spec, "queue": self._queue, "unlisted": unlisted}
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
            except BaseException as error:  # raised where the next result is awaited
                self._failure = error

        self._thread = threading.Thread(target=fit, name="learner", daemon=True)
        self._thread.start()
        result = await self._collect(-1, learner.start_timeout_s)
        self._number = self._saved = result.number
        return result.update

    async def update(self, batch: TrainBatch, *, needs_eval: bool = True) -> Update:
        """Run one RL step on a batch; with `needs_eval`, also return the weights to evaluate."""
        return await self._run(Job(kind="update", batch=(ray.put(batch),), needs_eval=needs_eval))

    async def again(self, number: int) -> Update:
        """Return the update of the newest job as a restarted worker group repeats it.

        The references of an update are lost with the worker that stored its weights.
        """
        answer = self._queue.get_repeated.remote(number)
        result = cast(Result, await self._wait(answer, number, self._config.learner.timeout_s))
        return result.update

    async def epoch(self) -> Update:
        """Run one supervised pass over the training examples."""
        return await self._run(Job(kind="epoch"))

    async def save(self) -> None:
        """Write a checkpoint of the newest job, unless there is one.

        Raises:
            CheckpointError: the storage does not take it; older checkpoints remain valid.
        """
        number, saved = self._number, self._saved
        if saved == number:
            return
        answer = await self._wait(self._queue.request_checkpoint.remote(number), number)
        if reason := cast(str, answer):
            # An incomplete checkpoint that no record lists would only keep the disk full.
            shutil.rmtree(self._folder / checkpoint.folder_of(number), ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of job {number} cannot be written below {self._storage}: "
                f"{reason}; the one of job {saved} is whole, make room (docs/runbooks/"
                "disk-full.md) and the same command resumes from there"
            )
        self._saved = number

    async def close(self, *, save: bool = False) -> None:
        """Let the workers finish, waiting for at most ten seconds.

        With `save` they first write a checkpoint of the newest job; this raises as `save` does.
        """
        if self._thread is None or not self._thread.is_alive():
            return
        if save:
            await self.save()
        await self._wait(
            self._queue.put_job.remote(self._number + 1, Job(kind="stop")), self._number
        )
        await asyncio.to_thread(self._thread.join, 10.0)

    async def _run(self, job: Job) -> Update:
        """Put a job and wait for its result."""
        self._number += 1
        await self._wait(self._queue.put_job.remote(self._number, job), self._number)
        result = await self._collect(self._number, self._config.learner.timeout_s)
        return result.update

    async def _collect(self, number: int, timeout_s: float) -> Result:
        """Wait for the result of a job."""
        answer = await self._wait(self._queue.get_result.remote(number), number, timeout_s)
        if isinstance(answer, OrchardError):
            raise answer
        result = cast(Result, answer)
        self.restarts = result.restarts
        return result

    async def _wait(self, answer: Any, number: int, timeout_s: float | None = None) -> object:
        """Wait for an answer about a job, for the end of the worker group, or for the deadline."""
        pending = asyncio.ensure_future(asyncio.wrap_future(answer.future()))
        timeout_s = timeout_s or self._config.learner.timeout_s
        deadline = time.monotonic() + timeout_s
        starting = number < 0
        stage = "while starting" if starting else f"at job {number}"
        setting = "learner.start_timeout_s" if starting else "learner.timeout_s"
        while True:
            done, _ = await asyncio.wait({pending}, timeout=1.0)
            if done:
                return pending.result()
            if self._thread is not None and not self._thread.is_alive():
                raise ActorError(
                    f"the learner stopped {stage} after {self._config.learner.max_failures}"
                    f" restarts: {self._failure}; see what it printed below logs in the run folder"
                ) from self._failure
            if time.monotonic() > deadline:
                # A restarted group first repeats jobs; the time limit applies to each of them anew,
                # as it does to each update of an epoch.
                left = timeout_s - await self._idle_s()
                if left <= 0:
                    raise ActorError(
                        f"the learner did not answer {stage} within {timeout_s:.0f} s; "
                        f"raise {setting}, or see what it printed below logs in the run folder"
                    )
                deadline = time.monotonic() + left

    async def _idle_s(self) -> float:
        """Return the seconds since the workers' last result."""
        answer = asyncio.wrap_future(self._queue.idle_s.remote().future())
        return cast(float, await asyncio.wait_for(answer, self._config.learner.timeout_s))

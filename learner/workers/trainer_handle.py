"""Give the driver a handle of the worker group on Ray Train, with awaitable jobs."""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from ray.train import CheckpointConfig as RayCheckpointConfig
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from learner import checkpoint
from learner.spec import LearnerSpec
from learner.workers.job_queue import Job, JobQueue, Result
from learner.workers.ray_trainer import worker_loop
from orchard.errors import ActorError, CheckpointError, OrchardError
from orchard.types import TrainBatch, Update

JobQueueActor: Any = ray.remote(JobQueue)
_log = logging.getLogger("orchard")


class TrainerHandle:
    """Driver's handle of the worker group, with awaitable jobs such as `update(batch)`."""

    def __init__(
        self, spec: LearnerSpec, *, storage: Path, written: Callable[[int], object]
    ) -> None:
        """Store the work to do; nothing runs before `start`.

        `written` is called with the number of each job whose checkpoint is whole.
        """
        self._config, self._storage = spec.config, storage.resolve()
        self._spec = spec
        self._folder = self._storage / f"learner-{spec.phase}"
        self._queue: Any = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._number = self._copied = self._whole = 0
        """Number of the newest job, and of those whose state is copied and whose checkpoint is
        whole."""
        self._written = written
        self._writing: asyncio.Task[str] | None = None
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
        # As `train_loop_config`, the task would be opened by Ray Train's controller too, which
        # would then load torch, transformers and the data of the spec for nothing.
        trainer = TorchTrainer(
            partial(worker_loop, task),
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
        self._number = self._copied = self._whole = result.number
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
        """Begin a checkpoint of the newest job, unless there is one; wait for the copy alone.

        Where the storage does not take it, a warning is logged, and older checkpoints remain valid.
        """
        number = self._number
        if self._copied == number:
            return
        await self.written()
        await self._wait(self._queue.request_checkpoint.remote(number), number)
        self._copied = number
        self._writing = asyncio.create_task(self._follow(number))

    async def written(self) -> str:
        """Wait until the newest checkpoint is written; return "" or why it cannot be."""
        return "" if self._writing is None else await self._writing

    async def _follow(self, number: int) -> str:
        """Wait until a checkpoint is written; return "", or warn and return the reason."""
        try:
            reason = cast(str, await self._wait(self._queue.get_written.remote(number), number))
        except ActorError:  # the next job raises it
            return ""
        if not reason:
            self._whole = number
            self._written(number)
            return ""
        reason = checkpoint.unwritten(number, self._storage, reason, whole=self._whole)
        _log.warning("%s; the run continues", reason)
        return reason

    async def close(self, *, save: bool = False) -> None:
        """Let the workers finish, waiting for the checkpoint and then for at most ten seconds.

        With `save` they first write a checkpoint of the newest job.

        Raises:
            CheckpointError: with `save`, the storage does not take it.
        """
        if self._thread is None or not self._thread.is_alive():
            if self._writing is not None:
                self._writing.cancel()
            return
        if save:
            await self.save()
        reason = await self.written()
        job = Job(kind="stop", written=self._whole)
        await self._wait(self._queue.put_job.remote(self._number + 1, job), self._number)
        await asyncio.to_thread(self._thread.join, 10.0)
        if save and reason:
            raise CheckpointError(f"{reason}, and the same command resumes from there")

    async def _run(self, job: Job) -> Update:
        """Put a job and wait for its result."""
        self._number += 1
        job = replace(job, written=self._whole)
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

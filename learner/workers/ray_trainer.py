"""Run the learner's worker on Ray Train.

The driver puts jobs 1, 2, 3, ... into a `JobQueue`. Every worker takes the job after its last one
and runs it, and the worker of rank 0 puts the result. After a failure Ray Train restarts the group
from the newest checkpoint, and the group requests the lost jobs again: the queue keeps them until
the second checkpoint after them. A checkpoint is copied between two jobs, written beside the
following ones, and listed by Ray Train before the first job that was put after it was written.
"""

import time
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
from ray.train import CheckpointUploadMode
from ray.train.torch import get_device

from learner import checkpoint
from learner.publisher import ObjectStore
from learner.spec import LearnerSpec
from learner.workers.job_queue import Job, Result
from learner.workers.worker import LearnerWorker
from orchard.errors import OrchardError
from orchard.types import TrainBatch, Update

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
    kept = cast(Any, context.get_storage())
    storage, filesystem = Path(kept.experiment_fs_path), kept.storage_filesystem
    store = ObjectStore(put=ray.put, get=ray.get)
    worker = LearnerWorker(spec, store, device=get_device(), rank=rank, world=world)
    if (saved := ray.train.get_checkpoint()) is not None:
        with saved.as_directory() as folder:
            worker.load(Path(folder))
    elif (unlisted := cast(Path | None, task["unlisted"])) is not None:
        worker.load(unlisted)

    def deliver(update: Update | None) -> None:
        if update is not None:  # on rank 0
            ray.get(queue.put_result.remote(Result(number=worker.number, update=update)))

    reported = time.monotonic()

    def advance() -> None:
        nonlocal reported
        if rank == 0 and time.monotonic() - reported >= PROGRESS_S:
            reported = time.monotonic()
            queue.report_progress.remote()

    def copy_state() -> None:
        """Copy the state, and begin to write it as the checkpoint of the newest job."""
        writer.join()
        state, number = worker.snapshot(), worker.number
        if rank == 0:
            written = partial(queue.checkpoint_written.remote, number)
            writer.start(state, storage / checkpoint.folder_of(number), written)
            ray.get(queue.state_copied.remote(number))

    def list_checkpoint(number: int) -> None:
        """Have Ray Train list a checkpoint that has been written; all workers take part."""
        path = str(storage / checkpoint.folder_of(number))
        ray.train.report(
            {"number": number},
            checkpoint=ray.train.Checkpoint(path, filesystem) if rank == 0 else None,
            checkpoint_dir_name=checkpoint.folder_of(number),
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
        if rank == 0:
            ray.get(queue.checkpoint_listed.remote(number))

    writer, copied, listed = checkpoint.Writer(), worker.number, worker.number
    deliver(worker.publish())
    while True:
        job = cast(Job, ray.get(queue.get_job.remote(worker.number + 1, saved=copied)))
        if job.kind == "save":
            copy_state()
            copied = worker.number
            continue
        if job.written > listed:
            list_checkpoint(job.written)
            listed = job.written
        if job.kind == "stop":
            break
        if job.kind == "epoch":
            deliver(worker.epoch(advance))
        else:
            batch = cast(TrainBatch, ray.get(job.batch[0]))
            deliver(worker.update(batch, needs_eval=job.needs_eval))

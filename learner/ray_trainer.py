"""Run the trainer on Ray Train workers.

The driver puts jobs 1, 2, 3, ... into a `JobQueue`. Every worker takes the job after its last one
and runs it, and the worker of rank 0 puts the result. After a failure Ray Train restarts the group
from the newest checkpoint, and the group requests the lost jobs again: the queue keeps them until
the second checkpoint after them. A checkpoint is copied between two jobs, written beside the
following ones, and listed by Ray Train before the first job that was put after it was written.
"""

import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
import ray.train
import torch
from ray.train import CheckpointUploadMode
from ray.train.torch import get_device

from learner import checkpoint
from learner.job_queue import Job, Result
from learner.publisher import ObjectStore, Publisher
from learner.spec import LearnerSpec, learner_config, pack_probe, sft_epoch
from learner.trainer import Trainer
from orchard.errors import OrchardError
from orchard.policy import lora, model, value_head
from orchard.policy.store import Policy
from orchard.registry import import_plugins
from orchard.types import PolicyVersion, TrainBatch, Update

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

    def copy_state() -> None:
        """Copy the state, and begin to write it as the checkpoint of the newest job."""
        writer.join()
        state = checkpoint.snapshot(
            trainer, number=number, catalog=digest, data=spec.data, write=rank == 0
        )
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

    probe = None if spec.probe is None else pack_probe(spec, spec.probe)
    writer, copied, listed = checkpoint.Writer(), number, number
    deliver({})
    while True:
        job = cast(Job, ray.get(queue.get_job.remote(number + 1, saved=copied)))
        if job.kind == "save":
            copy_state()
            copied = number
            continue
        if job.written > listed:
            list_checkpoint(job.written)
            listed = job.written
        if job.kind == "stop":
            break
        number += 1
        torch.manual_seed(hash((config.seed, number, rank)) % 2**63)
        if job.kind == "epoch":
            metrics = sft_epoch(trainer, spec, number, advance)
        else:
            metrics = trainer.rl_step(cast(TrainBatch, ray.get(job.batch[0])))
        deliver(metrics, needs_eval=job.needs_eval)

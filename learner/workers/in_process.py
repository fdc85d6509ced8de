"""Run the learner's worker in the driver's process, without Ray."""

import copy
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from learner import checkpoint
from learner.publisher import ObjectStore
from learner.spec import LearnerSpec
from learner.workers.worker import LearnerWorker
from orchard.errors import ActorError, CheckpointError
from orchard.types import TrainBatch, Update

_log = logging.getLogger("orchard")


class InProcessTrainer:
    """Learner of one worker in this process; each job has run when its call returns."""

    def __init__(
        self, spec: LearnerSpec, *, storage: Path, written: Callable[[int], object]
    ) -> None:
        """Store the work to do; nothing runs before `start`; arguments as `TrainerHandle`."""
        self._spec, self._written = spec, written
        self._folder = storage.resolve() / f"learner-{spec.phase}"
        self._worker: LearnerWorker | None = None
        self._newest: Update | None = None
        self._saved = 0
        """Number of the newest job with a checkpoint."""
        self.restarts = 0

    async def start(self) -> Update:
        """Load the policy, and the newest whole checkpoint if there is one."""
        device = "cuda" if self._spec.config.learner.gpus else "cpu"
        # A copy, as an object store makes: published float32 weights share the policy's memory.
        store = ObjectStore(put=copy.deepcopy, get=_same)
        self._worker = worker = LearnerWorker(self._spec, store, device=torch.device(device))
        found = checkpoint.recover(self._folder) or checkpoint.newest_complete(self._folder)
        if found is not None:
            worker.load(found)
            # Ray Train's list would lack the checkpoints to come; without it, the newest counts.
            (self._folder / checkpoint.RECORD).unlink(missing_ok=True)
        self._saved = worker.number
        return self._made(worker.publish())

    async def update(self, batch: TrainBatch, *, needs_eval: bool = True) -> Update:
        """Run one RL step on a batch."""
        return self._made(self._started.update(batch, needs_eval=needs_eval))

    async def epoch(self) -> Update:
        """Run one supervised pass over the training examples."""
        return self._made(self._started.epoch(lambda: None))

    async def again(self, number: int) -> Update:
        """Return the newest update; nothing is lost in one process."""
        assert self._newest is not None
        assert self._newest.policy.step == number
        return self._newest

    async def save(self) -> None:
        """Write a checkpoint of the newest job, unless there is one.

        Where the storage does not take it, a warning is logged, and older checkpoints remain valid.
        """
        if reason := self._save():
            _log.warning("%s; the run continues", reason)

    async def close(self, *, save: bool = False) -> None:
        """Let go of the worker; with `save`, first write a checkpoint of the newest job.

        Raises:
            CheckpointError: with `save`, the storage does not take it.
        """
        reason = self._save() if save and self._worker is not None else ""
        self._worker = self._newest = None
        if reason:
            raise CheckpointError(f"{reason}, and the same command resumes from there")

    @property
    def _started(self) -> LearnerWorker:
        if self._worker is None:
            raise ActorError("the learner has not started, or has ended")
        return self._worker

    def _made(self, update: Update | None) -> Update:
        """Keep the update of a job, which the worker of rank 0 always makes."""
        assert update is not None
        self._newest = update
        return update

    def _save(self) -> str:
        """Write a checkpoint of the newest job; return "" or why it cannot be written."""
        worker = self._started
        if self._saved == worker.number:
            return ""
        writer, reasons = checkpoint.Writer(), list[str]()
        folder = self._folder / checkpoint.folder_of(worker.number)
        writer.start(worker.snapshot(), folder, reasons.append)
        writer.join()
        if reason := reasons[0]:
            return checkpoint.unwritten(worker.number, self._folder, reason, whole=self._saved)
        self._saved = worker.number
        self._written(worker.number)
        for old in sorted(self._folder.glob("job_*"))[: -self._spec.config.checkpoint.keep]:
            shutil.rmtree(old)
        return ""


def _same(value: Any) -> Any:
    """Return a value unchanged."""
    return value

"""Protocol of what a run's driver holds of its learner."""

from typing import Protocol

from orchard.types import TrainBatch, Update


class Learner(Protocol):
    """Handle of the learner, whose jobs are numbered from 1; job 0 is the start itself."""

    restarts: int
    """Number of restarts of the workers."""

    async def start(self) -> Update:
        """Start, from a checkpoint if there is one; return the first version."""
        ...

    async def update(self, batch: TrainBatch, *, needs_eval: bool = True) -> Update:
        """Run one RL step on a batch; with `needs_eval`, also return the weights to evaluate."""
        ...

    async def epoch(self) -> Update:
        """Run one supervised pass over the training examples."""
        ...

    async def again(self, number: int) -> Update:
        """Return the update of the newest job as a restarted group of workers repeats it."""
        ...

    async def save(self) -> None:
        """Begin a checkpoint of the newest job, unless there is one."""
        ...

    async def close(self, *, save: bool = False) -> None:
        """End the learner; with `save`, first write a checkpoint of the newest job."""
        ...

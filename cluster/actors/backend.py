"""Backends of a run: actors and learner in processes of Ray, or all of them in this one.

In one process a call runs at once and to its end, so that a debugger stops inside actors and an
error keeps its traceback. Rollouts and updates do not overlap there, and nothing is retried.
"""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray

from learner.workers.in_process import InProcessTrainer
from learner.workers.protocol import Learner
from learner.workers.trainer_handle import TrainerHandle
from orchard.settings import ClusterConfig


@dataclass(frozen=True, kw_only=True)
class Backend:
    """Functions that start and end what a run needs."""

    put: Callable[[Any], Any]
    """Store a value for actors and return what to hand them."""
    start: Callable[..., Any]
    """Start an actor by its class, its arguments and `gpus`; return a handle, without waiting."""
    kill: Callable[[Any], object]
    """End an actor by its handle."""
    learner: Callable[..., Learner]
    """Create a learner; arguments as `TrainerHandle`."""


def backend_of(settings: ClusterConfig) -> Backend:
    """Return the backend that `cluster.in_process` selects."""
    return IN_PROCESS if settings.in_process else RAY


def _start_in_ray(worker: type, *arguments: object, gpus: float = 0.0) -> Any:
    remote: Any = ray.remote(worker)
    return remote.options(num_cpus=1, num_gpus=gpus).remote(*arguments)


@dataclass(frozen=True)
class Answer:
    """Answer of a call that has ended, with the interface of an object reference."""

    ended: "Future[object]"

    def future(self) -> "Future[object]":
        """Return the result or the exception of the call."""
        return self.ended


@dataclass(frozen=True)
class LocalMethod:
    """Method of an object in this process, with the interface of an actor's method."""

    function: Callable[..., object]

    def remote(self, *arguments: object) -> Answer:
        """Call the function and return the answer."""
        ended: Future[object] = Future()
        try:
            ended.set_result(self.function(*arguments))
        except Exception as error:  # raised where the answer is awaited
            ended.set_exception(error)
        return Answer(ended)


class LocalActor:
    """Object in this process with the interface of an actor's handle."""

    def __init__(self, worker: type, *arguments: object) -> None:
        """Create the object."""
        self._worker = worker(*arguments)
        self.__ray_ready__ = LocalMethod(lambda: True)

    def __getattr__(self, name: str) -> LocalMethod:
        """Return a method of the object."""
        return LocalMethod(getattr(self._worker, name))


def _start_here(worker: type, *arguments: object, gpus: float = 0.0) -> LocalActor:
    return LocalActor(worker, *arguments)


RAY = Backend(put=ray.put, start=_start_in_ray, kill=ray.kill, learner=TrainerHandle)
IN_PROCESS = Backend(
    put=lambda value: value,
    start=_start_here,
    kill=lambda actor: None,
    learner=InProcessTrainer,
)

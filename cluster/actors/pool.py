"""Pool of identical actors with bounded queues, deadlines, retries and replacement.

A call runs on the actor with the fewest calls in progress. Calls must be repeatable: if the actor
is dead, exceeds its deadline or has wrong weights, the call is sent again to any actor with queue
space, while the failed one is replaced.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from orchard.errors import ActorError, OrchardError, WeightMismatchError

LOST = (RayActorError, TimeoutError, WeightMismatchError)
"""Errors after which an actor is replaced."""

SEE = "see what it printed below logs in the run folder"
"""Hint of the error messages on where the output of an actor is."""


@dataclass
class ActorSlot:
    """Slot of the pool with its current actor."""

    actor: Any
    index: int
    generation: int = 0
    """Number of replacements in this slot."""
    busy: int = 0
    """Number of calls in progress or queued at the actor."""
    since: float = 0.0
    """Time at which the actor last became busy."""
    busy_s: float = 0.0
    """Seconds with calls in progress, before `since`."""
    replacing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Lock held while the actor is replaced."""


class Pool:
    """Pool of actors of one kind; use it from one event loop."""

    def __init__(
        self,
        name: str,
        make: Callable[[int], Any],
        *,
        size: int,
        queue: int,
        timeout_s: float,
        retries: int,
        max_restarts: int,
        start_timeout_s: float,
        section: str = "",
        kill: Callable[[Any], object] = ray.kill,
    ) -> None:
        """Start `size` actors by `make(index)`.

        Args:
            name: name of the actor kind, for messages.
            make: function that starts one actor and returns its handle without waiting.
            size: number of actors.
            queue: calls that one actor may hold; further calls wait in the pool.
            timeout_s: longest wait for one call.
            retries: number of retries after an actor failure or a missed deadline.
            max_restarts: replacements over the lifetime of the pool.
            start_timeout_s: longest wait for a new actor.
            section: settings section with these bounds, for messages; `name` by default.
            kill: function that ends an actor.
        """
        self.name, self._section = name, section or name
        self.restarts = 0
        """Number of actors replaced."""
        self.waiting = 0
        """Number of calls that wait for an actor with queue space."""
        self.calls: Counter[tuple[int, str]] = Counter()
        """Number of completed calls, by actor and method."""
        self.failures: Counter[tuple[str, str]] = Counter()
        """Number of failed calls, by method and reason (died, deadline, raised or unfit)."""
        self.on_start: Callable[[Any], Awaitable[object]] | None = None
        """Hook that initializes a replacement before it receives calls."""
        self._make, self._kill = make, kill
        self._queue, self._timeout_s, self._retries = queue, timeout_s, retries
        self._max_restarts, self._start_timeout_s = max_restarts, start_timeout_s
        self._slots = [ActorSlot(make(index), index) for index in range(size)]
        self._has_space = asyncio.Condition()

    async def ready(self) -> None:
        """Wait until every actor has started."""
        await asyncio.gather(*(self._wait_started(slot.actor, slot.index) for slot in self._slots))

    async def call(self, method: str, *args: object) -> Any:
        """Call a method of any actor and return its result; raises ActorError after all retries.

        An OrchardError raised by the method is not retried but raised unchanged, except for a
        WeightMismatchError, after which the actor is replaced.
        """
        lost: Exception | None = None
        for _ in range(self._retries + 1):
            slot = await self._take()
            generation = slot.generation
            try:
                return await self._ask(slot, self._timeout_s, method, *args)
            except LOST as error:
                lost = error
                await self._replace(slot, generation, error)
            finally:
                await self._give_back(slot)
        raise ActorError(
            f"{self.name}.{method} failed {self._retries + 1} times, last with "
            f"{_brief(lost)}; {SEE} or raise {self._section}.timeout_s"
        ) from lost

    async def broadcast(self, method: str, *args: object, timeout_s: float) -> list[Any]:
        """Call a method of all actors and return the results; an actor that fails is replaced."""

        async def call_slot(slot: ActorSlot) -> Any:
            generation = slot.generation
            try:
                return await self._ask(slot, timeout_s, method, *args)
            except LOST as error:
                await self._replace(slot, generation, error)
            try:
                return await self._ask(slot, timeout_s, method, *args)
            except (RayActorError, TimeoutError) as again:
                raise self._lost_again(slot.index, method, again) from again

        return await asyncio.gather(*(call_slot(slot) for slot in self._slots))

    def close(self) -> None:
        """Stop the actors that this pool started."""
        for slot in self._slots:
            self._kill(slot.actor)

    @property
    def actors(self) -> list[Any]:
        """Handles of the current actors."""
        return [slot.actor for slot in self._slots]

    def load(self) -> list[tuple[int, float]]:
        """Return the calls in progress and the busy seconds of each actor."""
        now = time.monotonic()
        return [(s.busy, s.busy_s + (now - s.since if s.busy else 0.0)) for s in self._slots]

    async def _take(self) -> ActorSlot:
        """Wait for an actor with queue space and reserve it for one call."""
        async with self._has_space:
            self.waiting += 1
            try:
                await self._has_space.wait_for(
                    lambda: any(s.busy < self._queue for s in self._slots)
                )
            finally:
                self.waiting -= 1
            slot = min(self._slots, key=lambda s: s.busy)
            if not slot.busy:
                slot.since = time.monotonic()
            slot.busy += 1
            return slot

    async def _give_back(self, slot: ActorSlot) -> None:
        """Release the reservation of one call."""
        async with self._has_space:
            slot.busy -= 1
            if not slot.busy:
                slot.busy_s += time.monotonic() - slot.since
            self._has_space.notify()

    async def _ask(self, slot: ActorSlot, timeout_s: float, method: str, *args: object) -> Any:
        """Call a method of the slot's actor once, and count the call or its failure."""
        reference = getattr(slot.actor, method).remote(*args)
        try:
            answer = await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout_s)
        except (RayActorError, TimeoutError) as error:
            self.failures[method, "deadline" if isinstance(error, TimeoutError) else "died"] += 1
            raise
        except RayTaskError as error:
            cause = self._as_orchard_error(error, method)
            self.failures[
                method, "unfit" if isinstance(cause, WeightMismatchError) else "raised"
            ] += 1
            raise cause from error
        self.calls[slot.index, method] += 1
        return answer

    def _as_orchard_error(self, error: RayTaskError, method: str) -> OrchardError:
        """Convert an exception raised by a method to an OrchardError."""
        cause = error.cause
        if isinstance(cause, OrchardError):
            return cause
        return ActorError(f"{self.name}.{method} raised {_brief(cause or error)}; {SEE}")

    def _lost_again(self, index: int, method: str, error: Exception) -> ActorError:
        return ActorError(
            f"{self.name} actor {index}, a replacement, failed {method} as well: {_brief(error)}; "
            f"{SEE}, or raise cluster.publish_timeout_s"
        )

    async def _wait_started(self, actor: Any, index: int) -> None:
        """Wait until an actor has started; raises its own OrchardError or an ActorError."""
        ready = asyncio.wrap_future(actor.__ray_ready__.remote().future())
        try:
            await asyncio.wait_for(ready, self._start_timeout_s)
        except TimeoutError as error:
            raise ActorError(
                f"{self.name} actor {index} did not start within {self._start_timeout_s:.0f} s; "
                f"are there free CPUs or GPUs for it in the cluster? {SEE}, or raise "
                "rollout.start_timeout_s"
            ) from error
        except RayTaskError as error:
            cause = error.cause
            raise (
                cause
                if isinstance(cause, OrchardError)
                else ActorError(
                    f"{self.name} actor {index} did not start: {_brief(cause or error)}; {SEE}"
                )
            ) from error
        except RayActorError as error:
            raise ActorError(
                f"{self.name} actor {index} died while starting: {_brief(error)}; {SEE}"
            ) from error

    async def _replace(self, slot: ActorSlot, generation: int, error: Exception) -> None:
        """Replace the actor of a slot, unless another caller has already done so."""
        async with slot.replacing:
            if slot.generation != generation:
                return
            if self.restarts >= self._max_restarts:
                raise ActorError(
                    f"{self.name} actor {slot.index} was lost ({_brief(error)}) after "
                    f"{self._max_restarts} replacements; raise {self._section}.max_restarts if "
                    f"that is expected on this cluster; {SEE}"
                ) from error
            self.restarts += 1
            self._kill(slot.actor)
            actor = self._make(slot.index)
            await self._wait_started(actor, slot.index)
            if self.on_start is not None:
                try:
                    await self.on_start(actor)
                except RayTaskError as problem:
                    raise self._as_orchard_error(problem, "on_start") from problem
                except (RayActorError, TimeoutError) as again:
                    raise self._lost_again(slot.index, "load_weights", again) from again
            slot.actor, slot.generation = actor, slot.generation + 1


def _brief(error: BaseException | None) -> str:
    """Format an exception as one line; for one with a traceback, use the traceback's last line."""
    text = str(error)
    if 'File "' in text:
        text = text.rstrip().splitlines()[-1]
    text = " ".join(text.split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__

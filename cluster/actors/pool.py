"""A pool of equal actors: bounded queues, deadlines, retries, replacement of the dead.

A call runs on the actor with the fewest calls in hand. Calls must be repeatable: one that meets a
dead, silent or unfit actor is sent again, to whichever actor has room, while the lost one is
replaced.
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
"""What an actor is replaced for."""

SEE = "see what it printed below logs in the run folder"


@dataclass
class ActorSlot:
    """A place in the pool and whoever sits there now."""

    actor: Any
    index: int
    generation: int = 0
    busy: int = 0
    since: float = 0.0
    """When the first of the calls in hand came."""
    busy_s: float = 0.0
    """Time with calls in hand, before `since`."""
    replacing: asyncio.Lock = field(default_factory=asyncio.Lock)


class Pool:
    """Actors of one kind. Use from one event loop."""

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
    ) -> None:
        """Start `size` actors by `make(index)`.

        Args:
            name: of the kind, for messages.
            make: starts one actor and returns its handle at once.
            size: number of actors.
            queue: calls that may be in an actor's hands; further ones wait here.
            timeout_s: longest wait for one call.
            retries: how often a call is sent again after a death or a missed deadline.
            max_restarts: replacements over the pool's life.
            start_timeout_s: longest wait for a new actor.
            section: of the settings that hold these bounds; by default it has the kind's name.
        """
        self.name, self._section = name, section or name
        self.restarts = 0
        self.waiting = 0
        """Calls that wait for an actor with room."""
        self.calls: Counter[tuple[int, str]] = Counter()
        """Calls answered, by actor and method."""
        self.failures: Counter[tuple[str, str]] = Counter()
        """Calls that failed, by method and reason: died, deadline, raised, unfit."""
        self.on_start: Callable[[Any], Awaitable[object]] | None = None
        """Brings a replacement up to date before it takes calls."""
        self._make = make
        self._queue, self._timeout_s, self._retries = queue, timeout_s, retries
        self._max_restarts, self._start_timeout_s = max_restarts, start_timeout_s
        self._slots = [ActorSlot(make(index), index) for index in range(size)]
        self._room = asyncio.Condition()

    async def ready(self) -> None:
        """Wait until every actor answers."""
        await asyncio.gather(*(self._answer(slot.actor, slot.index) for slot in self._slots))

    async def call(self, method: str, *args: object) -> Any:
        """The answer of some actor; raises ActorError when retries are used up.

        An OrchardError raised by the method itself is final and raised as it is, unless it says
        that the actor is unfit.
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
        """The answers of all actors; one that fails is replaced, and brought up to date by that."""

        async def one(slot: ActorSlot) -> Any:
            generation = slot.generation
            try:
                return await self._ask(slot, timeout_s, method, *args)
            except LOST as error:
                await self._replace(slot, generation, error)
            try:
                return await self._ask(slot, timeout_s, method, *args)
            except (RayActorError, TimeoutError) as again:
                raise self._lost_again(slot.index, method, again) from again

        return await asyncio.gather(*(one(slot) for slot in self._slots))

    def close(self) -> None:
        """Stop the actors that this pool started."""
        for slot in self._slots:
            ray.kill(slot.actor)

    @property
    def actors(self) -> list[Any]:
        """The handles as they are now."""
        return [slot.actor for slot in self._slots]

    def load(self) -> list[tuple[int, float]]:
        """Of each actor: calls in its hands, and seconds in which there were any."""
        now = time.monotonic()
        return [(s.busy, s.busy_s + (now - s.since if s.busy else 0.0)) for s in self._slots]

    async def _take(self) -> ActorSlot:
        async with self._room:
            self.waiting += 1
            try:
                await self._room.wait_for(lambda: any(s.busy < self._queue for s in self._slots))
            finally:
                self.waiting -= 1
            slot = min(self._slots, key=lambda s: s.busy)
            if not slot.busy:
                slot.since = time.monotonic()
            slot.busy += 1
            return slot

    async def _give_back(self, slot: ActorSlot) -> None:
        async with self._room:
            slot.busy -= 1
            if not slot.busy:
                slot.busy_s += time.monotonic() - slot.since
            self._room.notify()

    async def _ask(self, slot: ActorSlot, timeout_s: float, method: str, *args: object) -> Any:
        reference = getattr(slot.actor, method).remote(*args)
        try:
            answer = await asyncio.wait_for(asyncio.wrap_future(reference.future()), timeout_s)
        except (RayActorError, TimeoutError) as error:
            self.failures[method, "deadline" if isinstance(error, TimeoutError) else "died"] += 1
            raise
        except RayTaskError as error:
            told = self._told(error, method)
            self.failures[
                method, "unfit" if isinstance(told, WeightMismatchError) else "raised"
            ] += 1
            raise told from error
        self.calls[slot.index, method] += 1
        return answer

    def _told(self, error: RayTaskError, method: str) -> OrchardError:
        """What a method raised, as an error of ours."""
        cause = error.cause
        if isinstance(cause, OrchardError):
            return cause
        return ActorError(f"{self.name}.{method} raised {_brief(cause or error)}; {SEE}")

    def _lost_again(self, index: int, method: str, error: Exception) -> ActorError:
        return ActorError(
            f"{self.name} actor {index}, a replacement, failed {method} as well: {_brief(error)}; "
            f"{SEE}, or raise cluster.publish_timeout_s"
        )

    async def _answer(self, actor: Any, index: int) -> None:
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
        """Put a new actor into the slot, unless another caller already has."""
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
            ray.kill(slot.actor)
            actor = self._make(slot.index)
            await self._answer(actor, slot.index)
            if self.on_start is not None:
                try:
                    await self.on_start(actor)
                except RayTaskError as problem:
                    raise self._told(problem, "on_start") from problem
                except (RayActorError, TimeoutError) as again:
                    raise self._lost_again(slot.index, "load_weights", again) from again
            slot.actor, slot.generation = actor, slot.generation + 1


def _brief(error: BaseException | None) -> str:
    """An exception as one line; of one that brings a traceback, what was raised at its end."""
    text = str(error)
    if 'File "' in text:
        text = text.rstrip().splitlines()[-1]
    text = " ".join(text.split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__

"""Weights in Ray's object store: put them there, read them, and name what is published.

The driver handles references; it reads weights only to save a policy.
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayTaskError

from cluster.actors.pool import Pool
from orchard.errors import ActorError, WeightsLostError
from orchard.policy import transfer
from orchard.policy.transfer import LOST, WeightTransfer
from orchard.policy.weights import Weights
from orchard.types import PolicyVersion, StoredTransfer, Update
from rollout.probe import LogprobProbe


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedWeights:
    """Policy version with its stored weights, and its log-probability probe."""

    policy: PolicyVersion
    stored: StoredTransfer | None = None
    """Stored weights; None before the first version."""
    probe: LogprobProbe | None = None

    @property
    def arguments(self) -> tuple[PolicyVersion, StoredTransfer, LogprobProbe | None]:
        """Arguments of `load_weights`; the version carries the digest of the transfer."""
        assert self.stored is not None
        version = PolicyVersion(step=self.policy.step, digest=self.stored.digest)
        return version, self.stored, self.probe


def store(weights: Weights | StoredTransfer, put: Callable[[Any], Any]) -> StoredTransfer:
    """Put weights where their holders get them, in float32, unless they are there."""
    if isinstance(weights, StoredTransfer):
        return weights
    packed = transfer.pack(dict(weights))
    return StoredTransfer(digest=transfer.digest(packed), ref=put(packed))


async def fetch(weights: Weights | StoredTransfer) -> Weights:
    """Return weights by name, in the memory of the object store where nothing is added to them.

    Raises:
        WeightsLostError: the process that stored them has ended.
    """
    if not isinstance(weights, StoredTransfer):
        return weights
    packed: WeightTransfer = await fetch_value(weights.ref)
    base: WeightTransfer | None = None
    if packed.base:
        base = await fetch_value(weights.base_ref)
    return transfer.unpack(packed, base)


async def fetch_value(value: Any) -> Any:
    """Return a value, fetched where it is an object reference.

    Raises:
        WeightsLostError: the process that stored it has ended.
    """
    if not isinstance(value, ray.ObjectRef):
        return value
    try:
        return await asyncio.wrap_future(value.future())
    except ObjectLostError as error:
        raise WeightsLostError(LOST) from error


Again = Callable[[], Awaitable[PublishedWeights]]
"""Function that returns lost weights as they were published again."""


def repeated(lost: PublishedWeights, update: Update) -> PublishedWeights:
    """Return lost weights as a repeated update of the learner has them.

    Raises:
        WeightsLostError: the learner has not made the same version again.
    """
    made = (update.policy, update.weights), update.to_evaluate
    same = [weights for version, weights in made if version.digest == lost.policy.digest]
    if not same:
        raise WeightsLostError(LOST)
    return replace(lost, stored=same[0])


async def load(
    actor: Any, published: PublishedWeights, *, timeout_s: float, again: Again
) -> PolicyVersion:
    """Load published weights into one actor and return the version that it reports."""

    async def send(published: PublishedWeights) -> PolicyVersion:
        answer = actor.load_weights.remote(*published.arguments)
        return await asyncio.wait_for(asyncio.wrap_future(answer.future()), timeout_s)

    try:
        return await send(published)
    except RayTaskError as error:
        if not isinstance(error.cause, WeightsLostError):
            raise
    return await send(await again())


async def load_all(
    pool: Pool, published: PublishedWeights, *, timeout_s: float, again: Again
) -> int:
    """Load published weights into all actors of a pool and return their number.

    Raises:
        ActorError: an actor reports another version.
    """

    async def send(published: PublishedWeights) -> list[PolicyVersion]:
        return await pool.broadcast("load_weights", *published.arguments, timeout_s=timeout_s)

    try:
        answers = await send(published)
    except WeightsLostError:
        published = await again()
        answers = await send(published)
    wanted = published.arguments[0]
    for version in answers:
        if (version.step, version.digest) != (wanted.step, wanted.digest):
            raise ActorError(
                f"a {pool.name} actor holds policy {version} after {wanted} was published; run "
                "the same command again, and see logs in the run folder"
            )
    return len(answers)

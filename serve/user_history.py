"""Where the history of a user is, for requests that name only the user.

Every store answers with item ids, oldest first, and refuses users that it does not know.
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from orchard import ragged
from orchard.errors import ConfigError, DataError
from orchard.parquet import read_table
from orchard.settings import ServeConfig
from serve.errors import UnavailableError, UnknownNameError

MOST_ITEMS = 10_000
"""Of a history: as many as a request may hold."""


@runtime_checkable
class Histories(Protocol):
    """What a service asks."""

    async def of(self, user: str) -> list[int]:
        """Item ids, oldest first, at most `MOST_ITEMS` of them, the latest.

        Raises:
            UnknownNameError: there is no history of this user.
            UnavailableError: the store does not answer, or not with a history.
        """
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class NoHistories:
    """Knows nobody."""

    async def of(self, user: str) -> list[int]:
        """Raises UnknownNameError."""
        raise UnknownNameError(
            "no history store is configured; give a history, if only an empty one"
        )

    async def close(self) -> None:
        """Nothing to let go of."""


class TableHistories:
    """All histories in memory."""

    def __init__(self, of_user: Mapping[str, Int64[np.ndarray, " H"]]) -> None:
        """From user to item ids."""
        self._of_user = of_user

    async def of(self, user: str) -> list[int]:
        """See `Histories`."""
        if user not in self._of_user:
            raise _unknown()
        return self._of_user[user][-MOST_ITEMS:].tolist()

    async def close(self) -> None:
        """Nothing to let go of."""


class RedisHistories:
    """A Redis list per user, oldest item first: RPUSH adds to it."""

    def __init__(self, url: str, *, prefix: str, timeout_s: float, password: str | None) -> None:
        """Connects with the first request.

        Args:
            url: such as redis://host:6379/0, or rediss:// for TLS.
            prefix: of the keys, before the user.
            timeout_s: of connecting, and of an answer.
            password: None where the server asks for none.

        Raises:
            ConfigError: the client library is not installed, or the address is none.
        """
        try:
            library: Any = importlib.import_module("redis.asyncio")
            errors: Any = importlib.import_module("redis.exceptions")
        except ImportError as error:
            raise ConfigError(
                "serve.redis needs the Redis client, which is not installed; "
                "install the extra `redis`, or serve histories from a file with serve.histories"
            ) from error
        self._prefix, self._failures = prefix, (errors.RedisError, OSError)
        try:
            # A request has no time for a second try, and tells the server nothing of its client.
            self._client = library.Redis.from_url(
                url, password=password, protocol=2, driver_info=None, retry=None,
                socket_timeout=timeout_s, socket_connect_timeout=timeout_s,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"serve.redis is no address of a Redis server: {error}") from error

    async def of(self, user: str) -> list[int]:
        """See `Histories`."""
        key = (self._prefix + user).encode("utf-8", "surrogatepass")
        try:
            found: list[bytes] = await self._client.lrange(key, -MOST_ITEMS, -1)
        except self._failures as error:
            raise UnavailableError(
                "the history store gave no history in time; try again, or give a history"
            ) from error
        if not found:  # Redis keeps no empty lists
            raise _unknown()
        try:
            items = [int(one) for one in found]
        except ValueError as error:
            raise UnavailableError(
                "the history store holds something else than item ids for this user; give a history"
            ) from error
        if not all(-(2**63) <= item < 2**63 for item in items):
            raise UnavailableError(
                "the history store holds item ids beyond 64 bits for this user; give a history"
            )
        return items

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def open_histories(config: ServeConfig) -> Histories:
    """The store that the settings name.

    Raises:
        DataError: the file is missing or unreadable, or names a user twice.
        ConfigError: the Redis client is not installed, or the address is none.
    """
    if config.redis is not None:
        return RedisHistories(
            config.redis, prefix=config.redis_prefix, timeout_s=config.redis_timeout_ms / 1000,
            password=os.environ.get(config.redis_password_env) or None,
        )  # fmt: skip
    if config.histories is not None:
        return TableHistories(read_histories(config.histories))
    return NoHistories()


def read_histories(path: Path) -> Mapping[str, Int64[np.ndarray, " H"]]:
    """User, as text, to item ids, oldest first.

    Raises:
        DataError: the file or a column is missing or unreadable, or a user occurs twice.
    """
    table = read_table(
        path, role="histories", columns=("user_id", "history"), remedy="serve.histories"
    )
    lists = table["history"].combine_chunks()
    start = ragged.starts(lists.value_lengths().fill_null(0).to_numpy().astype(np.int64))
    flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    users = [str(user) for user in table["user_id"].to_pylist()]
    if len(set(users)) < len(users):
        raise DataError(
            f"histories file {path} has {len(users)} rows of {len(set(users))} users; "
            "give each user one row"
        )
    return dict(zip(users, np.split(flat, start[1:-1]), strict=True))


def _unknown() -> UnknownNameError:
    return UnknownNameError("there is no history of this user; give one, if only an empty one")

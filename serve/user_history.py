"""User history stores, for requests that give a user instead of a history.

Every store returns item ids, oldest first, and raises UnknownNameError for an unknown user.
"""

import importlib
import os
import re
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

_INTEGER = re.compile(rb"-?[0-9]{1,20}")
"""Item id as Redis holds it; Python's own `int` would also read 1_0 and blanks."""
MOST_ITEMS = 10_000
"""Maximum number of items of a history, the same as in a request."""


@runtime_checkable
class Histories(Protocol):
    """Interface of a user history store."""

    async def of(self, user: str) -> list[int]:
        """Return the latest item ids of a user, oldest first, at most `MOST_ITEMS`.

        Raises:
            UnknownNameError: the user has no history.
            UnavailableError: the store does not answer, or returns something other than a history.
        """
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class NoHistories:
    """Empty store, for an endpoint without a history store."""

    async def of(self, user: str) -> list[int]:
        """Raise UnknownNameError."""
        raise UnknownNameError("no history store is configured; give a history, which may be empty")

    async def close(self) -> None:
        """Do nothing; there are no connections."""


class TableHistories:
    """Store that keeps all histories in memory."""

    def __init__(self, of_user: Mapping[str, Int64[np.ndarray, " H"]]) -> None:
        """Create a store from a mapping of users to item ids."""
        self._of_user = of_user

    async def of(self, user: str) -> list[int]:
        """Return the history of a user; see `Histories`."""
        if user not in self._of_user:
            raise _unknown_user()
        return self._of_user[user][-MOST_ITEMS:].tolist()

    async def close(self) -> None:
        """Do nothing; there are no connections."""


class RedisHistories:
    """Store with one Redis list per user, oldest item first; RPUSH appends an item."""

    def __init__(self, url: str, *, prefix: str, timeout_s: float, password: str | None) -> None:
        """Create a client; it connects with the first request.

        Args:
            url: server address, such as redis://host:6379/0, or rediss:// for TLS.
            prefix: prefix of the keys; the user id follows.
            timeout_s: timeout of the connection and of each reply, in seconds.
            password: server password; None if the server requires none.

        Raises:
            ConfigError: the client library is not installed, or the address is invalid.
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
            # No retries, since a request has no time for them, and no client name or version sent.
            self._client = library.Redis.from_url(
                url, password=password, protocol=2, driver_info=None, retry=None,
                socket_timeout=timeout_s, socket_connect_timeout=timeout_s,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"serve.redis is not a Redis address: {error}") from error

    async def of(self, user: str) -> list[int]:
        """Return the history of a user; see `Histories`."""
        key = (self._prefix + user).encode("utf-8", "surrogatepass")
        try:
            reply: list[bytes] = await self._client.lrange(key, -MOST_ITEMS, -1)
        except self._failures as error:
            raise UnavailableError(
                "the history store did not answer in time; try again, or give a history"
            ) from error
        if not reply:  # Redis stores no empty lists
            raise _unknown_user()
        if not all(_INTEGER.fullmatch(entry) for entry in reply):
            raise UnavailableError(
                "the history store has a value that is not a list of item ids for this user; "
                "give a history"
            )
        items = [int(entry) for entry in reply]
        if not all(-(2**63) <= item < 2**63 for item in items):
            raise UnavailableError(
                "the history store holds item ids beyond 64 bits for this user; give a history"
            )
        return items

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()


def open_histories(config: ServeConfig) -> Histories:
    """Open the configured history store.

    Raises:
        DataError: the file is missing or unreadable, or contains a user twice.
        ConfigError: the Redis client is not installed, or the address is invalid.
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
    """Read a Parquet file of histories into a mapping of user ids, as text, to item ids.

    Raises:
        DataError: the file or a column is missing or unreadable, or a user occurs twice.
    """
    table = read_table(
        path, role="histories", columns=("user_id", "history"), remedy="serve.histories"
    )
    lists = table["history"].combine_chunks()
    # Item ids of all users, row r at start[r] : start[r + 1].
    start = ragged.starts(lists.value_lengths().fill_null(0).to_numpy().astype(np.int64))
    flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    users = [str(user) for user in table["user_id"].to_pylist()]
    if len(set(users)) < len(users):
        raise DataError(
            f"histories file {path} has {len(users)} rows of {len(set(users))} users; "
            "give each user one row"
        )
    return dict(zip(users, np.split(flat, start[1:-1]), strict=True))


def _unknown_user() -> UnknownNameError:
    """Return the error for a user without a history."""
    return UnknownNameError("there is no history of this user; give one, which may be empty")

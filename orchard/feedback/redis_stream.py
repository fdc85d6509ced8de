"""Redis stream of events, read by a consumer group; see `orchard.feedback.stream`."""

import importlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from orchard.errors import ConfigError, DataError
from orchard.feedback.schema import EVENTS
from orchard.feedback.stream import EventBatch, EventSource, FolderSource, Offset

_log = logging.getLogger("orchard")
_GROUP_EXISTS, _NO_GROUP = "BUSYGROUP", "NOGROUP"
_PAUSE_S = 1.0
"""Pause between two tries of a server that does not answer."""


class RedisSource:
    """Redis stream whose entries have the columns of events as fields, read by a consumer group.

    One consumer reads for a group: entries then come in the order of their IDs, and the offset is
    the last ID. The group keeps what was delivered and not acknowledged, which the same consumer
    gets again when it comes back. If the server does not answer, reading waits for it.
    """

    def __init__(
        self,
        url: str,
        *,
        stream: str,
        group: str = "orchard",
        consumer: str = "loop",
        timeout_s: float = 5.0,
        patience_s: float = 300.0,
        password: str | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Create a client; it connects with the first read.

        Args:
            url: server address, such as redis://host:6379/0.
            stream: key of the stream.
            group: name of the consumer group, which is created if need be.
            consumer: name of the consumer, the same after every restart.
            timeout_s: timeout of the connection and of each reply, in seconds.
            patience_s: seconds to wait for a server that does not answer.
            password: server password; None if the server requires none.
            sleep: pauses between two tries.

        Raises:
            ConfigError: the client library is not installed, or the address is invalid.
        """
        try:
            library: Any = importlib.import_module("redis")
        except ImportError as error:
            raise ConfigError(
                "reading events from Redis needs the Redis client, which is not installed; "
                "install the extra `redis`, or let events come in a folder"
            ) from error
        self._gone = (library.exceptions.ConnectionError, library.exceptions.TimeoutError, OSError)
        self._refusal: Any = library.exceptions.ResponseError
        try:
            self._client: Any = library.Redis.from_url(
                url, password=password, protocol=2, driver_info=None, retry=None,
                socket_timeout=timeout_s, socket_connect_timeout=timeout_s,
            )  # fmt: skip
        except ValueError as error:
            raise ConfigError(f"{url} is not the address of a Redis server: {error}") from error
        self._server = url.rpartition("@")[2]
        self._stream, self._group, self._consumer = stream, group, consumer
        self._patience_s, self._sleep = patience_s, sleep
        self._delivered: list[str] = []
        """IDs of entries that were delivered and not acknowledged by this process."""
        self._may_be_pending = True

    def read(self, offset: Offset, limit: int) -> EventBatch:
        """Return the next entries after an offset, first those that were delivered before."""
        after = str(offset.get("id", "0-0"))
        entries: list[tuple[bytes, Mapping[bytes, bytes] | None]] = []
        while not entries:
            if self._may_be_pending:
                self._acknowledge_kept(after)
                entries = self._entries(after, limit, after)
                self._may_be_pending = bool(entries)
                continue
            found = self._entries(">", limit, after)
            if self._may_be_pending:
                continue  # the reply was lost, and its entries now count as delivered
            # A server that was restored from an older copy delivers again what is kept.
            entries = [entry for entry in found if _order(entry[0].decode()) > _order(after)]
            if not found:
                break
            if not entries:
                self._may_be_pending = True
        rows = [_row(name.decode(), fields) for name, fields in entries]
        self._delivered += [name.decode() for name, _ in entries]
        events = [row for row in rows if row is not None]
        return EventBatch(
            events=pl.DataFrame(events, schema=EVENTS),
            offset={"id": entries[-1][0].decode()} if entries else dict(offset),
            refused=len(rows) - len(events),
        )

    def acknowledge(self, offset: Offset) -> None:
        """Acknowledge all entries up to an offset."""
        last = _order(str(offset.get("id", "0-0")))
        kept = [name for name in self._delivered if _order(name) <= last]
        if kept:
            self._call(
                partial(self._client.xack, self._stream, self._group, *kept), str(offset["id"])
            )
        self._delivered = [name for name in self._delivered if _order(name) > last]

    def append(self, events: pl.DataFrame) -> None:
        """Append events to the stream, as a producer does."""
        for row in events.iter_rows(named=True):
            fields = {name: value for name, value in row.items() if value is not None}
            self._call(partial(self._client.xadd, self._stream, fields), "0-0")

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _entries(
        self, position: str, limit: int, after: str
    ) -> list[tuple[bytes, Mapping[bytes, bytes] | None]]:
        """Return entries from a position: `>` new ones, an ID the delivered ones after it."""
        reply = self._call(
            lambda: self._client.xreadgroup(
                self._group, self._consumer, {self._stream: position}, count=limit
            ),
            after,
            once=position == ">",
        )
        return [] if not reply else list(reply[0][1])

    def _acknowledge_kept(self, after: str) -> None:
        """Acknowledge what was kept before this process came to acknowledging it."""
        while True:
            pending = self._call(
                lambda: self._client.xpending_range(
                    self._stream, self._group, "-", after, 1000, self._consumer
                ),
                after,
            )
            if not pending:
                return
            kept = [entry["message_id"] for entry in pending]
            self._call(partial(self._client.xack, self._stream, self._group, *kept), after)

    def _call(self, call: Callable[[], Any], after: str, *, once: bool = False) -> Any:
        """Call the server; wait while it does not answer, and create the group if there is none.

        With `once`, return None where a reply was lost, instead of calling again.

        Raises:
            DataError: it does not answer for `patience_s`, or refuses the call.
        """
        waited, told = 0.0, False
        while True:
            try:
                reply = call()
                if told:
                    _log.warning("the Redis server at %s answers again", self._server)
                return reply
            except self._gone as error:
                self._may_be_pending = True
                if once:
                    return None
                if waited >= self._patience_s:
                    raise DataError(
                        f"the Redis server at {self._server} has not answered for {waited:.0f} s "
                        f"({error}); start it, and run the command again: no event is lost"
                    ) from error
                if not told:
                    _log.warning(
                        "the Redis server at %s does not answer; trying again for %.0f s",
                        self._server, self._patience_s,
                    )  # fmt: skip
                told = True
                self._sleep(_PAUSE_S)
                waited += _PAUSE_S
            except self._refusal as error:
                if _NO_GROUP not in str(error):
                    raise DataError(
                        f"the Redis server at {self._server} refuses to read the stream "
                        f"{self._stream!r}: {error}"
                    ) from error
                self._create_group(after)

    def _create_group(self, after: str) -> None:
        """Create the consumer group, which begins after an ID."""
        try:
            self._client.xgroup_create(self._stream, self._group, id=after, mkstream=True)
        except self._refusal as error:
            if _GROUP_EXISTS not in str(error):
                raise DataError(
                    f"the consumer group {self._group!r} of the stream {self._stream!r} cannot be "
                    f"created: {error}"
                ) from error


def _order(name: str) -> tuple[int, int]:
    """Return the ID of a stream entry, MILLISECONDS-NUMBER, as a pair that sorts as Redis does."""
    milliseconds, _, number = name.partition("-")
    return int(milliseconds), int(number or 0)


def _row(name: str, fields: Mapping[bytes, bytes] | None) -> dict[str, Any] | None:
    """Return a stream entry as a row of events, None if it is none or was deleted."""
    texts = {key.decode(errors="replace"): value for key, value in (fields or {}).items()}
    try:
        row: dict[str, Any] = {key: texts[key].decode() for key in EVENTS if key in texts}
        row["time"], row["item_id"] = float(row["time"]), int(row["item_id"])
        row["value"] = float(row.get("value", 1.0))
        is_event = "behavior" in row and abs(row["time"]) < float("inf")
        in_bounds = -(2**63) <= row["item_id"] < 2**63
    except (KeyError, ValueError, UnicodeDecodeError):
        return None
    return {"event_id": name} | row if is_event and in_bounds else None


def open_source(address: str, *, stream: str, password_env: str) -> EventSource:
    """Open the source at an address: redis:// or rediss:// a stream, otherwise a folder."""
    if address.startswith(("redis://", "rediss://")):
        password = os.environ.get(password_env) or None
        return RedisSource(address, stream=stream, password=password)
    return FolderSource(Path(address))

"""History stores: a file, and a fake Redis server that speaks the protocol over a socket."""

import asyncio
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from pydantic import ValidationError

from orchard import config
from orchard.errors import ConfigError
from orchard.settings import ServeConfig
from serve import user_history
from serve.errors import UnavailableError, UnknownNameError
from serve.user_history import MOST_ITEMS, Histories, RedisHistories, TableHistories

T = TypeVar("T")
PASSWORD = "a-password-of-the-store"
LISTS = {
    "history:ann": [b"3", b"-17", b"5"],
    "history:long": [str(i).encode() for i in range(MOST_ITEMS + 5)],
    "history:odd": [b"3", b"shoes"],
    "history:huge": [str(2**63).encode()],
}


class Server:
    """Fake server for LRANGE on the lists above and AUTH; with `hangs` it never replies."""

    def __init__(self, *, hangs: bool = False) -> None:
        self.hangs, self.commands = hangs, list[list[bytes]]()

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readline():
                command = [await self._argument(reader) for _ in range(int(head[1:]))]
                self.commands.append(command)
                if self.hangs:
                    await reader.read()
                    break
                writer.write(self._reply(command))
                await writer.drain()
        finally:
            writer.close()

    async def _argument(self, reader: asyncio.StreamReader) -> bytes:
        size = int((await reader.readline())[1:])
        return (await reader.readexactly(size + 2))[:-2]

    def _reply(self, command: list[bytes]) -> bytes:
        name, *rest = command
        if name == b"AUTH":
            return b"+OK\r\n" if rest[-1] == PASSWORD.encode() else b"-WRONGPASS no\r\n"
        if name != b"LRANGE":
            return b"-ERR unknown command\r\n"
        key, first, last = rest[0].decode(), int(rest[1]), int(rest[2])
        if key == "history:text":
            return b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n"
        assert last == -1
        values = LISTS.get(key, [])[first:]
        return b"*%d\r\n" % len(values) + b"".join(b"$%d\r\n%s\r\n" % (len(v), v) for v in values)


@asynccontextmanager
async def listening(server: Server, *, password: str | None = None) -> AsyncGenerator[Histories]:
    """Open a store that is connected to `server`."""
    pytest.importorskip("redis", reason="the Redis client (requirements/dev.txt) is not installed")
    socket = await asyncio.start_server(server.talk, "127.0.0.1", 0)
    port = socket.sockets[0].getsockname()[1]
    store = RedisHistories(
        f"redis://127.0.0.1:{port}/0", prefix="history:", timeout_s=1.0, password=password
    )
    try:
        yield store
    finally:
        await store.close()
        socket.close()
        await socket.wait_closed()


def with_store(work: Callable[[Histories], Awaitable[T]], server: Server, password: str = "") -> T:
    async def run() -> T:
        async with listening(server, password=password or None) as store:
            return await work(store)

    return asyncio.run(run())


def test_redis_gives_the_latest_items_of_a_user_oldest_first() -> None:
    async def work(store: Histories) -> None:
        assert isinstance(store, Histories)
        assert await store.of("ann") == [3, -17, 5]
        assert await store.of("long") == list(range(5, MOST_ITEMS + 5))
        with pytest.raises(UnknownNameError, match="no history of this user"):
            await store.of("nobody")
        together = await asyncio.gather(*(store.of("ann") for _ in range(20)))
        assert together == [[3, -17, 5]] * 20

    with_store(work, Server())


@pytest.mark.parametrize("user", ["text", "odd", "huge"])
def test_what_is_no_list_of_item_ids_is_refused_without_telling_it(user: str) -> None:
    async def work(store: Histories) -> None:
        with pytest.raises(UnavailableError, match="give a history") as refused:
            await store.of(user)
        assert "shoes" not in str(refused.value)
        assert "WRONGTYPE" not in str(refused.value)
        assert await store.of("ann") == [3, -17, 5]

    with_store(work, Server())


@pytest.mark.slow
def test_a_server_that_hangs_or_is_gone_costs_a_503_and_is_asked_once() -> None:
    server = Server(hangs=True)

    async def hanging(store: Histories) -> None:
        with pytest.raises(UnavailableError, match="did not answer in time"):
            await store.of("ann")
        assert [command[0] for command in server.commands] == [b"LRANGE"]

    with_store(hanging, server)

    async def gone() -> None:
        socket = await asyncio.start_server(server.talk, "127.0.0.1", 0)
        port = socket.sockets[0].getsockname()[1]
        socket.close()
        await socket.wait_closed()
        store = RedisHistories(f"redis://127.0.0.1:{port}", prefix="", timeout_s=1.0, password=None)
        with pytest.raises(UnavailableError):
            await store.of("ann")
        await store.close()

    asyncio.run(gone())


def test_the_password_comes_from_the_environment() -> None:
    async def work(store: Histories) -> list[int]:
        return await store.of("ann")

    server = Server()
    assert with_store(work, server, PASSWORD) == [3, -17, 5]
    assert [command[0] for command in server.commands] == [b"AUTH", b"LRANGE"]
    with pytest.raises(UnavailableError):
        with_store(work, Server(), "another")
    for address in (f"redis://:{PASSWORD}@host", f"redis://host/0?password={PASSWORD}"):
        with pytest.raises(ValidationError, match="ORCHARD_REDIS_PASSWORD"):
            ServeConfig(redis=address)


def test_an_address_that_is_refused_for_its_password_is_not_repeated(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    run.write_text('name = "x"\ndata.path = "data"\n')
    with pytest.raises(ConfigError, match="ORCHARD_REDIS_PASSWORD") as failure:
        config.load(run, [f"serve.redis=redis://:{PASSWORD}@host"])
    assert PASSWORD not in str(failure.value)


def test_settings_choose_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownNameError, match="no history store"):
        asyncio.run(user_history.open_histories(ServeConfig()).of("ann"))
    table = TableHistories({"ann": np.array([3, 17])})
    assert asyncio.run(table.of("ann")) == [3, 17]
    with pytest.raises(UnknownNameError):
        asyncio.run(table.of("bob"))
    with pytest.raises(ValidationError, match="keep the one store"):
        ServeConfig.model_validate({"redis": "redis://host", "histories": "file.parquet"})
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ConfigError, match="install the extra `redis`"):
        user_history.open_histories(ServeConfig(redis="redis://host"))

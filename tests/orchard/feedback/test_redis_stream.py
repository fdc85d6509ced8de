"""Redis stream whose reader and server are killed."""

import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from orchard.errors import ConfigError, DataError
from orchard.feedback.event_store import EventStore
from orchard.feedback.redis_stream import RedisSource, open_source
from orchard.feedback.stream import FolderSource
from tests.fixtures.redis_server import RedisServer, redis_server

ROOT = Path(__file__).parents[3]


def test_an_address_names_the_kind_of_source(tmp_path: Path) -> None:
    assert isinstance(open_source(str(tmp_path), stream="", password_env=""), FolderSource)
    source = open_source("redis://127.0.0.1:1/0", stream="s", password_env="NO_SUCH")
    assert isinstance(source, RedisSource)
    with pytest.raises(ConfigError, match="not the address of a Redis server"):
        RedisSource("nonsense", stream="s")


def test_a_server_that_is_gone_is_waited_for_with_a_plain_message(
    caplog: pytest.LogCaptureFixture,
) -> None:
    pauses: list[float] = []
    source = RedisSource("redis://127.0.0.1:1/0", stream="s", patience_s=3.0, sleep=pauses.append)
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="no event is lost"):
        source.read({}, 10)
    assert pauses == [1.0, 1.0, 1.0]
    assert [r.message for r in caplog.records] == [
        "the Redis server at redis://127.0.0.1:1/0 does not answer; trying again for 3 s"
    ]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    (tmp_path / "redis").mkdir()
    made = redis_server(tmp_path / "redis")
    try:
        yield made
    finally:
        made.kill()


def add(server: RedisServer, first: int, count: int) -> None:
    import redis

    client: Any = redis.Redis.from_url(server.url)
    for number in range(first, first + count):
        fields = {"event_id": f"e{number}", "time": number, "user": "ann", "item_id": number,
                  "behavior": "click"}  # fmt: skip
        client.xadd("events", fields)
    client.close()


def stored(folder: Path) -> list[str]:
    return [
        event
        for file in sorted(folder.glob("*.parquet"))
        for event in pl.read_parquet(file)["event_id"].to_list()
    ]


def pending(server: RedisServer) -> int:
    import redis

    client: Any = redis.Redis.from_url(server.url)
    return int(client.xpending("events", "orchard")["pending"])


@pytest.mark.parametrize(
    "phase", ["before-read", "after-read", "before-acknowledge", "after-acknowledge"]
)
def test_a_killed_reader_loses_and_doubles_nothing(
    server: RedisServer, tmp_path: Path, phase: str
) -> None:
    add(server, 0, 20)
    folder = tmp_path / "store"
    command = [sys.executable, "-m", "tests.fixtures.consumer", server.url, str(folder), phase]
    ended = subprocess.run([*command, "2"], cwd=ROOT, check=False)
    assert ended.returncode == -9
    add(server, 20, 10)
    store, source = EventStore(folder), RedisSource(server.url, stream="events")
    store.ingest_all(source, limit=7)
    assert stored(folder) == [f"e{number}" for number in range(30)]
    assert pending(server) == 0
    assert store.ingest_all(source) == 0


def test_a_server_that_is_killed_and_comes_back_loses_and_doubles_nothing(
    server: RedisServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(server, 0, 20)
    folder = tmp_path / "store"
    store = EventStore(folder)

    def come_back(seconds: float) -> None:
        if not server.runs:
            server.start()
        time.sleep(0.05)  # it may still be reading its file

    source = RedisSource(server.url, stream="events", sleep=come_back)
    store.ingest(source, limit=7)
    server.kill()
    with caplog.at_level(logging.WARNING):
        store.ingest_all(source, limit=7)
    assert stored(folder) == [f"e{number}" for number in range(20)]
    assert [record.message.split()[-1] for record in caplog.records] == ["s", "again"]
    assert pending(server) == 0


def test_a_lost_reply_is_asked_for_again(
    server: RedisServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import redis

    add(server, 0, 10)
    source = RedisSource(server.url, stream="events", sleep=lambda _: None)
    give = source._client.xreadgroup
    calls: list[str] = []

    def lose_the_first(group: str, name: str, streams: dict[str, str], count: int) -> Any:
        reply = give(group, name, streams, count=count)
        calls.append(streams["events"])
        if calls.count(">") == 1 and calls[-1] == ">":
            raise redis.exceptions.ConnectionError("the reply is lost")
        return reply

    monkeypatch.setattr(source._client, "xreadgroup", lose_the_first)
    store = EventStore(tmp_path / "store")
    store.ingest_all(source, limit=4)
    assert stored(tmp_path / "store") == [f"e{number}" for number in range(10)]


def test_entries_that_are_no_events_are_counted_and_passed_over(
    server: RedisServer, tmp_path: Path
) -> None:
    import redis

    client: Any = redis.Redis.from_url(server.url)
    client.xadd("events", {"shoes": 3})
    client.xadd("events", {"time": "inf", "item_id": 3, "behavior": "click"})
    add(server, 0, 1)
    store = EventStore(tmp_path / "store")
    assert store.ingest_all(RedisSource(server.url, stream="events")) == 1
    assert store.refused == 2
    assert EventStore(tmp_path / "store").refused == 2

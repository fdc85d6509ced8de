"""The lock of a run folder: one owner at a time, and owners that are gone."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster import run_lock
from cluster.run_lock import FILE, hold
from orchard.errors import ConfigError, RunInterrupted

HOLD = """
import sys, time
from pathlib import Path
from cluster.run_lock import hold

with hold(Path(sys.argv[1]), "orchard train run.toml"):
    print("held", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fast hearts."""
    monkeypatch.setattr(run_lock, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(run_lock, "EXPIRES_S", 1.0)


def elsewhere(path: Path) -> None:
    """Make a lock file name a process of another machine."""
    owner = json.loads(path.read_text())
    path.write_text(json.dumps(owner | {"host": "node-7", "place": "another boot"}))


def test_the_second_command_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with hold(tmp_path / "toy", "orchard train run.toml") as lock:
        with (
            pytest.raises(ConfigError, match=r"`orchard train run.toml`, process \d+ on "),
            hold(tmp_path / "toy"),
        ):
            pass
        lock.check()
        with hold(tmp_path / "another"):
            pass
    assert list((tmp_path / "toy").iterdir()) == []
    with hold(tmp_path / "toy"):
        pass


def test_the_lock_of_a_killed_owner_is_taken_over_at_once(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match=f"process {owner.pid}"), hold(tmp_path):
            pass
        owner.send_signal(signal.SIGKILL)
    assert (tmp_path / FILE).is_file()
    with hold(tmp_path) as lock:
        lock.check()


def test_another_process_of_the_same_number_is_not_the_owner(tmp_path: Path) -> None:
    with hold(tmp_path):
        path = tmp_path / FILE
        owner = json.loads(path.read_text())
        assert owner["pid"] == os.getpid()
        path.write_text(json.dumps(owner | {"birth": "1"}))
        with hold(tmp_path):
            pass


@pytest.mark.usefixtures("soon")
def test_an_owner_elsewhere_holds_the_folder_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    with hold(tmp_path, "orchard train") as lock:
        elsewhere(tmp_path / FILE)
        with pytest.raises(ConfigError, match="on node-7"), hold(tmp_path):
            pass
        lock.check()


@pytest.mark.slow
@pytest.mark.usefixtures("soon")
def test_an_owner_elsewhere_without_a_heartbeat_is_gone(tmp_path: Path) -> None:
    with hold(tmp_path):
        kept = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(kept)
    elsewhere(tmp_path / FILE)
    with hold(tmp_path, "the next") as lock:
        assert json.loads((tmp_path / FILE).read_text())["command"] == "the next"
        lock.check()


@pytest.mark.usefixtures("soon")
def test_a_folder_that_is_released_while_one_waits_is_refused_or_free(tmp_path: Path) -> None:
    with hold(tmp_path):
        kept = (tmp_path / FILE).read_text()
    (tmp_path / FILE).write_text(kept)
    elsewhere(tmp_path / FILE)
    threading.Timer(0.3, (tmp_path / FILE).unlink).start()
    with hold(tmp_path) as lock:
        lock.check()


@pytest.mark.usefixtures("soon")
def test_an_owner_that_was_taken_for_gone_notices_and_leaves_the_lock(tmp_path: Path) -> None:
    with hold(tmp_path) as lock:
        other = json.loads((tmp_path / FILE).read_text()) | {"token": "b", "command": "another"}
        (tmp_path / FILE).write_text(json.dumps(other))
        with pytest.raises(RunInterrupted, match="names `another`"):
            lock.check()
        before = (tmp_path / FILE).stat().st_mtime_ns
        time.sleep(0.3)
        assert (tmp_path / FILE).stat().st_mtime_ns == before
    assert json.loads((tmp_path / FILE).read_text())["token"] == "b"


def test_only_one_of_many_gets_a_free_folder(tmp_path: Path) -> None:
    held: list[str] = []
    start, done = threading.Barrier(8), threading.Barrier(8)

    def attempt(name: str) -> None:
        start.wait()
        try:
            with hold(tmp_path, name):
                held.append(name)
                done.wait()
        except ConfigError:
            done.wait()

    threads = [threading.Thread(target=attempt, args=(str(n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 1


def test_a_damaged_lock_file_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    with hold(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()

"""Give a run folder to one command at a time: a lock file with its owner and a heartbeat.

`writer.lock` names the command, the machine and the process that write the folder. Its owner
touches it every few seconds. The lock of a process that was killed is taken over: at once on the
same machine, where the process can be looked up, and after `EXPIRES_S` without a heartbeat where
it cannot, such as on another node of a cluster. No clocks are compared.
"""

import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from orchard.errors import ConfigError, RunInterrupted

FILE = "writer.lock"
"""Name of the lock file in the run folder."""
HEARTBEAT_S = 5.0
"""Seconds between two heartbeats."""
EXPIRES_S = 30.0
"""Seconds without a heartbeat after which the owner on another machine counts as gone."""
_BOOT = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Process that writes a run folder."""

    command: str
    host: str
    pid: int
    started: str
    """Time at which it took the lock, in UTC."""
    place: str
    """Boot and process namespace in which `pid` is the number of a process."""
    birth: str
    """Start time of the process in clock ticks since boot, which no later process of the same
    number has."""
    token: str
    """Random name of this lock."""

    @classmethod
    def this_process(cls, command: str) -> "Owner":
        """Describe this process."""
        return cls(
            command=command,
            host=socket.gethostname(),
            pid=os.getpid(),
            started=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()),
            place=_place(),
            birth=_birth(os.getpid()),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        """Name the owner in a message."""
        return f"`{self.command}`, process {self.pid} on {self.host}, since {self.started} UTC"

    def is_alive(self) -> bool | None:
        """Look the process up; None where it runs on a machine that cannot be looked at."""
        if not self.place or self.place != _place():
            return None
        return _birth(self.pid) == self.birth


class RunLock:
    """Lock of a run folder, held by this process."""

    def __init__(self, path: Path, owner: Owner) -> None:
        """Keep the lock in the file `path`, which names `owner`, alive."""
        self._path, self._owner = path, owner
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._heart.start()

    def check(self) -> None:
        """Raise RunInterrupted if another process has taken the folder over."""
        if not self._is_ours():
            raise RunInterrupted(
                f"{self._path.parent} is no longer this command's: {self._path} names "
                f"{_read(self._path) or 'nobody'}; this process was silent for longer than "
                f"{EXPIRES_S:.0f} s, or the file was removed; it writes nothing more"
            )

    def release(self) -> None:
        """Stop the heartbeat and remove the lock, unless another process has taken it over."""
        self._ended.set()
        self._heart.join()
        with _exclusive(self._path.parent):
            if self._is_ours():
                self._path.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        held = _read(self._path)
        return held is not None and held.token == self._owner.token

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_S):
            with suppress(OSError):  # a storage that hiccups must not end the run
                if not self._is_ours():
                    logging.getLogger("orchard").error("%s was taken over", self._path)
                    return
                os.utime(self._path)


@contextmanager
def hold(run_dir: Path, command: str | None = None) -> Generator[RunLock]:
    """Hold the lock of a run folder, which is created if it does not exist.

    Args:
        run_dir: the run folder.
        command: name of the command in messages; by default that of this process.

    Raises:
        ConfigError: another command holds it, or the folder cannot be written.
    """
    owner = Owner.this_process(command or f"{Path(sys.argv[0]).name} {' '.join(sys.argv[1:3])}")
    path = run_dir / FILE
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        _acquire(path, owner)
    except OSError as error:
        raise ConfigError(
            f"run folder {run_dir} cannot be written: {error.strerror}; "
            "set output to writable storage with free space"
        ) from error
    lock = RunLock(path, owner)
    try:
        yield lock
    finally:
        with suppress(OSError):
            lock.release()


def _acquire(path: Path, owner: Owner) -> None:
    """Create the lock file, or take it over from an owner that is gone."""
    gone: str | None = None
    while True:
        with _exclusive(path.parent):
            held = _read(path)
            if held is None or held.token == gone or held.is_alive() is False:
                partial = path.with_name(f".{FILE}.{owner.token}")
                partial.write_text(json.dumps(asdict(owner)) + "\n", encoding="utf-8")
                partial.replace(path)
                return
        if held.is_alive() or _has_heartbeat(path, held):
            raise ConfigError(
                f"{path.parent} is being written by {held}; wait until it ends, stop it, or choose "
                "another run name or output"
            )
        gone = held.token


def _has_heartbeat(path: Path, held: Owner) -> bool:
    """Watch the lock of an owner elsewhere until its heart beats, or for `EXPIRES_S`."""
    logging.getLogger("orchard").warning(
        "%s names %s; waiting up to %.0f s for a heartbeat from it", path, held, EXPIRES_S
    )

    def beat() -> tuple[str, int]:
        current = _read(path)
        try:
            return (current.token if current else ""), path.stat().st_mtime_ns
        except OSError:
            return "", 0

    first, deadline = beat(), time.monotonic() + EXPIRES_S
    while time.monotonic() < deadline:
        time.sleep(min(0.5, EXPIRES_S / 10))
        if (now := beat()) != first:
            return now[0] != ""  # released in the meantime, the folder is free
    return False


def _read(path: Path) -> Owner | None:
    """Return the owner that a lock file names; None without one, or where it names nobody."""
    try:
        return Owner(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return None


@contextmanager
def _exclusive(folder: Path) -> Generator[None]:
    """Exclude other processes for a moment, where the storage can: a folder takes the lock."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network storage has no such locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _place() -> str:
    """Return the boot and the process namespace of this process; "" where there is no /proc."""
    try:
        return f"{_BOOT.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _birth(pid: int) -> str:
    """Return the start time of a process in clock ticks since boot; "" if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]

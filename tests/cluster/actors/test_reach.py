"""Addresses where nobody answers, or somebody else."""

import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.actors import jobs, reach
from cluster.actors.session import ray_session
from orchard.errors import ConfigError
from orchard.settings import ClusterConfig


@pytest.fixture
def silent() -> Iterator[int]:
    """Port where connections are accepted and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ended = threading.Event()
        held: list[socket.socket] = []

        def accept() -> None:
            while not ended.is_set():
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        ended.set()
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in held:
            connection.close()


@pytest.fixture
def closed() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "ray://localhost:{}"])
def test_a_cluster_that_nobody_runs_is_one_sentence(
    address: str, closed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = address.format(closed)
    monkeypatch.setenv("RAY_ADDRESS", named)
    with (
        pytest.raises(ConfigError, match=f"no Ray cluster answers at {named} .Connection refused"),
        ray_session(ClusterConfig(), cpus=1, logs=tmp_path),
    ):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_port_of_something_else_is_one_sentence(
    address: str, silent: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "PATIENCE_S", 0.5)
    with pytest.raises(ConfigError, match="does not speak Ray's protocol"):
        reach.check_cluster(address.format(silent))


def test_a_name_that_nobody_has_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="no Ray cluster answers at no-such-host.invalid:6379"):
        reach.check_cluster("no-such-host.invalid:6379")


@pytest.mark.parametrize("address", ["auto", "local", "[::1", "host:port"])
def test_what_names_no_port_is_left_to_ray(address: str) -> None:
    reach.check_cluster(address)


def test_the_patience_is_less_than_ten_seconds() -> None:
    assert 2 * reach.PATIENCE_S <= 10  # the connection, then the protocol


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
@pytest.mark.parametrize("address", ["127.0.0.1:{}", "http://127.0.0.1:{}", "ray://127.0.0.1:{}"])
def test_a_job_server_that_nobody_runs_is_one_sentence(
    variable: str, address: str, closed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in jobs.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, address.format(closed))
    with pytest.raises(ConfigError, match="answers at .*Connection refused"):
        jobs.client(None)

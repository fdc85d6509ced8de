"""A small world, and a Prometheus of a test's own."""

import json
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from orchard.data.synthetic import WorldParams, write_world

Ask = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty items and the rows of 120 users."""
    folder = tmp_path_factory.mktemp("world") / "data"
    write_world(folder, WorldParams(num_items=80, num_users=120, level_size=(5, 6, 7)))
    return folder


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Callable[[Sequence[Path], str], Ask]]:
    """Starts the real server over files of targets and the text of rules; what asks its API."""
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("prometheus is not installed (Debian package prometheus)")
    servers: list[subprocess.Popen[bytes]] = []

    def start(targets: Sequence[Path], rules: str = "groups: []") -> Ask:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        (tmp_path / "rules.yml").write_text(rules)
        settings = {
            "global": {"scrape_interval": "250ms", "evaluation_interval": "250ms"},
            "rule_files": [str(tmp_path / "rules.yml")],
            "scrape_configs": [
                {"job_name": "orchard", "file_sd_configs": [{"files": [str(t) for t in targets]}]}
            ],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(settings))
        server = subprocess.Popen(
            [
                binary, f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        servers.append(server)

        def ask(path: str, **parameters: str) -> dict[str, Any]:
            query = urllib.parse.urlencode(parameters)
            url = f"http://127.0.0.1:{port}/api/v1/{path}?{query}"
            deadline = time.monotonic() + 60
            while True:
                try:
                    with urllib.request.urlopen(url, timeout=10) as answer:
                        return json.loads(answer.read())["data"]
                except OSError:  # not ready yet
                    if server.poll() is not None or time.monotonic() > deadline:
                        raise
                    time.sleep(0.2)

        return ask

    yield start
    for server in servers:
        server.terminate()
        server.wait(30)

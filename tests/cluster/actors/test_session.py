"""Output of a Ray session (here a plain folder), and authentication of a local one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.actors.session import keep_logs, link_logs

ROOT = Path(__file__).parents[3]


@pytest.fixture
def session(tmp_path: Path) -> Path:
    folder = tmp_path / "ray" / "session_7"
    (folder / "logs" / "train").mkdir(parents=True)
    (folder / "logs" / "worker-a-1.out").write_text("vLLM says hello")
    (folder / "logs" / "worker-a-1.err").touch()
    (folder / "logs" / "raylet.out").write_text("plumbing")
    (folder / "logs" / "train" / "controller.log").write_text("a worker group of one")
    return folder


def test_output_can_be_read_while_a_session_runs(session: Path, tmp_path: Path) -> None:
    for _ in range(2):  # a second run on the same cluster
        link_logs(session, tmp_path / "run" / "logs")
    shown = tmp_path / "run" / "logs" / "session_7" / "worker-a-1.out"
    assert shown.read_text() == "vLLM says hello"


def test_output_outlives_a_local_session(session: Path, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    link_logs(session, logs)
    keep_logs(session, logs)
    assert not (logs / "session_7").is_symlink()
    kept = {file.name: file.read_text() for file in (logs / "session_7").iterdir()}
    assert kept == {"worker-a-1.out": "vLLM says hello", "controller.log": "a worker group of one"}
    assert (session / "logs" / "worker-a-1.out").is_file()


OPEN = """
import subprocess, sys
from pathlib import Path
import ray
from cluster.actors.session import ray_session
from orchard.settings import ClusterConfig

join = "import sys, ray; ray.init(address=sys.argv[1]); print('joined')"
with ray_session(ClusterConfig(), cpus=1, logs=Path(sys.argv[1])):
    assert ray.get(ray.remote(lambda: 7).remote()) == 7
    address = ray.get_runtime_context().gcs_address
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}
    for stranger in ({"RAY_AUTH_MODE": "disabled"}, wrong):
        ended = subprocess.run([sys.executable, "-c", join, address], env={"PATH": "", **stranger},
                               capture_output=True, text=True, timeout=100)
        print(ended.returncode, ended.stdout)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_nobody_joins_a_session_of_ours_without_its_token(tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")
    }
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", OPEN, str(tmp_path / "logs")],
        env=environment, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == ["1", "1"]
    assert not (tmp_path / ".ray").exists()
    assert "uthentication" not in ended.stderr

"""Where the output of a Ray session goes. The session here is a folder; no Ray is started."""

from pathlib import Path

import pytest

from cluster.session import keep_logs, link_logs


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

"""Requests to Ray's job server, against a fake server except in the last test."""

import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from cluster.actors import jobs
from cluster.actors.jobs import JobRequest, request
from orchard import config
from orchard.errors import ActorError, ConfigError
from orchard.settings import Config

ROOT = Path(__file__).parents[3]
QUICKSTART = ROOT / "cluster" / "runs" / "quickstart.toml"
ABSOLUTE = ("output=/mnt/runs", "data.path=/mnt/data")


def settings(*changes: str) -> Config:
    return config.load(QUICKSTART, changes or ABSOLUTE)


def test_a_request_is_what_one_would_type() -> None:
    order = JobRequest(
        working_dir=ROOT,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        grace_s=90.0,
        cpus=2.0,
    )
    arguments = request(settings(), QUICKSTART, [*ABSOLUTE, "name=a b"], order)
    assert shlex.split(arguments["entrypoint"]) == [
        "python", "-m", "cluster.cli", "train", "cluster/runs/quickstart.toml",
        "output=/mnt/runs", "data.path=/mnt/data", "name=a b",
    ]  # fmt: skip
    assert arguments["runtime_env"]["working_dir"] == str(ROOT)
    variables = arguments["runtime_env"]["env_vars"]
    assert variables == {"OMP_NUM_THREADS": "1", "RAY_JOB_STOP_WAIT_TIME_S": "90"}
    assert arguments["metadata"] == {"orchard_run": "quickstart", "orchard_command": "train"}
    assert arguments["submission_id"].startswith("quickstart-train-")
    assert arguments["entrypoint_num_cpus"] == 2.0


def test_a_relative_folder_would_be_lost_with_the_job() -> None:
    for changes, key in (
        (["data.path=/mnt/data"], "output = runs is relative"),
        (["output=/mnt/runs"], "data.path = runs/quickstart-data is relative"),
    ):
        with pytest.raises(ConfigError, match=key):
            request(settings(*changes), QUICKSTART, changes, JobRequest(working_dir=ROOT))


def test_what_ray_would_refuse_on_the_cluster_is_refused_here(tmp_path: Path) -> None:
    both = {"pip": ["a"], "uv": ["b"]}
    with pytest.raises(ConfigError, match="runtime environment is refused by Ray"):
        request(settings(), QUICKSTART, [], JobRequest(working_dir=ROOT, runtime_env=both))
    with pytest.raises(ConfigError, match="outside the working directory"):
        request(settings(), QUICKSTART, [], JobRequest(working_dir=tmp_path))
    with pytest.raises(ConfigError, match="choose sft or train"):
        request(settings(), QUICKSTART, [], JobRequest(working_dir=ROOT, command="serve"))


def test_a_runtime_environment_is_a_mapping_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    with pytest.raises(ConfigError, match="does not exist"):
        jobs.read_runtime_env(file)
    file.write_text("- pip")
    with pytest.raises(ConfigError, match="holds no mapping"):
        jobs.read_runtime_env(file)
    file.write_text("env_vars: {A: b}")
    assert jobs.read_runtime_env(file) == {"env_vars": {"A": "b"}}
    assert jobs.read_runtime_env(None) == {}


def test_a_folder_that_is_larger_than_ray_takes_is_refused_with_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "LARGEST_UPLOAD", 3 << 20)
    (tmp_path / "kept").mkdir()
    for name, mib in (("kept/a.bin", 1), ("b.bin", 2), ("ignored.bin", 4), ("c.txt", 0)):
        (tmp_path / name).write_bytes(bytes(mib << 20))
    (tmp_path / ".gitignore").write_text("ignored.bin\n")
    folder = {"working_dir": str(tmp_path)}
    with pytest.raises(
        ConfigError, match=r"upload 3\.0 MiB, .* less than 3; .* b\.bin \(2\.0 MiB\)"
    ):
        jobs.check_size(folder)
    jobs.check_size(folder | {"excludes": ["/kept/"]})
    (tmp_path / ".rayignore").write_text("b.bin\n")
    jobs.check_size(folder)
    jobs.check_size({"working_dir": "file:///storage/code.zip", "env_vars": {}})
    (tmp_path / ".rayignore").unlink()
    with pytest.raises(ConfigError, match="would upload"):
        jobs.check_size({"py_modules": [str(tmp_path)]})


def test_an_address_where_nobody_answers_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match="no Ray job server answers at http://127.0.0.1:9"):
        jobs.client("http://127.0.0.1:9")


class Server(JobSubmissionClient):
    """Fake job server with one job."""

    def __init__(self, status: JobStatus) -> None:
        self.job: Any = SimpleNamespace(
            submission_id="toy-1", status=status, metadata={"orchard_run": "quickstart"},
            message="killed", driver_exit_code=137, type="SUBMISSION",
        )  # fmt: skip
        self.submitted: list[dict[str, Any]] = []

    def list_jobs(self) -> list[Any]:
        return [self.job]

    def get_job_info(self, job_id: str) -> Any:
        if job_id != "toy-1":
            raise RuntimeError("404")
        return self.job

    def submit_job(self, **arguments: Any) -> str:
        self.submitted.append(arguments)
        return arguments["submission_id"]


def test_a_run_is_submitted_again_only_when_it_is_not_at_work() -> None:
    arguments = request(settings(), QUICKSTART, [], JobRequest(working_dir=ROOT))
    busy: Any = Server(JobStatus.RUNNING)
    with pytest.raises(ConfigError, match="already in progress as job toy-1; stop it first"):
        jobs.submit(busy, arguments)
    ended: Any = Server(JobStatus.STOPPED)
    assert jobs.submit(ended, arguments) == arguments["submission_id"]
    assert ended.submitted == [arguments]


def test_a_young_cluster_is_asked_again_and_an_idle_one_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = request(settings(), QUICKSTART, [], JobRequest(working_dir=ROOT))
    server: Any = Server(JobStatus.STOPPED)
    take, refusals = server.submit_job, iter([True, True])

    def submit_job(**wanted: Any) -> str:
        if next(refusals, False):
            raise RuntimeError("Request failed with status code 500: No available agent to submit")
        return take(**wanted)

    def sleep(_: float) -> None:
        """Clock that advances without waiting."""

    def refuse(**_: Any) -> str:
        raise RuntimeError("403")

    monkeypatch.setattr("cluster.actors.jobs.time.sleep", sleep)
    server.submit_job = submit_job
    assert jobs.submit(server, arguments) == arguments["submission_id"]
    refusals = iter([True] * 1000)
    monkeypatch.setattr("cluster.actors.jobs.START_S", 0.0)
    with pytest.raises(ActorError, match="no agent to run a job for 0 s"):
        jobs.submit(server, arguments)
    server.submit_job = refuse
    with pytest.raises(RuntimeError, match="403"):
        jobs.submit(server, arguments)


def test_a_job_that_failed_says_how() -> None:
    server: Any = Server(JobStatus.FAILED)
    with pytest.raises(ActorError, match="ended as FAILED, exit code 137: killed; submit"):
        jobs.ended(server, "toy-1")
    jobs.ended(Server(JobStatus.SUCCEEDED), "toy-1")
    with pytest.raises(ConfigError, match="there is no job toy-2; the cluster knows toy-1"):
        jobs.find(server, "toy-2")


NAMES = (
    "port",
    "dashboard-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "ray-client-server-port",
)


@pytest.fixture
def head() -> Iterator[str]:
    """Start a separate Ray with a job server, and yield its address.

    Every port is a free one: the agent that runs jobs would wait for ever for one that is taken.
    """
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in NAMES]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1] for one in sockets]
    # Not pytest's folder: paths of sockets may have hardly more than a hundred characters.
    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        command = [
            str(Path(sys.executable).with_name("ray")), "start", "--head", "--block",
            "--num-cpus=6", "--include-dashboard=true", "--disable-usage-stats",
            f"--temp-dir={folder}",
            *(f"--{name}={port}" for name, port in zip(NAMES, ports, strict=True)),
        ]  # fmt: skip
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            url = f"http://127.0.0.1:{ports[1]}"
            wait_for(url, process)
            yield url
            process.terminate()


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until a job server answers at `url`."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), urlopen(f"{url}/api/version", timeout=5):
            return
        time.sleep(0.5)
    pytest.fail(f"no job server at {url} within two minutes")


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_runs_on_a_cluster_from_the_working_directory_alone(
    head: str, tmp_path: Path
) -> None:
    """Run `data synth` as a job: uploaded files, output and final status."""
    arguments = request(settings(), QUICKSTART, [], JobRequest(working_dir=ROOT))
    out = tmp_path / "world"
    python = shlex.quote(sys.executable)
    arguments["entrypoint"] = f"{python} -m cluster.cli data synth {out} --items 30 --users 20"
    server = jobs.client(head)
    number = jobs.submit(server, arguments)
    jobs.follow(server, number)
    assert (out / "items.parquet").is_file()
    assert "items" in server.get_job_logs(number)
    again = arguments | {"submission_id": "waits", "entrypoint": "sleep 600"}
    assert jobs.submit(server, again) == "waits"
    assert jobs.stop(server, "waits", timeout_s=60.0) == "STOPPED"

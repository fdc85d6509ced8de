"""Record what `test_golden.py` holds: `python tests/golden/record.py` from the repository's root.

With the argument `quickstart` that alone, which takes minutes; without it all the rest.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# As in the tests, before anything is imported that reads them.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_worker_niceness", "0")
os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
sys.path.insert(0, os.environ["PYTHONPATH"])

import test_golden as golden

KEPT = ("config.toml", "metrics.jsonl", "warm_start", "policy", "checkpoints/learner-train")
"""Files of an interrupted run that a resume needs."""


def write(name: str, value: Any) -> None:
    """Keep something observed."""
    path = golden.HERE / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith(".jsonl"):
        path.write_text("".join(json.dumps(line) + "\n" for line in value))
    else:
        path.write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")


def copy(source: Path, target: Path) -> None:
    """Put a file or folder in the place of an earlier one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target)
    else:
        shutil.copy2(source, target)


def interrupted(run: Path, folder: Path) -> None:
    """Train on a run in `folder` until a few updates are done, and stop it there."""
    training = subprocess.Popen([*golden.COMMAND, "train", str(run)], cwd=folder)
    log = folder / "runs" / "beam" / "metrics.jsonl"
    while '{"step": 5' not in log.read_text():
        assert training.poll() is None, "it has ended before it could be interrupted"
        time.sleep(0.05)
    training.send_signal(signal.SIGTERM)
    assert training.wait() == 143


def runs() -> None:
    """The tiny runs, the policies that they make, and one that was interrupted."""
    for name, commands in golden.COMMANDS.items():
        file = golden.HERE / name / "run.toml"
        for command in commands:
            golden.do(command, file)
            if (name, command) == ("beam", "sft"):
                copy(Path("runs"), Path("twin/runs"))
        write(f"{name}/metrics.jsonl", golden.metrics(Path("runs", name)))
        if name in golden.POLICIES:
            golden.do("export", file, f"policies/{name}")
            copy(Path("policies", name), golden.HERE / "policies" / name)
    copy(Path("data"), Path("twin/data"))
    interrupted(golden.HERE / "beam" / "run.toml", Path("twin"))
    shutil.rmtree(golden.HERE / "interrupted", ignore_errors=True)
    for part in KEPT:
        copy(Path("twin/runs/beam", part), golden.HERE / "interrupted" / part)


def everything() -> None:
    """All but the quickstart."""
    write("fingerprint.json", golden.fingerprint())
    write("help.json", golden.help_texts())
    write("configurations.json", golden.configurations())
    golden.do("data", "synth", "data", *golden.WORLD)
    copy(Path("data"), golden.HERE / "data")
    runs()
    for name, more in golden.POLICIES.items():
        copy(golden.HERE / "policies" / name, Path("served", name, "policy"))
        write(f"policies/{name}.json", golden.answers(Path("served", name, "policy"), *more))
    write("openapi.json", golden.openapi(Path("served/beam/policy")))


def quickstart() -> None:
    """The quickstart's metrics."""
    subprocess.run([*golden.COMMAND, "quickstart", "--output", "."], check=True)
    write("quickstart/metrics.jsonl", golden.metrics(Path("quickstart")))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        quickstart() if sys.argv[1:] == ["quickstart"] else everything()

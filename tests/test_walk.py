"""The walk of examples/walk.sh, command by command as it is written, but for the training."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.cli import app as cli
from cluster.training.run import prepare
from cluster.training.run_dir import open_run_dir
from orchard import config

pytest.importorskip("faiss", reason="faiss is not installed; `make env` brings it")

ROOT = Path(__file__).parents[1]
SCRIPT = (ROOT / "examples" / "walk.sh").read_text()


def commands(work: Path) -> dict[str, list[str]]:
    """Arguments of each command of `orchard`, by its name."""
    run = re.search(r"^RUN=\((\S+) (.*)\)$", SCRIPT, re.MULTILINE)
    assert run is not None
    parts = {'"${RUN[@]}"': f"{run[1]} {run[2]}", '"${RUN[0]}"': run[1], '"${RUN[@]:1}"': run[2]}
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^timed (?:serving )?orchard (.*)$", SCRIPT, re.MULTILINE):
        for name, text in parts.items():
            line = line.replace(name, text)
        words = shlex.split(line.replace("$WORK", str(work)))
        found[" ".join(words[:2]) if words[0] == "data" else words[0]] = words
    return found


@pytest.mark.slow
def test_its_commands_and_settings_are_those_of_orchard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    raw: dict[str, Callable[[Path], None]] = {}
    exec(compile((ROOT / "examples" / "raw_log.py").read_text(), "raw_log.py", "exec"), raw)
    raw["write"](tmp_path / "raw")
    steps = commands(tmp_path)
    assert list(steps) == [
        "data import", "data sids", "plan", "sft", "train", "export", "serve"
    ]  # fmt: skip
    for name in ("data import", "data sids", "plan"):
        cli.main(steps[name])
    assert "items_without_title  0" in capsys.readouterr().out
    cli.main([*steps["sft"], "--dry-run"])
    run = prepare(config.load(Path(steps["sft"][1]), steps["sft"][2:]), "sft")
    open_run_dir(run)
    run.policy.rename(run.result)  # as the warm start would leave it, but untrained
    cli.main([*steps["train"], "--dry-run"])
    cli.main(steps["export"])
    capsys.readouterr()
    cli.main([*steps["serve"], "--dry-run"])
    assert f"policy: {tmp_path / 'policy'}" in capsys.readouterr().out
    assert os.access(ROOT / "examples" / "walk.sh", os.X_OK)

"""The walk of examples/walk.sh and the tutorial, as they are written, but for the training."""

import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.cli import app as cli
from cluster.cli.fit import FITS
from cluster.training.run import prepare
from cluster.training.run_dir import open_run_dir
from orchard import config

pytest.importorskip("faiss", reason="faiss is not installed; `make env` brings it")

ROOT = Path(__file__).parents[1]
SCRIPT = (ROOT / "examples" / "walk.sh").read_text()
TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text()


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


def of_the_tutorial() -> list[list[str]]:
    """Arguments of the commands of `orchard` and `curl` in the tutorial, in their order."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```", TUTORIAL, re.DOTALL | re.MULTILINE))
    lines = [shlex.split(line) for line in blocks.replace("\\\n", " ").splitlines()]
    return [words for words in lines if words[0] in ("orchard", "curl")]


def test_the_tutorial_has_the_commands_of_the_walk() -> None:
    shown = of_the_tutorial()
    asked = [words for words in shown if words[0] == "curl"]
    curl = re.search(r"^timed (curl .*)$", SCRIPT, re.MULTILINE)
    assert curl is not None
    assert asked == [shlex.split(curl[1])]
    walk = list(commands(Path("runs/walk")).values())
    own = [words[1:] for words in shown if words[0] == "orchard"]
    assert own[: len(walk)] == walk
    assert [words[0] for words in own[len(walk) :]] == ["fit", "evaluate"]


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
    fit, evaluate = of_the_tutorial()[-2:]
    FITS.check_name(fit[2], "KIND")  # a guide of an untrained policy cannot be fitted
    config.load(Path(fit[3]), fit[4:])
    cli.main([word.replace("runs/walk", str(tmp_path)) for word in evaluate[1:]])
    assert "ndcg@10/sid" in capsys.readouterr().out
    cli.main(steps["export"])
    capsys.readouterr()
    cli.main([*steps["serve"], "--dry-run"])
    assert f"policy: {tmp_path / 'policy'}" in capsys.readouterr().out
    assert os.access(ROOT / "examples" / "walk.sh", os.X_OK)
    (code,) = re.findall(r"```python\n(.*?)```", TUTORIAL, re.DOTALL)
    exec(code.replace("runs/walk/shop/policy", str(run.result)), dict[str, Any]())
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed] == ["1", "2", "3"]

"""The notebooks in examples/ run from top to bottom on a tiny world."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchard.evaluation import ranking
from orchard.testing import make_evaluation, tiny_setup
from serve.testing import export_policy
from tests.fixtures.registries import Borrow

NOTEBOOKS = Path(__file__).parents[1] / "examples" / "notebooks"


def run(name: str) -> dict[str, Any]:
    """Execute the code cells of a notebook in one namespace, and return it."""
    book = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text())
    names: dict[str, Any] = {"__name__": name}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not kept: clear them"
            exec(compile("".join(cell["source"]), f"{name}.ipynb", "exec"), names)
    return names


def test_a_first_look(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export_policy(tiny_setup(level_size=(5, 4, 6), num_items=40), tmp_path / "policy", step=3)
    ranking.write(make_evaluation(0.3), tmp_path / "evaluation" / "warm_start.json")
    monkeypatch.setenv("ORCHARD_RUN", str(tmp_path))
    names = run("first_look")
    said = capsys.readouterr().out
    assert "40 items" in said
    assert f"{names['code']}  {names['probability']:.3f}" in said
    assert "warm_start" in said
    assert 0 < names["probability"] <= 1


def test_own_reward(borrow: Borrow) -> None:
    from learner.advantage.estimators import ESTIMATORS
    from rewards.registry import REWARDS

    borrow(REWARDS)
    borrow(ESTIMATORS)
    names = run("own_reward")
    assert ((names["reward"] > 0) & (names["reward"] <= 1)).all()
    assert "rare" in REWARDS

"""The whole step: equal to the loop of sequences where the two can be compared."""

from pathlib import Path

import pytest
import torch

from benchmarks.shared import trl_loss, trl_step
from benchmarks.shared.flat_loop import advantages, rewards
from benchmarks.speed import step


def test_the_loop_rewards_and_compares_candidates_by_rank() -> None:
    codes = torch.tensor([[[1, 2], [3, 4], [5, 6]], [[1, 2], [3, 4], [5, 6]]])
    reward = rewards(codes, torch.tensor([[3, 4], [7, 8]]))
    total = 1 + 1 / 1.5849625 + 1 / 2
    expected = torch.tensor([[-1 / total, 1, -0.5 / total], [0, 0, 0]])
    torch.testing.assert_close(reward, expected)
    assert advantages(reward)[1].tolist() == [0, 0, 0]
    assert advantages(reward)[0].std().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_a_step_on_trees_is_that_on_sequences_and_missing_rivals_are_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trl_step, "installed", lambda: None)
    made = step.run(quick=True)
    figures = {f["name"]: f for f in made["figures"]}
    for name in ("equal_candidates", "advantage_difference", "loss_difference",
                 "gradient_difference"):  # fmt: skip
        assert figures[name]["holds"], figures[name]
    assert "over_trl" not in figures
    ways = {str(row["way"]): row for row in made["rows"] if "way" in row}
    assert ways.keys() == {"orchard", "orchard_whole_vocabulary", "flat_loop", "trl"}
    assert "requirements/bench.txt" in str(ways["trl"]["missing"])


@pytest.mark.slow
@pytest.mark.skipif(trl_step.installed() is None, reason="TRL (requirements/bench.txt) is absent")
def test_trl_takes_its_steps_one_at_a_time_and_ends_when_told() -> None:
    made = step.run(quick=True)
    ways = {row["way"] for row in made["rows"] if "way" in row}
    assert {f"trl_{way}" for way in trl_step.WAYS} <= ways
    figures = {f["name"]: f for f in made["figures"]}
    assert "over_trl" in figures
    assert figures["trl_loss_difference"]["holds"]


def test_packed_trees_have_the_loss_that_trl_computes_for_the_same_candidates(
    tmp_path: Path,
) -> None:
    pytest.importorskip(
        "trl",
        reason="TRL is absent; python -m pip install --no-deps -r requirements/bench.txt adds it",
    )
    difference = trl_loss.compare(tmp_path)
    assert difference.loss < 1e-5
    assert difference.gradients < 1e-4
    assert 0.1 < difference.clipped < 0.9, "the clips must matter"

"""The model of a run over GPUs, against sums that can be done by hand."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli import app as cli
from cluster.planning.simulate import GPUS, STAGES, Model, simulate, times
from orchard.data.synthetic import WorldParams, write_world

CALM = Model(spread=0.0, prompts_per_step=512.0, max_lag=0.0, reward_actors=512.0)


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_a_synchronous_step_is_the_sum_of_its_parts(gpus: int) -> None:
    given = times(CALM, gpus)
    rounds = -(-given.requests // given.actors)
    parts = [rounds * given.search, given.judge, given.pack, given.learn, given.send]
    found = simulate(CALM, gpus)
    assert found.step_s == pytest.approx(sum(parts) + given.install)
    assert found.busy["learn"] == pytest.approx(given.learn / found.step_s)


def test_searches_hide_behind_updates_once_they_may_lag() -> None:
    learning = replace(CALM, learn_tflops=1.0)
    given = times(learning, 8)
    ahead = simulate(replace(learning, max_lag=2.0), 8)
    assert ahead.step_s == pytest.approx(given.pack + given.learn + given.send + given.install)
    assert ahead.step_s < simulate(learning, 8).step_s
    assert ahead.bottleneck == "learn"


BOUND: dict[str, dict[str, float]] = {
    "search": {"search_tflops": 0.1},
    "rewards": {"reward_actors": 1.0, "reward_rate": 50.0},
    "pack": {"pack_rate": 50.0},
    "learn": {"learn_tflops": 0.1},
    "push": {"network_gb_s": 0.01},
}


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_slowest_is_named(stage: str) -> None:
    assert simulate(replace(CALM, max_lag=1.0, **BOUND[stage]), 64).bottleneck == stage


def test_gpus_help_until_what_they_do_not_speed_up_is_all_that_is_left() -> None:
    found = [simulate(replace(CALM, prompts_per_step=8192.0), gpus) for gpus in GPUS]
    assert found[0].step_s > 1.4 * found[1].step_s
    assert found[-2].step_s < found[-1].step_s  # one more round of the push
    assert {one.bottleneck for one in found[4:]} == {"push"}
    assert all(0.95 < sum(one.busy.values()) < 1.01 for one in found)


def test_equal_seeds_give_equal_runs_and_a_spread_costs_time() -> None:
    slow = replace(CALM, spread=0.5)
    assert simulate(slow, 16) == simulate(slow, 16)
    assert simulate(slow, 16).step_s > simulate(CALM, 16).step_s


def test_the_command_simulates_a_run_under_assumptions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_world(tmp_path / "data", WorldParams(num_items=60, num_users=60, level_size=(4, 5, 6)))
    run = tmp_path / "run.toml"
    run.write_text(
        f'name = "toy"\noutput = "{tmp_path / "runs"}"\n[data]\npath = "{tmp_path / "data"}"\n'
    )
    plot = tmp_path / "plot.svg"
    asked = ["--simulate", "--assume", "pack_rate=1", "--plot", str(plot)]
    cli.main(["plan", str(run), "rollout.group_size=4", *asked])
    said = capsys.readouterr().out
    assert "simulated, not measured: " in said
    assert "candidates=4, " in said
    assert "pack_rate=1, " in said
    rows = re.findall(r"^ *(\d+) .* (\w+)$", said, flags=re.MULTILINE)
    assert [(int(gpus), stage) for gpus, stage in rows] == [(gpus, "pack") for gpus in GPUS]
    assert plot.read_text().count("<svg") == 1
    for wrong, message in (("speed=1", "choose from"), ("pack_rate=0", "bounds")):
        with pytest.raises(SystemExit):
            cli.main(["plan", str(run), "--simulate", "--assume", wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", str(run), "--assume", "spread=0"])
    assert "are for --simulate" in capsys.readouterr().err

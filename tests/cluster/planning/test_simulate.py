"""The queueing model of a run, against sums computed by hand."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.cli import app as cli
from cluster.planning.simulate import GPUS, STAGES, Model, simulate, times
from tests.fixtures.runs import TinyRun

CALM = Model(spread=0.0, prompts_per_step=512.0, max_lag=0.0, reward_actors=512.0)


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_a_synchronous_step_is_the_sum_of_its_parts(gpus: int) -> None:
    durations = times(CALM, gpus)
    rounds = -(-durations.requests // durations.actors)
    parts = [
        rounds * durations.search,
        durations.judge,
        durations.pack,
        durations.learn,
        durations.send,
    ]
    result = simulate(CALM, gpus)
    assert result.step_s == pytest.approx(sum(parts) + durations.install)
    assert result.busy["learn"] == pytest.approx(durations.learn / result.step_s)


def test_searches_hide_behind_updates_once_they_may_lag() -> None:
    learning = replace(CALM, learn_tflops=1.0)
    durations = times(learning, 8)
    ahead = simulate(replace(learning, max_lag=2.0), 8)
    assert ahead.step_s == pytest.approx(
        durations.pack + durations.learn + durations.send + durations.install
    )
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
    results = [simulate(replace(CALM, prompts_per_step=8192.0), gpus) for gpus in GPUS]
    assert results[0].step_s > 1.4 * results[1].step_s
    assert results[-2].step_s < results[-1].step_s  # one more round of the push
    assert {result.bottleneck for result in results[4:]} == {"push"}
    assert all(0.95 < sum(result.busy.values()) < 1.01 for result in results)


def test_equal_seeds_give_equal_runs_and_a_spread_costs_time() -> None:
    slow = replace(CALM, spread=0.5)
    assert simulate(slow, 16) == simulate(slow, 16)
    assert simulate(slow, 16).step_s > simulate(CALM, 16).step_s


@pytest.mark.slow
def test_the_command_simulates_a_run_under_assumptions(
    tiny_run: TinyRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tiny_run()
    plot = tmp_path / "plot.svg"
    options = ["--simulate", "--assume", "pack_rate=1", "--plot", str(plot)]
    cli.main(["plan", str(run), "rollout.group_size=4", *options])
    output = capsys.readouterr().out
    assert "simulated, not measured: " in output
    assert "candidates=4, " in output
    assert "pack_rate=1, " in output
    rows = re.findall(r"^ *(\d+) .* (\w+)$", output, flags=re.MULTILINE)
    assert [(int(gpus), stage) for gpus, stage in rows] == [(gpus, "pack") for gpus in GPUS]
    assert plot.read_text().count("<svg") == 1
    for wrong, message in (("speed=1", "choose from"), ("pack_rate=0", "bounds")):
        with pytest.raises(SystemExit):
            cli.main(["plan", str(run), "--simulate", "--assume", wrong])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", str(run), "--assume", "spread=0"])
    assert "are for --simulate" in capsys.readouterr().err

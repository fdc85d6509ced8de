"""Rounds with actions of a toy world: what is published, taken back, skipped, and resumed."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pytest

from cluster.loop.gate import Measured
from cluster.loop.rounds import Collected, run_rounds
from cluster.loop.state import PHASES, RoundState
from orchard.evaluation.bootstrap import Estimate
from orchard.feedback.schema import FEEDBACK
from orchard.settings.loop import LoopConfig


class Killed(Exception):
    pass


def rows_of(policy: str, reward: float, count: int, number: int) -> list[dict[str, object]]:
    noise = np.random.default_rng([number, len(policy)]).normal(0, 0.1, count)
    return [
        {
            "request_id": f"{number}-{policy}-{n}", "time": float(n), "user": str(n),
            "history": [], "item_id": 1, "rank": 1, "sid": [1], "logprob": [-1.0],
            "decoder": "beam_sample", "width": 1, "temperature": 1.0, "restricted": False,
            "policy": policy, "catalogue": "0-a", "source": "policy",
            "reward": reward + float(noise[n]), "weight": 1.0, "behaviors": [],
        }
        for n in range(count)
    ]  # fmt: skip


@dataclass
class ToyActions:
    """A world in which policy n of round n earns `earns[n]` and is predicted to earn `told[n]`."""

    earns: Sequence[float]
    told: Sequence[float]
    canary: float = 0.1
    empty: Sequence[int] = ()
    few: Sequence[int] = ()
    kill: str = ""
    served: tuple[str, str] = ("", "")
    shown: list[dict[str, int]] = field(default_factory=list[dict[str, int]])
    windows: dict[int, pl.DataFrame] = field(default_factory=dict[int, pl.DataFrame])
    trained: list[str] = field(default_factory=list[str])

    def die(self, where: str) -> None:
        if self.kill == where:
            self.kill = ""
            raise Killed(where)

    def publish(self, main: str, canary: str) -> None:
        self.served = main, canary
        self.die("publish")

    def collect(self, state: RoundState, last: RoundState | None) -> Collected:
        number, (main, canary) = state.number, self.served
        few = 5 if number in self.few else round(400 * self.canary)
        count = {main: 400 - few} if main != canary else {main: 400}
        if main != canary:
            count[canary] = few
        self.shown.append(count)
        rows = [r for p, n in count.items() for r in rows_of(p, self.earns[int(p)], n, number)]
        rows = [] if number in self.empty else rows
        self.windows[number] = pl.DataFrame(rows, schema=FEEDBACK)
        self.die("collect")
        return Collected(
            rows=self.windows[number], counts={"requests": float(len(rows))},
            window_end=number + 1.0, event_files=number,
        )  # fmt: skip

    def collected(self, state: RoundState) -> pl.DataFrame:
        return self.windows[state.number]

    def train(self, state: RoundState) -> str:
        self.die("train")
        name = f"{state.number + 1:05d}"
        self.trained.append(name)
        return name

    def version(self, policy: str) -> str:
        return policy

    def measure(self, policy: str, rows: pl.DataFrame) -> Measured | None:
        self.die("measure")
        mean = self.told[int(policy)]
        reward = Estimate(mean=mean, low=mean - 0.05, high=mean + 0.05, n=len(rows))
        return Measured(reward=reward, effective=100.0, entropy=1.0, coverage=10)


def play(actions: ToyActions, rounds: int, **settings: object) -> list[RoundState]:
    config = LoopConfig.model_validate({"rounds": rounds, "canary": actions.canary} | settings)
    kept: dict[int, RoundState] = {}

    def save(state: RoundState) -> None:
        kept[state.number] = state

    while True:
        try:
            return run_rounds([kept[n] for n in sorted(kept)], actions, config, save)
        except Killed:
            continue


GOOD = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]


def test_good_policies_are_promoted_one_window_after_they_were_published() -> None:
    actions = ToyActions(earns=GOOD, told=GOOD)
    states = play(actions, 4)
    assert [state.outcome for state in states] == ["published"] * 4
    assert [state.main for state in states] == ["00000", "00001", "00002", "00003"]
    assert [state.watch for state in states] == ["", "inside", "inside", "inside"]
    assert [state.promoted for state in states] == [False, True, True, True]
    assert actions.shown[1] == {"00000": 360, "00001": 40}
    assert actions.served == ("00003", "00004")


def test_the_gate_stops_a_policy_that_is_estimated_below_the_bound() -> None:
    told = [1.0, 0.2, 1.2, 1.3]
    actions = ToyActions(earns=GOOD, told=told)
    states = play(actions, 3)
    assert [state.outcome for state in states] == ["refused", "published", "published"]
    assert "below the lower bound 0.9500" in states[0].reasons[0]
    assert actions.shown[1] == {"00000": 400}  # nobody was shown policy 1


@pytest.mark.parametrize("canary", [0.1, 0.0])
def test_a_policy_that_disappoints_is_taken_back_within_one_window(canary: float) -> None:
    earns = [1.0, 0.2, 1.2, 1.3]  # the estimate of policy 1 was wrong
    actions = ToyActions(earns=earns, told=GOOD, canary=canary)
    states = play(actions, 3)
    assert states[1].watch == "below"
    assert states[1].rolled_back
    assert "policy 00001 was rolled back: it earned 0." in states[1].reasons[0]
    assert actions.shown[1] == ({"00000": 360, "00001": 40} if canary else {"00001": 400})
    assert "00001" not in actions.shown[2]
    assert (states[2].main if canary else states[2].previous) == "00002"


def test_a_window_without_exposures_is_skipped_and_the_watch_goes_on() -> None:
    actions = ToyActions(earns=GOOD, told=GOOD, empty=[1])
    states = play(actions, 3)
    assert [state.outcome for state in states] == ["published", "skipped", "published"]
    assert "no exposures" in states[1].reasons[0]
    assert states[2].promoted
    assert actions.trained == ["00001", "00003"]


def test_too_few_draws_extend_the_watch() -> None:
    actions = ToyActions(earns=GOOD, told=GOOD, few=[1])
    states = play(actions, 3)
    assert [state.outcome for state in states] == ["published", "waiting", "published"]
    assert "5 draws" in states[1].reasons[0]
    assert states[2].promoted


@pytest.mark.parametrize("where", ["publish", "collect", "train", "measure"])
def test_a_killed_round_goes_on_where_it_was(where: str) -> None:
    undisturbed = play(ToyActions(earns=GOOD, told=GOOD), 3)
    actions = ToyActions(earns=GOOD, told=GOOD, kill=where)
    resumed = play(actions, 3)
    same = [f for f in RoundState.__dataclass_fields__ if f != "seconds"]
    for one, two in zip(undisturbed, resumed, strict=True):
        assert {f: getattr(one, f) for f in same} == {f: getattr(two, f) for f in same}
    # A phase that was done is not done again.
    assert len(actions.trained) == 3
    assert len(actions.shown) == 3 + (where == "collect")


def test_more_rounds_go_on_from_those_that_are_done() -> None:
    actions = ToyActions(earns=GOOD, told=GOOD)
    config = LoopConfig(rounds=2)
    saved: list[RoundState] = []
    states = run_rounds([], actions, config, saved.append)
    assert [state.phase for state in saved[:5]] == list(PHASES[1:])
    more = run_rounds(states, actions, LoopConfig(rounds=3), saved.append)
    assert [state.number for state in more] == [0, 1, 2]
    assert more[:2] == states

"""Rounds of the closed loop, as a state machine over a few actions.

    collect   the exposures and events of one window, joined to feedback
    watch     compare the reward of the policy that was published last with its prediction: it is
              taken back, or answers all requests from now on
    train     a new policy from the one that answers, on the window and a share of older feedback
    judge     estimate the new policy on the window, and hold it against the gate
    publish   serve it: to a canary share of the users, or to all

The state is written after each phase, and each action may be repeated, so that a loop that was
killed goes on with the phase that it was in. No action is named here: `Actions` has them.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import polars as pl

from cluster.loop import gate
from cluster.loop.gate import Measured
from cluster.loop.measure import realized, reward_per_request
from cluster.loop.state import Outcome, RoundState
from orchard.settings.loop import LoopConfig

_log = logging.getLogger("orchard")
Save = Callable[[RoundState], None]


@dataclass(frozen=True, kw_only=True)
class Collected:
    """Feedback of one window."""

    rows: pl.DataFrame
    """Rows of all that was shown, in the columns of `orchard.feedback.schema.FEEDBACK`."""
    counts: Mapping[str, float]
    """Counts of everything joined or not."""
    window_end: float
    """Time at which the window ended."""
    event_files: int
    """Files of the event store that the window and all before it may hold."""


@runtime_checkable
class Actions(Protocol):
    """Effects of a round on the world. Each call may be repeated after a crash."""

    def publish(self, main: str, canary: str) -> None:
        """Serve one policy, and another one to the canary's users; return when it answers."""
        ...

    def collect(self, state: RoundState, last: RoundState | None) -> Collected:
        """Collect the window of a round, which begins where that of the last round ended."""
        ...

    def collected(self, state: RoundState) -> pl.DataFrame:
        """Return the feedback that was collected in a round."""
        ...

    def train(self, state: RoundState) -> str:
        """Train a policy from the main one on the window of a round; return its name."""
        ...

    def version(self, policy: str) -> str:
        """Return the version of a policy, by which the exposure log names it."""
        ...

    def measure(self, policy: str, rows: pl.DataFrame) -> Measured | None:
        """Measure a policy on feedback; None if it holds no single draws."""
        ...


def run_rounds(
    states: list[RoundState], actions: Actions, settings: LoopConfig, save: Save
) -> list[RoundState]:
    """Run the rounds that are left; return the states of all rounds.

    Args:
        states: states of earlier rounds, of which the last may be unfinished.
        actions: what a round does.
        settings: settings of the loop.
        save: keeps a state after each phase.
    """
    states = list(states)
    if states and states[-1].phase != "done":
        unfinished = states.pop()
    else:
        unfinished = begin(states[-1] if states else None)
    while unfinished.number < settings.rounds:
        last = states[-1] if states else None
        states.append(run_round(unfinished, last, actions, settings, save))
        unfinished = begin(states[-1])
    return states


def begin(last: RoundState | None) -> RoundState:
    """Return the state in which the round after `last` begins."""
    if last is None:
        return RoundState(number=0)
    return RoundState(
        number=last.number + 1, main=last.main, canary=last.canary, previous=last.previous,
        expected=last.expected,
    )  # fmt: skip


def run_round(
    state: RoundState,
    last: RoundState | None,
    actions: Actions,
    settings: LoopConfig,
    save: Save,
) -> RoundState:
    """Run the phases of a round that are left, and return its last state."""

    def phase(work: Callable[[RoundState], RoundState], now: RoundState) -> RoundState:
        begin_time = time.monotonic()
        done = work(now)
        done = replace(done, seconds=now.seconds + time.monotonic() - begin_time)
        save(done)
        return done

    actions.publish(*served(state))
    if not state.has_done("collected"):
        state = phase(lambda now: _collect(now, last, actions), state)
    if state.phase == "done":
        return state
    if not state.has_done("watched"):
        state = phase(lambda now: _watch(now, actions, settings), state)
    if state.phase == "done":
        return state
    if not state.has_done("trained"):
        trained = phase(
            lambda now: replace(now, phase="trained", trained=actions.train(now)), state
        )
        state = trained
    if not state.has_done("judged"):
        state = phase(lambda now: _judge(now, actions, settings), state)
    return phase(lambda now: _publish(now, actions, settings), state)


def served(state: RoundState) -> tuple[str, str]:
    """Return the policies that a state serves: the main one, and the canary's, or the main one."""
    is_direct = bool(state.previous)  # the policy that is watched answers all requests
    return state.main, state.main if is_direct or not state.canary else state.canary


def _collect(state: RoundState, last: RoundState | None, actions: Actions) -> RoundState:
    """Collect the window; a window without exposures ends the round."""
    found = actions.collect(state, last)
    state = replace(
        state, phase="collected", window_end=found.window_end, event_files=found.event_files,
        counts=dict(found.counts),
    )  # fmt: skip
    if found.rows.is_empty():
        return _end(state, "skipped", "the window holds no exposures; nothing was learned")
    return state


def _watch(state: RoundState, actions: Actions, settings: LoopConfig) -> RoundState:
    """Compare the watched policy's reward with its prediction; promote it or take it back."""
    rows = actions.collected(state)
    state = replace(state, phase="watched", reward=reward_per_request(rows))
    expected = state.expected
    if expected is None or not state.canary:
        return replace(state, realized=realized(rows, actions.version(state.main)))
    found = realized(rows, actions.version(state.canary))
    verdict = gate.watch(expected, found, settings)
    state = replace(state, realized=found, watch=verdict)
    if verdict == "too few":
        number = 0 if found is None else found.n
        return _end(
            state, "waiting",
            f"{number} draws of the policy that is watched are fewer than loop.min_draws = "
            f"{settings.min_draws}; it is watched for another window",
        )  # fmt: skip
    if verdict == "below":
        assert found is not None
        low, high = gate.prediction_interval(expected, found)
        back = replace(
            state, main=state.previous or state.main, canary="", previous="", expected=None,
            rolled_back=True,
            reasons=(
                *state.reasons,
                f"policy {state.canary} was rolled back: it earned {found.mean:.4f} per draw, "
                f"below the predicted {low:.4f} to {high:.4f}",
            ),
        )  # fmt: skip
        _log.warning("round %d: %s", state.number, back.reasons[-1])
        actions.publish(*served(back))
        return back
    stays = replace(state, main=state.canary, canary="", previous="", expected=None, promoted=True)
    actions.publish(*served(stays))
    return stays


def _judge(state: RoundState, actions: Actions, settings: LoopConfig) -> RoundState:
    """Hold the trained policy against the gate."""
    state = replace(state, phase="judged")
    rows = actions.collected(state)
    if actions.version(state.trained) == actions.version(state.main):
        return _with_outcome(state, "refused", "the round changed nothing")
    serving, candidate = (actions.measure(name, rows) for name in (state.main, state.trained))
    if serving is None or candidate is None:
        return _with_outcome(
            state, "refused",
            "the window holds no single draws, by which a policy is judged; let some requests be "
            'decoded by "beam_sample" with k = 1 and width = 1',
        )  # fmt: skip
    state = replace(state, predicted=candidate.reward, serving=serving.reward)
    reasons = gate.reasons_against(candidate, serving, settings)
    return replace(state, outcome="refused" if reasons else "", reasons=(*state.reasons, *reasons))


def _publish(state: RoundState, actions: Actions, settings: LoopConfig) -> RoundState:
    """Publish the trained policy, unless the gate refuses it."""
    state = replace(state, phase="done")
    if state.outcome == "refused":
        _log.warning("round %d: not published: %s", state.number, "; ".join(state.reasons))
        return state
    published = replace(
        state,
        canary=state.trained,
        main=state.main if settings.canary else state.trained,
        previous="" if settings.canary else state.main,
        expected=state.predicted,
        outcome="published",
    )
    actions.publish(*served(published))
    return published


def _with_outcome(state: RoundState, outcome: Outcome, reason: str) -> RoundState:
    return replace(state, outcome=outcome, reasons=(*state.reasons, reason))


def _end(state: RoundState, outcome: Outcome, reason: str) -> RoundState:
    """End the round early, with its reason in the log."""
    _log.warning("round %d: %s", state.number, reason)
    return _with_outcome(replace(state, phase="done"), outcome, reason)

"""State of a loop: one JSON file per round, written after each phase, and the log of rounds.

loop/rounds/00003.json     what round 3 has done so far; replaced atomically after each phase
loop.jsonl                 one row per round that has ended, made from those files
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from orchard.errors import CheckpointError
from orchard.evaluation.bootstrap import Estimate
from orchard.folders import atomic_write

Phase = Literal["begun", "collected", "watched", "trained", "judged", "done"]
PHASES: tuple[Phase, ...] = get_args(Phase)
"""Phases of a round, in order; a round that is read again goes on after the last one."""
Watch = Literal["", "inside", "above", "below", "too few"]
"""Place of the realized reward relative to the predicted interval; empty if nothing was watched."""
Outcome = Literal["", "published", "promoted", "rolled back", "refused", "skipped", "waiting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundState:
    """Results of a round so far, and the policies that it begins with."""

    number: int
    phase: Phase = "begun"
    main: str = "00000"
    """Name of the policy that answers most requests."""
    canary: str = ""
    """Name of the policy that is watched: on a share of the users, or on all; empty without one."""
    previous: str = ""
    """Name of the policy to return to if a policy that answers all requests disappoints."""
    expected: Estimate | None = None
    """Reward per draw that was predicted for the policy that is watched."""
    window_end: float = float("-inf")
    """Time at which the window ends, in seconds since 1970."""
    event_files: int = 0
    """Files of the event store when the window was closed."""
    counts: dict[str, float] | None = None
    """Counts of the window: exposures, events, requests and what was joined."""
    realized: Estimate | None = None
    """Reward per draw of the policy that is watched."""
    reward: Estimate | None = None
    """Reward per request of the window, over all that was served."""
    watch: Watch = ""
    trained: str = ""
    """Name of the policy that the round trained; empty if it trained none."""
    predicted: Estimate | None = None
    """Off-policy estimate of the reward per draw of the policy that the round trained."""
    serving: Estimate | None = None
    """Off-policy estimate of the reward per draw of the policy that answers most requests."""
    outcome: Outcome = ""
    """Fate of the policy that the round trained, or why it trained none."""
    rolled_back: bool = False
    """Whether the policy that was watched was taken back."""
    promoted: bool = False
    """Whether the policy that was watched now answers all requests."""
    reasons: tuple[str, ...] = ()
    """Sentences that give the reasons."""
    seconds: float = 0.0
    """Duration of the round in seconds, without interruptions."""

    def has_done(self, phase: Phase) -> bool:
        """Return whether the round has done a phase."""
        return PHASES.index(self.phase) >= PHASES.index(phase)


def write_state(folder: Path, state: RoundState) -> None:
    """Write the state of a round to its file in the loop's folder, atomically."""
    rounds = folder / "rounds"
    rounds.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(asdict(state)), indent=2, allow_nan=False) + "\n"
    atomic_write(rounds / f"{state.number:05d}.json", text)


def read_states(folder: Path) -> list[RoundState]:
    """Return the states of all rounds in the loop's folder, in order.

    Raises:
        CheckpointError: a file is damaged, or a round is missing.
    """
    states = [_read(path) for path in sorted((folder / "rounds").glob("[0-9]*.json"))]
    if [state.number for state in states] != list(range(len(states))):
        raise CheckpointError(
            f"the rounds in {folder / 'rounds'} are not 0 to {len(states) - 1}; restore the "
            "missing files, or choose another run name"
        )
    return states


def write_log(path: Path, states: Sequence[RoundState]) -> None:
    """Write one row per round that has ended; the log is made anew, so it has no row twice."""
    rows = [_finite(asdict(state)) for state in states if state.phase == "done"]
    atomic_write(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def _read(path: Path) -> RoundState:
    """Read the state of one round."""
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        known = {field.name for field in fields(RoundState)}
        if not tree.keys() <= known:
            raise ValueError(f"unknown fields {', '.join(sorted(tree.keys() - known))}")
        for name in ("expected", "realized", "reward", "predicted", "serving"):
            tree[name] = None if tree.get(name) is None else Estimate(**tree[name])
        tree["reasons"] = tuple(tree.get("reasons", ()))
        if tree.get("window_end") is None:
            tree["window_end"] = float("-inf")
        return RoundState(**tree)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the state of a round, {path}, is damaged: {error}; restore it, or remove it and all "
            "later ones to repeat those rounds"
        ) from error


def _finite(tree: dict[str, Any]) -> dict[str, Any]:
    """Replace minus infinity, the end of no window, by null, which JSON has."""
    return {key: None if value == float("-inf") else value for key, value in tree.items()}

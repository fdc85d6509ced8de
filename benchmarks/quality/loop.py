"""Benchmark the closed loop: what users of a synthetic world earn, by what the rounds learn from.

Every way starts from the same SFT policy and serves the same users for the same number of rounds,
over the endpoint of Ray Serve. Users of a window are the same in every way, and so are the random
numbers behind their clicks, so that the last windows are compared user by user.

    frozen      no round changes the policy
    sft         SFT on the clicked items of each window
    next_item   RL with clicked items as next items
    feedback    RL on the rewards of all that was shown
    flipped     as feedback, but the sign of all rewards is flipped in one round

The oracle knows the tastes; its reward has a closed form. The results have, beside the reward
that users gave, the expected reward of the same lists in closed form, which has no noise of clicks.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from jaxtyping import Float64

from benchmarks.shared.measure import Figure, Report, Row, figure, report
from cluster.actors.session import cpus_needed, ray_session
from cluster.cli.serving import served
from cluster.loop.run import loop_folder, run_loop
from cluster.loop.state import RoundState, read_states
from cluster.loop.train import train_round
from cluster.training.controller import start_controller
from cluster.training.run import prepare
from cluster.training.sft import sft
from orchard import config
from orchard.data.synthetic import WorldParams, write_world
from orchard.evaluation.bootstrap import estimates_over_seeds
from orchard.feedback.schema import ROWS
from orchard.settings import Config
from orchard.simulation.click_models import click_model
from orchard.simulation.simulator import shown_lists
from orchard.simulation.synthetic_users import SyntheticUsers, UserParams, users_of_folder

WAYS = ("frozen", "sft", "next_item", "feedback", "flipped")
LEARN = {"sft": "sft", "next_item": "clicks"}
ROUNDS, SEEDS, REQUESTS, STEPS = 10, 3, 1000, 20
QUICK = {"rounds": 3, "seeds": 1, "requests": 200, "steps": 6}
FLIPPED_AT = 1
"""Round in which the way `flipped` has rewards of the wrong sign."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of the benchmark."""

    rounds: int
    seeds: int
    requests: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Earned:
    """Rewards of the users of the last window, by their places among its visits."""

    realized: Float64[np.ndarray, " R"]
    expected: Float64[np.ndarray, " R"]
    """Expected reward of the same lists."""
    oracle: Float64[np.ndarray, " R"]
    """Expected reward of the best lists of the same length."""


def run(quick: bool) -> Report:
    """Run all ways with all seeds; `quick` has three small rounds and one seed."""
    torch.set_num_threads(1)
    size = Size(**QUICK) if quick else Size(
        rounds=ROUNDS, seeds=SEEDS, requests=REQUESTS, steps=STEPS
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="orchard-loop-"))
    try:
        earned: dict[str, list[Earned]] = {way: [] for way in WAYS}
        states: dict[str, list[list[RoundState]]] = {way: [] for way in WAYS}
        for seed in range(size.seeds):
            first = first_policy(folder / str(seed), seed, size)
            for way in WAYS:
                settings = settings_of(folder / str(seed), way, seed, size)
                shutil.copytree(first, settings.run_dir / "warm_start")
                with ray_session(
                    settings.cluster, cpus=cpus_needed(settings) + 2, logs=settings.run_dir / "logs"
                ):
                    run_loop(settings, partial(served, settings), train=trainer(way))
                earned[way].append(last_window(settings, seed, size))
                states[way].append(read_states(loop_folder(settings)))
        return report("loop", figures_of(earned, states, size), rows_of(earned, states))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def settings_of(folder: Path, way: str, seed: int, size: Size) -> Config:
    """Return the settings of one way; its world is written once for a seed."""
    if not (folder / "data").is_dir():
        write_world(folder / "data", WorldParams(seed=seed, num_items=600, num_users=1500))
    tree: dict[str, Any] = {
        "name": way, "output": str(folder), "seed": seed, "data": {"path": str(folder / "data")},
        "model": {
            "hidden_size": 48, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 96,
        },
        "sft": {"epochs": 3, "valid_rows": 200, "valid_beams": 10},
        "rollout": {"engine": "torch", "group_size": 16, "threads": 1},
        "learner": {"prompts_per_step": 32, "threads": 1, "lr": 3e-4},
        "evaluate": {"every": 0, "valid_beams": 10, "valid_rows": 8},
        "serve": {"port": 0, "width": 10},
        "loop": {
            "users": "synthetic", "rounds": size.rounds, "requests": size.requests,
            "steps": size.steps, "learn": LEARN.get(way, "feedback"), "canary": 0.2,
        },
    }  # fmt: skip
    return config.parse(tree)


def first_policy(folder: Path, seed: int, size: Size) -> Path:
    """Run the SFT that all ways start from; return its policy."""
    prepared = prepare(settings_of(folder, "first", seed, size), "sft")

    async def work() -> None:
        async with start_controller(prepared) as controller:
            await sft(controller)

    asyncio.run(work())
    return prepared.result


def trainer(way: str) -> Callable[..., Path]:
    """Return how the rounds of a way train."""

    def frozen(settings: Config, number: int, *, policy: Path, **_: Any) -> Path:
        return policy

    def flipped(settings: Config, number: int, *, feedback: Sequence[Path], **others: Any) -> Path:
        if number == FLIPPED_AT:
            feedback = [flip(each) for each in feedback]
        return train_round(settings, number, feedback=feedback, **others)

    return {"frozen": frozen, "flipped": flipped}.get(way, train_round)


def flip(feedback: Path) -> Path:
    """Write feedback with the sign of all rewards flipped; return its folder."""
    target = feedback.with_name(f"{feedback.name}-flipped")
    target.mkdir(exist_ok=True)
    rows = pl.read_parquet(feedback / ROWS).with_columns(-pl.col("reward"))
    rows.write_parquet(target / ROWS)
    return target


def last_window(settings: Config, seed: int, size: Size) -> Earned:
    """Return what the users of the last window gave, and what their lists were worth."""
    folder, last = loop_folder(settings), size.rounds - 1
    users = users_of(settings, seed, size)
    for window in range(last):
        users.remember(pl.read_parquet(folder / "visits" / f"window-{window:05d}.parquet"))
    visits = users.visits(last)
    rows = pl.read_parquet(folder / "feedback" / f"{last:05d}" / ROWS).sort("request_id", "rank")
    lists: list[list[int]] = [[] for _ in range(len(visits))]
    realized = np.zeros(len(visits))
    for name, item, reward in rows.select("request_id", "item_id", "reward").iter_rows():
        place = int(name.partition("-")[2])
        lists[place].append(item)
        realized[place] += reward
    shown = shown_lists([str(place) for place in range(len(lists))], lists)
    length = np.diff(shown.start)
    oracle = np.zeros(len(visits))
    for k in np.unique(length):
        best = users.expected_reward(visits, users.best_lists(visits, int(k))) if k else 0.0
        oracle = np.where(length == k, best, oracle)
    return Earned(realized=realized, expected=users.expected_reward(visits, shown), oracle=oracle)


def users_of(settings: Config, seed: int, size: Size) -> SyntheticUsers:
    """Return the users of a way as they are before the first window."""
    params = UserParams(seed=seed, requests=size.requests)
    return users_of_folder(settings.data.path, params, click_model(settings.loop.click_model))


def figures_of(
    earned: dict[str, list[Earned]], states: dict[str, list[list[RoundState]]], size: Size
) -> list[Figure]:
    """Return the figures, each with its target."""
    note = f"{size.rounds} rounds of {size.requests} requests, {size.seeds} seeds"
    figures: list[Figure] = []
    for kind in ("realized", "expected"):
        for other in ("frozen", "sft", "next_item"):
            a, b = (
                np.stack([getattr(each, kind) for each in earned[way]])[:, :, None]
                for way in ("feedback", other)
            )
            gap = estimates_over_seeds(["gap"], a, b, resamples=2000, seed=0)["gap"]
            figures.append(figure(
                f"feedback_over_{other}_{kind}", gap.mean, "reward per request", asked="> 0",
                note=f"95 % interval {gap.low:.4f} to {gap.high:.4f}; {note}",
            ))  # fmt: skip
    oracle, frozen, learned = (
        float(np.mean([values.mean() for values in each]))
        for each in (
            [e.oracle for e in earned["feedback"]], [e.expected for e in earned["frozen"]],
            [e.expected for e in earned["feedback"]],
        )
    )  # fmt: skip
    figures.append(figure(
        "gap_closed", (learned - frozen) / (oracle - frozen), "share", asked=">= 0.333",
        note=f"frozen {frozen:.4f}, feedback {learned:.4f}, oracle {oracle:.4f}; {note}",
    ))  # fmt: skip
    watched = [
        state for way in WAYS for each in states[way] for state in each
        if state.watch in ("inside", "above", "below")
    ]  # fmt: skip
    inside = sum(state.watch == "inside" for state in watched)
    figures.append(figure(
        "inside_prediction", inside / max(1, len(watched)), "share", asked=">= 0.9",
        note=f"{len(watched)} windows after a policy was published, all ways; {note}",
    ))  # fmt: skip
    stopped = [is_stopped(each) for each in states["flipped"]]
    figures.append(figure(
        "flipped_round_stopped", sum(stopped) / len(stopped), "share", asked="== 1",
        note=f"refused, or taken back after one window at a fifth of the users; {note}",
    ))  # fmt: skip
    failed = sum(
        (state.counts or {}).get("requests_failed", 0.0)
        for way in WAYS for each in states[way] for state in each
    )  # fmt: skip
    figures.append(figure("requests_failed", float(failed), "requests", asked="== 0", note=note))
    return figures


def is_stopped(states: Sequence[RoundState]) -> bool:
    """Return whether the policy of the flipped round answered the users of the canary at most."""
    name = states[FLIPPED_AT].trained
    return all(state.main != name for state in states[FLIPPED_AT + 1 :])


def rows_of(
    earned: dict[str, list[Earned]], states: dict[str, list[list[RoundState]]]
) -> list[Row]:
    """Return one row per way, seed and round."""
    rows: list[Row] = []
    for way in WAYS:
        for seed, rounds in enumerate(states[way]):
            for state in rounds:
                rows.append({
                    "way": way, "seed": seed, "round": state.number,
                    "reward": round(state.reward.mean, 4) if state.reward else 0.0,
                    "predicted": round(state.predicted.mean, 4) if state.predicted else 0.0,
                    "watch": state.watch, "outcome": state.outcome,
                    "rolled_back": state.rolled_back,
                })  # fmt: skip
            last = earned[way][seed]
            rows.append({
                "way": way, "seed": seed, "realized_last": float(last.realized.mean()),
                "expected_last": float(last.expected.mean()),
                "oracle_last": float(last.oracle.mean()),
            })  # fmt: skip
    return rows

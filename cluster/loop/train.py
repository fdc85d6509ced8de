"""Train a policy on the feedback of a window, with the learner and rollout of any other run.

Each round is a run of its own in `loop/training/round-00003`, which starts from the policy that is
served. It learns by `loop.learn`:

    feedback    RL on the rewards of all that was shown (`data.feedback`), by default with the
                utilities of prefixes as reward
    clicks      RL with the clicked items of the window as next items (`data.fresh`)
    sft         SFT on the same rows
"""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from cluster.training.controller import start_controller
from cluster.training.loop import train
from cluster.training.run import prepare
from cluster.training.sft import sft
from orchard.errors import DataError
from orchard.feedback.event_store import replayed
from orchard.feedback.read import read_feedback
from orchard.feedback.schema import ROWS
from orchard.folders import atomic_dir
from orchard.settings import Config


def train_round(
    settings: Config, number: int, *, policy: Path, feedback: Sequence[Path], folder: Path
) -> Path:
    """Train a policy in a round; a run that was interrupted goes on from its checkpoint.

    Args:
        settings: settings of the loop's run.
        number: number of the round.
        policy: folder of the policy to start from.
        feedback: feedback folders to learn from.
        folder: folder of the loop.

    Returns:
        The folder of the trained policy.
    """
    config = round_settings(settings, number, policy=policy, feedback=feedback, folder=folder)
    phase = "sft" if settings.loop.learn == "sft" else "train"
    run = prepare(config, phase, policy=policy)

    async def work() -> None:
        async with start_controller(run) as controller:
            await (sft(controller) if phase == "sft" else train(controller))

    asyncio.run(work())
    return run.result


def round_settings(
    settings: Config, number: int, *, policy: Path, feedback: Sequence[Path], folder: Path
) -> Config:
    """Return the settings of the run of a round.

    Raises:
        DataError: nothing was clicked, and the round learns from clicks.
    """
    loop, tree = settings.loop, settings.model_dump(mode="json")
    data: dict[str, Any] = {"path": str(settings.data.path.absolute())}
    if loop.learn == "feedback":
        data["feedback"] = [str(each.absolute()) for each in feedback]
    else:
        rows = write_clicks(folder / "clicks" / f"{number:05d}.parquet", feedback)
        data["fresh" if loop.learn == "clicks" else "train"] = [str(rows.absolute())]
        data["hold_back"] = 0.0
    if loop.learn == "feedback" and "weights" not in settings.rewards.model_fields_set:
        tree["rewards"]["weights"] = {"utility": 1.0}
    changes: dict[str, dict[str, Any]] = {
        "data": data,
        "model": {"path": str(policy.absolute())},
        "learner": {"steps": loop.steps} | ({"rows": "fresh"} if loop.learn == "clicks" else {}),
        "evaluate": {"every": 0, "valid_rows": settings.evaluate.valid_rows},
        "checkpoint": {"every": loop.steps},
        "cluster": {"metrics_port": None, "tracker": None},
    }
    for section, values in changes.items():
        tree[section] |= values
    tree |= {
        "name": f"round-{number:05d}", "output": str((folder / "training").absolute()),
        "seed": settings.seed + number,
    }  # fmt: skip
    return Config.model_validate(tree)


def write_clicks(path: Path, feedback: Sequence[Path]) -> Path:
    """Write the rewarded rows of feedback as rows of a split: what was clicked after which history.

    Raises:
        DataError: no row has a reward.
    """
    rows = read_feedback(feedback)
    clicked = rows.filter(pl.col("reward") > 0).select(
        pl.col("user").fill_null("").alias("user_id"), "history", pl.col("item_id").alias("target")
    )
    if clicked.is_empty():
        raise DataError(
            f"none of {len(rows)} rows of feedback has a reward, so there is no click to learn "
            'from; set loop.learn = "feedback", or let the window be longer'
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    clicked.write_parquet(path)
    return path


def add_replay(
    folder: Path, number: int, *, older: Sequence[Path], share: float, seed: int
) -> list[Path]:
    """Return the feedback folders that a round learns from: its own, and one of older requests.

    Args:
        folder: folder that holds the feedback of all rounds.
        number: number of the round.
        older: feedback folders of earlier rounds.
        share: share of older rows among all.
        seed: seed of the choice.
    """
    own = folder / f"{number:05d}"
    frames = [pl.read_parquet(each / ROWS) for each in older]
    rows = len(pl.read_parquet(own / ROWS, columns=["request_id"]))
    chosen = replayed(frames, share=share, rows=rows, seed=seed, window=number)
    if chosen is None:
        return [own]
    replay = folder / f"{number:05d}-replay"
    with atomic_dir(replay) as partial:
        chosen.write_parquet(partial / ROWS)
    return [own, replay]

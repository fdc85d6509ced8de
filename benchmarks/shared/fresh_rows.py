"""Recipes after the warm start of an Amazon set, in one process: RL and supervision on fresh rows.

The first three quarters of the validation rows are fresh, the last quarter chooses the update and
fits the weights of guides. Test rows are only scored. Every recipe of a set makes the same number
of updates of the same size from the same warm start; `supervision` continues the warm start on the
fresh rows for as long as RL on them took, at most twelve epochs, of which the best is kept.
`held back` is the comparison at equal total data: its warm start leaves out the last fifth of each
user's training rows, which RL then learns from, and nothing is added.

A policy is evaluated plainly, and with guides of its own, whose experts count the rows of the warm
start (`train`) or the fresh rows, too (`all`).
"""

import asyncio
import shutil
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.shared.recipe import ONE_THREAD
from cluster.cli.commands import TRAINED, WARM_START
from cluster.cli.fit_guide import fit_guide
from cluster.training.controller import Controller, start_controller
from cluster.training.evaluate import (
    GUIDED,
    chosen_rows,
    evaluate,
    evaluation_file,
    excludes_seen,
    guide_settings,
)
from cluster.training.loop import train
from cluster.training.measure import measure
from cluster.training.run import Run, prepare
from cluster.training.run_dir import saved_policy
from cluster.training.sft import sft
from orchard import config
from orchard.evaluation import ranking
from orchard.policy.store import open_guide
from orchard.settings import Config
from orchard.tracking.metrics_log import FILE, read_metrics

Counts = str
"""Rows that the experts of a guide count: `train` or `all`."""
HELD_BACK, SUPERVISION = "held back", "supervision"
LONGEST_SUPERVISION = 12
BEAMS = 50
IN_PROCESS = ("cluster.in_process=true", *ONE_THREAD)
ON_A_GPU = (
    "learner.gpus=1", "rollout.gpus=1", "learner.attention=dense", "learner.max_tokens=65536",
    "rollout.batch_size=256", "evaluate.batch_size=1024",
)  # fmt: skip
WEIGHTS = {
    "amazon_industrial": "rewards.weights={rule=1.0,ranking=1.0,transition=0.5}",
    "amazon_instruments": "rewards.weights={rule=1.0,ranking=1.0}",
}
UPDATES = {
    "amazon_industrial": ("learner.steps=40", "evaluate.valid_rows=1133"),
    "amazon_instruments": ("learner.steps=72", "evaluate.valid_rows=3000"),
}
RECIPES: dict[str, tuple[str, ...]] = {
    "fresh": (),
    "fresh-expert": ("rewards.weights={rule=1.0,ranking=1.0,expert=0.5}",),
    SUPERVISION: (),
    "old": ("learner.rows=train",),
    "guided": ("rollout.guide=expert",),
    "hints": ("rollout.hints=2",),
    "vstar": (
        "rollout.search=ved", "rollout.ved.guide=expert", "rollout.ved.likelihood=true",
        "rollout.ved.traversals=4", "learner.estimator=group_sibling",
    ),
}  # fmt: skip
"""Overrides of each recipe, laid over `learner.rows=fresh` and the rewards of the set."""


@dataclass(frozen=True, kw_only=True)
class World:
    """Data set, seed and variant of the policy that recipes start from."""

    name: str
    seed: int
    changes: tuple[str, ...] = ()
    """Overrides of every run of this world."""
    variant: str = ""
    """Part of the names of the run folders that tells this world from the plain one."""

    def run_name(self, recipe: str = "") -> str:
        """Return the name of the run folder of a recipe, by default of the warm start."""
        parts = (self.name, self.variant, recipe.replace(" ", "-"), str(self.seed))
        return "-".join(part for part in parts if part)

    def settings(self, recipe: str = "", *changes: str) -> Config:
        """Return the settings of the run of a recipe."""
        device = ON_A_GPU if torch.cuda.is_available() else ()
        later = () if recipe.startswith(HELD_BACK) else self._later()
        return config.load(Path(f"cluster/runs/{self.name}.toml"), [
            *IN_PROCESS, *device, "checkpoint.every=1000", "evaluate.every=10", f"seed={self.seed}",
            *later, f"name={self.run_name(recipe)}", *changes, *self.changes,
        ])  # fmt: skip

    def _later(self) -> tuple[str, ...]:
        """Write the earlier three quarters of the validation rows and the rest; name the files."""
        plain = config.load(Path(f"cluster/runs/{self.name}.toml"), self.changes)
        folder = plain.output.absolute() / f"{self.name}-later"
        folder.mkdir(parents=True, exist_ok=True)
        table = pq.read_table(plain.data.path / plain.data.valid)
        cut = 3 * len(table) // 4
        files = folder / "fresh.parquet", folder / "late.parquet"
        for file, part in zip(files, (table.slice(0, cut), table.slice(cut)), strict=True):
            if not file.is_file():
                pq.write_table(part, file)
        return f'data.fresh=["{files[0]}"]', f'data.valid="{files[1]}"'


def warm_start(world: World, *, counts: tuple[Counts, ...] = ("train", "all")) -> Config:
    """Run and evaluate the warm start of a world, unless that is done; return its settings.

    Its folder ends with the guide that counts the training rows alone, which RL takes along.
    """
    settings = world.settings()
    folder = settings.run_dir / WARM_START
    if folder.is_dir() and is_judged(settings, WARM_START, counts):
        return settings
    _phase(settings, "sft", sft)
    judge(settings, folder, WARM_START, counts)
    _fit(settings, folder, "train")
    return settings


def run_recipe(world: World, recipe: str, *, counts: tuple[Counts, ...] = ("all",)) -> None:
    """Run one recipe from the warm start of a world and evaluate it, unless that is done."""
    start = world.settings()
    warm = start.run_dir / WARM_START
    judged = WARM_START if recipe == SUPERVISION else TRAINED
    if is_judged(world.settings(recipe), judged, counts):
        return
    if recipe == HELD_BACK:
        settings = world.settings(HELD_BACK, "data.hold_back=0.2", *_updates(world))
        _phase(settings, "sft", sft)
        judge(settings, settings.run_dir / WARM_START, WARM_START, counts)
    elif recipe == SUPERVISION:
        settings = world.settings(
            recipe, "sft.rows=fresh", f"model.path={warm}", f"sft.lr={start.sft.lr / 4}",
            f"sft.epochs={_epochs_of_supervision(world)}", *UPDATES[world.name][1:],
        )  # fmt: skip
        _phase(settings, "sft", sft)
        judge(settings, settings.run_dir / WARM_START, WARM_START, counts)
        return
    else:
        changes = (*_updates(world), "learner.rows=fresh", *RECIPES[recipe])
        settings = world.settings(recipe, *changes)
        if not (settings.run_dir / WARM_START).is_dir():
            shutil.copytree(warm, settings.run_dir / WARM_START)
    _phase(settings, "train", train)
    judge(settings, settings.run_dir / "policy", TRAINED, counts)


def run_part(world: World, part: str, overrides: tuple[str, ...]) -> Config:
    """Run RL on fresh rows with some overrides and evaluate it plainly; return its settings."""
    warm = world.settings().run_dir / WARM_START
    settings = world.settings(part, *_updates(world), "learner.rows=fresh", *overrides)
    if not is_judged(settings, TRAINED, ()):
        if not (settings.run_dir / WARM_START).is_dir():
            shutil.copytree(warm, settings.run_dir / WARM_START)
        _phase(settings, "train", train)
        judge(settings, settings.run_dir / "policy", TRAINED, ())
    return settings


def evaluations_of(settings: Config, name: str, counts: tuple[Counts, ...]) -> dict[str, Path]:
    """Return the files of the evaluations of a policy: `plain`, and one for each guide."""
    folder = settings.run_dir / "evaluation"
    files = {"plain": folder / f"{name}.json"}
    return files | {f"guided, {c}": folder / f"{name}_{c}{GUIDED}.json" for c in counts}


def is_judged(settings: Config, name: str, counts: tuple[Counts, ...]) -> bool:
    """Check that all evaluations of a policy are there."""
    return all(file.is_file() for file in evaluations_of(settings, name, counts).values())


def judge(settings: Config, folder: Path, name: str, counts: tuple[Counts, ...]) -> None:
    """Evaluate a policy plainly, and with a guide of its own for each of `counts`, unless done."""
    without = settings.evaluate.model_copy(update={"guide": False})
    run = prepare(settings.model_copy(update={"evaluate": without}), "evaluate", policy=folder)
    missing = [c for c in counts if not evaluation_file(run, f"{name}_{c}{GUIDED}").is_file()]
    if not missing and evaluation_file(run, name).is_file():
        return

    async def work(controller: Controller) -> None:
        if not evaluation_file(run, name).is_file():
            await evaluate(controller, folder, split="test", beams=BEAMS, name=name)
        version, weights = saved_policy(run, folder)
        for count in missing:
            counting = _fit(settings, folder, count)
            guide = open_guide(folder, counting.catalog)
            assert guide is not None
            excludes, rows = excludes_seen(counting, guide), chosen_rows(counting, "test")
            found = await controller.rank(
                counting.test, rows, policy=version, weights=weights, beams=BEAMS, guide=guide,
                exclude_seen=excludes,
            )  # fmt: skip
            further = guide_settings(guide, excludes)
            result = measure(counting, counting.test, rows, found, BEAMS, version, further)
            ranking.write(result, evaluation_file(run, f"{name}_{count}{GUIDED}"))

    _in_controller(run, work)


def _fit(settings: Config, folder: Path, counts: Counts) -> Run:
    """Fit the guide of a policy that counts some rows, and return the run that has counted."""
    counting = settings.guide.model_copy(update={"counts": counts})
    changed = settings.model_copy(update={"guide": counting})
    run = prepare(changed, "evaluate", policy=folder)
    fit_guide(run)
    return run


def _updates(world: World) -> tuple[str, ...]:
    return (*UPDATES[world.name], "learner.ema_decay=0.9", WEIGHTS[world.name])


def _epochs_of_supervision(world: World) -> int:
    """Return the epochs on the fresh rows that take as long as RL on them took."""
    start, rl = world.settings(), world.settings("fresh")
    seconds = float(np.sum(read_metrics(rl.run_dir / FILE)["train"]["cluster/step_s"].value))
    log = read_metrics(start.run_dir / FILE)["sft"]
    files = [start.data.path / file for file in start.data.train]
    known = sum(pq.read_metadata(file).num_rows for file in files)
    share = pq.read_metadata(start.data.fresh[0]).num_rows / known
    epochs = round(seconds / (float(np.median(log["sft/epoch_s"].value)) * share))
    return min(LONGEST_SUPERVISION, max(1, epochs))


def _phase(settings: Config, phase: str, work: Callable[[Controller], Awaitable[object]]) -> None:
    """Run a phase of a run, from where it is."""
    _in_controller(prepare(settings, phase), work)  # type: ignore[arg-type]


def _in_controller(run: Run, work: Callable[[Controller], Awaitable[object]]) -> None:
    async def enter() -> None:
        async with start_controller(run) as controller:
            await work(controller)

    asyncio.run(enter())


if __name__ == "__main__":
    # One world of many, so that several processes may share a machine.
    name, seed, *recipes = sys.argv[1:]
    world = World(name=name, seed=int(seed))
    warm_start(world)
    for recipe in recipes or (*RECIPES, HELD_BACK):
        run_recipe(world, recipe)

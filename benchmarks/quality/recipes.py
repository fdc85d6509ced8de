"""Benchmark recipes after the warm start of the Amazon sets: which rows RL learns from, and how.

`benchmarks.shared.fresh_rows` runs the recipes, one world in one process, and says what each is;
`python -m benchmarks.shared.fresh_rows SET SEED` runs those of one seed, so that several processes
may share a machine. What has been run is read; `python -m benchmarks.quality.recipes FILE
[KEY=VALUE ...]` writes the table of that alone. `PARTS` are ways against groups without a hit, with
rule and ranking rewards on fresh rows, from the warm start of one seed.
"""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.shared import fresh_rows
from benchmarks.shared.fresh_rows import HELD_BACK, RECIPES, SUPERVISION, World, evaluations_of
from benchmarks.shared.measure import Figure, Report, Row, figure, report
from benchmarks.shared.recipe import means, over_seeds, spelt
from cluster.cli.commands import TRAINED, WARM_START
from cluster.training.evaluate import UNSEEN
from orchard.evaluation import ranking
from orchard.evaluation.bootstrap import Estimate
from orchard.evaluation.ranking import Evaluation
from orchard.tracking.metrics_log import FILE, read_metrics

SETS = ("amazon_industrial", "amazon_instruments")
SEEDS = 3
METRICS = ("ndcg@10/sid", "hr@1/sid", "hr@10/sid", "hr@50/sid", "ndcg@10/item")
START = "warm start"
PAIRS = (
    ("fresh", START), ("fresh", SUPERVISION), ("fresh", "old"), (SUPERVISION, START),
    ("old", START), ("fresh-expert", "fresh"), ("guided", "fresh"), ("hints", "fresh"),
    ("vstar", "guided"), ("vstar", "fresh"), (HELD_BACK, START),
)  # fmt: skip
_TWO = ("learner.updates_per_batch=2", "learner.dropout=0")
PARTS: dict[str, tuple[str, ...]] = {
    "rule and ranking": (),
    "hints": ("rollout.hints=2",),
    "hints, learned": ("rollout.hints=2", "learner.hint_weight=0.01"),
    "up to four draws": ("learner.max_draws=4",),
    "anchor": ("learner.anchor=0.1",),
    "boundary": ("learner.estimator=boundary",),
    "window of .3": ("learner.estimator=window", "learner.window=[0.0,0.3]"),
    "length in free codes": (
        'plugins=["benchmarks.quality.free_codes"]',
        "learner.estimator=group_free",
    ),
    "two updates, clip": _TWO,
    "two updates, cispo": (*_TWO, "learner.loss=cispo", "learner.clip_low=1"),
    "two updates, ecpo": (*_TWO, "learner.loss=ecpo"),
}
Lists = Mapping[str, Evaluation]
"""Evaluations of a policy by the kind of its lists."""


def run(quick: bool) -> Report:
    """Run every recipe that has not run yet, and compare them on the test rows."""
    changes = ("sft.epochs=1", "learner.steps=2", "learner.prompts_per_step=32",
               "evaluate.test_rows=100", "guide.rows=500",
               "output=runs/bench-quick") if quick else ()  # fmt: skip
    seeds = range(1 if quick else SEEDS)
    for name in SETS:
        for seed in seeds:
            world = World(name=name, seed=seed, changes=changes)
            fresh_rows.warm_start(world)
            for recipe in (*RECIPES, HELD_BACK):
                fresh_rows.run_recipe(world, recipe)
    rows = parts(World(name=SETS[0], seed=0, changes=changes))
    return table(changes, seeds=seeds, further=rows)


def table(
    changes: tuple[str, ...], *, seeds: Iterable[int] = range(SEEDS), further: Sequence[Row] = ()
) -> Report:
    """Compare what has been run; nothing is run."""
    rows, figures = list[Row](), list[Figure]()
    for name in SETS:
        policies = dict[str, dict[int, Lists]]()
        for seed in seeds:
            for recipe, lists in read(World(name=name, seed=seed, changes=changes)).items():
                policies.setdefault(recipe, {})[seed] = lists
                rows += [{"set": name, "seed": seed, "recipe": recipe, "lists": kind}
                         | means(found, [m for m in METRICS if m in found.metrics])
                         for kind, found in lists.items()]  # fmt: skip
        for pair in PAIRS:
            rows += differences(name, policies, *pair)
        figures += bars(name, policies)
    return report("recipes", figures, [*rows, *further])


def read(world: World) -> dict[str, Lists]:
    """Read the evaluations of all policies of a world that have been made."""
    runs = {START: ("", WARM_START)} | {
        recipe: (recipe, WARM_START if recipe == SUPERVISION else TRAINED)
        for recipe in (*RECIPES, HELD_BACK)
    }
    found = dict[str, Lists]()
    for policy, (recipe, name) in runs.items():
        files = evaluations_of(world.settings(recipe), name, ("train", "all"))
        files["plain, history left out"] = files["plain"].with_name(f"{name}{UNSEEN}.json")
        lists = {kind: ranking.read(file) for kind, file in files.items() if file.is_file()}
        if lists:
            found[policy] = lists
    return found


def differences(
    name: str, policies: Mapping[str, Mapping[int, Lists]], ours: str, theirs: str
) -> list[Row]:
    """Compare two policies of a set by each kind of lists, over the seeds that have both."""
    rows = list[Row]()
    for kind in ("plain", "plain, history left out", "guided, all"):
        gain, seeds = gain_of(policies, ours, theirs, kind)
        if seeds:
            rows.append({
                "set": name, "difference": f"{ours} - {theirs}", "lists": kind, "seeds": seeds,
            } | spelt(gain, [metric for metric in METRICS if metric in gain]))  # fmt: skip
    return rows


def gain_of(
    policies: Mapping[str, Mapping[int, Lists]], ours: str, theirs: str, kind: str
) -> tuple[dict[str, Estimate], int]:
    """Estimate the first policy minus the second, and count the seeds that have both."""
    both = [
        (left[kind], right[kind])
        for seed, left in policies.get(ours, {}).items()
        if (right := policies.get(theirs, {}).get(seed)) and kind in left and kind in right
    ]
    return (over_seeds(*zip(*both, strict=True)) if both else {}), len(both)


def bars(name: str, policies: Mapping[str, Mapping[int, Lists]]) -> list[Figure]:
    """Return the lower ends of the intervals that matter for a set."""
    figures = list[Figure]()
    for ours, theirs in PAIRS[:3]:
        gain, seeds = gain_of(policies, ours, theirs, "plain")
        if seeds:
            told = spelt(gain, METRICS[:1])[METRICS[0]]
            figures.append(figure(
                f"{name}_{ours}_over_{theirs}".replace(" ", "_"), gain[METRICS[0]].low, "",
                asked="> 0", note=f"NDCG@10, plain lists: {told}, {seeds} seeds",
            ))  # fmt: skip
    return figures


def parts(world: World) -> list[Row]:
    """Compare each of `PARTS` with the first, from the warm start of one world."""
    plain = ("rewards.weights={rule=1.0,ranking=1.0}",)
    rows, base = list[Row](), None
    for name, overrides in PARTS.items():
        part = f"part-{name.replace(', ', '-').replace(' ', '-')}"
        settings = fresh_rows.run_part(world, part, (*plain, *overrides))
        evaluation = ranking.read(evaluations_of(settings, TRAINED, ())["plain"])
        base = evaluation if base is None else base
        log = read_metrics(settings.run_dir / FILE)["train"]
        mean = {key: float(np.mean(log[key].value)) for key in (
            "rewards/zero_spread_share", "rollout/prompts", "rollout/forward_tokens",
            "cluster/step_s",
        )}  # fmt: skip
        rows.append({"set": world.name, "seed": world.seed, "part": name,
                     "groups_that_teach": 1 - mean["rewards/zero_spread_share"],
                     "prompts": mean["rollout/prompts"],
                     "forward_tokens": mean["rollout/forward_tokens"],
                     "step_s": mean["cluster/step_s"]} | means(evaluation, METRICS))  # fmt: skip
        if evaluation is not base:
            rows.append({"set": world.name, "difference": f"{name} - rule and ranking", "seeds": 1}
                        | spelt(over_seeds([evaluation], [base]), METRICS))  # fmt: skip
    return rows


if __name__ == "__main__":
    file, *overrides = sys.argv[1:]
    Path(file).write_text(json.dumps(table(tuple(overrides)), indent=1) + "\n")

"""Benchmark recipes after the warm start of Amazon Industrial: which rows RL learns from.

The warm start is that of `orchard bench guide`, on all training rows. The first three quarters of
the validation rows, which come later, are fresh rows; the last quarter chooses the update and fits
the weights of guides. Test rows are only scored. Every recipe makes the same number of updates of
the same size; `supervision` continues the warm start on the fresh rows alone for as long as RL on
them took. `held back` is the comparison at equal total data: its warm start leaves out the last
fifth of each user's training rows, which RL then learns from, and nothing is added.

Each policy is evaluated with its own guide as well, whose experts count the rows of the warm start
(`guided`) or the fresh rows, too (`guided, counts of all`).
"""

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from benchmarks.shared.measure import Figure, Report, Row, figure, report
from benchmarks.shared.recipe import means, over_seeds, read, spelt
from cluster.cli.commands import TRAINED, WARM_START, evaluate_policy, improve, warm_start
from cluster.cli.fit_guide import fit_guide
from cluster.training.evaluate import GUIDED
from orchard import config
from orchard.evaluation.ranking import Evaluation
from orchard.settings import Config
from orchard.tracking.metrics_log import FILE, read_metrics

RUN = Path("cluster/runs/amazon_industrial.toml")
NAME = "amazon_industrial"
METRICS = ("ndcg@10/sid", "hr@1/sid", "hr@10/sid", "hr@50/sid", "ndcg@10/item")
FRESH, LATE = "fresh.parquet", "late.parquet"
UPDATES = ("learner.steps=40", "learner.ema_decay=0.9", "evaluate.every=10",
           "evaluate.valid_rows=1133")  # fmt: skip
WAYS = {
    "RL, old rows": ("learner.rows=train",),
    "RL, fresh rows": ("learner.rows=fresh",),
    "RL, fresh rows, no counts": ("learner.rows=fresh", "rewards.weights.transition=0"),
}
SEEDS = 1
_TWO = ("learner.updates_per_batch=2", "learner.dropout=0")
PARTS = {
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
"""Ways against groups without a hit, lengths and losses, with rule and ranking rewards on fresh
rows."""


def run(quick: bool) -> Report:
    """Run every recipe that has not run yet, and compare them on the test rows."""
    quick_changes = ("sft.epochs=1", "learner.steps=2", "learner.prompts_per_step=32",
                     "evaluate.every=1", "evaluate.test_rows=100", "evaluate.valid_rows=50",
                     "guide.rows=500", "output=runs/bench-quick")  # fmt: skip
    changes = quick_changes if quick else ()
    rows, figures = list[Row](), list[Figure]()
    policies = dict[str, list[dict[str, Evaluation]]]()
    for seed in range(SEEDS):
        for name, evaluations in _seed(seed, changes).items():
            policies.setdefault(name, []).append(evaluations)
            rows += [{"seed": seed, "recipe": name, "lists": lists} | means(evaluation, METRICS)
                     for lists, evaluation in evaluations.items()]  # fmt: skip
    for ours, theirs in (
        ("RL, fresh rows", "warm start"), ("RL, old rows", "warm start"),
        ("supervision, fresh rows", "warm start"), ("RL, fresh rows", "RL, old rows"),
        ("RL, fresh rows", "supervision, fresh rows"), ("RL, held back", "warm start, held back"),
        ("RL, held back", "warm start"),
    ):  # fmt: skip
        for lists in ("plain", "guided", "guided, counts of all"):
            left, right = ([seed[lists] for seed in policies[side]] for side in (ours, theirs))
            gain = over_seeds(left, right)
            rows.append({"difference": f"{ours} - {theirs}", "lists": lists, "seeds": SEEDS}
                        | spelt(gain, METRICS))  # fmt: skip
            if ours == "RL, fresh rows" and lists == "plain":
                figures.append(figure(
                    f"fresh_rl_over_{theirs}".replace(", ", "_").replace(" ", "_"),
                    gain["ndcg@10/sid"].low, "", asked="> 0",
                    note="NDCG@10, lower end of the paired 95 % interval over rows; mean "
                    f"{gain['ndcg@10/sid'].mean:+.4f}, {SEEDS} seed",
                ))  # fmt: skip
    return report("recipes", figures, [*rows, *_parts(changes)])


def _parts(changes: tuple[str, ...]) -> list[Row]:
    """Compare each of `PARTS` with the first, from the warm start of seed 0."""
    start = config.load(RUN, [f"name={NAME}-0", "seed=0", *changes])
    common = (*UPDATES, *_later_rows(start), *changes, "seed=0", "learner.rows=fresh",
              "rewards.weights.transition=0")  # fmt: skip
    rows, base = list[Row](), None
    for name, overrides in PARTS.items():
        settings = config.load(RUN, [*common, f"name={_folder(f'part-{name}', 0)}", *overrides])
        if not (settings.run_dir / WARM_START).is_dir():
            shutil.copytree(start.run_dir / WARM_START, settings.run_dir / WARM_START)
        improve(settings, dry_run=False)
        evaluation = read(settings, TRAINED)
        base = evaluation if base is None else base
        log = read_metrics(settings.run_dir / FILE)["train"]
        mean = {key: float(np.mean(log[key].value)) for key in (
            "rewards/zero_spread_share", "rollout/prompts", "rollout/forward_tokens",
            "cluster/step_s",
        )}  # fmt: skip
        rows.append({"part": name, "groups_that_teach": 1 - mean["rewards/zero_spread_share"],
                     "prompts": mean["rollout/prompts"],
                     "forward_tokens": mean["rollout/forward_tokens"],
                     "step_s": mean["cluster/step_s"]} | means(evaluation, METRICS))  # fmt: skip
        if evaluation is not base:
            rows.append({"difference": f"{name} - rule and ranking", "seeds": 1}
                        | spelt(over_seeds([evaluation], [base]), METRICS))  # fmt: skip
    return rows


def _seed(seed: int, changes: tuple[str, ...]) -> dict[str, dict[str, Evaluation]]:
    """Run every recipe from the warm start of one seed, and return its evaluations."""
    start = config.load(RUN, [f"name={NAME}-{seed}", f"seed={seed}", *changes])
    if not (start.run_dir / "evaluation" / f"{WARM_START}.json").is_file():
        warm_start(start, dry_run=False)
    later = (*UPDATES, *_later_rows(start), *changes, f"seed={seed}")
    evaluations, seconds = dict[str, dict[str, Evaluation]](), 0.0
    for name, overrides in WAYS.items():
        settings = config.load(RUN, [*later, f"name={_folder(name, seed)}", *overrides])
        if not (settings.run_dir / WARM_START).is_dir():
            shutil.copytree(start.run_dir / WARM_START, settings.run_dir / WARM_START)
        improve(settings, dry_run=False)
        if name == "RL, fresh rows":
            log = read_metrics(settings.run_dir / FILE)["train"]
            seconds = float(np.sum(log["cluster/step_s"].value))
            evaluations["warm start"] = _judged(settings, WARM_START)
        evaluations[name] = _judged(settings, "policy")
    epoch_s = float(np.median(read_metrics(start.run_dir / FILE)["sft"]["sft/epoch_s"].value))
    num_fresh = 3 * _num_rows(start, start.data.valid) / 4
    share = num_fresh / sum(_num_rows(start, name) for name in start.data.train)
    control = config.load(RUN, [
        *later, f"name={_folder('supervision, fresh rows', seed)}", "sft.rows=fresh",
        f"model.path={start.run_dir / WARM_START}", "sft.lr=5e-4",
        f"sft.epochs={max(1, round(seconds / (epoch_s * share)))}",
    ])  # fmt: skip
    warm_start(control, dry_run=False)
    evaluations["supervision, fresh rows"] = _judged(control, WARM_START)
    held = config.load(RUN, [*UPDATES, *changes, f"seed={seed}", "data.hold_back=0.2",
                             f"name={_folder('RL, held back', seed)}"])  # fmt: skip
    if not (held.run_dir / "evaluation" / f"{WARM_START}.json").is_file():
        warm_start(held, dry_run=False)
    improve(held, dry_run=False)
    evaluations["warm start, held back"] = _judged(held, WARM_START)
    evaluations["RL, held back"] = _judged(held, "policy")
    return evaluations


def _judged(settings: Config, folder: str) -> dict[str, Evaluation]:
    """Evaluate a policy of a run plainly and with guides of its own, unless that is done."""
    policy = settings.run_dir / folder
    plain = WARM_START if folder == WARM_START else TRAINED
    evaluations = {"plain": read(settings, plain)}
    for lists, counts in (("guided", "train"), ("guided, counts of all", "all")):
        name = f"{plain}_{counts}"
        if not (settings.run_dir / "evaluation" / f"{name}{GUIDED}.json").is_file():
            counting = settings.guide.model_copy(update={"counts": counts})
            changed = settings.model_copy(update={"guide": counting})
            fit_guide(changed, policy)
            evaluate_policy(changed, policy=policy, split="test", beams=settings.evaluate.beams,
                            name=name, against=None, json_file=None)  # fmt: skip
        evaluations[lists] = read(settings, f"{name}{GUIDED}")
    return evaluations


def _later_rows(start: Config) -> tuple[str, ...]:
    """Write the earlier three quarters of the validation rows and the rest; return the settings."""
    folder = start.output.absolute() / f"{NAME}-later"
    folder.mkdir(parents=True, exist_ok=True)
    table = pq.read_table(start.data.path / start.data.valid)
    cut = 3 * len(table) // 4
    for name, part in ((FRESH, table.slice(0, cut)), (LATE, table.slice(cut))):
        if not (folder / name).is_file():
            pq.write_table(part, folder / name)
    return (f'data.fresh=["{folder / FRESH}"]', f'data.valid="{folder / LATE}"')


def _num_rows(start: Config, name: str) -> int:
    return pq.read_metadata(start.data.path / name).num_rows


def _folder(recipe: str, seed: int) -> str:
    return f"{NAME}-{recipe.replace(', ', '-').replace(' ', '-')}-{seed}"

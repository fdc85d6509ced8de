"""Benchmark the guided beam on Amazon Industrial and Instruments: quality, proof, cost, VED.

Each seed starts from the SFT policy of its run file, and fits a guide to it (`orchard fit guide`).
All lists of a data set leave out the history, or keep it, as its guide says. `plain` is the beam,
`ordered` the same candidates in the order of log p + r, `guided` the beam that ranks prefixes by
log p + V, and `expert` the leaves with the best scores of one expert, without a policy: the best
expert is the one with the highest NDCG@10 on validation rows.

Shapes:  R rows   C candidates
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.shared.measure import Figure, Report, Row, figure, interleaved, report
from benchmarks.shared.recipe import means, over_seeds, spelt
from cluster.cli.commands import WARM_START, warm_start
from cluster.cli.fit_guide import fit_guide
from cluster.training.measure import measure
from cluster.training.run import Run, prepare
from orchard import arrays, config, ragged
from orchard.catalog.view import full_view
from orchard.data.prompts import Split, make_prompts
from orchard.evaluation import bootstrap
from orchard.evaluation.ranking import Evaluation
from orchard.guide.guide import Guide
from orchard.policy.store import GUIDE, Policy, open_guide
from orchard.settings import Config, VedConfig
from orchard.types import Cost, PolicyVersion
from rollout.candidates import Candidates
from rollout.engine.protocol import SearchRunner
from rollout.engine.torch import TorchEngine
from rollout.engine.vllm import VllmEngine
from rollout.search.beam import beam
from rollout.search.guided import without_history
from rollout.search.ved.search import ved

Search = Callable[..., Candidates]
METRICS = ("ndcg@10/sid", "hr@1/sid", "hr@10/sid", "ndcg@10/item", "hr@10/item")
WIDTHS = (16, 50)
BATCH, K = 64, 10
VED_ROWS, VED_BUDGET, VED_WIDTH = 600, 33, 8


@dataclass(frozen=True, kw_only=True)
class World:
    """A data set: its run file, and how many seeds are measured."""

    name: str
    seeds: int

    @property
    def run_file(self) -> Path:
        """Path of the run file."""
        return Path("cluster/runs") / f"{self.name}.toml"


WORLDS = (World(name="amazon_industrial", seeds=3), World(name="amazon_instruments", seeds=1))


@dataclass(frozen=True, kw_only=True)
class Lists:
    """Evaluations of one seed by the name of the list, and its candidates where kept."""

    evaluations: dict[str, Evaluation]
    in_set: dict[str, np.ndarray]
    """Whether the target is among the first 16 candidates of each row, by list."""
    rows: list[Row]


def run(quick: bool) -> Report:
    """Measure every data set; `quick` is a smoke test with little training and few rows."""
    torch.set_num_threads(1)
    changes = ("sft.epochs=2", "evaluate.test_rows=200", "evaluate.valid_rows=50",
               "guide.rows=1000", "output=runs/bench-quick") if quick else ()  # fmt: skip
    figures, rows = list[Figure](), list[Row]()
    for world in WORLDS:
        num_rows = 200 if quick else None
        configs = [
            config.load(world.run_file, [f"name={world.name}-{seed}", f"seed={seed}", *changes])
            for seed in range(1 if quick else world.seeds)
        ]
        seeds = [_measure(settings, num_rows) for settings in configs]
        more_figures, more_rows = _compare(world.name, seeds)
        figures += more_figures
        rows += more_rows
        if world is WORLDS[0]:
            cost_figures, cost_rows = _costs(configs[0], repeats=3 if quick else 10)
            figures += cost_figures
            rows += [*cost_rows, *_ved(configs[0], VED_ROWS if num_rows is None else num_rows)]
    return report("guide", figures, rows)


def _guided_run(settings: Config) -> tuple[Run, Policy, Guide]:
    """Train the SFT policy and fit its guide, unless both exist."""
    folder = settings.run_dir / WARM_START
    if not (settings.run_dir / "evaluation" / f"{WARM_START}.json").is_file():
        warm_start(settings, dry_run=False)
    if not (folder / GUIDE).is_dir():
        fit_guide(settings, folder)
    prepared = prepare(settings, "evaluate", policy=folder)
    torch.set_num_threads(1)
    guide = open_guide(folder, prepared.catalog)
    assert guide is not None, "fit_guide has written one"
    return prepared, Policy.open(folder, prepared.tokenizer), guide


def _measure(settings: Config, num_rows: int | None) -> Lists:
    """Search every list of one seed, and the wide guided list with early stop."""
    prepared, policy, guide = _guided_run(settings)
    engine = TorchEngine(policy.model, prepared.tokenizer, policy.version)
    split = prepared.test
    rows = np.arange(len(split))[:num_rows]
    expert = _best_expert(prepared, guide, num_rows, policy.version)
    lists: dict[str, tuple[Candidates, int]] = {
        "expert": (
            expert_lists(prepared, split, rows, guide, expert, guide.exclude_seen),
            WIDTHS[-1],
        )
    }
    for width in WIDTHS:
        plain = _search(prepared, engine, split, rows, partial(beam, width=width), guide)
        lists[f"plain {width}"] = plain, width
        lists[f"ordered {width}"] = _ordered(prepared, split, rows, plain, guide), width
        guided = partial(beam, width=width, guide=guide, prove=K)
        lists[f"guided {width}"] = (
            _search(prepared, engine, split, rows, guided, guide), width
        )  # fmt: skip
    if guide.exclude_seen:
        seen = partial(beam, width=WIDTHS[-1])
        lists["plain 50, history kept"] = (
            _search(prepared, engine, split, rows, seen, None), WIDTHS[-1]
        )  # fmt: skip
    first = partial(beam, width=WIDTHS[-1], guide=guide, prove=K, count=K)
    early = _search(prepared, engine, split, rows, first, guide)
    whole = lists[f"guided {WIDTHS[-1]}"][0]
    table: list[Row] = [{
        "seed": settings.seed, "data": settings.name, "expert": expert,
        "early_stop_tokens": early.cost.forward_tokens / whole.cost.forward_tokens,
        "same_first_lists": _same_first(early, whole),
        "guide_mib": guide.num_bytes / 2**20,
    }]  # fmt: skip
    evaluations = {
        name: measure(prepared, split, rows, candidates, width, policy.version)
        for name, (candidates, width) in lists.items()
    }
    target = prepared.catalog.leaf_of_item[split.target[rows]]
    in_set = {name: _has_target(candidates, target) for name, (candidates, _) in lists.items()}
    for name, evaluation in evaluations.items():
        extra = {"forward_tokens": evaluation.extra["forward_tokens"] / len(rows)}
        if "proved@10" in evaluation.extra:
            extra["proved@10"] = evaluation.extra["proved@10"]
        table.append({"seed": settings.seed, "data": settings.name, "list": name}
                     | means(evaluation, METRICS) | extra)  # fmt: skip
    return Lists(evaluations=evaluations, in_set=in_set, rows=table)


def _search(
    prepared: Run,
    engine: SearchRunner,
    split: Split,
    rows: np.ndarray,
    search_fn: Search,
    guide: Guide | None,
) -> Candidates:
    """Search rows of a split in batches, without the history if the guide says so."""
    if guide is not None and guide.exclude_seen:
        view = full_view(prepared.catalog.trie)
        search_fn = partial(without_history, search_fn=search_fn, view=view)
    batches = (rows[first : first + BATCH] for first in range(0, len(rows), BATCH))
    return Candidates.concatenate(
        [engine.run(search_fn, make_prompts(prepared.tokenizer, split, rows)) for rows in batches]
    )


def _ordered(
    prepared: Run, split: Split, rows: np.ndarray, candidates: Candidates, guide: Guide
) -> Candidates:
    """Return the same candidates in the order of log p + r."""
    prompts = make_prompts(prepared.tokenizer, split, rows)
    prompt = ragged.row_of(candidates.start)
    key = candidates.score + guide.reward(prompts, prompt, candidates.leaf)
    return arrays.take(candidates, np.lexsort((-key, prompt)), axis="C")


def expert_lists(
    prepared: Run, split: Split, rows: np.ndarray, guide: Guide, expert: str, exclude_seen: bool
) -> Candidates:
    """Return the leaves with the highest scores of one expert, as candidates."""
    trie = prepared.catalog.trie
    column = [e.name for e in guide.experts].index(expert)
    alone = replace(guide, experts=(guide.experts[column],), terms=())
    parts = list[Candidates]()
    for first in range(0, len(rows), BATCH):
        batch = make_prompts(prepared.tokenizer, split, rows[first : first + BATCH])
        scores = alone.scores(batch)
        kept = scores.score[:, 0] > 0
        if exclude_seen:
            kept &= ~scores.seen
        prompt, leaf, score = scores.prompt[kept], scores.leaf[kept], scores.score[kept, 0]
        order = np.lexsort((leaf, -score, prompt))
        start = ragged.starts(np.bincount(prompt, minlength=len(batch)))
        order = order[ragged.index_in_row(start) < WIDTHS[-1]]
        count = np.minimum(np.diff(start), WIDTHS[-1])
        leaf = leaf[order]
        node = trie.path(trie.node_of(torch.from_numpy(leaf))).numpy()
        parts.append(Candidates(
            start=ragged.starts(count), node=node, logprob=np.zeros(node.shape, np.float32),
            score=np.log(score[order]).astype(np.float32), leaf=leaf, cost=Cost(),
        ))  # fmt: skip
    return Candidates.concatenate(parts)


def _best_expert(prepared: Run, guide: Guide, num_rows: int | None, version: PolicyVersion) -> str:
    """Return the expert that is best alone on the validation rows."""
    rows = np.arange(len(prepared.valid))[:num_rows]
    quality = dict[str, float]()
    for expert in guide.experts:
        candidates = expert_lists(
            prepared, prepared.valid, rows, guide, expert.name, guide.exclude_seen
        )
        result = measure(prepared, prepared.valid, rows, candidates, WIDTHS[-1], version)
        quality[expert.name] = result.metrics["ndcg@10/sid"].mean
    return max(quality, key=lambda name: quality[name])


def _compare(name: str, seeds: Sequence[Lists]) -> tuple[list[Figure], list[Row]]:
    """Compare the lists of a data set, paired by row and averaged over the seeds."""
    rows: list[Row] = [row for seed in seeds for row in seed.rows]
    figures = list[Figure]()
    wide, narrow = f"guided {WIDTHS[-1]}", f"guided {WIDTHS[0]}"
    pairs = [
        (narrow, f"plain {WIDTHS[0]}"), (wide, f"plain {WIDTHS[-1]}"),
        (narrow, f"ordered {WIDTHS[0]}"), (wide, f"ordered {WIDTHS[-1]}"),
        (narrow, f"ordered {WIDTHS[-1]}"), (narrow, "expert"), (wide, "expert"),
    ]  # fmt: skip
    for ours, theirs in pairs:
        gain = over_seeds(
            [seed.evaluations[ours] for seed in seeds],
            [seed.evaluations[theirs] for seed in seeds],
        )  # fmt: skip
        rows.append({"data": name, "difference": f"{ours} - {theirs}", "seeds": len(seeds)}
                    | spelt(gain, tuple(m for m in METRICS if m in gain)))  # fmt: skip
        if (ours, theirs) in (pairs[0], pairs[1], pairs[6]):
            figures.append(figure(
                f"{name}_{ours}_over_{theirs}".replace(" ", "_"), gain["ndcg@10/sid"].low, "",
                asked="> 0", note="NDCG@10, lower end of 95 % over rows and seeds; mean "
                f"{gain['ndcg@10/sid'].mean:+.4f}, {len(seeds)} seeds",
            ))  # fmt: skip
    sides = [np.stack([s.in_set[side].astype(float) for s in seeds])[:, :, None]
             for side in (narrow, f"plain {WIDTHS[0]}")]  # fmt: skip
    estimate = bootstrap.estimates_over_seeds(["in_set"], *sides, resamples=2000, seed=0)["in_set"]
    figures.append(figure(
        f"{name}_target_in_set", estimate.low, "", asked="> 0",
        note=f"target among {WIDTHS[0]}, guided - plain, lower end of 95 %; mean "
        f"{estimate.mean:+.4f}",
    ))  # fmt: skip
    return figures, rows


def _costs(settings: Config, *, repeats: int) -> tuple[list[Figure], list[Row]]:
    """Time the guided beam against the plain one on both engines, on the same test rows."""
    prepared, policy, guide = _guided_run(settings)
    prompts = make_prompts(prepared.tokenizer, prepared.test, np.arange(BATCH))
    rollout = prepared.config.rollout.model_copy(update={"threads": 1, "engine": "vllm"})
    engines: dict[str, SearchRunner] = {
        "torch": TorchEngine(policy.model, prepared.tokenizer, policy.version),
        "vllm": VllmEngine(prepared.policy, policy.model, prepared.tokenizer, policy.version,
                           rollout, seed=0),
    }  # fmt: skip
    figures, rows = list[Figure](), list[Row]()
    for name, engine in engines.items():
        for width in WIDTHS:
            cases = {
                "plain": partial(engine.run, partial(beam, width=width), prompts),
                "guided": partial(engine.run, partial(beam, width=width, guide=guide), prompts),
            }
            seconds = interleaved(cases, repeats=repeats)
            ratio = seconds["guided"] / seconds["plain"]
            rows.append({
                "engine": name, "width": width, "plain_ms": 1000 * seconds["plain"] / BATCH,
                "guided_ms": 1000 * seconds["guided"] / BATCH, "guided_over_plain": ratio,
            })  # fmt: skip
            figures.append(figure(
                f"guided_over_plain_{name}_{width}", ratio, "x", asked="<= 1.15",
                note=f"seconds, {BATCH} prompts of Industrial, interleaved, one thread",
            ))  # fmt: skip
    return figures, rows


def _ved(settings: Config, num_rows: int) -> list[Row]:
    """Compare VED with the guide's values against beams, 16 candidates of test rows."""
    prepared, policy, guide = _guided_run(settings)
    engine = TorchEngine(policy.model, prepared.tokenizer, policy.version)
    rows = np.arange(min(num_rows, len(prepared.test)))
    target = prepared.catalog.leaf_of_item[prepared.test.target[rows]]
    common = {"budget": VED_BUDGET, "width": VED_WIDTH, "traversals": 4}
    ways: dict[str, Search] = {
        "plain beam": partial(beam, width=WIDTHS[0]),
        "guided beam": partial(beam, width=WIDTHS[0], guide=guide),
    }
    for name, changes in (
        ("ved, V = 0", {"value_weight": 0.0}),
        ("ved, G = V + H", {}),
        ("ved, G = log p + V + H", {"likelihood": True}),
        ("ved, G = log p + V, no exploration",
         {"likelihood": True, "exploration": 0.0, "entropy_weight": 0.0}),
    ):  # fmt: skip
        ved_config = VedConfig.model_validate({**common, **changes, "guide": "expert"})
        ways[name] = partial(ved, settings=ved_config, count=WIDTHS[0], seed=0, critic=guide)
    table, base = list[Row](), None
    for name, search_fn in ways.items():
        candidates = _search(prepared, engine, prepared.test, rows, search_fn, guide)
        has_target = _has_target(candidates, target)
        base = has_target if base is None else base
        gap = (has_target.astype(float) - base)[:, None]
        over = bootstrap.estimates(["in_set"], gap, resamples=2000, seed=0)["in_set"]
        ordered = _ordered(prepared, prepared.test, rows, candidates, guide)
        quality = measure(prepared, prepared.test, rows, ordered, WIDTHS[0], policy.version)
        table.append({
            "search": name, "target_in_set": float(has_target.mean()),
            "over_the_beam": f"{over.mean:+.4f} [{over.low:+.4f}, {over.high:+.4f}]",
            "forward_tokens": candidates.cost.forward_tokens / len(rows),
            "leaf_tokens": candidates.cost.leaf_tokens / len(rows),
            "ndcg@10/sid, ordered by log p + r": quality.metrics["ndcg@10/sid"].mean,
        })  # fmt: skip
    return table


def _has_target(candidates: Candidates, target: np.ndarray) -> np.ndarray:
    """Return whether the first 16 candidates of each prompt hold its target."""
    prompt = ragged.row_of(candidates.start)
    hit = (candidates.leaf == target[prompt]) & (ragged.index_in_row(candidates.start) < WIDTHS[0])
    return np.bincount(prompt[hit], minlength=len(target)) > 0


def _same_first(a: Candidates, b: Candidates) -> float:
    """Return the share of prompts whose first ten candidates are the same."""
    same = [
        np.array_equal(a.leaf[a.start[i] :][: min(K, a.count[i])],
                       b.leaf[b.start[i] :][: min(K, b.count[i])])
        for i in range(len(a.count))
    ]  # fmt: skip
    return float(np.mean(same))

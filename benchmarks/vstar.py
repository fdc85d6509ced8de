"""V-STAR (arXiv 2602.10699) on Amazon Industrial: what a guided search costs, and what it brings.

The ablation branches off one warm start per seed and gives every way equal prompts and updates:
one seed for all ways, three for the two ends, which are also set beside a control that goes on with
the warm start for as long as RL took.
`beam` of width 16 forwards what the paper counts as budget 1x (33 tokens), width 32 as 2x (65).
After training, sets of 64 candidates are compared at equal forward tokens on held-out prompts.
The two ends are run once more on Amazon Instruments, with the same recipe and one seed.
"""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.decode import LENGTH
from benchmarks.shared.measure import Figure, Report, Row, figure, interleaved, report
from benchmarks.shared.recipe import ONE_THREAD, branch, control_of, means, over_seeds, read, spelt
from cluster.cli.commands import WARM_START
from cluster.training.run import Run, prepare
from learner.advantage.estimators import ESTIMATORS
from learner.batch.pack import pack
from learner.logprob_model import LogprobModel
from learner.logprobs import to_tensors
from orchard import config
from orchard.data.prompts import make_prompts
from orchard.evaluation import bootstrap, ranking
from orchard.evaluation.diagnostics import grouped_spearman
from orchard.evaluation.ranking import Evaluation
from orchard.policy import model, value_head
from orchard.settings import Config, VedConfig
from orchard.tracking.metrics_log import FILE, read_metrics
from orchard.types import PolicyVersion, Prompts, ScoredTrees
from rollout.candidates import Candidates
from rollout.engine.protocol import DecodingBackend, SearchRunner
from rollout.engine.torch import TorchEngine
from rollout.engine.vllm import VllmEngine
from rollout.search.beam import beam, sample
from rollout.search.ved.search import ved
from rollout.search_trees import build_search_trees

Search = Callable[[DecodingBackend, Prompts], Candidates]
RUN = Path("cluster/runs/vstar_industrial.toml")
BEAM = ("rollout.search=beam", "model.value_head=false")
WAYS: Mapping[str, tuple[str, ...]] = {
    "beam+grpo": (*BEAM, "learner.estimator=group"),
    "beam+sibling": (*BEAM, "learner.estimator=sibling"),
    "ved_v+grpo": ("rollout.ved.entropy_weight=0.0", "learner.estimator=group"),
    "ved_h+grpo": ("rollout.ved.value_weight=0.0", "learner.estimator=group"),
    "ved+grpo": ("learner.estimator=group",),
    "ved+sibling": ("learner.estimator=sibling",),
    "ved+both": ("learner.estimator=group_sibling",),
    "ved+both, held": (
        "learner.estimator=group_sibling", "learner.sibling_weight=0.2", "learner.kl.weight=0.2",
        "learner.value.outcome={rule=1.0,transition=0.5}", "learner.value.target=monte_carlo",
        "learner.value.lr=5e-3",
    ),
    "beam_2x+grpo": (*BEAM, "learner.estimator=group", "rollout.group_size=32"),
    "ved_2x+both": ("learner.estimator=group_sibling", "rollout.ved.budget=65"),
}  # fmt: skip
ENDS = ("beam+grpo", "ved+both")
INSTRUMENTS = (
    "data.path=../shared/data/amazon_instruments", "data.train=[\"train.parquet\"]",
    "data.max_history=20", "sft.epochs=12",
)  # fmt: skip
"""What the recipe of Industrial becomes on the other catalog, as in amazon_instruments.toml."""
METRICS = ("ndcg@10/sid", "hr@1/sid", "hr@3/sid", "hr@10/sid", "hr@50/sid")
BATCH, WIDTH, BUDGET = 32, 16, 33
SET, SET_BUDGET = 64, 129
"""Candidates of a held-out set, and what a beam of as many forwards over three codes."""
DRAWS, TEMPERATURE = 64, 1.5
"""Of the sets in which the paper correlates values and log-probabilities with the reward."""
SEED = 7


def run(quick: bool) -> Report:
    """Costs and ablation; `quick` has one seed and a few updates, and shows only that it works."""
    cut = ("sft.epochs=1", "learner.steps=2", "learner.prompts_per_step=16", "evaluate.every=1",
           "evaluate.test_rows=100", "evaluate.valid_rows=50", "evaluate.resamples=200",
           "rollout.ved.warmup=1", "output=runs/bench-quick")  # fmt: skip
    changes, seeds = (cut, 1) if quick else (ONE_THREAD, 3)
    costs, figures = _costs(repeats=3 if quick else 10)
    found = {way: [_branch(way, 0, changes)] for way in WAYS}
    for seed in range(1, seeds):
        for way in ENDS:
            found[way].append(_branch(way, seed, changes))
    rows: list[Row] = [
        {"way": way, "seed": seed} | means(read(one), METRICS) | _spent(one)
        for way, several in found.items()
        for seed, one in enumerate(several)
    ]
    for way in WAYS:
        if way != "beam+grpo":
            theirs = found["beam+grpo"][: len(found[way])]
            gain = over_seeds([read(one) for one in found[way]], [read(one) for one in theirs])
            rows.append({"difference": f"{way} - beam+grpo", "seeds": len(found[way])}
                        | spelt(gain, METRICS))  # fmt: skip
    others = {
        "beam_grpo": [read(one) for one in found["beam+grpo"]],
        "warm_start": [read(one, WARM_START) for one in found["ved+both"]],
        "control": [_control(seed, found["ved+both"][seed], changes) for seed in range(seeds)],
    }
    for name, theirs in others.items():
        if name != "beam_grpo":
            rows += [{"policy": name, "seed": seed} | means(one, METRICS)
                     for seed, one in enumerate(theirs)]  # fmt: skip
        gain = over_seeds([read(one) for one in found["ved+both"]], theirs)
        rows.append({"difference": f"ved+both - {name}", "seeds": seeds} | spelt(gain, METRICS))
        figures.append(figure(f"ved_both_over_{name}", gain["ndcg@10/sid"].low, "", asked="> 0",
                              note=f"NDCG@10, lower end of the paired 95 % interval, {seeds} "
                              f"seeds; mean {gain['ndcg@10/sid'].mean:+.4f}"))  # fmt: skip
    rows += _instruments(changes)
    sets, best = _sets(found["ved+both"], num_rows=100 if quick else 600)
    return report("vstar", [*figures, *best], [*costs, *rows, *sets])


def _costs(*, repeats: int) -> tuple[list[Row], list[Figure]]:
    """Guided search beside a beam of sixteen, on both engines; random weights, one thread."""
    torch.set_num_threads(1)
    settings = config.load(RUN, ["name=vstar-costs"])
    at = prepare(settings, "sft")
    policy = model.create(settings.model, at.tokenizer, seed=0)
    value_head.attach(policy, seed=0)
    version = PolicyVersion(step=0, digest="")
    folder = settings.run_dir / "policy"
    shutil.rmtree(folder, ignore_errors=True)
    value_head.save(policy, folder)
    rollout = settings.rollout.model_copy(update={"threads": 1})
    engines: dict[str, SearchRunner] = {
        "vllm": VllmEngine(folder, policy, at.tokenizer, version, rollout,
                           seed=0),
        "torch": TorchEngine(policy, at.tokenizer, version),
    }  # fmt: skip
    prompts, rows, figures = _prompts(at), list[Row](), list[Figure]()
    for name, engine in engines.items():
        searches = _searches()
        seconds = interleaved(
            {way: partial(engine.run, find, prompts) for way, find in searches.items()},
            repeats=repeats,
        )
        for way, find in searches.items():
            cost = engine.run(find, prompts).cost
            rows.append({
                "engine": name, "search": way, "seconds": seconds[way],
                "over_beam": seconds[way] / seconds["beam"], "passes": cost.passes,
                "forward_tokens": cost.forward_tokens, "leaf_tokens": cost.leaf_tokens,
                "prefill_tokens": cost.prefill_tokens,
            })  # fmt: skip
        best = min(seconds[way] for way in searches if way != "beam")
        figures.append(figure(f"ved_over_beam_{name}", best / seconds["beam"], "x", asked="<= 1.6",
                              note=f"{BATCH} prompts of {LENGTH} tokens, budget {BUDGET}, beam "
                              f"{WIDTH}; best number of traversals to a pass"))  # fmt: skip
    return rows, figures


def _searches() -> dict[str, Search]:
    guided = {
        f"ved, {count} to a pass": partial(
            ved, settings=VedConfig(budget=BUDGET, traversals=count), count=WIDTH, seed=0
        )
        for count in (1, 2, 4, 8)
    }
    return {"beam": partial(beam, width=WIDTH), **guided}


def _prompts(at: Run) -> Prompts:
    token = np.random.default_rng(SEED).integers(3, at.tokenizer.size, BATCH * LENGTH)
    return Prompts(
        id=np.arange(BATCH),
        target=np.zeros(BATCH, np.int64),
        history=np.zeros(0, np.int64),
        history_start=np.zeros(BATCH + 1, np.int64),
        token=token.astype(np.int32),
        token_start=np.arange(BATCH + 1) * LENGTH,
    )


def _begin(seed: int, changes: tuple[str, ...], of: str = "vstar") -> Config:
    return config.load(RUN, [*changes, f"name={of}-start-{seed}", f"seed={seed}"])


def _branch(way: str, seed: int, changes: tuple[str, ...], of: str = "vstar") -> Config:
    """The run of one way from the warm start of its seed, done or only read."""
    begin = _begin(seed, changes, of)
    name = way.replace("+", "-").replace(", ", "-")
    own = config.load(RUN, [*changes, f"name={of}-{name}-{seed}", f"seed={seed}", *WAYS[way]])
    branch(begin, own)
    return own


def _instruments(changes: tuple[str, ...]) -> list[Row]:
    """The two ends on Amazon Instruments, from one warm start."""
    # The cuts of a quick run come last: a later change of one setting is the one that counts.
    own = (*INSTRUMENTS, *changes)
    runs = {way: _branch(way, 0, own, "vstar-instruments") for way in ENDS}
    found = {way: read(run) for way, run in runs.items()}
    found["warm_start"] = read(runs["ved+both"], WARM_START)
    rows: list[Row] = [
        {"instruments": way, "seed": 0} | means(one, METRICS) for way, one in found.items()
    ]
    for ours, theirs in (ENDS[::-1], *((way, "warm_start") for way in ENDS)):
        gain = over_seeds([found[ours]], [found[theirs]])
        rows.append({"instruments": f"{ours} - {theirs}", "seeds": 1} | spelt(gain, METRICS))
    return rows


def _control(seed: int, like: Config, changes: tuple[str, ...]) -> Evaluation:
    """The warm start after more supervision, for as long as that run of RL took."""
    control = control_of(_begin(seed, changes), RUN, _spent(like)["train_s"], (
        *changes, f"name=vstar-control-{seed}", f"seed={seed}",
    ))  # fmt: skip
    return read(control, WARM_START)


def _sets(runs: list[Config], *, num_rows: int) -> tuple[list[Row], list[Figure]]:
    """Hits among 64 candidates of held-out prompts, guided against beam, at equal tokens.

    And how well the value of a prefix, its log-probability, or that of its last code alone, goes
    with a hit, in draws that none of them has chosen.
    """
    torch.set_num_threads(1)
    budget = VedConfig(budget=SET_BUDGET, width=SET // 2, traversals=4)
    searches: dict[str, Search] = {
        "beam": partial(beam, width=SET),
        "ved": partial(ved, settings=budget, count=SET, seed=SEED),
    }
    hits: dict[str, list[np.ndarray]] = {name: [] for name in searches}
    diversity: dict[str, list[float]] = {name: [] for name in searches}
    ranks: dict[str, list[list[float]]] = {}
    for settings in runs:
        at = prepare(settings, "train", policy=settings.run_dir / "policy")
        policy = model.load(at.policy, at.tokenizer)
        version = PolicyVersion(step=0, digest="")
        engine = TorchEngine(policy, at.tokenizer, version)
        rows = np.arange(min(num_rows, len(at.test)))
        prompts = make_prompts(at.tokenizer, at.test, rows)
        target = at.catalog.leaf_of_item[prompts.target]

        for name, find in searches.items():
            found = _look(find, engine, prompts)
            owner = np.repeat(rows, np.diff(found.start))
            hit = np.bincount(owner[found.leaf == target[owner]], minlength=len(rows)) > 0
            hits[name].append(hit.astype(np.float64))
            diversity[name].append(ranking.diversity(path=found.node, start=found.start))
        draw = partial(sample, count=DRAWS, temperature=TEMPERATURE, seed=SEED)
        drawn = _look(draw, engine, prompts)
        owner = np.repeat(rows, np.diff(drawn.start))
        right = (drawn.leaf == target[owner]).astype(np.float64)
        for kind, of in (
            ("value", _values(policy, at, prompts, drawn)),
            ("logprob", drawn.logprob.cumsum(1)),
            ("logprob of the last code", drawn.logprob),
        ):
            ranks.setdefault(kind, []).append(_rank_correlations(of, right, owner))
    mean = {name: np.mean(several, axis=0) for name, several in hits.items()}
    gap = (mean["ved"] - mean["beam"])[:, None]
    change = bootstrap.estimates(["hit"], gap, resamples=2000, seed=SEED)["hit"]
    table: list[Row] = [
        {"set": name, "best_in_set": float(mean[name].mean()),
         "diversity": float(np.mean(diversity[name]))}
        for name in searches
    ]  # fmt: skip
    rho = {kind: np.mean(several, axis=0) for kind, several in ranks.items()}
    table += [
        {"spearman_with_hit": kind} | {f"level_{k}": float(one) for k, one in enumerate(levels, 1)}
        for kind, levels in rho.items()
    ]
    note = f"hits among {SET}, {SET_BUDGET} tokens, lower end of 95 %; mean {change.mean:+.4f}"
    return table, [
        figure("ved_best_in_set", change.low, "", asked="> 0", note=note),
        *(figure(f"value_over_logprob_{k}", float(gap), "", asked="> 0",
                 note="Spearman with a hit over 64 draws at temperature 1.5 for held-out prompts, "
                 "value minus log-probability of the prefix")
          for k, gap in enumerate(rho["value"] - rho["logprob"], 1)),
    ]  # fmt: skip


def _look(find: Search, engine: DecodingBackend, prompts: Prompts) -> Candidates:
    rows = np.arange(len(prompts))
    return Candidates.concatenate(
        [find(engine, prompts.select(rows[i : i + SET])) for i in rows[::SET]]
    )


def _values(
    policy: PreTrainedModel, at: Run, prompts: Prompts, found: Candidates
) -> Float64[np.ndarray, "C L"]:
    """What the head says of every prefix of every candidate, as in an update."""
    trie, vocabulary = at.catalog.trie, at.tokenizer
    scorer, values = LogprobModel(policy, vocabulary, "trie"), list[np.ndarray]()
    for first in range(0, len(prompts), BATCH):
        rows = np.arange(first, min(first + BATCH, len(prompts)))
        part = found.select(rows)
        version = PolicyVersion(step=0, digest="")
        trees = build_search_trees(prompts.select(rows), part, vocabulary, version)
        scored = ScoredTrees(trees=trees, reward=np.zeros(len(trees.leaf), np.float32), parts={})
        batch = pack(scored, [ESTIMATORS["group"](scored, 1e-4)], vocabulary,
                     node_reward=np.zeros(len(trees.step), np.float32))  # fmt: skip
        with torch.inference_mode():
            of_state: Tensor = scorer(to_tensors(batch))[2]
        of_node = np.full(len(trees.step), np.nan)
        of_node[trees.step > 0] = of_state.numpy()  # a state for each node, in their order
        path = trees.paths()
        own = np.full((len(path), trie.depth), np.nan)
        own[:, : path.shape[1]] = np.where(path >= 0, of_node[path], np.nan)
        values.append(own)
    return np.concatenate(values)


def _rank_correlations(of: np.ndarray, right: np.ndarray, owner: np.ndarray) -> list[float]:
    """Mean over prompts, by level, where both vary; 0 where there is no such prompt."""
    found = []
    for level in range(of.shape[1]):
        known = ~np.isnan(of[:, level])
        rho = grouped_spearman(
            of[known, level], right[known], owner[known], int(owner.max(initial=-1)) + 1
        )
        found.append(float(np.nan_to_num(np.nanmean(rho))) if np.isfinite(rho).any() else 0.0)
    return found


def _spent(settings: Config) -> dict[str, float]:
    log = read_metrics(settings.run_dir / FILE)["train"]
    tokens = log["rollout/forward_tokens"].value + log["rollout/leaf_tokens"].value
    return {
        "train_s": float(np.sum(log["cluster/step_s"].value)),
        "forward_tokens": float(np.sum(tokens)),
    }

"""Benchmark V-STAR (arXiv 2602.10699) on Amazon Industrial: cost and benefit of guided search.

The ablation starts from one SFT policy per seed and gives every variant equal prompts and updates:
one seed for all variants, and three for the two extremes (`ENDS`), which are also compared with a
control that continues SFT for as long as RL took.
`beam` of width 16 forwards what the paper counts as budget 1x (33 tokens), width 32 as 2x (65).
After training, sets of 64 candidates are compared at equal forward tokens on held-out prompts.
The two extremes are also run on Amazon Instruments, with the same recipe and one seed.
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

from benchmarks.shared.measure import Figure, Report, Row, figure, interleaved, report
from benchmarks.shared.recipe import ONE_THREAD, branch, control_of, means, over_seeds, read, spelt
from benchmarks.speed.decode import LENGTH
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
from rollout.search.beam import beam
from rollout.search.draws import sample
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
    "data.path=amazon_instruments", "data.max_history=20", "sft.epochs=12",
)  # fmt: skip
"""Overrides that adapt Industrial's recipe to Instruments, as in amazon_instruments.toml."""
METRICS = ("ndcg@10/sid", "hr@1/sid", "hr@3/sid", "hr@10/sid", "hr@50/sid")
BATCH, WIDTH, BUDGET = 32, 16, 33
SET, SET_BUDGET = 64, 129
"""Number of candidates per held-out prompt, and the forward tokens of a beam of that width."""
DRAWS, TEMPERATURE = 64, 1.5
"""Number and temperature of the samples in which, as in the paper, values and log-probabilities are
correlated with the reward."""
SEED = 7


def run(quick: bool) -> Report:
    """Measure costs and run the ablation; `quick` is a smoke test with one seed and few updates."""
    quick_changes = (
        "sft.epochs=1", "learner.steps=2", "learner.prompts_per_step=16", "evaluate.every=1",
        "evaluate.test_rows=100", "evaluate.valid_rows=50", "evaluate.resamples=200",
        "rollout.ved.warmup=1", "output=runs/bench-quick",
    )  # fmt: skip
    changes, seeds = (quick_changes, 1) if quick else (ONE_THREAD, 3)
    costs, figures = _costs(repeats=3 if quick else 10)
    runs = {way: [_branch(way, 0, changes)] for way in WAYS}
    for seed in range(1, seeds):
        for way in ENDS:
            runs[way].append(_branch(way, seed, changes))
    rows: list[Row] = [
        {"way": way, "seed": seed} | means(read(run_config), METRICS) | _spent(run_config)
        for way, configs in runs.items()
        for seed, run_config in enumerate(configs)
    ]
    for way in WAYS:
        if way != "beam+grpo":
            baseline = runs["beam+grpo"][: len(runs[way])]
            gain = over_seeds([read(ours) for ours in runs[way]], [read(r) for r in baseline])
            rows.append({"difference": f"{way} - beam+grpo", "seeds": len(runs[way])}
                        | spelt(gain, METRICS))  # fmt: skip
    others = {
        "beam_grpo": [read(run_config) for run_config in runs["beam+grpo"]],
        "warm_start": [read(run_config, WARM_START) for run_config in runs["ved+both"]],
        "control": [_control(seed, runs["ved+both"][seed], changes) for seed in range(seeds)],
    }
    for name, baseline in others.items():
        if name != "beam_grpo":
            rows += [{"policy": name, "seed": seed} | means(evaluation, METRICS)
                     for seed, evaluation in enumerate(baseline)]  # fmt: skip
        gain = over_seeds([read(run_config) for run_config in runs["ved+both"]], baseline)
        rows.append({"difference": f"ved+both - {name}", "seeds": seeds} | spelt(gain, METRICS))
        figures.append(figure(f"ved_both_over_{name}", gain["ndcg@10/sid"].low, "", asked="> 0",
                              note=f"NDCG@10, lower end of the paired 95 % interval, {seeds} "
                              f"seeds; mean {gain['ndcg@10/sid'].mean:+.4f}"))  # fmt: skip
    rows += _instruments(changes)
    sets, best = _sets(runs["ved+both"], num_rows=100 if quick else 600)
    return report("vstar", [*figures, *best], [*costs, *rows, *sets])


def _costs(*, repeats: int) -> tuple[list[Row], list[Figure]]:
    """Time guided search against a beam of 16 on both engines, with random weights, one thread."""
    torch.set_num_threads(1)
    settings = config.load(RUN, ["name=vstar-costs"])
    prepared = prepare(settings, "sft")
    policy = model.create(settings.model, prepared.tokenizer, seed=0)
    value_head.attach(policy, seed=0)
    version = PolicyVersion(step=0, digest="")
    folder = settings.run_dir / "policy"
    shutil.rmtree(folder, ignore_errors=True)
    value_head.save(policy, folder)
    rollout = settings.rollout.model_copy(update={"threads": 1})
    engines: dict[str, SearchRunner] = {
        "vllm": VllmEngine(folder, policy, prepared.tokenizer, version, rollout,
                           seed=0),
        "torch": TorchEngine(policy, prepared.tokenizer, version),
    }  # fmt: skip
    prompts, rows, figures = _prompts(prepared), list[Row](), list[Figure]()
    for name, engine in engines.items():
        searches = _searches()
        seconds = interleaved(
            {
                search_name: partial(engine.run, search_fn, prompts)
                for search_name, search_fn in searches.items()
            },
            repeats=repeats,
        )
        for search_name, search_fn in searches.items():
            cost = engine.run(search_fn, prompts).cost
            rows.append({
                "engine": name, "search": search_name, "seconds": seconds[search_name],
                "over_beam": seconds[search_name] / seconds["beam"], "passes": cost.passes,
                "forward_tokens": cost.forward_tokens, "leaf_tokens": cost.leaf_tokens,
                "prefill_tokens": cost.prefill_tokens,
            })  # fmt: skip
        best = min(seconds[search_name] for search_name in searches if search_name != "beam")
        figures.append(figure(f"ved_over_beam_{name}", best / seconds["beam"], "x", asked="<= 1.6",
                              note=f"{BATCH} prompts of {LENGTH} tokens, budget {BUDGET}, beam "
                              f"{WIDTH}; best number of traversals to a pass"))  # fmt: skip
    return rows, figures


def _searches() -> dict[str, Search]:
    ved_searches = {
        f"ved, {count} to a pass": partial(
            ved, settings=VedConfig(budget=BUDGET, traversals=count), count=WIDTH, seed=0
        )
        for count in (1, 2, 4, 8)
    }
    return {"beam": partial(beam, width=WIDTH), **ved_searches}


def _prompts(prepared: Run) -> Prompts:
    token = np.random.default_rng(SEED).integers(3, prepared.tokenizer.size, BATCH * LENGTH)
    return Prompts(
        id=np.arange(BATCH),
        target=np.zeros(BATCH, np.int64),
        history=np.zeros(0, np.int64),
        history_start=np.zeros(BATCH + 1, np.int64),
        token=token.astype(np.int32),
        token_start=np.arange(BATCH + 1) * LENGTH,
    )


def _begin(seed: int, changes: tuple[str, ...], prefix: str = "vstar") -> Config:
    return config.load(RUN, [*changes, f"name={prefix}-start-{seed}", f"seed={seed}"])


def _branch(way: str, seed: int, changes: tuple[str, ...], prefix: str = "vstar") -> Config:
    """Run RL of one variant from the SFT policy of its seed, unless it has been run already."""
    sft_config = _begin(seed, changes, prefix)
    name = way.replace("+", "-").replace(", ", "-")
    run_config = config.load(
        RUN, [*changes, f"name={prefix}-{name}-{seed}", f"seed={seed}", *WAYS[way]]
    )
    branch(sft_config, run_config)
    return run_config


def _instruments(changes: tuple[str, ...]) -> list[Row]:
    """Run the two extremes on Amazon Instruments, from one SFT policy."""
    # The changes of a quick run come last, since a later change of a setting overrides an earlier.
    overrides = (*INSTRUMENTS, *changes)
    runs = {way: _branch(way, 0, overrides, "vstar-instruments") for way in ENDS}
    evaluations = {way: read(run) for way, run in runs.items()}
    evaluations["warm_start"] = read(runs["ved+both"], WARM_START)
    rows: list[Row] = [
        {"instruments": way, "seed": 0} | means(evaluation, METRICS)
        for way, evaluation in evaluations.items()
    ]
    for ours, theirs in (ENDS[::-1], *((way, "warm_start") for way in ENDS)):
        gain = over_seeds([evaluations[ours]], [evaluations[theirs]])
        rows.append({"instruments": f"{ours} - {theirs}", "seeds": 1} | spelt(gain, METRICS))
    return rows


def _control(seed: int, rl_config: Config, changes: tuple[str, ...]) -> Evaluation:
    """Continue the SFT policy for as long as an RL run took, and return the evaluation."""
    control = control_of(_begin(seed, changes), RUN, _spent(rl_config)["train_s"], (
        *changes, f"name=vstar-control-{seed}", f"seed={seed}",
    ))  # fmt: skip
    return read(control, WARM_START)


def _sets(runs: list[Config], *, num_rows: int) -> tuple[list[Row], list[Figure]]:
    """Measure hits among 64 candidates of held-out prompts, guided against beam, at equal tokens.

    Also correlate the value of a prefix, its log-probability, and that of its last code with a
    hit, in samples that none of the three selected.
    """
    torch.set_num_threads(1)
    ved_config = VedConfig(budget=SET_BUDGET, width=SET // 2, traversals=4)
    searches: dict[str, Search] = {
        "beam": partial(beam, width=SET),
        "ved": partial(ved, settings=ved_config, count=SET, seed=SEED),
    }
    hits: dict[str, list[np.ndarray]] = {name: [] for name in searches}
    diversity: dict[str, list[float]] = {name: [] for name in searches}
    ranks: dict[str, list[list[float]]] = {}
    for settings in runs:
        prepared = prepare(settings, "train", policy=settings.run_dir / "policy")
        policy = model.load(prepared.policy, prepared.tokenizer)
        version = PolicyVersion(step=0, digest="")
        engine = TorchEngine(policy, prepared.tokenizer, version)
        rows = np.arange(min(num_rows, len(prepared.test)))
        prompts = make_prompts(prepared.tokenizer, prepared.test, rows)
        target = prepared.catalog.leaf_of_item[prompts.target]

        for name, search_fn in searches.items():
            candidates = _look(search_fn, engine, prompts)
            prompt_of = np.repeat(rows, np.diff(candidates.start))
            prompt_of_hit = prompt_of[candidates.leaf == target[prompt_of]]
            hit = np.bincount(prompt_of_hit, minlength=len(rows)) > 0
            hits[name].append(hit.astype(np.float64))
            diversity[name].append(ranking.diversity(path=candidates.node, start=candidates.start))
        sample_fn = partial(sample, count=DRAWS, temperature=TEMPERATURE, seed=SEED)
        samples = _look(sample_fn, engine, prompts)
        prompt_of = np.repeat(rows, np.diff(samples.start))
        is_target = (samples.leaf == target[prompt_of]).astype(np.float64)
        for kind, score in (
            ("value", _values(policy, prepared, prompts, samples)),
            ("logprob", samples.logprob.cumsum(1)),
            ("logprob of the last code", samples.logprob),
        ):
            ranks.setdefault(kind, []).append(_rank_correlations(score, is_target, prompt_of))
    mean = {name: np.mean(values, axis=0) for name, values in hits.items()}
    sides = [np.stack(hits[name])[:, :, None] for name in ("ved", "beam")]
    estimate = bootstrap.estimates_over_seeds(["hit"], *sides, resamples=2000, seed=SEED)["hit"]
    table: list[Row] = [
        {"set": name, "best_in_set": float(mean[name].mean()),
         "diversity": float(np.mean(diversity[name]))}
        for name in searches
    ]  # fmt: skip
    rho = {kind: np.mean(values, axis=0) for kind, values in ranks.items()}
    table += [
        {"spearman_with_hit": kind}
        | {f"level_{k}": float(rho_of_level) for k, rho_of_level in enumerate(levels, 1)}
        for kind, levels in rho.items()
    ]
    note = f"hits among {SET}, {SET_BUDGET} tokens, lower end of 95 %; mean {estimate.mean:+.4f}"
    return table, [figure("ved_best_in_set", estimate.low, "", asked="> 0", note=note)]


def _look(search_fn: Search, engine: DecodingBackend, prompts: Prompts) -> Candidates:
    rows = np.arange(len(prompts))
    return Candidates.concatenate(
        [search_fn(engine, prompts.select(rows[first : first + SET])) for first in rows[::SET]]
    )


def _values(
    policy: PreTrainedModel, prepared: Run, prompts: Prompts, candidates: Candidates
) -> Float64[np.ndarray, "C L"]:
    """Compute the head's value of every prefix of every candidate, as in an update."""
    trie, tokenizer = prepared.catalog.trie, prepared.tokenizer
    scorer, values = LogprobModel(policy, tokenizer, "trie"), list[np.ndarray]()
    for first in range(0, len(prompts), BATCH):
        rows = np.arange(first, min(first + BATCH, len(prompts)))
        chunk = candidates.select(rows)
        version = PolicyVersion(step=0, digest="")
        trees = build_search_trees(prompts.select(rows), chunk, tokenizer, version)
        scored = ScoredTrees(
            trees=trees,
            reward=np.zeros(len(trees.leaf), np.float32),
            parts={},
            node_reward=np.zeros(len(trees.step), np.float32),
        )
        batch = pack(scored, [ESTIMATORS["group"](scored, 1e-4)], tokenizer)
        with torch.inference_mode():
            state_value: Tensor = scorer(to_tensors(batch))[2]
        node_value = np.full(len(trees.step), np.nan)
        node_value[trees.step > 0] = state_value.numpy()  # one state per node, in order
        path = trees.paths()
        candidate_value = np.full((len(path), trie.depth), np.nan)
        candidate_value[:, : path.shape[1]] = np.where(path >= 0, node_value[path], np.nan)
        values.append(candidate_value)
    return np.concatenate(values)


def _rank_correlations(
    score: np.ndarray, is_target: np.ndarray, prompt_of: np.ndarray
) -> list[float]:
    """Average Spearman's rho over prompts where both vary, by level; 0 without such a prompt."""
    correlations, num_prompts = list[float](), int(prompt_of.max(initial=-1)) + 1
    for level in range(score.shape[1]):
        has_score = ~np.isnan(score[:, level])
        rho = grouped_spearman(
            score[has_score, level], is_target[has_score], prompt_of[has_score], num_prompts
        )
        correlations.append(
            float(np.nan_to_num(np.nanmean(rho))) if np.isfinite(rho).any() else 0.0
        )
    return correlations


def _spent(settings: Config) -> dict[str, float]:
    log = read_metrics(settings.run_dir / FILE)["train"]
    tokens = log["rollout/forward_tokens"].value + log["rollout/leaf_tokens"].value
    return {
        "train_s": float(np.sum(log["cluster/step_s"].value)),
        "forward_tokens": float(np.sum(tokens)),
    }

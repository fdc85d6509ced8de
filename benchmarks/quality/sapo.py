"""Benchmark SAPO: stepwise against outcome credit, and its search against `generate` loops.

The table trains `cluster/runs/sapo_tiny.toml` in four variants from one SFT policy per seed, on the
same prompts: GRPO with the exact match, GRPO with the share of matching codes, SAPO with the
advantage on thoughts alone, and SAPO. `SPARSE` repeats the table where fewer than one group in ten
holds its target: more items, and prompts of fresh rows alone. A group has a signal if the quantity
that its estimator compares (the reward, or the match at some step) varies among its candidates.

The speed is that of a fresh policy, whose blocks nearly all reach their maximum length. On vLLM,
the plain loop makes one blocking call for each block of each sample and one for each of its codes;
the batched loop, like the precursor of SAPO's code, makes one for each opening tag, block and code
of all samples at once, without seeds or log-probabilities. On the engine in this process, the
rival is `benchmarks.shared.thought_loop`, which computes no token twice either.
"""

import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shared.hugging_face import allowed_tokens
from benchmarks.shared.measure import Figure, Report, Row, figure, interleaved, report
from benchmarks.shared.recipe import ONE_THREAD, over_seeds, read, spelt
from benchmarks.shared.thought_loop import ThoughtLoop
from cluster.cli.commands import TRAINED, WARM_START, improve, warm_start
from cluster.training.run import Run, prepare
from cluster.training.run_dir import open_run_dir
from orchard import config
from orchard.catalog.trie import ROOT
from orchard.data.prompts import make_prompts
from orchard.data.synthetic import WorldParams, write_world
from orchard.evaluation import ranking
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.policy.model import load
from orchard.settings import Config
from orchard.tracking.metrics_log import FILE, read_metrics
from orchard.types import Prompts
from rollout.actor import RolloutWorker

WAYS = {
    "grpo_exact": ("learner.estimator=group",),
    "grpo_prefix": ("learner.estimator=group", "rewards.weights={rule=0.0,prefix=1.0}"),
    "sapo_think_only": ("learner.sapo.think_only=true",),
    "sapo": (),
}
WORLD = WorldParams(num_items=500, num_users=1200)
"""Synthetic world of reduced size: three seeds of the table take one to two core hours."""
SPARSE = WorldParams(num_items=2000, num_users=1600)
"""World in which the exact match is rare."""
FRESH = "data.hold_back=0.3"
METRICS = ("ndcg@10/sid", "hr@1/sid", "hr@10/sid")
CUT = (
    "sft.epochs=1", "sft.valid_rows=20", "learner.steps=2", "learner.prompts_per_step=4",
    "evaluate.valid_rows=20", "evaluate.test_rows=40", "rollout.engine=torch",
)  # fmt: skip


def run(quick: bool) -> Report:
    """Run three seeds, and time 16 prompts of 8 samples; `quick` is a smoke test."""
    output = Path("runs/bench-quick" if quick else "runs")
    data_path = output / "bench-sapo-data"
    if not data_path.is_dir():
        write_world(data_path, WorldParams(num_items=80, num_users=100) if quick else WORLD)
    changes = [f"output={output}", f"data.path={data_path}", *ONE_THREAD, *(CUT if quick else ())]
    sizes = {"prompts": 4, "samples": 4, "repeats": 1} if quick else {
        "prompts": 16, "samples": 8, "repeats": 5}  # fmt: skip
    here, rows_here = speed_here(changes, **sizes)
    speed, rows = _speed(changes, **sizes)
    figures, table = _table(changes, seeds=1 if quick else 3)
    sparse = _sparse(output, CUT if quick else (), seeds=1 if quick else 3)
    return report("sapo", [*here, *speed, *figures], [*rows_here, *rows, *table, *sparse])


def _settings(name: str, seed: int, changes: list[str]) -> Config:
    return config.load(
        Path("cluster/runs/sapo_tiny.toml"), [f"name={name}", f"seed={seed}", *changes]
    )


def run_ways(name: str, seed: int, changes: list[str]) -> dict[str, Config]:
    """Train every variant from the SFT policy of a seed, unless done; return their settings."""
    sft_config = _settings(f"{name}-{seed}", seed, changes)
    warm_start(sft_config, dry_run=False)
    policy = f"model.path={sft_config.run_dir / WARM_START}"
    runs = {WARM_START: sft_config}
    for way, overrides in WAYS.items():
        runs[way] = _settings(f"{name}-{seed}-{way}", seed, [*changes, policy, *overrides])
        improve(runs[way], dry_run=False)
    return runs


def sparse_changes(output: Path, cut: tuple[str, ...]) -> list[str]:
    """Write the sparse world, unless it is there; return the settings of runs in it."""
    data_path = output / "bench-sapo-sparse-data"
    if not data_path.is_dir():
        write_world(data_path, SPARSE)
    return [
        f"output={output}", f"data.path={data_path}", FRESH, "rollout.engine=torch",
        "cluster.in_process=true", *ONE_THREAD, *cut,
    ]  # fmt: skip


def _sparse(output: Path, cut: tuple[str, ...], *, seeds: int) -> list[Row]:
    """Compare all variants in the sparse world, in one process, paired by row and seed."""
    changes = sparse_changes(output, cut)
    runs = [run_ways("sapo_sparse", seed, changes) for seed in range(seeds)]
    rows = list[Row]()
    for way in (WARM_START, *WAYS):
        name = WARM_START if way == WARM_START else TRAINED
        facts = [_scores(of_seed[way], name) for of_seed in runs]
        if way != WARM_START:
            pairs = zip(facts, runs, strict=True)
            facts = [one | _course(of_seed[way]) for one, of_seed in pairs]
        mean = {key: float(np.mean([one[key] for one in facts])) for key in facts[0]}
        rows.append({"world": "sparse", "policy": way, "seeds": seeds} | mean)
    for ours, theirs in (("sapo", "grpo_exact"), ("sapo", "grpo_prefix"), ("sapo", WARM_START),
                         ("sapo", "sapo_think_only"), ("grpo_exact", WARM_START)):  # fmt: skip
        left = [read(of_seed[ours], TRAINED) for of_seed in runs]
        right = [
            read(of_seed[theirs], WARM_START if theirs == WARM_START else TRAINED)
            for of_seed in runs
        ]
        rows.append({"world": "sparse", "difference": f"{ours} - {theirs}", "seeds": seeds}
                    | spelt(over_seeds(left, right), METRICS))  # fmt: skip
    return rows


def _table(changes: list[str], *, seeds: int) -> tuple[list[Figure], list[Row]]:
    """Train every variant from the SFT policy of each seed; return figures and mean scores."""
    scores: dict[str, list[dict[str, float]]] = {WARM_START: [], **{way: [] for way in WAYS}}
    for seed in range(seeds):
        for way, settings in run_ways("sapo_tiny", seed, changes).items():
            if way == WARM_START:
                scores[way].append(_scores(settings, WARM_START))
            else:
                scores[way].append(_scores(settings, TRAINED) | _course(settings))
    mean = {
        way: {
            name: float(np.mean([facts[name] for facts in facts_of_seeds]))
            for name in facts_of_seeds[0]
        }
        for way, facts_of_seeds in scores.items()
    }
    figures = [
        figure("signal_over_grpo", mean["sapo"]["signal"] - mean["grpo_exact"]["signal"], "share",
               asked="> 0", note=f"groups with signal, SAPO minus GRPO exact, {seeds} seeds"),
        *(figure(f"match_{k}_rise", mean["sapo"][f"match_{k}_end"] - mean["sapo"][f"match_{k}"],
                 "share", asked="> 0", note="last tenth of SAPO's updates minus first tenth")
          for k in (1, 2, 3)),
    ]  # fmt: skip
    return figures, [{"policy": way, "seeds": seeds} | facts for way, facts in mean.items()]


def _scores(settings: Config, name: str) -> dict[str, float]:
    path = settings.run_dir / "evaluation" / f"{name}.json"
    return {metric: ranking.read(path).metrics[metric].mean for metric in METRICS}


def _course(settings: Config) -> dict[str, float]:
    """Summarize the training log: signal on average, rewards in its first and last tenth."""
    log = read_metrics(settings.run_dir / FILE)["train"]
    by_step = settings.learner.estimator == "sapo"
    name = "rewards/step_signal_share" if by_step else "rewards/zero_spread_share"
    mean_share = float(np.mean(log[name].value))
    facts = {"signal": mean_share if by_step else 1 - mean_share}
    for metric in ("mean", "match_1", "match_2", "match_3"):
        values = np.asarray(log[f"rewards/{metric}"].value)
        tenth = max(1, len(values) // 10)
        shown = "reward" if metric == "mean" else metric
        facts |= {
            shown: float(values[:tenth].mean()),
            f"{shown}_end": float(values[-tenth:].mean()),
        }
    return facts


def speed_here(
    changes: list[str], *, prompts: int, samples: int, repeats: int
) -> tuple[list[Figure], list[Row]]:
    """Measure samples per CPU second of the engine in this process and of the loop by hand.

    CPU time on one thread: other load on the machine does not count.
    """
    settings, prepared, rollout_worker = _fresh(changes, "torch", samples)
    eval_prompts = make_prompts(prepared.tokenizer, prepared.train, np.arange(prompts))
    contexts = [p.tolist() for p in np.split(eval_prompts.token, eval_prompts.token_start[1:-1])]
    think_tokens, cap = prepared.tokenizer.think, settings.rollout.think.block_tokens
    assert think_tokens is not None
    loop = ThoughtLoop(
        load(prepared.policy, prepared.tokenizer).eval(), think_tokens,
        allowed_tokens(prepared.tokenizer), levels=prepared.catalog.trie.depth,
    )  # fmt: skip
    seconds = interleaved(
        {
            "think": lambda: rollout_worker.search(eval_prompts, 0),
            "cached_loop": lambda: loop.generate(contexts, samples=samples, cap=cap),
        },
        repeats=repeats,
        clock=time.process_time,
    )
    rate = {name: prompts * samples / value for name, value in seconds.items()}
    note = f"CPU time, torch engine, {prompts} prompts x {samples} samples, K = 3, cap {cap}, FP32"
    figures = [figure("over_cached_loop", rate["think"] / rate["cached_loop"], "x", asked=">= 1",
                      note=f"a loop with kept keys and values, {note}")]  # fmt: skip
    return figures, [{"samples_per_cpu_s": name, "value": value} for name, value in rate.items()]


def _fresh(changes: list[str], engine: str, samples: int) -> tuple[Config, Run, RolloutWorker]:
    """Prepare a fresh policy and a rollout worker on one thread."""
    folder = tempfile.mkdtemp(prefix="orchard-sapo-")
    overrides = [f"output={folder}", f"rollout.engine={engine}", f"rollout.group_size={samples}"]
    settings = _settings("speed", 0, [*changes, *overrides, "rollout.threads=1"])
    prepared = prepare(settings, "sft")
    open_run_dir(prepared)
    rollout_worker = RolloutWorker(settings.rollout, prepared.policy, prepared.tokenizer, seed=0)
    torch.set_num_threads(1)  # vLLM sets its own
    return settings, prepared, rollout_worker


def _speed(
    changes: list[str], *, prompts: int, samples: int, repeats: int
) -> tuple[list[Figure], list[Row]]:
    """Measure samples per second of each method, interleaved on one vLLM engine."""
    settings, prepared, rollout_worker = _fresh(changes, "vllm", samples)
    eval_prompts = make_prompts(prepared.tokenizer, prepared.train, np.arange(prompts))
    llm: Any = rollout_worker._engine.llm  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    cap = settings.rollout.think.block_tokens

    def fresh(work: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            llm.reset_prefix_cache()
            return work()

        return call

    seconds = interleaved(
        {
            "think": fresh(lambda: rollout_worker.search(eval_prompts, 0)),
            "batched_loop": fresh(
                lambda: _loop(llm, prepared, eval_prompts, samples, cap, batched=True)
            ),
            "plain_loop": fresh(
                lambda: _loop(llm, prepared, eval_prompts, samples, cap, batched=False)
            ),
        },
        repeats=repeats,
    )
    rate = {name: prompts * samples / value for name, value in seconds.items()}
    conditions = f"{prompts} prompts x {samples} samples, K = 3, cap {cap}, FP32, one thread"
    figures = [
        figure("over_plain_loop", rate["think"] / rate["plain_loop"], "x", asked=">= 3",
               note=f"a call per block and sample, {conditions}"),
        figure("over_batched_loop", rate["think"] / rate["batched_loop"], "x", asked=">= 1",
               note=f"a call per tag, block and code of all samples, {conditions}"),
    ]  # fmt: skip
    return figures, [{"samples_per_s": name, "value": value} for name, value in rate.items()]


def _loop(
    llm: Any, prepared: Run, eval_prompts: Prompts, samples: int, cap: int, *, batched: bool
) -> list[list[int]]:
    """Generate thoughts and codes by `generate`, for all contexts at once or one by one."""
    bounds = pairwise(eval_prompts.token_start.tolist())
    contexts = [eval_prompts.token[a:b].tolist() for a, b in bounds for _ in range(samples)]
    groups = [contexts] if batched else [[context] for context in contexts]
    return [
        context for group in groups for context in _finish(llm, prepared, group, cap, tags=batched)
    ]


def _finish(
    llm: Any, prepared: Run, contexts: list[list[int]], cap: int, *, tags: bool
) -> list[list[int]]:
    """Append blocks and codes to each context, a call at a time; with `tags`, also opening tags."""
    from vllm import SamplingParams

    def ask(params: list[SamplingParams]) -> None:
        requests = [{"prompt_token_ids": context} for context in contexts]
        for context, answer in zip(
            contexts, llm.generate(requests, params, use_tqdm=False), strict=True
        ):
            context += answer.outputs[0].token_ids

    think_tokens = prepared.tokenizer.think
    assert think_tokens is not None
    block_params = SamplingParams(
        max_tokens=cap, stop_token_ids=[think_tokens.close], detokenize=False
    )
    for _ in range(prepared.catalog.trie.depth):
        if tags:
            ask(
                [SamplingParams(max_tokens=1, allowed_token_ids=[think_tokens.open])]
                * len(contexts)
            )
        else:
            for context in contexts:
                context.append(think_tokens.open)
        ask([block_params] * len(contexts))
        for context in contexts:
            if context[-1] != think_tokens.close:
                context.append(think_tokens.close)
    node = torch.full((len(contexts),), ROOT)
    for _ in range(prepared.catalog.trie.depth):
        legal_tokens = _legal(prepared.tokenizer, node)
        ask(
            [
                SamplingParams(max_tokens=1, allowed_token_ids=list(child_of))
                for child_of in legal_tokens
            ]
        )
        node = torch.tensor(
            [
                child_of[context[-1]]
                for child_of, context in zip(legal_tokens, contexts, strict=True)
            ]
        )
    return contexts


def _legal(tokenizer: ItemTokenizer, node: torch.Tensor) -> list[dict[int, int]]:
    """Return for each trie node its legal tokens and the child node of each."""
    children = tokenizer.trie.children(node)
    token = tokenizer.token_of(children.node).tolist()
    child_node = children.node.tolist()
    return [
        dict(zip(token[a:b], child_node[a:b], strict=True))
        for a, b in pairwise(children.start.tolist())
    ]

"""SAPO: credit by steps against credit by outcome, and thoughts against loops of `generate` calls.

The table trains `cluster/runs/sapo_tiny.toml` in four ways from one warm start per seed, on the
same prompts: GRPO with the exact match, GRPO with the share of matching codes, SAPO with the
advantage on thoughts alone, and SAPO. A group has a signal where what its estimator compares (the
reward, or the match at some step) is not the same for all of its candidates.

The speed is that of a fresh policy, whose blocks nearly all run to their cap. The plain loop makes
one blocking call for each block of each sample and one for each of its codes; the batched loop, as
the precursor of SAPO's code does, one for each opening tag, block and code of all samples at once.
"""

import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shared.measure import Figure, Report, Row, figure, interleaved, report
from benchmarks.shared.recipe import ONE_THREAD
from cluster.cli.commands import TRAINED, WARM_START, improve, warm_start
from cluster.training.run import Run, prepare
from cluster.training.run_dir import open_run_dir
from orchard import config
from orchard.catalog.trie import ROOT
from orchard.data.prompts import make_prompts
from orchard.data.synthetic import WorldParams, write_world
from orchard.evaluation import ranking
from orchard.policy.item_tokenizer import ItemTokenizer
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
"""A third of the usual world: three seeds of the table are then an hour or two of a core."""
METRICS = ("ndcg@10/sid", "hr@1/sid", "hr@10/sid")
CUT = (
    "sft.epochs=1", "sft.valid_rows=20", "learner.steps=2", "learner.prompts_per_step=4",
    "evaluate.valid_rows=20", "evaluate.test_rows=40", "rollout.engine=torch",
)  # fmt: skip


def run(quick: bool) -> Report:
    """Three seeds and 16 prompts of 8 samples; `quick` only shows that it runs."""
    output = Path("runs/bench-quick" if quick else "runs")
    data = output / "bench-sapo-data"
    if not data.is_dir():
        write_world(data, WorldParams(num_items=80, num_users=100) if quick else WORLD)
    changes = [f"output={output}", f"data.path={data}", *ONE_THREAD, *(CUT if quick else ())]
    speed, rows = _speed(changes, prompts=4 if quick else 16, samples=4 if quick else 8,
                         repeats=1 if quick else 5)  # fmt: skip
    figures, table = _table(changes, seeds=1 if quick else 3)
    return report("sapo", [*speed, *figures], [*rows, *table])


def _settings(name: str, seed: int, changes: list[str]) -> Config:
    return config.load(
        Path("cluster/runs/sapo_tiny.toml"), [f"name={name}", f"seed={seed}", *changes]
    )


def _table(changes: list[str], *, seeds: int) -> tuple[list[Figure], list[Row]]:
    """Every way from the warm start of each seed, and what each came to on average."""
    found: dict[str, list[dict[str, float]]] = {WARM_START: [], **{way: [] for way in WAYS}}
    for seed in range(seeds):
        begin = _settings(f"sapo_tiny-{seed}", seed, changes)
        warm_start(begin, dry_run=False)
        found[WARM_START].append(_scores(begin, WARM_START))
        for way, own in WAYS.items():
            policy = f"model.path={begin.run_dir / WARM_START}"
            settings = _settings(f"sapo_tiny-{seed}-{way}", seed, [*changes, policy, *own])
            improve(settings, dry_run=False)
            found[way].append(_scores(settings, TRAINED) | _course(settings))
    mean = {
        way: {name: float(np.mean([one[name] for one in every])) for name in every[0]}
        for way, every in found.items()
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
    """What the training log shows at its two ends, and on average."""
    log = read_metrics(settings.run_dir / FILE)["train"]
    by_step = settings.learner.estimator == "sapo"
    name = "rewards/step_signal_share" if by_step else "rewards/zero_spread_share"
    share = float(np.mean(log[name].value))
    facts = {"signal": share if by_step else 1 - share}
    for metric in ("mean", "match_1", "match_2", "match_3"):
        values = np.asarray(log[f"rewards/{metric}"].value)
        tenth = max(1, len(values) // 10)
        shown = "reward" if metric == "mean" else metric
        facts |= {
            shown: float(values[:tenth].mean()),
            f"{shown}_end": float(values[-tenth:].mean()),
        }
    return facts


def _speed(
    changes: list[str], *, prompts: int, samples: int, repeats: int
) -> tuple[list[Figure], list[Row]]:
    """Samples per second in each of the ways, which take turns in one vLLM engine."""
    folder = tempfile.mkdtemp(prefix="orchard-sapo-")
    own = [f"output={folder}", "rollout.engine=vllm", f"rollout.group_size={samples}"]
    settings = _settings("speed", 0, [*changes, *own, "rollout.threads=1"])
    made = prepare(settings, "sft")
    open_run_dir(made)
    rollout_worker = RolloutWorker(settings.rollout, made.policy, made.tokenizer, seed=0)
    torch.set_num_threads(1)  # vLLM sets its own
    asked = make_prompts(made.tokenizer, made.train, np.arange(prompts))
    llm: Any = rollout_worker._engine.llm  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue]
    cap = settings.rollout.think.block_tokens

    def fresh(work: Callable[[], object]) -> Callable[[], object]:
        def call() -> object:
            llm.reset_prefix_cache()
            return work()

        return call

    seconds = interleaved(
        {
            "think": fresh(lambda: rollout_worker.search(asked, 0)),
            "batched_loop": fresh(lambda: _loop(llm, made, asked, samples, cap, batched=True)),
            "plain_loop": fresh(lambda: _loop(llm, made, asked, samples, cap, batched=False)),
        },
        repeats=repeats,
    )
    rate = {name: prompts * samples / value for name, value in seconds.items()}
    at = f"{prompts} prompts x {samples} samples, K = 3, cap {cap}, FP32, one thread"
    figures = [
        figure("over_plain_loop", rate["think"] / rate["plain_loop"], "x", asked=">= 3",
               note=f"a call per block and sample, {at}"),
        figure("over_batched_loop", rate["think"] / rate["batched_loop"], "x", asked=">= 1",
               note=f"a call per tag, block and code of all samples, {at}"),
    ]  # fmt: skip
    return figures, [{"samples_per_s": name, "value": value} for name, value in rate.items()]


def _loop(
    llm: Any, made: Run, asked: Prompts, samples: int, cap: int, *, batched: bool
) -> list[list[int]]:
    """Thoughts and codes by `generate` alone, for all contexts together or one after another."""
    starts = pairwise(asked.token_start.tolist())
    contexts = [asked.token[a:b].tolist() for a, b in starts for _ in range(samples)]
    groups = [contexts] if batched else [[one] for one in contexts]
    return [one for group in groups for one in _finish(llm, made, group, cap, tags=batched)]


def _finish(
    llm: Any, made: Run, contexts: list[list[int]], cap: int, *, tags: bool
) -> list[list[int]]:
    """Blocks and codes behind each context, a call at a time; with `tags`, one for opening tags."""
    from vllm import SamplingParams

    def ask(params: list[SamplingParams]) -> None:
        requests = [{"prompt_token_ids": one} for one in contexts]
        for one, answer in zip(
            contexts, llm.generate(requests, params, use_tqdm=False), strict=True
        ):
            one += answer.outputs[0].token_ids

    special = made.tokenizer.think
    assert special is not None
    text = SamplingParams(max_tokens=cap, stop_token_ids=[special.close], detokenize=False)
    for _ in range(made.catalog.trie.depth):
        if tags:
            ask([SamplingParams(max_tokens=1, allowed_token_ids=[special.open])] * len(contexts))
        else:
            for one in contexts:
                one.append(special.open)
        ask([text] * len(contexts))
        for one in contexts:
            if one[-1] != special.close:
                one.append(special.close)
    node = torch.full((len(contexts),), ROOT)
    for _ in range(made.catalog.trie.depth):
        legal = _legal(made.tokenizer, node)
        ask([SamplingParams(max_tokens=1, allowed_token_ids=list(one)) for one in legal])
        node = torch.tensor([one[c[-1]] for one, c in zip(legal, contexts, strict=True)])
    return contexts


def _legal(tokenizer: ItemTokenizer, node: torch.Tensor) -> list[dict[int, int]]:
    """For each trie node its legal tokens and where they lead."""
    children = tokenizer.trie.children(node)
    token = tokenizer.token_of(children.node).tolist()
    after = children.node.tolist()
    return [
        dict(zip(token[a:b], after[a:b], strict=True)) for a, b in pairwise(children.start.tolist())
    ]

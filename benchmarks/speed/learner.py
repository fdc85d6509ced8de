"""Benchmark a policy-gradient update on packed trees against a flat batch of the same candidates.

The trees are the best G leaves of a beam search by the policy itself, a fresh Qwen3 of the default
sizes, over 20,000 random items with three codes each and some 64 alternatives per code. The flat
batch has the usual layout, one candidate per row, and runs through the model's own causal
attention; it also omits the last code and shares the evaluation of the head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float32
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.shared.measure import Report, Row, figure, interleaved, report
from learner.advantage.estimators import ESTIMATORS
from learner.batch.pack import flatten, pack
from learner.logprobs import choice_logprobs, score_choices, to_tensors
from learner.loss import policy_loss
from orchard.catalog import catalog as catalogs
from orchard.catalog.catalog import Catalog
from orchard.policy import model as models
from orchard.policy.item_tokenizer import ItemTokenizer, compact_tokenizer, make_item_tokenizer
from orchard.policy.model import head_weight
from orchard.settings import LearnerConfig, ModelConfig
from orchard.types import PolicyVersion, Prompts, ScoredTrees, SearchTrees, TrainBatch
from rewards.score import score_trees
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees

VERSION = PolicyVersion(step=0, digest="0" * 64)
LENGTH, GROUP = 128, 16
"""Number of prompt tokens and candidates of the reported figures."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Policy, tokenizer and catalog of a benchmark."""

    catalog: Catalog
    tokenizer: ItemTokenizer
    model: PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Loss and gradients of one forward and backward pass."""

    loss: float
    gradients: list[Tensor]
    clipped_fraction: float


def run(quick: bool) -> Report:
    """Compare loss, gradients, tokens and time at P=128, G=16, L=3, and, unless `quick`, others."""
    setting = default_setting()
    num_prompts, repeats = (4, 3) if quick else (8, 5)
    sizes = [(LENGTH, GROUP)]
    if not quick:
        sizes += [(64, GROUP), (256, GROUP), (LENGTH, 8), (LENGTH, 32)]
    rows = [
        _compare(setting, length, group, num_prompts=num_prompts, repeats=repeats)
        for length, group in sizes
    ]
    conditions, main_row = f"P={LENGTH}, G={GROUP}, L=3, {num_prompts} prompts, FP32", rows[0]
    figures = [
        figure("loss_difference", float(main_row["loss_difference"]), "relative", asked="<= 1e-5",
               note=f"packed against flat, with clipping and KL, {conditions}"),
        figure("gradient_difference", float(main_row["gradient_difference"]), "relative",
               asked="<= 1e-5", note="largest over the parameters: max |difference| / max |flat|"),
        figure("forward_token_ratio", float(main_row["token_ratio"]), "x", asked=">= 8",
               note=f"flat / packed, {conditions}"),
        figure("time_ratio", float(main_row["time_ratio"]), "x", asked=">= 4",
               note=f"forward and backward, median of {repeats} interleaved runs, {conditions}"),
    ]  # fmt: skip
    return report("learner", figures, [*rows, *_packing_rows(setting, quick)])


def default_setting(num_items: int = 20_000, num_codes: int = 64) -> Setting:
    """Create a fresh policy of the default sizes over random items."""
    codes = np.random.default_rng(0).integers(num_codes, size=(num_items, 3))
    catalog = catalogs.from_codes(codes.tolist(), level_size=(256, 256, 256))
    tokenizer = make_item_tokenizer(compact_tokenizer(catalog), catalog)
    model = models.create(ModelConfig(), tokenizer, seed=0)
    return Setting(catalog=catalog, tokenizer=tokenizer, model=model)


def random_prompts(
    tokenizer: ItemTokenizer, num_prompts: int, length: int, draw: np.random.Generator
) -> Prompts:
    """Create prompts of `length` random codes, without history, with random target items."""
    start = np.arange(num_prompts + 1) * length
    return Prompts(
        id=np.arange(num_prompts),
        target=draw.integers(len(tokenizer.catalog), size=num_prompts),
        history=np.zeros(0, np.int64),
        history_start=np.zeros(num_prompts + 1, np.int64),
        token=draw.integers(3, tokenizer.size, int(start[-1])).astype(np.int32),
        token_start=start,
    )


def with_hits(trees: SearchTrees, catalog: Catalog, draw: np.random.Generator) -> SearchTrees:
    """Return trees of which every other one has its target among its equally many candidates."""
    first = trees.candidate_start[:-1:2]
    hit = first + draw.integers(int(trees.candidate_start[1]), size=len(first))
    target = trees.prompts.target.copy()
    target[::2] = catalog.item_of_leaf[catalog.leaf_start[trees.leaf[hit]]]
    return replace(trees, prompts=replace(trees.prompts, target=target))


def _trees(setting: Setting, length: int, group: int, num_prompts: int) -> ScoredTrees:
    """Return scored beams, half of them with a hit, from a behavior policy near the policy."""
    rng = np.random.default_rng(length)
    catalog, tokenizer = setting.catalog, setting.tokenizer
    prompts = random_prompts(tokenizer, num_prompts, length, rng)
    engine = TorchEngine(setting.model, tokenizer, VERSION)
    trees = build_search_trees(prompts, beam(engine, prompts, width=group), tokenizer, VERSION)
    trees = with_hits(trees, catalog, rng)
    behavior_logprob = trees.logprob + rng.normal(0, 0.3, len(trees.logprob)).astype(np.float32)
    trees = replace(trees, logprob=behavior_logprob)
    return score_trees(trees, catalog, {"rule": 1.0, "ranking": 1.0})


def _compare(
    setting: Setting, length: int, group: int, *, num_prompts: int, repeats: int
) -> dict[str, str | int | float]:
    """Compare both layouts of the same trees in tokens, time, loss and gradients."""
    scored = _trees(setting, length, group, num_prompts)
    credits = [ESTIMATORS["group"](scored, 1e-4)]
    packed = pack(scored, credits, setting.tokenizer)
    flat = flatten(scored, credits, setting.tokenizer)
    tree_batch, flat_batch = to_tensors(packed), to_tensors(flat)
    cases: dict[str, Callable[[], Outcome]] = {
        "packed": lambda: _update(setting, tree_batch, _packed_logprobs),
        "flat": lambda: _update(setting, flat_batch, _flat_logprobs),
    }
    packed_outcome, flat_outcome = (case() for case in cases.values())
    seconds = interleaved(cases, repeats=repeats)
    return {
        "prompt_tokens": length,
        "candidates": group,
        "prompts": num_prompts,
        "packed_tokens": packed.forward_tokens,
        "flat_tokens": flat.forward_tokens,
        "token_ratio": flat.forward_tokens / packed.forward_tokens,
        "packed_s": seconds["packed"],
        "flat_s": seconds["flat"],
        "time_ratio": seconds["flat"] / seconds["packed"],
        "clipped_fraction": packed_outcome.clipped_fraction,
        "loss_difference": abs(packed_outcome.loss - flat_outcome.loss) / abs(flat_outcome.loss),
        "gradient_difference": max(
            float((a - b).abs().max() / b.abs().max())
            for a, b in zip(packed_outcome.gradients, flat_outcome.gradients, strict=True)
        ),
    }


def _packing_rows(setting: Setting, quick: bool) -> list[Row]:
    """Time the packing itself."""
    rows: list[Row] = []
    for num_prompts in (128,) if quick else (128, 1024):
        scored = _trees(setting, 32, GROUP, num_prompts)
        credits = [ESTIMATORS["group"](scored, 1e-4)]
        pack_args = (scored, credits, setting.tokenizer)
        seconds = interleaved({"pack": lambda pack_args=pack_args: pack(*pack_args)}, repeats=5)
        rows.append({"prompts": num_prompts, "candidates": GROUP, "pack_s": seconds["pack"]})
    return rows


Logprobs = Callable[
    [Setting, TrainBatch[Tensor]], tuple[Float32[Tensor, " E"], Float32[Tensor, " E"]]
]


def _packed_logprobs(
    setting: Setting, batch: TrainBatch[Tensor]
) -> tuple[Float32[Tensor, " E"], Float32[Tensor, " E"]]:
    return choice_logprobs(setting.model, batch, setting.tokenizer)


def _flat_logprobs(
    setting: Setting, batch: TrainBatch[Tensor]
) -> tuple[Float32[Tensor, " E"], Float32[Tensor, " E"]]:
    """Compute log-probabilities of a flat batch with causal attention; padding is on the right."""
    hidden = setting.model.base_model(input_ids=batch.token, use_cache=False).last_hidden_state
    return score_choices(hidden, head_weight(setting.model), batch, setting.tokenizer)


def _update(setting: Setting, batch: TrainBatch[Tensor], logprobs: Logprobs) -> Outcome:
    """Compute loss and gradients with the default clips; the reference is the behavior policy."""
    setting.model.zero_grad()
    value, parts = policy_loss(
        *logprobs(setting, batch),
        batch.behaviour_logprob,
        batch,
        LearnerConfig(),
    )
    value.backward()
    return Outcome(
        loss=value.item(),
        gradients=[p.grad for p in setting.model.parameters() if p.grad is not None],
        clipped_fraction=parts.metrics()["clipped_fraction"],
    )

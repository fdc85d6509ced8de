"""Compare the loss and gradients of packed trees with those of TRL's own GRPO loss function.

TRL's `GRPOTrainer.compute_loss` runs the policy on whole sequences and applies TRL's ratio, clips,
divergence and means. It gets candidates, advantages, and the log-probabilities of the behavior
policy and of the reference; the policy differs from both. TRL normalizes codes over the whole
vocabulary, as does Orchard's `learner.logprob = "full"`. Every inner node of the catalog has
several children: where a code has no alternative, Orchard omits its term and TRL does not.

TRL 1.16 computes log-probabilities in chunks, with a backward pass of its own, whose gradients
differ by some 5e-5 from those that autograd finds for the same formula; ours differ by 2e-6.

Shapes:  C candidates   P tokens of a prompt   L codes   E choices
"""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.shared.trl_step import grpo_trainer
from learner.advantage.estimators import compute_advantages
from learner.batch.pack import pack
from learner.logprobs import choice_logprobs, to_tensors
from learner.loss import policy_loss
from orchard.catalog import catalog as catalogs
from orchard.policy import model as models
from orchard.policy.item_tokenizer import ItemTokenizer, compact_tokenizer, make_item_tokenizer
from orchard.settings import LearnerConfig, ModelConfig
from orchard.testing import save_model_folder
from orchard.types import PolicyVersion, Prompts, TrainBatch
from rewards.score import score_trees
from rollout.engine.torch import TorchEngine
from rollout.search.beam import beam
from rollout.search_trees import build_search_trees

CODES, LEVELS, PROMPTS, LENGTH, GROUP = 8, 3, 4, 32, 16
CONFIG = LearnerConfig(logprob="full")
VERSION = PolicyVersion(step=0, digest="0" * 64)


class Difference(NamedTuple):
    """Relative differences between Orchard's loss and TRL's."""

    loss: float
    gradients: float
    """Largest over the parameters: max |difference| / max |TRL's|."""
    clipped: float
    """Share of the ratios for which a clip was active."""


def compare(folder: Path, *, seed: int = 0) -> Difference:
    """Compute loss and gradients of the same candidates by both; `folder` gets TRL's policy."""
    rng = np.random.default_rng(seed)
    codes = list(itertools.product(range(CODES), repeat=LEVELS))
    catalog = catalogs.from_codes(codes, level_size=(CODES,) * LEVELS)
    text_tokenizer = compact_tokenizer(catalog)
    tokenizer = make_item_tokenizer(text_tokenizer, catalog)
    save_model_folder(models.create(ModelConfig(), tokenizer, seed=seed), text_tokenizer, folder)
    policy = models.load(folder, tokenizer)  # TRL loads its reference from the same folder
    prompts = Prompts(
        id=np.arange(PROMPTS),
        target=rng.integers(len(catalog), size=PROMPTS),
        history=np.zeros(0, np.int64),
        history_start=np.zeros(PROMPTS + 1, np.int64),
        token=rng.integers(3, tokenizer.size, PROMPTS * LENGTH).astype(np.int32),
        token_start=np.arange(PROMPTS + 1) * LENGTH,
    )
    candidates = beam(TorchEngine(policy, tokenizer, VERSION), prompts, width=GROUP)
    trees = build_search_trees(prompts, candidates, tokenizer, VERSION)
    assert not trees.forced.any()
    scored = replace(
        score_trees(trees, catalog, {"rule": 1.0}),
        reward=rng.normal(size=PROMPTS * GROUP).astype(np.float32),
    )
    credits = compute_advantages(scored, CONFIG)
    batch = to_tensors(pack(scored, credits, tokenizer))
    # [C, L] flat index of each candidate's tokens
    token_index = torch.from_numpy(trees.token_start[trees.paths()])
    completion = torch.from_numpy(trees.token.astype(np.int64))[token_index]
    prompt = torch.from_numpy(prompts.token.astype(np.int64)).view(PROMPTS, LENGTH)
    prompt = prompt.repeat_interleave(GROUP, 0)

    with torch.no_grad():
        reference = choice_logprobs(policy, batch, tokenizer, "full")[0]
        flat_reference = _flat_logprobs(policy, prompt, completion)
        generator = torch.Generator().manual_seed(seed)
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=1e-3)
        noise = torch.from_numpy(rng.normal(0, 0.3, len(trees.token)).astype(np.float32))
        behavior = choice_logprobs(policy, batch, tokenizer, "full")[0]
        # Choices are the tokens in the order of the trees: none is forced.
        behavior = behavior + noise
    batch = replace(batch, behaviour_logprob=behavior)
    packed_loss, clipped = _packed(policy, tokenizer, batch, reference)
    packed_gradients = _gradients(policy)
    policy.zero_grad()

    trainer = grpo_trainer(
        policy, text_tokenizer, CONFIG, folder / "trl", group=GROUP, rows=PROMPTS * GROUP,
        levels=LEVELS, prompts=[""] * PROMPTS,
    )  # fmt: skip
    trainer.model.eval()  # the loss of a training step is divided by its micro-batches
    trl_loss = trainer.compute_loss(
        trainer.model,
        {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": completion,
            "completion_mask": torch.ones_like(completion),
            "advantages": torch.from_numpy(credits[0].advantage[:, 0]),
            "old_per_token_logps": behavior[token_index],
            "ref_per_token_logps": flat_reference,
        },
    )
    trl_loss.backward()
    trl_gradients = _gradients(policy)
    return Difference(
        loss=abs(packed_loss - trl_loss.item()) / abs(trl_loss.item()),
        gradients=max(
            float((packed_gradients[name] - flat).abs().max() / flat.abs().max())
            for name, flat in trl_gradients.items()
        ),
        clipped=clipped,
    )


def _packed(
    policy: PreTrainedModel,
    tokenizer: ItemTokenizer,
    batch: TrainBatch[Tensor],
    reference: Float[Tensor, " E"],
) -> tuple[float, float]:
    """Compute Orchard's loss and gradients; return the loss and the share of clipped ratios."""
    loss, stats = policy_loss(
        *choice_logprobs(policy, batch, tokenizer, "full"), reference, batch, CONFIG
    )
    loss.backward()
    return loss.item(), stats.metrics()["clipped_fraction"]


def _gradients(policy: PreTrainedModel) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def _flat_logprobs(
    policy: PreTrainedModel, prompt: Int[Tensor, "C P"], completion: Int[Tensor, "C L"]
) -> Float[Tensor, "C L"]:
    """Compute log-probabilities of whole sequences over the whole vocabulary."""
    logits = policy(torch.cat([prompt, completion], 1)).logits[:, -LEVELS - 1 : -1]
    return logits.log_softmax(-1).gather(-1, completion[..., None]).squeeze(-1)

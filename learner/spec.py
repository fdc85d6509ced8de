"""Specify a learner's work and run an SFT epoch over its examples; free of Ray."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
from jaxtyping import Int64

from learner.batch import sft
from learner.trainer import Trainer
from orchard.data.prompts import Split, TrainingWindows
from orchard.data.rationales import TokenizedRationales
from orchard.data.sft_tasks import SftTasks
from orchard.policy.item_tokenizer import ItemTokenizer
from orchard.settings import Config, LearnerConfig
from orchard.types import PolicyVersion, Prompts, TrainBatch


@dataclass(frozen=True, kw_only=True)
class LearnerSpec:
    """Configuration, policy and data that a learner worker needs; identical on every rank."""

    config: Config
    phase: Literal["sft", "train"]
    policy: Path
    """Hugging Face folder of the initial policy."""
    tokenizer: ItemTokenizer
    sequences: TrainingWindows | None
    """Training windows of SFT on item sequences."""
    traces: tuple[Split, TokenizedRationales] | None
    """Rows and their rationales, in place of the windows, for SFT of a policy that thinks."""
    tasks: SftTasks | None
    """Tasks, in place of the windows, for SFT of a text model."""
    total_steps: int
    """Length of the learning-rate schedule in optimizer steps."""
    data: str = ""
    """Digest of the training rows."""
    probe: Prompts | None = None
    """Prompts whose targets are scored with every version, for engines to compare with."""


def learner_config(config: Config, phase: str) -> LearnerConfig:
    """Return the learner's settings for a phase; SFT replaces rates and clips by those of `sft`."""
    if phase == "train":
        return config.learner
    sft_config = config.sft
    return config.learner.model_copy(
        update={
            "logprob": sft_config.logprob,
            "lr": sft_config.lr,
            "warmup": sft_config.warmup,
            "final_lr": sft_config.final_lr,
            "weight_decay": sft_config.weight_decay,
            "grad_clip": sft_config.grad_clip,
            "kl": config.learner.kl.model_copy(update={"weight": 0.0}),
        }
    )


def sft_epoch(
    trainer: Trainer, spec: LearnerSpec, number: int, advance: Callable[[], None]
) -> dict[str, float]:
    """Train once over all examples, in an order drawn from (seed, epoch number).

    `advance` is called after every update.
    """
    begin, config = time.perf_counter(), spec.config
    traces, tasks, windows = spec.traces, spec.tasks, spec.sequences
    tokenizer = spec.tokenizer
    version, forced = PolicyVersion(step=number, digest=""), config.sft.logprob == "full"

    def make_batch(rows: Int64[np.ndarray, "R ..."]) -> TrainBatch:
        if tasks is not None:
            examples = tasks.examples(rows, tokenizer)
            return sft.pack_examples(examples, tokenizer, version, forced=forced)
        if traces is not None:
            return sft.pack_traces(*traces, rows, tokenizer, version, forced=forced)
        return sft.pack_sequences(
            cast(TrainingWindows, windows), rows, tokenizer, version, forced=forced
        )

    if tasks is not None:
        order = tasks.epoch(number, seed=config.seed)
    else:
        order = np.random.Generator(np.random.Philox(key=[config.seed, number])).permutation(
            len(cast(TrainingWindows, windows) if traces is None else traces[1])
        )
    size = config.sft.batch_size
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    metrics = list[dict[str, float]]()
    for rows in batches:
        metrics.append(trainer.sft_step(make_batch(rows)))
        advance()
    return {
        "loss": float(np.mean([m["nll"] for m in metrics])),
        "grad_norm": float(np.mean([m["grad_norm"] for m in metrics])),
        "lr": metrics[-1]["lr"],
        "epoch_s": time.perf_counter() - begin,
    }


def pack_probe(spec: LearnerSpec, prompts: Prompts) -> TrainBatch:
    """Pack the prompts and their targets into a batch that a learner can score."""
    return sft.pack_answers(prompts, spec.tokenizer, PolicyVersion(step=0, digest=""))

"""What a learner is asked to do, and how a warm start goes through its examples; no Ray."""

import time
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
    """All that a worker needs; identical on every rank."""

    config: Config
    phase: Literal["sft", "train"]
    policy: Path
    """Hugging Face folder of the policy to start from."""
    tokenizer: ItemTokenizer
    sequences: TrainingWindows | None
    """Of the warm start."""
    traces: tuple[Split, TokenizedRationales] | None
    """What it has instead where it teaches to think: rows and their rationales."""
    tasks: SftTasks | None
    """What it has instead where it teaches a text model."""
    total_steps: int
    probe: Prompts | None = None
    """Prompts whose targets are scored with every version, for its holders to compare with."""


def learner_config(config: Config, phase: str) -> LearnerConfig:
    """The learner's section, with the warm start's own rates where it is the warm start."""
    if phase == "train":
        return config.learner
    own = config.sft
    return config.learner.model_copy(
        update={
            "logprob": own.logprob,
            "lr": own.lr,
            "warmup": own.warmup,
            "final_lr": own.final_lr,
            "weight_decay": own.weight_decay,
            "grad_clip": own.grad_clip,
            "kl": config.learner.kl.model_copy(update={"weight": 0.0}),
        }
    )


def sft_epoch(learner: Trainer, assignment: LearnerSpec, number: int) -> dict[str, float]:
    """One pass over the sequences in an order drawn from (seed, epoch)."""
    begin, config = time.perf_counter(), assignment.config
    traces, tasks, windows = assignment.traces, assignment.tasks, assignment.sequences
    tokenizer = assignment.tokenizer
    version, forced = PolicyVersion(step=number, digest=""), config.sft.logprob == "full"

    def batch(rows: Int64[np.ndarray, " R"]) -> TrainBatch:
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
    batches = [order[at : at + size] for at in range(0, len(order), size)]
    measured = [learner.sft_step(batch(rows)) for rows in batches]
    return {
        "loss": float(np.mean([m["nll"] for m in measured])),
        "grad_norm": float(np.mean([m["grad_norm"] for m in measured])),
        "lr": measured[-1]["lr"],
        "epoch_s": time.perf_counter() - begin,
    }


def probe_of(assignment: LearnerSpec, prompts: Prompts) -> TrainBatch:
    """The prompts and their targets as a batch that a learner can score."""
    return sft.pack_answers(prompts, assignment.tokenizer, PolicyVersion(step=0, digest=""))

"""Specification of the learner for the phase of a run."""

import numpy as np

from cluster.training.run import Run
from learner.spec import LearnerSpec
from orchard.data.prompts import make_prompts, make_windows


def learner_spec(run: Run) -> LearnerSpec:
    """Build the specification of the learner for the phase of the run."""
    config = run.config
    supervised = run.phase == "sft"
    traces = (run.rows, run.traces) if supervised and run.traces is not None else None
    tasks = run.tasks if supervised else None
    windows, per_epoch = None, 0
    if supervised and traces is None and tasks is None:
        windows = make_windows(
            run.rows,
            max_history=config.data.max_history,
            targets_only=config.sft.rows == "fresh",  # the warm start has seen the histories
        )
    if supervised:
        examples = next(rows for rows in (tasks, windows, run.rows) if rows is not None)
        per_epoch = -(-len(examples) // config.sft.batch_size)
    probed = min(config.cluster.probe_prompts, len(run.train))
    return LearnerSpec(
        probe=make_prompts(run.tokenizer, run.train, np.arange(probed)) if probed else None,
        config=config,
        phase="sft" if supervised else "train",
        policy=run.policy.resolve(),
        tokenizer=run.tokenizer,
        data=run.rows.digest,
        sequences=windows,
        traces=traces,
        tasks=tasks,
        total_steps=config.sft.epochs * per_epoch
        if supervised
        else config.learner.steps * config.learner.updates_per_batch,
    )

"""Evaluate saved policies on held-out rows, and keep the results in the run folder."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int64

from cluster.console import Progress
from cluster.training.controller import Controller
from cluster.training.run import Run
from cluster.training.run_dir import saved_policy
from orchard.evaluation import ranking
from orchard.evaluation.ranking import Evaluation
from orchard.folders import atomic_write

SplitName = Literal["valid", "test"]


async def evaluate(
    controller: Controller, folder: Path, *, split: SplitName, beams: int, name: str
) -> Evaluation:
    """Evaluate a policy folder and keep the result as `evaluation/<name>.json`."""
    run = controller.run
    rows = chosen_rows(run, split)
    version, values = saved_policy(run, folder)
    batches = -(-len(rows) // run.config.evaluate.batch_size)
    with Progress(f"evaluating {name}", total=batches) as progress:
        result = await controller.evaluate(
            getattr(run, split),
            rows,
            policy=version,
            weights=values,
            beams=beams,
            advance=progress.advance,
        )
    ranking.write(result, evaluation_file(run, name))
    return result


async def evaluate_split(controller: Controller, folder: Path, name: str) -> Evaluation:
    """Return the test evaluation of a policy folder; reuse a current one in the run folder."""
    path, beams = evaluation_file(controller.run, name), controller.run.config.evaluate.beams
    if path.is_file():
        saved = ranking.read(path)
        fresh = path.stat().st_mtime >= (folder / "config.json").stat().st_mtime
        same = np.array_equal(saved.row, chosen_rows(controller.run, "test"))
        if fresh and same and saved.width == beams:
            return saved
    return await evaluate(controller, folder, split="test", beams=beams, name=name)


def chosen_rows(run: Run, split: SplitName) -> Int64[np.ndarray, " R"]:
    """Return all rows of the split, or a seeded sample of `evaluate.test_rows` rows."""
    sample_size, num_rows = run.config.evaluate.test_rows, len(getattr(run, split))
    if sample_size == 0 or sample_size >= num_rows:
        return np.arange(num_rows)
    generator = np.random.Generator(np.random.Philox(key=[run.config.seed, 2**33]))
    return np.sort(generator.permutation(num_rows)[:sample_size])


def evaluation_file(run: Run, name: str) -> Path:
    """Return the path of a named evaluation in the run folder."""
    return run.dir / "evaluation" / f"{name}.json"


def write_metrics(evaluation: Evaluation, path: Path) -> None:
    """Write {mean, low, high, n} of each metric as JSON, for `orchard evaluate --json`."""
    metrics = {name: asdict(estimate) for name, estimate in evaluation.metrics.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(metrics, indent=2) + "\n")

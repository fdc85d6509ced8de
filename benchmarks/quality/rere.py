"""Benchmark ReRe (arXiv 2510.12211) on Amazon Industrial: samplers x rewards, from one SFT policy.

Each cell is RL of equal length from the SFT policy of its seed; the grid is one seed, and the
baseline and the best cell by NDCG@10 on the validation rows are repeated over three. The paper's
order: beam above dynamic above independent sampling; rule with ranking above rule above
collaborative. `semantic` compares embeddings of the titles (TF-IDF and SVD), since the data set has
no embeddings. `counted` adds the reward `transition` to the paper's best.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.shared.measure import Figure, Report, Row, figure, report
from benchmarks.shared.recipe import ONE_THREAD, branch, means, over_seeds, read
from cluster.cli.commands import WARM_START
from cluster.cli.fit import fit
from orchard import config
from orchard.evaluation import ranking
from orchard.semantic_ids.embed import of_titles
from orchard.settings import Config
from orchard.tracking.metrics_log import FILE, read_metrics

RUN = Path("cluster/runs/amazon_industrial.toml")
SAMPLERS = ("beam", "dynamic", "sample")
REWARDS = {
    "rule": {"rule": 1.0},
    "rule_ranking": {"rule": 1.0, "ranking": 1.0},
    "semantic": {"semantic": 1.0, "rule": 0.0},
    "collaborative": {"collaborative": 1.0, "rule": 0.0},
    "counted": {"rule": 1.0, "ranking": 1.0, "transition": 0.5},
}
SIZE = (*ONE_THREAD, "learner.steps=60", "learner.prompts_per_step=128", "evaluate.every=20")
"""Size of a cell's run: enough to distinguish cells in a few minutes each."""
BASELINE = ("beam", "rule_ranking")
ORDERS = (
    (("beam", "rule_ranking"), ("dynamic", "rule_ranking")),
    (("dynamic", "rule_ranking"), ("sample", "rule_ranking")),
    (("beam", "rule_ranking"), ("beam", "rule")),
    (("beam", "rule"), ("beam", "collaborative")),
)
"""Pairs of cells in which the paper reports the first as better."""


def run(quick: bool) -> Report:
    """Run the grid; `quick` runs every cell for a few updates, as a smoke test."""
    quick_changes = (
        "sft.epochs=1", "learner.steps=2", "learner.prompts_per_step=16", "evaluate.every=1",
        "evaluate.test_rows=100", "evaluate.valid_rows=50", "evaluate.resamples=200",
        "rewards.collaborative.epochs=1", "output=runs/bench-quick",
    )  # fmt: skip
    changes = quick_changes if quick else SIZE
    changes = (*changes, f"data.embeddings={_embeddings(config.load(RUN, changes))}")
    cells = [(sampler, reward) for sampler in SAMPLERS for reward in REWARDS]
    results = {cell: _cell(cell, 0, changes) for cell in cells}
    start = read(results[BASELINE][0], WARM_START)
    rows: list[Row] = [{"cell": "warm start", "seed": 0} | means(start)]
    rows += [{"cell": "/".join(cell), "seed": 0} | means(read(run_config)) | {"valid": valid}
             for cell, (run_config, valid) in results.items()]  # fmt: skip
    best = max(cells, key=lambda cell: results[cell][1])
    repeated = {cell: [read(results[cell][0])] for cell in dict.fromkeys((BASELINE, best))}
    for cell, evaluations in repeated.items():
        for seed in () if quick else (1, 2):
            evaluations.append(read(_cell(cell, seed, changes)[0]))
            rows.append({"cell": "/".join(cell), "seed": seed} | means(evaluations[-1]))
    figures = [_order(results, first, second) for first, second in ORDERS]
    if best != BASELINE:
        gain = over_seeds(repeated[best], repeated[BASELINE])["ndcg@10/sid"]
        figures.append(figure(f"{'/'.join(best)}_above_baseline", gain.low, "", asked="> 0",
                              note=f"lower end of 95 %; mean {gain.mean:+.4f}"))  # fmt: skip
    return report("rere", figures, rows)


def _embeddings(settings: Config) -> Path:
    """Return a file of embeddings of the items' titles, computed if it does not exist."""
    path = (settings.run_dir.parent / "rere-embeddings.parquet").resolve()
    if not path.is_file():
        items = pq.read_table(settings.data.path / settings.data.items)
        vectors = of_titles(items["title"].to_pylist(), dimensions=64, seed=0)
        # A title that shares no word with another has a zero vector; use the mean instead.
        vectors[~vectors.any(axis=1)] = vectors.mean(axis=0)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"item_id": items["item_id"], "embedding": list(vectors)}), path)
    return path


def _cell(cell: tuple[str, str], seed: int, changes: tuple[str, ...]) -> tuple[Config, float]:
    """Run one cell, unless it has been run; return the run and its best validation NDCG@10."""
    sampler, reward = cell
    sft_config = config.load(RUN, [*changes, f"name=rere-start-{seed}", f"seed={seed}"])
    weights = ", ".join(f"{name} = {weight}" for name, weight in REWARDS[reward].items())
    run_config = config.load(RUN, [
        *changes,
        f"name=rere-{sampler}-{reward}-{seed}",
        f"seed={seed}",
        f"rollout.search={sampler}",
        f"rewards.weights={{{weights}}}",
        f"rewards.collaborative.path={sft_config.run_dir / 'collaborative'}",
    ])  # fmt: skip
    if reward == "collaborative" and not (sft_config.run_dir / "collaborative").is_dir():
        fit("collaborative", sft_config)
    branch(sft_config, run_config)
    log = read_metrics(run_config.run_dir / FILE)["train"]
    return run_config, float(np.max(log["evaluate/ndcg@10/sid"].value))


def _order(
    results: dict[tuple[str, str], tuple[Config, float]],
    first: tuple[str, str],
    second: tuple[str, str],
) -> Figure:
    """Compare two cells on equal test rows; the paper reports the first as better."""
    gain = ranking.difference(read(results[first][0]), read(results[second][0]))["ndcg@10/sid"]
    note = f"NDCG@10, one seed; paired 95 % [{gain.low:+.4f}, {gain.high:+.4f}]"
    name = f"{'/'.join(first)}_above_{'/'.join(second)}"
    return figure(name, gain.mean, "", asked="> 0", note=note)

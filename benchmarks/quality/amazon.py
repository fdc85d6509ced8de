"""Train on two Amazon data sets from scratch: SFT, RL and an SFT control."""

from benchmarks.shared.measure import Report, Row, report
from benchmarks.shared.recipe import measure

SETS = {
    "amazon_industrial": (3, {"ndcg@10/sid": 0.095, "hr@10/sid": 0.140},
                          "counted item transitions .098 / .127"),
    "amazon_instruments": (1, {}, "item-kNN NDCG@10 .0831; SASRec .0775"),
}  # fmt: skip
"""Number of seeds, targets, and other results on the same rows, by the name of the run file."""


def run(quick: bool) -> Report:
    """Run every seed of both data sets; `quick` runs one for a few updates, as a smoke test."""
    cut = ("sft.epochs=1", "learner.steps=2", "evaluate.test_rows=100", "evaluate.valid_rows=50")
    figures, rows = [], list[Row]()
    for name, (seeds, bars, published) in SETS.items():
        part = measure(
            name,
            seeds=1 if quick else seeds,
            bars=bars,
            published=published,
            changes=(*cut, "output=runs/bench-quick") if quick else (),
        )
        figures += [{**figure, "name": f"{name}_{figure['name']}"} for figure in part["figures"]]
        rows += [{"data": name, **row} for row in part["rows"]]
    return report("amazon", figures, rows)
